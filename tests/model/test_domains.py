"""A slot of the action heads that upstream has given away is taken, unless the card says that it is shared."""

from __future__ import annotations

import pytest

from cosmos3_train.config import UserError
from cosmos3_train.model.domains import REGISTERED, refuse_taken_domains
from tests.data.logs import embodiment


def test_upstream_s_table_is_read():
    assert REGISTERED["pusht"] == 4 and REGISTERED["droid_lerobot"] == REGISTERED["robomind-franka"] == 8


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ([{}], r"embodiments\.mover\.domain_id is 4, .* upstream's 'pusht'; .* such as 31, .* shares_domain: pusht"),
        ([{"domain_id": 8}], r"domain_id is 8, .* upstream's 'droid_lerobot' and 'robomind-franka'; "),
        ([{"shares_domain": "umi"}], r"domain_id is 4, .*, and shares_domain names 'umi', which is not there; "),
        ([{"shares_domain": "mover"}], r"domain_id is 4, .*, and shares_domain names 'mover', which is not there; "),
        ([{"domain_id": 31}, {"name": "arm", "domain_id": 0}], r"embodiments\.arm\.domain_id is 0, .* such as 30, "),
    ],
)
def test_a_slot_of_upstream_s_is_refused_under_another_name(cards, words):
    with pytest.raises(UserError, match=words) as caught:
        refuse_taken_domains([embodiment(**card) for card in cards])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cards",
    [
        [{"domain_id": 31}],
        [{"name": "pusht"}],
        [{"name": "robomind-franka", "domain_id": 8}],
        [{"shares_domain": "pusht"}],
        [{"name": "pusht"}, {"shares_domain": "pusht"}],
        [{"name": "arm", "shares_domain": "pusht"}, {"shares_domain": "arm"}],
    ],
)
def test_a_free_slot_upstream_s_own_robot_and_one_that_shares_are_not(cards):
    refuse_taken_domains([embodiment(**card) for card in cards])
