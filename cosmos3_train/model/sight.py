"""A conversation with pictures as tokens: transformers' own processor resizes, cuts and numbers, and its model's own
function gives the positions, so that training sees what the deployed reasoner sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import Cosmos3OmniPipeline
from torch import Tensor
from transformers import Qwen3VLProcessor
from transformers.models.cosmos3_omni.modeling_cosmos3_omni import Cosmos3OmniModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from cosmos3_train.config import Model, UserError, first_line
from cosmos3_train.data.talk import Talk
from cosmos3_train.data.talk_index import UNTAKEN
from cosmos3_train.data.talk_pictures import Shape
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.model.loading import DTYPES, model_folder
from cosmos3_train.model.prompts import answer_labels, conversation
from cosmos3_train.model.vision import read_vision_config
from cosmos3_train.types import Picture, PictureTokens, Spans

ANY = (1, 1 << 40)
"""Limits of an area that change no picture."""


def open_sight(model: Model, parts: Cosmos3OmniPipeline, what: str, folder: Path | None = None) -> Sight:
    """What reads pictures for a model.

    Args:
        what: shows pictures, for messages.
        folder: the model's, where it is known to be on this disk.

    Raises:
        UserError: as `vision.read_vision_config`, or the folder has no processor, or one of another encoder.
    """
    folder = folder or model_folder(model)
    config = read_vision_config(folder, model, what)
    try:
        images: Any = Qwen2VLImageProcessor.from_pretrained(folder)
        videos: Any = Qwen3VLVideoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise UserError(
            f"{folder}: how it takes pictures cannot be read ({reason}); fetch its preprocessor_config.json and "
            "video_preprocessor_config.json again"
        ) from None
    wanted = (config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
    for processor in (images, videos):
        given = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        if given != wanted:
            raise UserError(
                f"{folder}: its processor cuts pictures into patches of {given} (side, merged, frames), its vision "
                f"encoder takes {wanted}; they are not of one model: fetch it again"
            )
    if getattr(videos, "cap_pixels_per_frame", False) is None:
        videos.cap_pixels_per_frame = False  # what it does by default, without the warning
    tokenizer = cast(Any, parts.text_tokenizer)
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    return Sight(processor, config, DTYPES[model.dtype])


@dataclass(frozen=True)
class Counter:
    """Counts the tokens of a set's conversations while it is prepared (a `talk_index.Measure`); goes to workers.

    tokenizer: alone, not the pipeline, whose weights would go with it
    sight: of the model, or why it has none, which the first picture raises
    """

    tokenizer: Any
    sight: Sight | UserError

    @staticmethod
    def of(model: Model, parts: Cosmos3OmniPipeline, what: str) -> Counter:
        """Args: as of `open_sight`, whose errors wait until a picture is met."""
        try:
            return Counter(parts.text_tokenizer, open_sight(model, parts, what))
        except UserError as error:
            return Counter(parts.text_tokenizer, error)

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer, its chat template and the processor's sizes."""
        tokenizer, digest = self.tokenizer, hashlib.sha256()
        digest.update(f"{tokenizer.chat_template}{tokenizer.backend_tokenizer.to_str()}".encode())
        if isinstance(self.sight, Sight):
            processor = self.sight.processor
            digest.update(
                f"{processor.image_processor.to_json_string()}{processor.video_processor.to_json_string()}".encode()
            )
        return digest.hexdigest()[:32]

    def __call__(self, talk: Talk, shapes: Sequence[Shape], where: str) -> int:
        if not shapes:
            return len(self._taken(lambda: conversation(self.tokenizer, talk.messages, where)[0]))
        sight = self.needed()
        return self._taken(lambda: sight.count(talk.messages, shapes, where))

    def needed(self) -> Sight:
        """The sight, of a set that shows pictures.

        Raises:
            UserError: the model has none.
        """
        if isinstance(self.sight, UserError):
            raise self.sight
        return self.sight

    def _taken(self, count: Callable[[], Any]) -> Any:
        """What a row comes to; one that is refused is counted by `talk_index`, and the set is not."""
        try:
            return count()
        except UserError as error:
            raise Unusable(UNTAKEN, str(error)) from None


@dataclass(frozen=True)
class Seeing:
    """A conversation as tokens. text, labels: int64 [L];  positions: float32 [3, L]"""

    text: Tensor
    labels: Tensor
    positions: Tensor
    pictures: PictureTokens


