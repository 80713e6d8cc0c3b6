"""The clips that ship: what is heard follows from what is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cosmos3_train.data.card import load_card
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sound import SoundForm
from tests.data.sounds import pitch

ROOT = Path(__file__).parents[2]


def test_the_pitch_follows_the_height_of_the_disc_and_its_side_the_side(tmp_path):
    card = load_card(ROOT / "data" / "whistle" / "clips.yaml")
    summary = prepare(card, card.clips(), card.source_folder(ROOT), tmp_path / "out", progress=False)
    assert sum(summary.sounding.values()) == sum(summary.windows.values()) == 16 and not summary.silent
    dataset = PreparedDataset(tmp_path / "out", None, sound=SoundForm(48000, 2))
    for number in range(3):
        row = dataset.row(number)
        assert row["instruction"].endswith(".") and row["sound_caption"].startswith("A clear whistle")
        frames, sound = dataset.frames(row).numpy().astype(int), dataset.waveform(row).numpy()
        for frame in range(6, 60, 12):
            bright = np.ptp(frames[frame], axis=0) > 60
            height, across = 1 - np.argwhere(bright).mean(axis=0)[0] / 256, np.argwhere(bright).mean(axis=0)[1] / 256
            middle = round((frame + 0.5) / 24 * 48000)
            heard = sound[:, middle - 2000 : middle + 2000]
            loudness = np.sqrt(np.square(heard).mean(axis=1))
            assert abs(np.log2(pitch(heard.sum(axis=0), 48000) / 200) / 3 - height) < 0.03
            assert abs(np.arctan2(loudness[1], loudness[0]) * 2 / np.pi - across) < 0.08
