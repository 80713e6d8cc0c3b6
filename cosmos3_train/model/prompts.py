"""Token ids of a sample's text, made by upstream's own templates, so that training and deployment cannot drift.

`parts` below is upstream's pipeline without a transformer (`loading.load_parts`). Robots get the action caption (a JSON
text with the instruction, view point, rate, duration and canvas) and no system prompt, as the checkpoints were trained;
plain video gets the caption with upstream's duration and resolution sentences, and a system prompt where the folder's
pipeline gives it one by default, for that is how it is deployed.
"""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _ACTION_RESOLUTION_BINS
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from cosmos3_train.config import Embodiment, UserError
from cosmos3_train.types import IGNORED_LABEL


def canvas(size: tuple[int, int], tier: int) -> tuple[int, int]:
    """(H, W) of the canvas of a tier whose aspect ratio is nearest to the frame's (H, W), as upstream picks it."""
    ratios = _ACTION_RESOLUTION_BINS[str(tier)]
    return VideoProcessor.classify_height_width_bin(*whole(size), ratios=cast(Any, ratios))


def whole(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) rounded down to whole latent cells of 16 pixels, to which upstream resizes frames before anything else."""
    return size[0] - size[0] % 16, size[1] - size[1] % 16


def robot_prompt(parts: Cosmos3OmniPipeline, instruction: str, embodiment: Embodiment, size: tuple[int, int]) -> Tensor:
    """int64 [L] ids of a robot's prompt, with the end-of-turn and start-of-generation tokens.

    Args:
        size: (H, W) of the native frames; the caption states the canvas that they are padded to.
    """
    height, width = canvas(size, embodiment.resolution_tier)
    ids, _ = parts.tokenize_prompt(
        instruction,
        num_frames=embodiment.frames,
        height=height,
        width=width,
        fps=embodiment.control_hz,
        use_system_prompt=False,
        action_mode="policy",  # all action modes share one caption; the mode itself is not part of it
        action_view_point=embodiment.view_point,
    )
    return torch.tensor(ids, dtype=torch.long)


def video_prompt(parts: Cosmos3OmniPipeline, caption: str, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """int64 [L] ids of a clip's caption; a JSON caption states its own metadata and is used verbatim."""
    plain = not caption.lstrip().startswith("{")
    ids, _ = parts.tokenize_prompt(
        caption,
        num_frames=frames,
        height=size[0],
        width=size[1],
        fps=fps,
        use_system_prompt=None,  # as the folder's model_index.json says
        add_resolution_template=plain,
        add_duration_template=plain,
    )
    return torch.tensor(ids, dtype=torch.long)


def with_sound(caption: str, heard: str) -> str:
    """A caption that also says what is heard, as Cosmos 3 was trained with sound: a JSON caption in its field
    `audio_description`, a plain one after the words "Audio description:".

    Args:
        heard: "" leaves the caption as it is.
    """
    if not heard:
        return caption
    try:
        found = json.loads(caption)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return json.dumps(found | {"audio_description": heard}, ensure_ascii=False)
    return f"{caption} Audio description: {heard}"


def dropped_prompt(parts: Cosmos3OmniPipeline) -> Tensor:
    """int64 [L]: the template around an empty caption, which guidance's unconditional pass sees for action tasks."""
    _, ids = parts.tokenize_prompt("", negative_prompt="", use_system_prompt=False, action_mode="policy")
    return torch.tensor(ids, dtype=torch.long)


def conversation(tokenizer: Any, messages: list[dict[str, Any]], key: str) -> tuple[Tensor, Tensor]:
    """Token ids of a conversation of words and the label of each position, both int64 [L].

    Raises:
        UserError: as `answer_labels`.
    """
    ids = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    return torch.tensor(ids, dtype=torch.long), answer_labels(tokenizer, ids, key)


def answer_labels(tokenizer: Any, ids: list[int], key: str) -> Tensor:
    """The label of each position of a conversation's token ids, int64 [L].

    The assistant's words and the end of its turn are predicted; `<|im_start|>assistant\\n` and everything else is not.
    Labels are already shifted: position i holds the token i + 1 where that is to be predicted.

    Raises:
        UserError: nothing in the conversation would be predicted; names the sample.
    """
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    predicted, place = [False] * len(ids), 0
    while place < len(ids):
        if ids[place] == start and ids[place + 1 : place + 1 + len(header)] == header:
            place += 1 + len(header)
            while place < len(ids) and ids[place] != end:
                predicted[place] = True
                place += 1
            if place < len(ids):
                predicted[place] = True
        place += 1
    labels = [ids[i + 1] if i + 1 < len(ids) and predicted[i + 1] else IGNORED_LABEL for i in range(len(ids))]
    if all(label == IGNORED_LABEL for label in labels):
        raise UserError(f"{key}: no assistant turn in the conversation, so nothing to learn; add one or remove the row")
    return torch.tensor(labels, dtype=torch.long)
