"""Pictures that a log stores as JPEG or PNG bytes, decoded."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.pixels import TooLarge, check_pixels


def decode_images(encoded: Iterable[bytes | memoryview], where: str, numbers: Iterable[int] | None = None) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB, of T files' bytes; grey ones and palettes become RGB.

    Args:
        numbers: what errors call them; None counts from 0.

    Raises:
        UserError: bytes that are no picture, are cut off or too large (`pixels`), or pictures of different sizes;
            `where` names them.
    """
    pictures = []
    for number, content in zip(itertools.count() if numbers is None else numbers, encoded, strict=False):
        name = f"{where}, picture {number}"
        try:
            with Image.open(io.BytesIO(content)) as image:
                check_pixels(image.height, image.width, name)
                pictures.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        except TooLarge:
            raise
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problem = " ".join(str(error).split())[:100]
            raise UserError(f"{name}: not a readable picture ({problem}); copy it again") from None
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{picture.shape[1]}x{picture.shape[2]}" for picture in (pictures[0], pictures[-1])]
            raise UserError(f"{name}: is {sizes[1]}, but the first is {sizes[0]}")
    return torch.from_numpy(np.stack(pictures))
