"""Next token: cross-entropy on labelled text tokens, a mean over all labelled tokens of the step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cosmos3_train.model.omni import text_logits_loss
from cosmos3_train.types import IGNORED_LABEL, PackedSequence, TokenSample, Velocities


def labelled_tokens(samples: Sequence[TokenSample]) -> int:
    """How many tokens of the samples are predicted."""
    return sum(int((s.labels != IGNORED_LABEL).sum()) for s in samples if s.labels is not None)


def loss(velocities: Velocities, packed: PackedSequence, head: nn.Module, chunk: int) -> Tensor:
    """Summed cross-entropy of the pack's labelled tokens, float32 scalar; divide by the step's labelled tokens."""
    return text_logits_loss(velocities.text_hidden, packed.labels, head, chunk)
