"""Cutting a rank's share of a step into packs under the token budget."""

from __future__ import annotations

from collections.abc import Sequence

from cosmos3_train.config import UserError
from cosmos3_train.model.packing import Layout
from cosmos3_train.types import TokenSample


def split_into_packs(samples: Sequence[TokenSample], layout: Layout, budget: int) -> list[list[TokenSample]]:
    """The samples in as few packs as first-fit by falling length makes, none over `budget` tokens of both streams.

    The order inside a step carries no meaning: its gradient is a sum over samples.

    Raises:
        UserError: one sample alone is larger than the budget; names it, its size and the key to raise.
    """
    sizes = {place: layout.tokens(sample) for place, sample in enumerate(samples)}
    packs: list[tuple[int, list[int]]] = []
    for place in sorted(sizes, key=lambda p: (-sizes[p], p)):
        size = sizes[place]
        if size > budget:
            raise UserError(
                f"sample {samples[place].key!r} ({samples[place].task}) has {size} tokens, over "
                f"training.tokens_per_micro_batch = {budget}; raise it to at least {size}"
            )
        for index, (used, members) in enumerate(packs):
            if used + size <= budget:
                packs[index] = (used + size, [*members, place])
                break
        else:
            packs.append((size, [place]))
    return [[samples[place] for place in sorted(members)] for _, members in packs]
