"""A backbone that recalls its prompts' keys and values gives the numbers of one that computes them, and reads no weight
of the understanding tower; a cache is whole, resumable and nobody else's."""

from __future__ import annotations

import json
import shutil
import threading
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from safetensors.torch import load_file, save_file

from cosmos3_train.config import Model, Tuning, UserError
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.model import loading, reasoner_cache
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import forget_understanding, load_backbone, read_understanding
from cosmos3_train.model.omni import is_understanding
from cosmos3_train.model.packing import prompt_key
from cosmos3_train.model.reasoner_cache import CachedPrompts, Reasoner, ReasonerCache, ensure_reasoner, remember
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.runtime import draw
from cosmos3_train.training.batching import PackedStep, Packer
from cosmos3_train.training.module import PostTraining
from cosmos3_train.types import Sample, StepBatch
from tests.parity.upstream import EDGE, randomise
from tests.training.project import robot
from tests.training.steps import make_module, parts, perturb

CPU = torch.device("cpu")
LORA = Tuning(method="hybrid", rank=4)
WORDS = ("push", "push the block to the left edge of the table and wait", "turn it")


@pytest.fixture(scope="module")
def edge(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("edge") / "edge"
    shutil.copytree(folder, root)
    words = json.loads((folder / "transformer" / "config.json").read_text())["vocab_size"]
    made = Cosmos3OmniTransformer(**{**EDGE, "num_hidden_layers": 2, "vocab_size": words})
    randomise(made)
    shutil.rmtree(root / "transformer")
    made.save_pretrained(root / "transformer")
    return root


def model(folder: Path, **changes) -> Model:
    return Model(path=str(folder), **{"dtype": "float32", "checkpoint_activations": False, **changes})


def samples(tasks: list[str]) -> list[Sample]:
    """Samples of these tasks, several of one instruction and rate."""
    found = []
    for number, task in enumerate(tasks):
        generator, rules = draw(5, number), TASKS[task]
        latent = torch.randn((48, 1 if rules.image else 2, 2 + number % 2, 3), generator=generator)
        found.append(
            Sample(
                f"{task}/{number}",
                number,
                task,
                caption=WORDS[number % len(WORDS)],
                fps=10.0,
                latent=latent,
                size=(32, 48),
                action=torch.rand((4, 2), generator=generator) * 2 - 1 if rules.has_robot else None,
                sound=None if rules.sound == "absent" else torch.rand((2, 64, 5), generator=generator),
                embodiment="mover",
            )
        )
    return found


def packed(module: PostTraining, tasks: list[str], dropout: float = 0.5) -> tuple[Packer, PackedStep]:
    encoder = Encoder(parts(), {"mover": robot()}, caption_dropout=dropout)
    packer = replace(module.packer, encoder=encoder)
    return packer, packer(StepBatch(0, samples(tasks)))


def with_cache(folder: Path, prepared: Path, prompts, **changes) -> PostTraining:
    """The module of `make_module` whose backbone has a cache in place of its understanding tower."""
    reasoner = Reasoner(model(folder), CPU)
    ensure_reasoner(prepared, prompts, reasoner, progress=False)
    made = make_module(folder, tuning=LORA, **changes)
    backbone = load_backbone(model(folder), CPU, towers="generation")
    cache = ReasonerCache.open(prepared, reasoner)
    assert cache is not None
    remember(backbone, [cache])
    trainables = make_trainable(backbone, LORA, [robot()], seed=0)
    return PostTraining(made.experiment, backbone.train(), trainables, made.packer)


def step(module: PostTraining, made: PackedStep):
    """Summed losses and gradients of a packed step."""
    module.zero_grad(set_to_none=True)
    sums = module.accumulate(made.packs, module.step_counts(made))
    gradients = {n: p.grad.clone() for n, p in module.trainables.parameters.items() if p.grad is not None}
    return sums, gradients


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize("kind", ["folder", "edge"])
@pytest.mark.parametrize("tasks", [*([task] * 5 for task in TASKS), [*TASKS, "policy", "policy"]], ids=lambda t: t[-1])
def test_velocities_losses_and_gradients_are_those_of_the_tower(kind, tasks, request, tmp_path, monkeypatch):
    # Lightning's backward belongs to a Trainer; here there is none.
    monkeypatch.setattr(PostTraining, "manual_backward", lambda self, loss: loss.backward())
    folder = request.getfixturevalue(kind)
    whole = perturb(make_module(folder, tuning=LORA, budget=400))
    packer, made = packed(whole, tasks)
    texts = [sample.text for sample in packer.encoder.encode(samples(tasks))]
    keys = [prompt_key(text) for text in texts]
    assert len(set(keys)) < len(keys), "some share a prompt"
    assert prompt_key(packer.encoder.dropped_text()) in keys, "some captions are dropped"
    cached = perturb(with_cache(folder, tmp_path, list({prompt_key(t): t for t in texts}.values()), budget=400))
    for pack in made.packs:
        with torch.no_grad():
            ours, theirs = cached.backbone(pack), whole.backbone(pack)
        for name in ("video", "sound", "action"):
            expected = getattr(theirs, name)
            assert getattr(ours, name).shape == expected.shape
            assert not expected.numel() or difference(getattr(ours, name), expected) <= 1e-6, name
    sums, gradients = step(cached, made)
    expected_sums, expected = step(whole, made)
    for name, value in expected_sums.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-6), name
    assert gradients.keys() == expected.keys() and expected
    scale = torch.cat([value.flatten() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert float((gradients[name] - value).norm()) <= 1e-6 * max(float(value.norm()), 0.01 * float(scale)), name


# ------------------------------------------------------------------------------------------------ what is read


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the tensors that are read from checkpoints."""
    names: list[str] = []
    opened = loading.safe_open

    class Counting:
        def __init__(self, *arguments, **named) -> None:
            self.file = opened(*arguments, **named)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(loading, "safe_open", Counting)
    return names


@pytest.mark.parametrize("kind", ["folder", "edge"])
def test_of_one_tower_the_other_is_never_read(kind, request, read):
    folder = request.getfixturevalue(kind)
    whole = load_backbone(model(folder), CPU)
    both = sorted(read)
    read.clear()
    generation = load_backbone(model(folder), CPU, towers="generation")
    assert read and not any(is_understanding(name) for name in read)
    assert not generation.understands and whole.understands
    assert not any(t.is_meta for t in (*generation.parameters(), *generation.buffers()))
    assert generation.state_dict().keys() == {name for name in whole.state_dict() if not is_understanding(name)}
    half = sorted(read)
    read.clear()
    understanding = load_backbone(model(folder), CPU, towers="understanding", text_logits=False)
    own = {"lm_head.weight", *(name for name in both if "k_norm_und_for_gen" in name)}
    assert sorted({*read, *half, "lm_head.weight"}) == both and set(read) & set(half) <= own
    assert understanding.understands
    assert all(is_understanding(name) or "k_norm_und" in name for name in understanding.state_dict())


def test_a_tower_that_is_read_later_is_the_same_and_goes_again(folder):
    whole = load_backbone(model(folder), CPU)
    half = load_backbone(model(folder), CPU, towers="generation")
    read_understanding(half, model(folder), CPU)
    assert half.state_dict().keys() == whole.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in half.state_dict().items())
    forget_understanding(half)
    assert not any(is_understanding(name) for name in half.state_dict())


def test_random_weights_do_not_depend_on_what_is_left_out(folder):
    drawn = model(
        folder, random={"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 1152, "num_attention_heads": 4}
    )
    whole = load_backbone(drawn, CPU).state_dict()
    for towers in ("generation", "understanding"):
        part = load_backbone(drawn, CPU, towers=towers).state_dict()
        assert part and all(torch.equal(value, whole[name]) for name, value in part.items())
    others = load_backbone(replace(drawn, random_seed=1), CPU).state_dict()
    assert not any(torch.equal(value, whole[name]) for name, value in others.items() if value.dim() > 1)
    assert Reasoner(drawn, CPU).fingerprint != Reasoner(replace(drawn, random_seed=1), CPU).fingerprint


# ------------------------------------------------------------------------------------------------ in the step


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 1000, (n,), generator=draw(1, "prompt", n)) for n in lengths]


def test_prompts_that_are_alike_stand_once_and_stay_on_the_device(folder, tmp_path, monkeypatch):
    module = make_module(folder, tuning=LORA)
    packer, made = packed(module, ["policy"] * 7, dropout=0)
    (pack,) = made.packs
    reasoner = Reasoner(model(folder), CPU)
    texts = [packer.encoder.robot_text(words, robot(), (32, 48)) for words in WORDS]
    ensure_reasoner(tmp_path, texts, reasoner)
    cache = ReasonerCache.open(tmp_path, reasoner)
    assert cache is not None and len(cache.places) == 3
    reads: list[str] = []
    original = ReasonerCache.read
    monkeypatch.setattr(ReasonerCache, "read", lambda self, key: reads.append(key) or original(self, key))
    recall = CachedPrompts([cache], 64, torch.float32)
    understood = recall(pack)
    assert [k.shape[0] for k, _ in understood.keys_values] == [sum(t.numel() for t in texts)] * 2
    assert recall(pack) and len(reads) == 3, "the second pack reads nothing"
    tight = CachedPrompts([cache], 64, torch.float32, device_bytes=original(cache, prompt_key(texts[1])).nbytes)
    reads.clear()
    again = understood
    for _ in range(2):
        again = tight(pack)
        assert sum(entry.nbytes for entry in tight._kept.values()) <= tight.device_bytes
    assert len(reads) > 3, "what does not fit is read again"
    for (k, v), (other_k, other_v) in zip(understood.keys_values, again.keys_values, strict=True):
        assert torch.equal(k, other_k) and torch.equal(v, other_v)
    _, alone = packed(module, ["policy"], dropout=0)
    only = recall(alone.packs[0])
    assert only.joint_order is None
    kept = recall._kept[alone.packs[0].prompts[0], CPU]
    assert only.keys_values[0][0].data_ptr() == kept.data_ptr(), "one prompt copies nothing"


def test_what_is_expected_is_read_ahead_once_and_by_another_thread(folder, tmp_path, monkeypatch):
    module = make_module(folder, tuning=LORA)
    packer, made = packed(module, ["policy"] * 7, dropout=0)
    (pack,) = made.packs
    reasoner = Reasoner(model(folder), CPU)
    ensure_reasoner(tmp_path, [packer.encoder.robot_text(words, robot(), (32, 48)) for words in WORDS], reasoner)
    cache = ReasonerCache.open(tmp_path, reasoner)
    assert cache is not None
    expected = CachedPrompts([cache], 64, torch.float32)(pack)
    reads: list[tuple[str, bool]] = []
    original = ReasonerCache.read

    def read(self, key):
        reads.append((key, threading.current_thread() is threading.main_thread()))
        return original(self, key)

    monkeypatch.setattr(ReasonerCache, "read", read)
    recall = CachedPrompts([cache], 64, torch.float32)
    for _ in range(2):
        recall.expect([*pack.prompts, "of no cache"], CPU)
        understood = recall(pack)
    assert sorted(reads) == sorted((key, False) for key in set(pack.prompts))
    for (k, v), (other_k, other_v) in zip(understood.keys_values, expected.keys_values, strict=True):
        assert torch.equal(k, other_k) and torch.equal(v, other_v)


def test_a_prompt_that_no_cache_holds_is_said_with_the_remedy(folder, tmp_path):
    module = with_cache(folder, tmp_path, prompts(5))
    _, made = packed(module, ["policy"], dropout=0)
    length = made.packs[0].text_spans.total
    with pytest.raises(
        UserError, match=rf"a prompt of {length} tokens is in no reasoner cache .*cache_reasoner to false"
    ):
        module.backbone(made.packs[0])


def test_what_trains_the_keys_norm_of_edge_cannot_be_cached(edge):
    backbone = load_backbone(model(edge), CPU, towers="generation")
    with pytest.raises(UserError, match=r"tuning.method is 'tower', which trains what the understanding tower's keys"):
        make_trainable(backbone, Tuning(method="tower"), [], seed=0)


# ------------------------------------------------------------------------------------------------ on disk


def test_another_models_cache_is_refused_by_name_and_other_generation_weights_are_not(folder, tmp_path):
    ensure_reasoner(tmp_path, prompts(5, 7), Reasoner(model(folder), CPU))
    cache = tmp_path / "caches" / "reasoner"
    other = Reasoner(model(folder, dtype="bfloat16"), CPU)
    with pytest.raises(
        UserError, match=rf"{cache}: these keys and values are of .* in float32 .*, not of .* in bfloat16 .*delete"
    ):
        ReasonerCache.open(tmp_path, other)
    for name, refused in (("layers.0.self_attn.to_k.weight", True), ("layers.0.self_attn.add_k_proj.weight", False)):
        copy = tmp_path / name.split(".")[3]
        shutil.copytree(folder, copy)
        file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, {"format": "pt"})
        if refused:
            with pytest.raises(UserError, match=r"these keys and values are of .*fingerprint"):
                ensure_reasoner(tmp_path, prompts(5), Reasoner(model(copy), CPU))
        else:
            found = ReasonerCache.open(tmp_path, Reasoner(model(copy), CPU))
            assert found is not None and len(found.places) == 2


def test_a_row_of_the_embedding_that_no_prompt_reads_may_change_and_no_other(folder, tmp_path):
    wanted, copy = prompts(5, 7), tmp_path / "copy"
    ensure_reasoner(tmp_path, wanted, Reasoner(model(folder), CPU))
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, read = load_file(file), torch.cat(wanted).unique().tolist()
    embedding = tensors["embed_tokens.weight"]
    rows = [row for row in range(10, len(embedding) // 2 - 10) if row not in read][:1] + read[1:2]
    for row, refused in zip(rows, (False, True), strict=True):
        embedding[row] += 1
        save_file(tensors, file, {"format": "pt"})
        changed = Reasoner(model(copy), CPU)
        assert changed.fingerprint == Reasoner(model(folder), CPU).fingerprint, "it looks at other rows"
        with pytest.raises(UserError, match="1 of its token embedding's rows") if refused else nullcontext():
            ensure_reasoner(tmp_path, wanted, changed)


def test_a_cache_that_cannot_be_read_is_named(folder, tmp_path):
    reasoner = Reasoner(model(folder), CPU)
    ensure_reasoner(tmp_path, prompts(5), reasoner)
    cache = tmp_path / "caches" / "reasoner"
    (shard,) = cache.glob("*.safetensors")
    foreign = cache / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign, {"fingerprint": "other"})
    with pytest.raises(UserError, match=rf"{foreign}: of another model"):
        ReasonerCache.open(tmp_path, reasoner)
    foreign.unlink()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{shard}: .* missing or corrupt .*; delete the file"):
        ReasonerCache.open(tmp_path, reasoner)
    (cache / "card.json").unlink()
    with pytest.raises(UserError, match=r"card.json: not a card of cached keys and values .*; delete"):
        ensure_reasoner(tmp_path, prompts(5), reasoner)


def test_killed_while_writing_the_same_call_goes_on_and_makes_nothing_twice(folder, tmp_path, monkeypatch):
    wanted = prompts(5, 7, 6, 9, 8)
    monkeypatch.setattr(reasoner_cache, "TOKENS_A_SHARD", 12)
    reasoner = Reasoner(model(folder), CPU)
    (tmp_path / "undisturbed").mkdir()
    ensure_reasoner(tmp_path / "undisturbed", wanted, reasoner)
    written: list[Path] = []

    def killed(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(reasoner_cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure_reasoner(tmp_path, wanted, reasoner)
    cache = ReasonerCache.open(tmp_path, reasoner)
    assert cache is not None and len(cache.places) == 2, "5 and 7 tokens are in the one whole shard"
    understood: list[int] = []
    original = Reasoner.keys_values

    def counted(self, few):
        understood.extend(prompt.numel() for prompt in few)
        return original(self, few)

    monkeypatch.setattr(Reasoner, "keys_values", counted)
    ensure_reasoner(tmp_path, wanted, reasoner)
    assert understood == [6, 9, 8]
    ensure_reasoner(tmp_path, wanted, reasoner)
    assert understood == [6, 9, 8], "and then nothing is left to do"
    files = sorted(path.name for path in (tmp_path / "caches" / "reasoner").iterdir())
    assert [name for name in files if not name.endswith((".safetensors", ".json"))] == []
    found = ReasonerCache.open(tmp_path, reasoner)
    undisturbed = ReasonerCache.open(tmp_path / "undisturbed", reasoner)
    assert found is not None and undisturbed is not None
    for prompt in wanted:
        assert torch.equal(found.read(prompt_key(prompt)), undisturbed.read(prompt_key(prompt)))


def test_the_size_is_said_before_and_a_full_disk_refused(folder, tmp_path, monkeypatch, caplog):
    reasoner = Reasoner(model(folder), CPU)
    assert reasoner.bytes_a_token == 2 * 2 * 2 * 16 * 4, "layers, keys and values, key heads, their width, float32"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 12 * reasoner.bytes_a_token - 1))
    with pytest.raises(
        UserError, match=r"keys and values of 2 prompts, 12 tokens .* need .* are free; free some space"
    ):
        ensure_reasoner(tmp_path, prompts(5, 7), reasoner)
    assert not (tmp_path / "caches").exists()
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        ensure_reasoner(tmp_path, prompts(5, 7), reasoner)
    assert "2 prompts, 12 tokens of 0.5 KiB, 0.0 MB" in caplog.text
    (shard,) = (tmp_path / "caches" / "reasoner").glob("*.safetensors")
    assert sum(value.nbytes for value in load_file(shard).values()) == 12 * reasoner.bytes_a_token
