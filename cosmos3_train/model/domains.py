"""Slots of the action heads that upstream has registered, and the check that a robot does not take another's."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _EMBODIMENT_TO_DOMAIN_ID

from cosmos3_train.config import Embodiment, UserError, free_domain

REGISTERED: dict[str, int] = dict(_EMBODIMENT_TO_DOMAIN_ID)
"""Upstream's embodiment → domain. Read once: an export registers robots of its own in that table."""


def refuse_taken_domains(embodiments: Iterable[Embodiment]) -> None:
    """Raise `UserError` for a robot on a slot that upstream has given to a robot of another name.

    A published checkpoint knows that other robot there. A card may say so (`shares_domain`): the name of upstream's,
    or of another of these embodiments that has the slot.
    """
    cards = {card.name: card for card in embodiments}
    for card in cards.values():
        owners = sorted(name for name, domain in REGISTERED.items() if domain == card.domain_id)
        other = cards.get(card.shares_domain or "")
        shares = card.shares_domain in owners or (other not in (None, card) and other.domain_id == card.domain_id)
        if owners and card.name not in owners and not shares:
            said = f", and shares_domain names {card.shares_domain!r}, which is not there" if card.shares_domain else ""
            free = free_domain([*REGISTERED.values(), *(known.domain_id for known in cards.values())])
            raise UserError(
                f"embodiments.{card.name}.domain_id is {card.domain_id}, which is taken by upstream's "
                f"{' and '.join(map(repr, owners))}{said}; give it a free slot, such as {free}, or say "
                f"shares_domain: {owners[0]} on the card"
            )
