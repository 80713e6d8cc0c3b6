"""A base in FP8: what is rounded, and how far that moves velocities and LoRA gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from cosmos3_train.config import Model, Tuning, UserError, load_experiment
from cosmos3_train.model import fp8
from cosmos3_train.model.fp8 import E4M3, Fp8Linear, round_rows
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.omni import Cosmos3PackedTransformer, is_understanding
from cosmos3_train.model.packing import Layout, pack, prompt_key
from cosmos3_train.model.projections import FusedLora
from cosmos3_train.model.reasoner_cache import Reasoner, ReasonerCache, ensure_reasoner
from cosmos3_train.model.trainable import arrange_frozen, make_trainable
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import PICO
from tests.training.steps import CPU, difference

SMALL = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "rope_axes_dim": [12, 10, 10], "action_gen": True,
         "action_dim": 64}  # fmt: skip
NANO = {**SMALL, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rope_axes_dim": [24, 20, 20]}  # fmt: skip
TUNINGS = {
    "generation": Tuning(rank=4),
    "both towers": Tuning(rank=4, towers=["understanding", "generation"]),
    "attention": Tuning(rank=4, modules=["attention"]),
    "dropout": Tuning(rank=4, dropout=0.2),
}


def adapted(
    sizes: dict[str, Any], precision: Literal["dtype", "fp8"], tuning: Tuning, copies: int = 2
) -> Cosmos3PackedTransformer:
    """A model of random weights whose LoRA has been moved away from its start."""
    model = Model(
        path=str(PICO),
        random=sizes,
        dtype="float32",
        checkpoint_activations=False,
        base_precision=precision,
        fp8_copies=copies,
    )
    backbone = load_backbone(model, CPU, text_logits=False)
    made = make_trainable(backbone, tuning, [], seed=0)
    arrange_frozen(backbone, copies)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return backbone.train()


def outputs(backbone: Cosmos3PackedTransformer) -> dict[str, torch.Tensor]:
    """Velocities and the gradients of what trains."""
    torch.manual_seed(1)
    samples = [make_sample(task, place, text=40 + place) for place, task in enumerate(("policy", "text_to_video"))]
    parts = [noise_it(sample, 0.4) for sample in samples]
    found = backbone(pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(backbone.config)))
    (found.video.square().mean() + found.action.square().mean()).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return {"video": found.video.detach(), "action": found.action.detach()} | gradients


def by_layer(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The velocities of each modality, and all gradients of each layer of each tower, as one vector."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, value in found.items():
        tower = "understanding" if is_understanding(name.replace(".default", "")) else "generation"
        key = ".".join([*name.split(".")[:2], tower]) if "lora_" in name else name
        parts.setdefault(key, []).append(value.flatten())
    return {key: torch.cat(values) for key, values in parts.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def test_a_row_is_rounded_to_three_bits_of_its_largest():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 64)[:, None]
    codes, scale = round_rows(x)
    back = codes.float() * scale
    assert codes.dtype == E4M3 and torch.equal(codes.float().abs().amax(1), torch.full((64,), 448.0))
    small = x.abs() < x.abs().amax(1, keepdim=True) * 2**-14  # below e4m3's normal numbers, where steps are even
    assert ((back - x).abs()[~small] <= x.abs()[~small] * 2**-4).all()
    assert not round_rows(torch.zeros(2, 16))[0].float().any()
    for bad in (torch.nan, torch.inf):
        codes, scale = round_rows(torch.tensor([[1.0, bad], [1.0, 2.0]]))
        products = (codes.float() * scale).sum(1)
        assert not products[0].isfinite() and products[1].isfinite()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_velocities_and_gradients_follow_the_exact_base(tuning):
    exact, rounded = (adapted(SMALL, precision, TUNINGS[tuning]) for precision in ("dtype", "fp8"))
    assert sum(isinstance(m, Fp8Linear) for m in rounded.modules()) == 2 * 2 * 7
    expected, found = by_layer(outputs(exact)), by_layer(outputs(rounded))
    towers = len(TUNINGS[tuning].towers)
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * towers
    for name, value in expected.items():
        assert cosine(found[name], value) >= 0.99 and difference(found[name], value) > 1e-3, name


@pytest.mark.slow
@pytest.mark.long
def test_at_nano_s_width_every_gradient_of_the_first_step_has_the_exact_one_s_direction():
    expected = by_layer(outputs(adapted(NANO, "dtype", TUNINGS["generation"])))
    found = by_layer(outputs(adapted(NANO, "fp8", TUNINGS["generation"])))
    cosines = {name: cosine(found[name], value) for name, value in expected.items()}
    assert len(cosines) == 2 + 2 and min(cosines.values()) >= 0.99, cosines


def test_one_copy_gives_the_numbers_of_two():
    one, two = (adapted(SMALL, "fp8", TUNINGS["both towers"], copies) for copies in (1, 2))
    sizes = [sum(b.nbytes for b in model.buffers()) for model in (one, two)]
    turned = [m for m in two.modules() if isinstance(m, FusedLora) and m.joined_transposed is not None]
    assert sizes[0] < sizes[1] and len(turned) == 2 * 4
    expected, found = outputs(one), outputs(two)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_gradient_of_the_input_is_that_of_the_rounded_operands():
    """By hand: the scale of a weight's row belongs to the incoming gradient, which is rounded with it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    layer.requires_grad_(False)
    fp8.use_fp8(torch.nn.Sequential(layer))
    assert isinstance(layer, Fp8Linear)
    layer.set_weight(weight)
    x, gradient = torch.randn(10, 64, requires_grad=True), torch.randn(10, 48)
    out = layer(x)
    out.backward(gradient)
    (wc, ws), (xc, xs) = round_rows(weight), round_rows(x.detach())
    assert difference(out.detach(), (xc.double() * xs) @ (wc.double() * ws).t() + bias) < 1e-6
    gc, gs = round_rows(gradient * ws.flatten())
    assert x.grad is not None and difference(x.grad, (gc.double() * gs) @ wc.double()) < 1e-6
    assert difference(x.grad, gradient @ weight) < 0.06