class Sight:
    """Turns words and decoded pictures into tokens. On the CPU, in whatever process packs."""

    def __init__(self, processor: Qwen3VLProcessor, config: Qwen3VLVisionConfig, dtype: torch.dtype) -> None:
        """Args:
        config: of the vision encoder;  dtype: that it runs in.
        """
        self.processor = cast(Any, processor)
        self.config = config
        self.dtype = dtype

    def read(self, messages: list[dict[str, Any]], pictures: Sequence[Picture], key: str) -> Seeing:
        """Args:
            messages: as of `Sample`;  pictures: one for each part of them that is one, in their order.
            key: of the sample, for messages.

        Raises:
            UserError: the words hold a token that stands for pictures, a picture is too narrow, or there is no answer.
        """
        made = self._process(messages, pictures, key)
        text = made["input_ids"][0]
        return Seeing(
            text=text,
            labels=answer_labels(self.processor.tokenizer, text.tolist(), key),
            positions=self._positions(made),
            pictures=self._tokens(made, pictures, torch.nonzero(made["mm_token_type_ids"][0]).flatten()),
        )

    def count(self, messages: list[dict[str, Any]], shapes: Sequence[Shape], key: str) -> int:
        """How many tokens `read` would give, without pixels: pictures of one token a frame are read in place of those
        of these shapes, and theirs are reckoned.

        Raises:
            UserError: as `read`.
        """
        side = self.processor.image_processor.patch_size * self.config.spatial_merge_size
        blanks = [torch.zeros((len(shape.numbers or (0,)), 3, side, side), dtype=torch.uint8) for shape in shapes]
        stands = [Picture(blank, s.numbers, s.fps, ANY) for blank, s in zip(blanks, shapes, strict=True)]
        made = self._process(messages, stands, key)
        answer_labels(self.processor.tokenizer, made["input_ids"][0].tolist(), key)
        words = int((made["mm_token_type_ids"] == 0).sum())
        try:
            return words + sum(map(self._reckoned, shapes))
        except ValueError as error:
            raise _untaken(key, error) from None

    def _reckoned(self, shape: Shape) -> int:
        """Tokens of a picture."""
        height, width = shape.size
        processor = self.processor.image_processor if shape.numbers is None else self.processor.video_processor
        size = _size(processor, shape.pixels)
        if shape.numbers is None:
            limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            patches = processor.get_number_of_image_patches(height, width, limits)
        else:
            patches = processor.get_num_of_video_patches(len(shape.numbers), height, width, {"size": size})
        return patches // self.config.spatial_merge_size**2

    def _process(self, messages: list[dict[str, Any]], pictures: Sequence[Picture], key: str) -> Any:
        words = self.processor.tokenizer.apply_chat_template(messages, tokenize=False)
        videos = [picture for picture in pictures if picture.numbers is not None]
        images = [picture for picture in pictures if picture.numbers is None]
        for token, shown in ((self.processor.image_token, images), (self.processor.video_token, videos)):
            if words.count(token) != len(shown):
                raise UserError(
                    f"{key}: its words hold {token!r}, which stands for a picture, or the tokenizer's chat template "
                    "has no pictures; take the row out, or fetch the tokenizer again"
                )
        options: dict[str, Any] = {"text": [words], "return_tensors": "pt"}
        if images:
            options |= {"images": [picture.frames[0] for picture in images]}
            options |= {"images_kwargs": {"size": _size(self.processor.image_processor, images[0].pixels)}}
        if videos:
            options |= {"videos": [picture.frames for picture in videos]}
            options["videos_kwargs"] = {
                "size": _size(self.processor.video_processor, videos[0].pixels),
                "do_sample_frames": False,
                "video_metadata": [_metadata(picture) for picture in videos],
            }
        try:
            return self.processor(**options)
        except ValueError as error:
            raise _untaken(key, error) from None

    def _positions(self, made: Any) -> Tensor:
        # The model's own function, which reads these of it and nothing else.
        model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=self.config))
        model.get_vision_position_ids = Cosmos3OmniModel.get_vision_position_ids.__get__(model)
        found, _ = Cosmos3OmniModel.get_rope_index(
            model,
            made["input_ids"],
            made["mm_token_type_ids"],
            image_grid_thw=made.get("image_grid_thw"),
            video_grid_thw=made.get("video_grid_thw"),
        )
        return found[:, 0].float()

    def _tokens(self, made: Any, pictures: Sequence[Picture], places: Tensor) -> PictureTokens:
        """The processor keeps images and videos apart; here they stand in the order of the stream."""
        images = _apart(made, "pixel_values", "image_grid_thw")
        videos = _apart(made, "pixel_values_videos", "video_grid_thw")
        ordered = [(images if picture.numbers is None else videos).pop(0) for picture in pictures]
        grids = torch.stack([grid for _, grid in ordered])
        merge, side = self.config.spatial_merge_size, int(self.config.num_position_embeddings**0.5)
        taps, weights = get_vision_interpolation_indices_and_weights(
            grids, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
        return PictureTokens(
            patches=torch.cat([patches for patches, _ in ordered]).to(self.dtype),
            cells=get_vision_position_ids(grids, merge),
            grids=grids,
            taps=taps,
            tap_weights=weights,
            frames=Spans.of(get_vision_cu_seqlens(grids).diff().tolist()),
            places=places,
            rows=torch.arange(places.numel()),
        )


def _untaken(key: str, error: ValueError) -> UserError:
    return UserError(f"{key}: a picture cannot be taken ({error}); take the row out")


def _size(processor: Any, pixels: tuple[int | None, int | None]) -> dict[str, int]:
    """The area that pictures are resized to: the processor's own where their dataset does not say it."""
    (least, most), own = pixels, processor.size
    return {
        "shortest_edge": own["shortest_edge"] if least is None else least,
        "longest_edge": own["longest_edge"] if most is None else most,
    }


def _metadata(picture: Picture) -> VideoMetadata:
    assert picture.numbers is not None
    numbers = list(picture.numbers)
    return VideoMetadata(total_num_frames=numbers[-1] + 1, fps=picture.fps, frames_indices=numbers)


def _apart(made: Any, pixels: str, grids: str) -> list[tuple[Tensor, Tensor]]:
    """(patches, grid) of each picture of a kind."""
    if pixels not in made:
        return []
    parts = made[pixels].split(made[grids].prod(dim=1).tolist())
    return list(zip(parts, made[grids], strict=True))
