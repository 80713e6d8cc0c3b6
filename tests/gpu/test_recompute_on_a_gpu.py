"""On a CUDA device: as many layers keep their activations as a cap allows, the gradients do not change, and a run whose
memory runs out goes on with fewer."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.config import Model, Tuning
from cosmos3_train.evaluation.pictures import read_metrics
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.model.trainable import arrange_frozen, make_trainable
from cosmos3_train.training.recompute import MARGIN, settle
from cosmos3_train.training.run import train
from tests.gpu.test_reasoner_cache_on_a_gpu import SIZES
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import PICO, load, write_project

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LAYERS = 12


@pytest.mark.parametrize("compile", [False, True], ids=["written", "compiled"])
def test_as_many_layers_keep_their_activations_as_a_cap_allows(capped, compile):
    model = Model(path=str(PICO), random={**SIZES, "num_hidden_layers": LAYERS}, compile=compile)
    backbone = load_backbone(model, DEVICE, text_logits=False)
    trainables = make_trainable(backbone, Tuning(rank=8), [], seed=0)
    arrange_frozen(backbone, 2)
    samples = [make_sample("policy", number, text=40, latent=(9, 40, 40)) for number in range(2)]
    parts = [noise_it(sample, 0.5) for sample in samples]
    packed = pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(backbone.config)).to(DEVICE)

    def accumulate(packs, passes: int) -> None:
        found = backbone(packs[0])
        (found.video.float().square().mean() + found.action.float().square().mean()).backward()

    def step() -> tuple[int, dict[str, torch.Tensor]]:
        for parameter in trainables.parameters.values():
            parameter.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        accumulate([packed], 1)
        gradients = {name: p.grad.clone() for name, p in trainables.parameters.items() if p.grad is not None}
        return torch.cuda.max_memory_allocated(), gradients

    def settled(room: float | None = None) -> tuple[int, bool]:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if room is None else room / (1 - MARGIN) / total)
        settle(backbone, DEVICE, accumulate, [packed], 1, packed.tokens)
        return backbone.kept_layers, backbone.lean

    for name, parameter in trainables.parameters.items():
        if "lora_B" in name:  # it begins at 0, where A has no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    step(), step()
    least, exact = step()
    assert settled() == (LAYERS, False)
    most, kept = step()
    assert most > 1.5 * least
    tight = least + 0.4 * (most - least)
    count, lean = settled(tight)
    assert lean and 2 < count < LAYERS
    peak, found = step()
    assert tight - 2.5 * (most - least) / LAYERS < peak <= tight
    for name, value in exact.items():
        for other in (kept, found):
            assert float((other[name] - value).norm() / value.norm()) < 2e-2, name
    loose = least + 0.9 * (most - least)
    assert settled(loose) == (LAYERS, True), "without norms and gates they all fit"
    assert step()[0] <= loose


def test_a_run_whose_memory_shrinks_makes_the_step_again_with_more_of_it_recomputed(capped, tmp_path, caplog):
    caplog.set_level("INFO")
    root = write_project(tmp_path / "root")
    sizes = {**SIZES, "num_hidden_layers": LAYERS}
    common = (
        f"model.path={PICO} model.dtype=bfloat16 model.checkpoint_activations=auto model.cuda_graphs=false "
        f"{' '.join(f'model.random.{key}={value}' for key, value in sizes.items())} strategy.accelerator=gpu "
        "training.samples_per_step=96 training.tokens_per_micro_batch=20000 training.steps=12 "
        "training.evaluate_every_n_steps=0 evaluation.before=false training.checkpoint_every_n_steps=0"
    )

    def shrink(run, _) -> None:
        if run.module.position.step == 4:
            stays, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            print(f"\nof {peak / 2**20:.0f} MiB {(peak - stays) / 2**20:.0f} are a step's")
            assert (run.backbone.kept_layers, run.backbone.lean) == (LAYERS, False)
            torch.cuda.empty_cache()
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction((stays + 0.6 * (peak - stays)) / total)

    curves = {}
    for name, watch in (("undisturbed", None), ("short", shrink)):
        loaded = load(root, *common.split(), f"name={name}")
        train(loaded, watch=watch)
        curves[name] = read_metrics(loaded.run_folder / "metrics.csv")["loss"][1]
        assert ("memory ran out; now" in caplog.text) == (name == "short")
    assert len(curves["short"]) == 12
    assert curves["short"] == pytest.approx(curves["undisturbed"], rel=0.02)