def test_names_are_the_exact_models_and_the_files_are_read_a_tensor_at_a_time(monkeypatch):
    """The whole model in its own dtype is nowhere: a weight is rounded before the next one is read."""
    wide: list[int] = []
    rounding = fp8.round_rows

    def watch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide.append(sum(p.nbytes for p in made[0].parameters() if p.dtype == torch.bfloat16 and p.dim() == 2))
        return rounding(x)

    made: list[torch.nn.Module] = []
    use = fp8.use_fp8
    monkeypatch.setattr("cosmos3_train.model.loading.use_fp8", lambda layers: made.append(layers) or use(layers))
    monkeypatch.setattr(fp8, "round_rows", watch)
    model = Model(path=str(PICO), base_precision="fp8")
    rounded, exact = load_backbone(model, CPU), load_backbone(replace(model, base_precision="dtype"), CPU)
    assert len(wide) == 6 * 2 * 7
    assert all(not p.dtype.is_floating_point for p in rounded.layers.parameters() if p.dim() == 2)
    assert rounded.state_dict().keys() == exact.state_dict().keys()
    assert max(wide) == 0 or max(wide) < sum(p.nbytes for p in exact.layers.parameters()) / 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tuning.method=full"], "trains the weights that it would round; use lora or hybrid"),
        (["tuning.method=tower"], "trains the weights that it would round; use lora or hybrid"),
        (["tuning.dora=true"], "tuning.dora needs the norms of the exact weights"),
        (["strategy.name=fsdp2"], "strategy.name 'fsdp2' spreads weights over processes in their own dtype; use ddp"),
        (["strategy.name=hsdp"], "strategy.name 'hsdp' spreads weights over processes in their own dtype; use ddp"),
        (["model.fp8_copies=3"], r"model.fp8_copies is 3; it is 1 or 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as told:
        load_experiment("experiments/quickstart.yaml", ["model.base_precision=fp8", *changes])
    assert "\n" not in str(told.value)


def test_one_cache_of_exact_keys_serves_an_exact_and_a_rounded_base(tmp_path):
    rounded = Model(path=str(PICO), base_precision="fp8")
    exact, prompt = Reasoner(replace(rounded, base_precision="dtype"), CPU), torch.arange(5)
    ensure_reasoner(tmp_path, [prompt], Reasoner(rounded, CPU))
    card = json.loads((tmp_path / "caches" / "reasoner" / "card.json").read_text())
    assert card["dtype"] == "bfloat16" and card["fingerprint"] == exact.fingerprint
    cache = ReasonerCache.open(tmp_path, exact)
    assert cache is not None and torch.equal(cache.read(prompt_key(prompt)), exact.keys_values([prompt])[0])
