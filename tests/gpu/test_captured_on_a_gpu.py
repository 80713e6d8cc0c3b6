"""On a CUDA device: passes that are launched as one give the losses and gradients of those whose kernels are launched
one by one, and a run says so and ends as it would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos3_train.data.mixture import Mixture, StepDataset
from cosmos3_train.evaluation.pictures import read_metrics
from cosmos3_train.training.captured import AS_WRITTEN, LARGEST, CapturedPasses
from cosmos3_train.training.run import build, train
from tests.gpu.test_reasoner_cache_on_a_gpu import SIZES
from tests.training.project import PICO, experiment, load, write, write_project
from tests.training.steps import difference
from tests.training.test_captured import packed

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WAYS = {
    "lora, cached": "tuning.method=tower tuning.towers=[generation] data.datasets.moves.cache_reasoner=true",
    "hybrid, both towers, recomputed": "model.checkpoint_activations=but_attention",
    "hybrid, fp8, lean": "model.base_precision=fp8 tuning.towers=[generation] "
    "model.checkpoint_activations=but_products",
}
COMMON = (
    f"model.path={PICO} model.dtype=bfloat16 {' '.join(f'model.random.{k}={v}' for k, v in SIZES.items())} "
    "strategy.accelerator=gpu model.compile=true training.samples_per_step=4 training.tokens_per_micro_batch=110 "
    "training.evaluate_every_n_steps=0 evaluation.before=false training.checkpoint_every_n_steps=0 training.steps=30"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_project(tmp_path_factory.mktemp("captured") / "root")
    alone = experiment(root)
    del alone["data"]["datasets"]["talk"]
    alone["data"]["datasets"]["moves"]["tasks"] = {"policy": 1}
    write(root / "experiments" / "small.yaml", alone)
    return root


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_passes_as_written(root, way):
    run = build(load(root, *COMMON.split(), *WAYS[way].split(), f"name=grad_{list(WAYS).index(way)}"))
    module, device = run.module.to(run.device), run.device  # as Lightning does
    module.manual_backward = lambda loss: loss.backward()  # Lightning's asks for its Trainer
    shares = StepDataset(Mixture(run.opened, 0), 4, 0, 1, 40)
    parameters = run.trainables.parameters
    for name, parameter in parameters.items():
        if "lora_B" in name:  # it begins at 0, where A has no gradient
            torch.nn.init.normal_(parameter, std=0.02)

    def gradients(*parts) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Of a step made in parts: (packs, counts, as written) each."""
        sums: dict[str, float] = {}
        for packs, counts, as_written in parts:
            for name, value in module.accumulate(packs, counts, as_written=as_written).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        module.optimizer.zero_grad(set_to_none=True)
        return sums, found

    def step(number: int):
        packed = module.packer(shares[number])
        assert len(packed.packs) > 1
        return packed.packs, module.step_counts(packed)

    for number in range(10):
        gradients((*step(number), False))
    assert module.captured is not None and 0 < len(module.captured) <= 4
    for number in range(10, 16):
        with torch.no_grad():  # a graph reads the weights as they are now
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter) * 1e-2 * parameter.std())
        packs, counts = step(number)
        expected_losses, expected = gradients((packs, counts, True))
        halves = (packs[:1], counts, True), (packs[1:], counts, False)
        for losses, found in (gradients((packs, counts, False)), gradients(*halves)):
            assert losses == pytest.approx(expected_losses, rel=1e-3)
            assert found.keys() == expected.keys()
            wrong = {name: difference(found[name], value) for name, value in expected.items()}
            assert max(wrong.values()) < 1e-2, max(wrong.items(), key=lambda pair: pair[1])
    before = torch.cuda.memory_reserved(device)
    module.captured.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < before
    gradients((*step(16), False))
    assert len(module.captured) > 0, "a known shape is recorded anew"


def test_a_run_by_graphs_makes_the_curve_of_one_without(root, caplog):
    caplog.set_level("INFO")
    curves = {}
    for graphs in ("false", "auto"):
        loaded = load(root, *COMMON.split(), f"name=run_{graphs}", f"model.cuda_graphs={graphs}")
        train(loaded)
        curves[graphs] = read_metrics(loaded.run_folder / "metrics.csv")["loss"][1]
        assert ("launched as one" in caplog.text) == (graphs == "auto")
    assert len(curves["auto"]) == 30
    assert curves["auto"] == pytest.approx(curves["false"], rel=0.03)


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "not alike"])
def test_where_memory_does_not_hold_a_pass_twice_those_that_are_alike_are_recorded(capped, alike):
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.nn.Parameter(torch.rand(2**27, device=device))  # 0.5 GiB, as is each step of the chain below

    def work(pack, understood, counts):
        value = weight
        for _ in range(4):
            value = value.exp().log1p()
        return {"video": value.mean().detach()}, value.mean() * counts.sum()

    passes = CapturedPasses([weight], work, LARGEST, alone=True)
    counts = torch.ones(1, device=device)
    ours, theirs = packed(5, 9).to(device), packed(5, 10).to(device)

    def make(pack) -> torch.Tensor:
        if passes(pack, None, counts, may_record=True) is None:
            work(pack, None, counts)[1].backward()
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.cpu(), None
        return gradient

    torch.cuda.reset_peak_memory_stats(device)
    expected = make(ours if alike else theirs)
    stays, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((stays + 1.6 * (peak - stays)) / total)
    for _ in range(AS_WRITTEN + 1):
        torch.testing.assert_close(make(ours), expected)
    assert len(passes) == alike
    if alike:  # one that is not has no room beside it
        with pytest.raises(torch.OutOfMemoryError):
            make(theirs)
        assert passes.give_back()
        torch.testing.assert_close(make(theirs), expected)
