"""The two logs that ship: small, whole, of the seeds their cards state; and the expert that makes them."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cosmos3_train.config import load_embodiment
from cosmos3_train.data.card import load_card
from cosmos3_train.data.scan import Scan, scan_log
from cosmos3_train.data.sources import open_log

REPOSITORY = Path(__file__).resolve().parents[2]
CARDS = sorted((REPOSITORY / "data/pusht").glob("*.yaml"))
FIELDS = {
    "name", "format", "source", "licence", "size", "layout", "columns", "rate_hz", "tasks", "embodiment",
    "known_faults", "how_made",
}  # fmt: skip


@pytest.fixture(scope="module")
def make_episodes() -> Iterator[ModuleType]:
    """The script as a module; its folder stays importable, as it is when the script runs."""
    sys.path.insert(0, str(REPOSITORY / "data/pusht"))
    yield importlib.import_module("make_episodes")
    sys.path.remove(str(REPOSITORY / "data/pusht"))


def test_both_cards_are_there() -> None:
    assert [card.name for card in CARDS] == ["log.yaml", "moves_log.yaml"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_shipped_log_is_small_and_whole(card: Path) -> None:
    fields = yaml.safe_load(card.read_text())
    assert set(fields) == FIELDS
    root = REPOSITORY / fields["source"]
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 4_000_000
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert set(fields["columns"]) == {"observation.images.top", "observation.state", "action"}
    with av.open(str(root / "videos/observation.images.top/chunk-000/file-000.mp4")) as container:
        assert container.streams.video[0].average_rate == fields["rate_hz"]
        assert sum(1 for _ in container.decode(video=0)) == rows.num_rows
    action, state = (np.stack(rows[name].to_pylist()) for name in ("action", "observation.state"))
    largest = 512 if fields["embodiment"] == "pusht" else 100
    assert np.isfinite(action).all() and np.abs(action).max() <= largest
    assert state.min() >= 0 and state.max() <= largest
    lead = np.linalg.norm(action - state, axis=1) / 5.12 if largest == 512 else np.linalg.norm(action, axis=1)
    assert lead.max() < 10, "the target stays within 10 cm of the agent"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_scan_of_a_shipped_log_finds_nothing(path: Path) -> None:
    card = load_card(path)
    assert card.embodiment is not None
    log, scan = open_log(card, card.source_folder(REPOSITORY)), Scan()
    assert list(scan_log(log, card, load_embodiment(card.embodiment, REPOSITORY), scan, threads=2)) == []
    assert scan.items == len(log.episodes) and scan.frames > 6000


def test_the_expert_solves_fresh_starts_under_both_contracts(make_episodes: ModuleType) -> None:
    for contract in make_episodes.CONTRACTS:
        coverage = [make_episodes.plan_episodes(contract, seed)[0].max_coverage for seed in (2, 3, 4)]
        assert min(coverage) > 0.9


def test_evaluation_seeds_never_make_data(make_episodes: ModuleType) -> None:
    for seed in (90_000, 100_000, 100_049, -1):
        with pytest.raises(AssertionError, match="seed"):
            make_episodes.plan_episodes("pusht", seed)


def test_stored_poses_draw_the_same_pictures(make_episodes: ModuleType, tmp_path: Path) -> None:
    episodes = [make_episodes.plan_episodes("pusht_moves", seed)[0] for seed in (21, 24)]
    file = tmp_path / "states.npz"
    make_episodes.save_states("pusht_moves", episodes, file)
    for kept, ((stored, pictures),) in zip(
        episodes, make_episodes.stored_episodes("pusht_moves", [file], 1), strict=True
    ):
        assert stored.seed == kept.seed
        np.testing.assert_array_equal(stored.action, kept.action)
        np.testing.assert_array_equal(pictures, make_episodes.draw(kept))
    with pytest.raises(ValueError, match="contract"):
        next(make_episodes.stored_episodes("pusht", [file], 1))


def test_other_robots_tell_the_same_play(make_episodes: ModuleType, tmp_path: Path) -> None:
    (episode,) = make_episodes.plan_episodes("pusht", 21)
    file = tmp_path / "states.npz"
    make_episodes.save_states("pusht", [episode], file)
    (turned,), (swapped,) = (make_episodes.read_states(name, file) for name in ("pusht_turned", "pusht_swapped"))
    np.testing.assert_allclose(swapped.action[:, ::-1] * 51.2, episode.action[::2], atol=1e-3)
    # Seed 21: a camera turned by 90 degrees counter-clockwise, so the table's (x, y) is the picture's (y, 512 - x).
    seen = turned.state + turned.action
    np.testing.assert_allclose(np.stack([512 - seen[:, 1], seen[:, 0]], 1), episode.action, atol=1e-3)
    own, other = make_episodes.draw(episode), make_episodes.draw(turned)
    assert np.corrcoef(own[0, ..., 1].ravel(), np.rot90(other[0], -1)[..., 1].ravel())[0, 1] > 0.99
    x, y = np.round(turned.state[0] / 512 * 96 - 0.5).astype(int)
    blue = other[0, y, x].astype(int)
    assert blue[2] > blue[0] + 50, "the agent is where the state says"
    with pytest.raises(ValueError, match="contract"):
        make_episodes.read_states("pusht_moves", file)
