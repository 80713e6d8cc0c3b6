"""The sound tokenizer of a model folder: whether there is one that can encode, what it takes, and its encoder.

Its decoder is not kept: nothing here makes sound audible, and it is the larger half.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import Cosmos3AVAEAudioTokenizer, Cosmos3OmniPipeline
from safetensors import SafetensorError

from cosmos3_train.config import Model, UserError, first_line
from cosmos3_train.data.sound import SoundForm
from cosmos3_train.model.base_identity import check_shards
from cosmos3_train.model.loading import DTYPES, SOUND, make_backbone, model_folder, tensor_files
from cosmos3_train.model.tokenizers import place_tokenizer


def check_sound(folder: Path, model: Model, task: str) -> SoundForm:
    """Look at a folder's sound tokenizer as a run would meet it. Reads no weight.

    Args:
        folder: the model's, on this disk;  model: of the experiment, for its sizes and for messages.
        task: that needs it, for messages.

    Raises:
        UserError: the transformer has no sound head, or the folder no sound tokenizer, or one that cannot encode, is
            damaged, or is of another transformer.
    """
    where = f"model.path is {model.path!r}"
    remedy = f"which the task {task!r} needs; leave it out, or take a model that"
    with torch.device("meta"):
        head: Any = make_backbone(folder / "transformer", model).config
    if not head.sound_gen or not head.sound_dim:
        raise UserError(f"{where}: its transformer has no sound head (sound_gen), {remedy} has one")
    if not (folder / SOUND / "config.json").is_file():
        raise UserError(f"{where}: no sound tokenizer is in the folder ({SOUND}/), {remedy} has one")
    try:
        config: Any = Cosmos3AVAEAudioTokenizer.load_config(folder, subfolder=SOUND)
        with torch.device("meta"), _quiet():
            tokenizer = cast(Cosmos3AVAEAudioTokenizer, Cosmos3AVAEAudioTokenizer.from_config(config))
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"{folder / SOUND}/config.json cannot be read ({reason}); fetch it again") from None
    check_shards(folder / SOUND)
    if tokenizer.encoder is None or not any(name.startswith("encoder.") for name in tensor_files(folder / SOUND)):
        raise UserError(f"{where}: its sound tokenizer is a decoder alone and cannot encode, {remedy} has both")
    sizes: Any = tokenizer.config
    hertz = sizes.sampling_rate / tokenizer._hop_size
    if sizes.vocoder_input_dim != head.sound_dim or abs(hertz - float(head.sound_latent_fps)) > 1e-6:
        raise UserError(
            f"{where}: its sound tokenizer gives {sizes.vocoder_input_dim} channels at {hertz:g} Hz, its transformer "
            f"takes {head.sound_dim} at {head.sound_latent_fps:g}; they are not of one model: fetch it again"
        )
    return form_of(tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Upstream's own use of what torch has deprecated is not the user's to know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        yield


def form_of(tokenizer: Cosmos3AVAEAudioTokenizer) -> SoundForm:
    """The sound that a tokenizer takes."""
    sizes: Any = tokenizer.config
    return SoundForm(sizes.sampling_rate, sizes.input_channels * (2 if sizes.stereo else 1))


def add_sound_tokenizer(parts: Cosmos3OmniPipeline, model: Model, device: torch.device, task: str | None) -> None:
    """Give the parts the folder's sound tokenizer, its encoder on the device, unless they have one or no task needs it.

    Raises:
        UserError: as `check_sound`.
    """
    if task is None or parts.sound_tokenizer is not None:
        return
    folder = model_folder(model)
    check_sound(folder, model, task)
    try:
        with _quiet():
            tokenizer: Any = Cosmos3AVAEAudioTokenizer.from_pretrained(
                folder, subfolder=SOUND, torch_dtype=DTYPES[model.vae_dtype], use_safetensors=True
            )
    except (OSError, SafetensorError, json.JSONDecodeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{folder / SOUND}: the sound tokenizer cannot be read ({reason}); fetch it again") from error
    tokenizer.decoder = None
    place_tokenizer(tokenizer, device)
    parts.register_modules(sound_tokenizer=tokenizer)
