"""The denoising loss: for each sample the mean squared error of its velocities, over all its elements."""

from __future__ import annotations

from torch import Tensor

from cosmos3_train.types import ModalityTarget


def squared_error(predicted: Tensor, target: ModalityTarget) -> Tensor:
    """float32 [n]: the squared error of each generated token, summed over its valid elements."""
    return ((predicted.float() - target.velocity).square() * target.valid).sum(dim=1)


def sample_losses(predicted: Tensor, target: ModalityTarget) -> Tensor:
    """float32 [B]: each sample's mean squared error; 0 where a sample has no generated token of this modality.

    The denominator counts the elements that `target.elements` says: all of the sample's, given ones included, as the
    checkpoints were trained, or the generated ones alone.
    """
    sums = target.elements.new_zeros(target.elements.shape).index_add(
        0, target.sample, squared_error(predicted, target)
    )
    return sums / target.elements.clamp(min=1)
