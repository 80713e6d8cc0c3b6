"""What trains: float32 masters that compute in the run's dtype, and nothing else that moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_train.config import Tuning, UserError
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.types import StepBatch
from tests.training.project import FRESH, robot, write_model
from tests.training.steps import CPU, HYBRID, difference, make_module, make_steps, mixed_samples, perturb

TOWER = Tuning(method="tower", towers=["generation"])
FULL = Tuning(method="full")
DORA = Tuning(method="hybrid", rank=4, dora=True)
HEADS = ("action_proj_in", "action_proj_out")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainable") / "model"
    folder.mkdir()
    return write_model(folder)


def total(module) -> torch.Tensor:
    pack = module.packer(StepBatch(0, mixed_samples())).packs[0]
    return torch.stack(list(module.pack_losses(pack).values())).sum()


@pytest.mark.parametrize("tuning", [HYBRID, DORA, TOWER, FULL], ids=["hybrid", "dora", "tower", "full"])
def test_in_bf16_masters_and_gradients_are_float32_and_follow_the_float32_run(model, tuning):
    """bf16 keeps 8 bits: a gradient through two layers of it stays within a few percent of float32's."""
    half = perturb(make_module(model, tuning=tuning, dtype="bfloat16"))
    full = perturb(make_module(model, tuning=tuning, dtype="float32"))
    frozen = {p.dtype for n, p in half.backbone.named_parameters() if not p.requires_grad and "time_emb" not in n}
    assert frozen <= {torch.bfloat16} and (frozen or tuning is FULL)
    total(half).backward()
    total(full).backward()
    worst: dict[str, float] = {}
    for name, parameter in half.trainables.parameters.items():
        assert parameter.dtype == torch.float32, name
        reference = full.trainables.parameters[name].grad
        if reference is None or float(reference.norm()) == 0:
            continue
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        worst[name] = difference(parameter.grad, reference)
    name = max(worst, key=worst.__getitem__)
    assert worst[name] < 0.25, (name, worst[name])
    assert sorted(worst.values())[len(worst) // 2] < 0.06


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "PEFT's own forward"])
def test_lora_multiplies_in_bf16(model, dropout):
    """PEFT by itself would give bf16 factors, or with float32 ones multiply in float32."""
    module = perturb(make_module(model, dtype="bfloat16", tuning=replace(HYBRID, dropout=dropout)))
    factors = [m for n, m in module.backbone.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))]
    assert len(factors) == 2 * 2 * (4 + 3) * 2  # factors, layers, projections, towers
    assert {factor.weight.dtype for factor in factors} == {torch.float32}
    seen: set[tuple[str, torch.dtype]] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            if function is torch.ops.cosmos3_train.lora_linear.default or (
                function is torch.ops.aten.mm.default and tensors[0].shape[1] == HYBRID.rank
            ):
                seen.update((function.__name__, tensor.dtype) for tensor in tensors)
            return function(*arguments, **(named or {}))

    with Products():
        total(module)
    assert seen == {("mm.default" if dropout else "lora_linear.default", torch.bfloat16)}


@pytest.mark.parametrize("tuning", [HYBRID, TOWER, FULL], ids=["hybrid", "tower", "full"])
def test_decay_and_steps_leave_other_robots_rows_and_the_modality_embedding_alone(model, tuning, tmp_path):
    module = make_module(model, tuning=tuning, weight_decay=0.5, learning_rate=0.01)
    before = {name: p.detach().clone() for name, p in module.backbone.named_parameters()}
    heads = {(head, part): head_rows(module, head, part).clone() for head in HEADS for part in ("fc", "bias")}
    assert not any(name == "action_modality_embed" for name in module.trainables.parameters)
    make_steps(module, [StepBatch(step, mixed_samples()) for step in range(3)], tmp_path)
    after = dict(module.backbone.named_parameters())
    assert torch.equal(after["action_modality_embed"], before["action_modality_embed"])
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert moved and set(moved) <= set(module.trainables.parameters)
    others = [row for row in range(32) if row != FRESH]
    for (head, part), rows in heads.items():
        found = head_rows(module, head, part)
        assert torch.equal(found[others], rows[others]), (head, part)
        if tuning is HYBRID:
            assert f"{head}.{part}.token_adapter.trainable_tokens_delta.default" in moved
        else:
            assert not torch.equal(found[FRESH], rows[FRESH])


def head_rows(module, head: str, part: str) -> torch.Tensor:
    """All 32 domains' rows of an action head as the checkpoint has them, beside a hybrid run's own."""
    table = module.backbone.get_submodule(f"{head}.{part}")
    return getattr(table, "original_module", table).weight.detach()


def test_decay_reaches_matrices_only(model):
    module = make_module(model, tuning=FULL, weight_decay=0.5)
    for group in module.optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in module.trainables.parameters.items() if p is parameter)
            is_row = name.startswith(tuple(f"{head}." for head in HEADS))
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1 and not is_row), name


@pytest.mark.parametrize(
    ("domain", "source", "expected"),
    [(FRESH, 4, 4), (4, None, 4), (4, 9, 9), (FRESH, None, None)],
    ids=["another's", "upstream's own", "told otherwise", "anew"],
)
def test_where_a_robot_s_rows_start(model, domain, source, expected):
    backbone = load_backbone(make_module(model).experiment.model, CPU)
    original = {(h, p): backbone.get_submodule(f"{h}.{p}").weight.clone() for h in HEADS for p in ("fc", "bias")}
    card = robot(domain_id=domain, initialise_from=source)
    made = make_trainable(backbone, HYBRID, [card], seed=0)
    for (head, part), weights in original.items():
        delta = made.parameters[f"{head}.{part}.token_adapter.trainable_tokens_delta.default"].detach()
        assert delta.shape == (1, weights.shape[1])
        if expected is not None:
            assert torch.equal(delta[0], weights[expected])
        elif part == "bias":
            assert not delta.any()
        else:
            assert 0.01 < float(delta.std()) < 0.03 and float(delta.abs().max()) <= 0.04


def test_one_seed_gives_one_start(model):
    def start(seed: int):
        backbone = load_backbone(make_module(model).experiment.model, CPU)
        torch.manual_seed(torch.seed())
        return make_trainable(backbone, HYBRID, [robot(initialise_from=None)], seed=seed).parameters

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_learning_rate_factors_follow_their_patterns(model):
    tuning = Tuning(method="hybrid", rank=4, learning_rate_multipliers={"action_proj_*": 5.0})
    module = make_module(model, tuning=tuning, learning_rate=0.001)
    for name, factor in module.trainables.factors.items():
        assert factor == (5.0 if name.startswith("action_proj_") else 1.0)
    rates = {group["lr"] for group in module.optimizer.param_groups}
    assert rates == {0.001, 0.005}
    with pytest.raises(UserError, match=r"'action_porj_\*' matches no trainable parameter. Did you mean 'action_proj"):
        make_module(model, tuning=Tuning(method="hybrid", learning_rate_multipliers={"action_porj_*": 5.0}))


def test_hybrid_without_a_robot_is_refused(model):
    with pytest.raises(UserError, match="no dataset names an embodiment"):
        make_trainable(load_backbone(make_module(model).experiment.model, CPU), HYBRID, [], seed=0)
