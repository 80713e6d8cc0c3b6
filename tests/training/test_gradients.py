"""The gradient of a step is that of its samples, however they are cut into packs, and each loss counts for itself."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.config import Tuning, UserError
from cosmos3_train.objectives.flow_matching import noisy_pack
from cosmos3_train.training.batching import split_into_packs
from cosmos3_train.types import IGNORED_LABEL, StepBatch
from tests.training.steps import HYBRID, difference, gradients, make_module, make_steps, mixed_samples, perturb


@pytest.fixture(scope="module")
def one_pack(project, tmp_path_factory):
    """(gradients, report) of the mixed step in one pack."""
    module = perturb(make_module(project / "model"))
    make_steps(module, [StepBatch(0, mixed_samples())], tmp_path_factory.mktemp("one"))
    assert module.report.packs == 1
    return gradients(module), module.measured()


def reference(module) -> dict[str, torch.Tensor]:
    """The step's gradient written out by hand: one sample a forward, nothing packed, nothing accumulated.

    Weights 10, 10 and 1; video: mean over its four generation samples, action: over its three robots', all elements
    counted, given ones included; text: over all labelled tokens.
    """
    samples = module.packer.encoder.encode(mixed_samples())
    labelled = sum(int((s.labels != IGNORED_LABEL).sum()) for s in samples if s.labels is not None)
    video = sum(s.video is not None for s in samples)
    action = sum(s.action is not None for s in samples)
    assert (video, action) == (4, 3) and labelled > 10
    total = torch.zeros(())
    for sample in samples:
        pack = noisy_pack([sample], module.packer.layout, module.experiment.objective, seed=0)
        velocities = module.backbone(pack)
        if sample.video is not None and not sample.video_given.all():
            error = ((velocities.video - pack.video_target.velocity) ** 2)[pack.video_target.valid].sum()
            total = total + 10 * error / sample.video.numel() / video
        if sample.action is not None and not sample.action_given.all():
            error = ((velocities.action - pack.action_target.velocity) ** 2)[:, : sample.action_width].sum()
            total = total + 10 * error / (sample.action.shape[0] * sample.action_width) / action
        if sample.labels is not None:
            logits = module.backbone.lm_head(velocities.text_hidden)
            total = total + torch.nn.functional.cross_entropy(logits, pack.labels, reduction="sum") / labelled
    parameters = module.trainables.parameters
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def assert_equal_gradients(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    reached = {name for name, value in theirs.items() if float(value.norm()) > 0}
    assert len(reached) == len(theirs), "the step reaches every trainable"
    worst = {name: difference(ours[name], theirs[name]) for name in reached}
    name = max(worst, key=worst.__getitem__)
    assert worst[name] <= 1e-5, (name, worst[name])


def test_one_pack_has_the_gradient_of_its_samples_alone(project, one_pack):
    assert_equal_gradients(one_pack[0], reference(perturb(make_module(project / "model"))))


@pytest.mark.parametrize(
    ("budget", "checkpointed"),
    [(150, False), (80, False), (150, True), (150, "but_products")],
    ids=["few", "many", "checkpointed", "lean"],
)
def test_cut_into_packs_the_gradient_and_the_losses_are_the_same(project, one_pack, tmp_path, budget, checkpointed):
    module = perturb(make_module(project / "model", budget=budget, checkpoint_activations=checkpointed))
    make_steps(module, [StepBatch(0, mixed_samples())], tmp_path)
    assert module.report.packs > (3 if budget < 100 else 1)
    assert_equal_gradients(gradients(module), one_pack[0])
    assert module.measured().losses == pytest.approx(one_pack[1].losses, rel=1e-5)
    assert module.measured().total == pytest.approx(one_pack[1].total, rel=1e-5)


def test_the_order_of_a_step_carries_no_meaning(project, one_pack, tmp_path):
    module = perturb(make_module(project / "model", budget=150))
    make_steps(module, [StepBatch(0, mixed_samples()[::-1])], tmp_path)
    assert_equal_gradients(gradients(module), one_pack[0])


def test_each_loss_is_reported_by_itself_and_weighted(one_pack):
    report = one_pack[1]
    assert report.losses.keys() == {"video", "action", "text"}
    losses = report.losses
    assert report.total == pytest.approx(10 * losses["video"] + 10 * losses["action"] + losses["text"])


def test_a_weight_of_zero_takes_its_loss_out_of_the_gradient(project, one_pack, tmp_path):
    module = perturb(make_module(project / "model", text=0.0, video=0.0))
    make_steps(module, [StepBatch(0, mixed_samples())], tmp_path)
    found = gradients(module)
    row = "action_proj_out.fc.token_adapter.trainable_tokens_delta.default"
    assert difference(found[row], one_pack[0][row]) < 1e-5
    last = [name for name in found if name.startswith("layers.1.self_attn.to_q.")]
    assert last and all(float(found[name].norm()) == 0 for name in last), "only text reaches the last text layer's q"


def test_two_packs_forward_then_both_backward(project):
    """A backward that recomputes a layer after another forward sees its own offsets: they are arguments, not state."""
    module = perturb(make_module(project / "model", budget=150, checkpoint_activations=True))
    parameters = list(module.trainables.parameters.values())
    packs = module.packer(StepBatch(0, mixed_samples())).packs
    assert len(packs) > 1

    def total(pack):
        return torch.stack(list(module.pack_losses(pack).values())).sum()

    apart = [torch.zeros_like(p) for p in parameters]
    for pack in packs:
        for mine, g in zip(apart, torch.autograd.grad(total(pack), parameters, allow_unused=True), strict=True):
            mine += 0 if g is None else g
    losses = [total(pack) for pack in packs]
    together = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
    for mine, g in zip(apart, together, strict=True):
        assert difference(torch.zeros_like(mine) if g is None else g, mine) <= 1e-5


def test_packs_keep_the_budget_and_lose_nobody(project):
    module = make_module(project / "model", budget=120)
    samples = module.packer.encoder.encode(mixed_samples())
    layout = module.packer.layout
    packs = split_into_packs(samples, layout, 120)
    assert sorted(s.key for members in packs for s in members) == sorted(s.key for s in samples)
    assert all(sum(layout.tokens(s) for s in members) <= 120 for members in packs)
    total = sum(layout.tokens(s) for s in samples)
    assert -(-total // 120) <= len(packs) < len(samples)
    for members in packs:
        pack = noisy_pack(members, layout, module.experiment.objective, seed=0)
        assert pack.tokens == sum(layout.tokens(s) for s in members)
    largest = max(samples, key=layout.tokens)
    with pytest.raises(UserError, match=rf"'{largest.key}' .* has {layout.tokens(largest)} tokens, over .*= 20;"):
        split_into_packs([largest], layout, 20)


def test_chunked_logits_give_the_step_the_same_gradient(project, one_pack, tmp_path):
    module = perturb(make_module(project / "model", logits_chunk=3))
    make_steps(module, [StepBatch(0, mixed_samples())], tmp_path)
    assert_equal_gradients(gradients(module), one_pack[0])


def nodes(total: torch.Tensor) -> set[str]:
    """Names of everything that the backward of a loss goes through."""
    seen, todo = set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("tuning", [HYBRID, Tuning(method="full")], ids=["hybrid", "full"])
def test_the_backward_of_a_step_is_the_same_from_run_to_run(project, tuning):
    """On a CPU that of x[index] with repeats is not: threads add in whatever order they come. Keys and values, noise
    levels and heads' rows are all gathered with repeats."""
    module = perturb(make_module(project / "model", tuning=tuning))
    pack = module.packer(StepBatch(0, mixed_samples())).packs[0]
    parameters, threads = list(module.trainables.parameters.values()), torch.get_num_threads()
    total = torch.stack(list(module.pack_losses(pack).values())).sum()
    gathers = {name for name in nodes(total) if name.startswith(("Index", "Embedding", "Gather", "Take", "Scatter"))}
    assert {"IndexSelectBackward0", "EmbeddingBackward0"} <= gathers
    assert gathers <= {"IndexSelectBackward0", "EmbeddingBackward0", "IndexAddBackward0", "IndexCopyBackward0"}
    torch.set_num_threads(2)
    try:
        turns = [torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    for again in turns[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(turns[0], again, strict=True))


def test_what_indexing_would_put_there():
    x = torch.zeros(3, 2, requires_grad=True)
    index = torch.tensor([0, 0, 2])
    assert "IndexBackward0" in nodes(x[index].sum())
    assert "IndexBackward0" not in nodes(x.index_select(0, index).sum())
