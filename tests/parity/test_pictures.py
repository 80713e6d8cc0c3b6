"""Conversations with pictures have transformers' ids, positions, logits and gradients, packed as well as alone."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from transformers import Cosmos3OmniForConditionalGeneration
from transformers.video_utils import VideoMetadata

from cosmos3_train.config import Model, UserError
from cosmos3_train.data.talk import Reference, Talk
from cosmos3_train.data.talk_pictures import Shape
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_backbone, load_parts
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.model.sight import Counter, open_sight
from cosmos3_train.model.slices import slice_of
from cosmos3_train.model.vision import load_eyes
from cosmos3_train.training.batching import PackedStep
from cosmos3_train.training.skipped import keep_skipped, list_skipped, read_shares
from cosmos3_train.types import IGNORED_LABEL, NoiseLevels, Picture, Sample
from tests.commands.tiny import make_model
from tests.parity.eyes import add_eyes, picture, reasoner
from tests.parity.upstream import add_random_lora, make_sample, noise_it

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
CPU = torch.device("cpu")


def words(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def answer(text):
    return {"role": "assistant", "content": text}


ONE = [user(IMAGE, words("Where is the T?")), answer("On the left.")]
TWO = [
    {"role": "system", "content": "Be brief."},
    user(words("Before:"), IMAGE, words(" and after:"), IMAGE),
    answer("It moved."),
    user(words("Far?")),
    answer("No."),
]
CLIP = [user(VIDEO, words("Does it fall?")), answer("Yes, twice.")]
MIXED = [user(VIDEO, words("Like this one?"), IMAGE), answer("No.")]
PLAIN = [user(words("What is a T?")), answer("A letter.")]

A, B, C = (Picture(picture(n, *size)[None]) for n, size in enumerate([(40, 70), (33, 32), (150, 90)]))
FILM = Picture(torch.stack([picture(10 + n, 50, 64) for n in range(5)]), numbers=(0, 12, 25, 37, 49), fps=24.0)
SMALL = Picture(FILM.frames[:2], numbers=(0, 9), fps=10.0, pixels=(1, 2 * 32 * 32))
TALKS = {"one": (ONE, [A]), "two": (TWO, [B, C]), "clip": (CLIP, [FILM]), "mixed": (MIXED, [SMALL, A])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_eyes(make_model(tmp_path_factory.mktemp("model"), layers=3))


@pytest.fixture(scope="module")
def model(folder):
    return Model(path=str(folder), dtype="float32", vae_dtype="float32", checkpoint_activations=False)


@pytest.fixture(scope="module")
def sight(model):
    return open_sight(model, load_parts(model, CPU, vae_weights=False), "a test")


@pytest.fixture(scope="module")
def encoder(model, sight):
    return Encoder(load_parts(model, CPU, vae_weights=False), {}, sight=sight)


@pytest.fixture(scope="module")
def both(model, sight):
    ours = load_backbone(model, CPU).eval()
    eyes = load_eyes(model, CPU, "a test")
    ours.see = eyes
    found = {"image_token_id": sight.processor.image_token_id, "video_token_id": sight.processor.video_token_id}
    return ours, reasoner(ours, found, eyes.encoder)


def samples_of(encoder, *names):
    found = []
    for number, name in enumerate(names):
        messages, pictures = TALKS.get(name, (PLAIN, []))
        found.append(Sample(name, number, "conversation", messages=messages, pictures=tuple(pictures)))
    return encoder.encode(found)


def their_inputs(sight, name):
    """What transformers makes of a conversation."""
    messages, pictures = TALKS.get(name, (PLAIN, []))
    left, shown = list(pictures), []
    for message in messages:
        if not isinstance(message["content"], str):
            kinds = [part["type"] for part in message["content"] if part["type"] != "text"]
            shown += [{"type": kind, kind: left.pop(0)} for kind in kinds]
    images = [part["image"].frames[0] for part in shown if part["type"] == "image"]
    films = [part["video"] for part in shown if part["type"] == "video"]
    options = {}
    if films:
        metadata = [VideoMetadata(100, fps=f.fps, frames_indices=list(f.numbers)) for f in films]
        options["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
        if films[0].pixels != (None, None):
            least, most = films[0].pixels
            options["videos_kwargs"]["size"] = {"shortest_edge": least, "longest_edge": most}
    prompt = sight.processor.apply_chat_template(messages, tokenize=False)
    return sight.processor(
        text=[prompt], images=images or None, videos=[f.frames for f in films] or None, return_tensors="pt", **options
    )


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def labelled(sample):
    return torch.nonzero(sample.labels != IGNORED_LABEL).flatten()


def packed(ours, samples):
    parts = [noise_it(s, 0.5) if s.video is not None else (None, None, NoiseLevels(0, 0, 0)) for s in samples]
    values = [noise_it(s, 0.5)[1] for s in samples]
    return pack(samples, values, [p[2] for p in parts], Layout.of(ours.config))


@pytest.mark.parametrize("name", TALKS)
def test_ids_and_positions_are_transformers_own(name, both, sight, encoder):
    (sample,), theirs = samples_of(encoder, name), their_inputs(sight, name)
    assert sample.text.tolist() == theirs["input_ids"][0].tolist()
    expected = both[1].model.compute_3d_position_ids(
        input_ids=theirs["input_ids"],
        image_grid_thw=theirs.get("image_grid_thw"),
        video_grid_thw=theirs.get("video_grid_thw"),
        inputs_embeds=None,
        mm_token_type_ids=theirs["mm_token_type_ids"],
    )
    assert torch.equal(sample.positions, expected[:, 0].float())
    assert len({tuple(column) for column in sample.positions.T.tolist()}) > 1
    said = encoder.parts.text_tokenizer.decode(sample.labels[labelled(sample)])
    assert said == "".join(f"{m['content']}<|im_end|>" for m in TALKS[name][0] if m["role"] == "assistant")


@torch.no_grad()
def test_a_mixed_pack_has_transformers_logits(both, sight, encoder):
    ours, theirs = both
    names = ("one", "two", "plain", "clip", "mixed")
    samples = samples_of(encoder, *names)
    alone = {name: ours.lm_head(ours(packed(ours, [s])).text_hidden) for name, s in zip(names, samples, strict=True)}
    samples[1:1] = [make_sample("policy", 8), make_sample("text_to_image", 9)]
    together = packed(ours, samples)
    calls = []
    ours.see = lambda pictures, see=ours.see: calls.append(pictures) or see(pictures)
    try:
        logits = ours.lm_head(ours(together).text_hidden)
    finally:
        ours.see = ours.see.__defaults__[0]
    assert len(calls) == 1 and len(calls[0].grids) == 6, "one pass over all pictures of a pack"
    talks = [s for s in samples if s.task == "conversation"]
    found = logits.split([labelled(s).numel() for s in talks])
    for name, sample, mine in zip(names, talks, found, strict=True):
        expected = theirs(**their_inputs(sight, name)).logits[0, labelled(sample)]
        assert difference(mine, expected) <= 1e-5, name
        assert difference(alone[name], expected) <= 1e-5, name


@torch.no_grad()
def test_transformers_reads_the_same_folder(both, folder, sight, encoder):
    theirs = Cosmos3OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    (sample,) = samples_of(encoder, "mixed")
    expected = theirs(**their_inputs(sight, "mixed")).logits[0, labelled(sample)]
    assert difference(both[0].lm_head(both[0](packed(both[0], [sample])).text_hidden), expected) <= 1e-5


@torch.no_grad()
def test_pictures_and_what_they_add_to_the_first_layers_count(both, encoder):
    ours, (sample,) = both[0], samples_of(encoder, "one")
    seen = packed(ours, [sample])
    logits = ours(seen).text_hidden
    see = ours.see
    try:
        ours.see = lambda pictures: type(found := see(pictures))(found.embeddings, found.deep[:1])
        assert difference(ours(seen).text_hidden, logits) > 1e-3
        ours.see = lambda pictures: type(found := see(pictures))(0 * found.embeddings, found.deep)
        assert difference(ours(seen).text_hidden, logits) > 1e-3
    finally:
        ours.see = see


@pytest.mark.parametrize(
    ("joint", "checkpointed"),
    [
        (False, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_lora_gradients_equal_transformers(joint, checkpointed, model, both, sight, encoder):
    ours, theirs = load_backbone(model, CPU), both[1]
    ours.see, ours.joint_layers = both[0].see, joint
    reference = reasoner(ours, {t: getattr(theirs.config, t) for t in ("image_token_id", "video_token_id")},
                         both[0].see.encoder)  # fmt: skip
    for made, targets in (
        (ours, ["to_q", "to_k", "to_v", "to_out", "gate_proj", "up_proj", "down_proj"]),
        (reference.model.language_model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ):
        add_random_lora(made, targets, exclude=r".*moe_gen.*" if made is ours else None)
    if checkpointed:
        ours.enable_gradient_checkpointing()
        ours.train()
    names = ("one", "two", "clip", "mixed", "plain")
    samples = samples_of(encoder, *names)
    if joint:
        samples.append(make_sample("policy", 3))
    made = packed(ours, samples)
    loss = torch.nn.functional.cross_entropy(ours.lm_head(ours(made).text_hidden), made.labels, reduction="sum")
    loss.backward()
    expected = torch.zeros(())
    for name, sample in zip(names, samples, strict=False):
        places = labelled(sample)
        logits = reference(**their_inputs(sight, name)).logits[0, places]
        expected = expected + torch.nn.functional.cross_entropy(logits, sample.labels[places], reduction="sum")
    expected.backward()
    assert difference(loss.detach(), expected.detach()) <= 1e-5
    mine = [p for n, p in ours.named_parameters() if "lora_" in n]
    their = [p for n, p in reference.model.language_model.named_parameters() if "lora_" in n]
    assert len(mine) == len(their) == 2 * 3 * 7
    for one, other in zip(mine, their, strict=True):
        assert torch.equal(one, other) and float(other.grad.norm()) > 0
        assert difference(one.grad, other.grad) <= 1e-5


@pytest.mark.parametrize("name", [*TALKS, "plain"])
def test_tokens_are_counted_without_pixels(name, model, encoder):
    messages, pictures = TALKS.get(name, (PLAIN, []))
    shapes = [Shape(tuple(p.frames.shape[2:]), p.numbers, p.fps, p.pixels) for p in pictures]
    counter = pickle.loads(pickle.dumps(Counter.of(model, encoder.parts, "a test")))
    assert counter.fingerprint == Counter.of(model, encoder.parts, "another").fingerprint
    (sample,) = samples_of(encoder, name)
    assert counter(Talk(messages, tuple(Reference("image") for _ in pictures)), shapes, "") == sample.text.numel()


def test_a_slice_keeps_the_tokens_of_its_own(both, encoder):
    ours = both[0]
    whole = packed(ours, samples_of(encoder, "two", "one", "clip"))
    with torch.no_grad():
        seen = ours.see(whole.pictures)
        parts = [slice_of(whole, place, 3) for place in range(3)]
        found = torch.cat([ours.see(part.pictures).embeddings for part in parts])
        assert torch.equal(found, seen.embeddings)
    starts = [0, *torch.tensor([p.text_ids.numel() for p in parts]).cumsum(0).tolist()]
    places = torch.cat([p.pictures.places + start for p, start in zip(parts, starts, strict=False)])
    assert torch.equal(places, whole.pictures.places)


def test_a_skipped_step_is_kept_with_its_pictures(both, encoder, tmp_path):
    whole = packed(both[0], samples_of(encoder, "two", "clip"))
    keep_skipped(tmp_path, PackedStep(3, [whole], {"text": 2}, 2, [["two", "clip"]]), math.nan)
    ((draw, files),) = list_skipped(tmp_path).items()
    (step,), norm = read_shares(files)
    (found,) = step.packs
    assert draw == 3 and math.isnan(norm) and step.keys == [["two", "clip"]]
    assert found.prompts == whole.prompts and found.pictures.frames.lengths == whole.pictures.frames.lengths
    with torch.no_grad():
        assert torch.equal(both[0](found).text_hidden, both[0](whole).text_hidden)


def test_models_without_eyes_are_refused(tmp_path, folder, model):
    from dataclasses import replace

    blind = make_model(tmp_path / "blind")
    parts = load_parts(model, CPU, vae_weights=False)
    with pytest.raises(UserError, match=r"a set shows pictures, but model\.path .*blind.* has no vision encoder.*nano"):
        open_sight(replace(model, path=str(blind)), parts, "a set")
    add_eyes(blind)
    (blind / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        open_sight(replace(model, path=str(blind)), parts, "a set")
    edge = Cosmos3OmniTransformer.load_config(blind / "transformer")
    Cosmos3OmniTransformer.from_config({**edge, "hidden_act": "relu2"}).save_pretrained(blind / "transformer")
    with pytest.raises(UserError, match="Cosmos3-Edge"):
        open_sight(replace(model, path=str(blind)), parts, "a set")
    Cosmos3OmniTransformer.from_config({**edge, "hidden_size": 64}).save_pretrained(blind / "transformer")
    with pytest.raises(UserError, match="width 48 for 2 layers, and a transformer of width 64 with 2"):
        load_eyes(replace(model, path=str(blind)), CPU, "a set")


def test_words_that_stand_for_pictures_are_refused(sight):
    forged = [user(IMAGE, words("and <|image_pad|>")), answer("No.")]
    with pytest.raises(UserError, match=r"talk/7: its words hold '<\|image_pad\|>'"):
        sight.read(forged, [A], "talk/7")
