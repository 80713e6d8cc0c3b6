"""A bank of clips drawn by the simulator's own camera, pixel for pixel what a policy sees, for training the VAE.

The camera draws on the CPU (about 0.4 ms a frame and core), so the bank is made once, by forked processes and
before CUDA starts. Poses come from recorded episodes where a states file is given, else from made-up motion.
"""

import multiprocessing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pusht_scenes import random_poses
from torch import Tensor

from cosmos3_train.evaluation.simulators.pusht_camera import PushTCamera

CLIP_FRAMES = 17
STATE_COLUMNS = ("agent", "block", "length")


class Bank(NamedTuple):
    """`poses` float32 [N, 17, 5]; `pixels` uint8 [N, 17, 96, 96, 3], RGB, PushT's own camera."""

    poses: Tensor
    pixels: Tensor

    def to(self, device: torch.device) -> "Bank":
        """The bank on `device`: 470 kB a clip."""
        return Bank(self.poses.to(device), self.pixels.to(device))


def read_episodes(file: Path) -> list[np.ndarray]:
    """Episodes of a states file of data/pusht/make_episodes.py, each float32 [T, 5], as the scenes' poses."""
    with np.load(file, allow_pickle=False) as stored:
        missing = [name for name in STATE_COLUMNS if name not in stored.files]
        if missing:
            raise ValueError(f"--states {file} lacks {missing}: write it with data/pusht/make_episodes.py --states")
        poses = np.concatenate([stored["agent"], stored["block"]], axis=1).astype(np.float32)
        ends = np.cumsum(stored["length"])
    return [part for part in np.split(poses, ends[:-1]) if len(part) >= CLIP_FRAMES]


def windows(episodes: list[np.ndarray], clips: int, seed: int) -> Tensor:
    """`clips` windows of 17 frames [clips, 17, 5], each from an episode and place drawn from the seed."""
    draw = np.random.default_rng(seed)
    chosen = []
    for _ in range(clips):
        episode = episodes[draw.integers(len(episodes))]
        start = draw.integers(len(episode) - CLIP_FRAMES + 1)
        chosen.append(episode[start : start + CLIP_FRAMES])
    return torch.from_numpy(np.stack(chosen))


def draw_clip(poses: np.ndarray) -> np.ndarray:
    """Pictures uint8 [T, 96, 96, 3] of poses [T, 5]."""
    camera = PushTCamera()
    return np.stack([camera.draw(pose[:2], pose[2:]) for pose in poses])


def draw_bank(poses: Tensor, workers: int) -> Bank:
    """The clips of `poses` [N, 17, 5], drawn by `workers` processes (1: by this one)."""
    clips = list(poses.double().numpy())
    if workers <= 1:
        return Bank(poses, torch.from_numpy(np.stack([draw_clip(clip) for clip in clips])))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        drawn = pool.map(draw_clip, clips, chunksize=16)
    return Bank(poses, torch.from_numpy(np.stack(drawn)))


def make_banks(states: Path | None, clips: int, held_out: int, seed: int, workers: int) -> tuple[Bank, Bank]:
    """(training bank, held-out bank). Held-out clips are of the last 5 % of the episodes, which training never sees."""
    if states is None:
        generator = torch.Generator().manual_seed(seed)
        poses = random_poses(clips + held_out, CLIP_FRAMES, generator)
        training, kept = poses[:clips], poses[clips:]
    else:
        episodes = read_episodes(states)
        split = len(episodes) - max(1, len(episodes) // 20)
        if split < 1:
            raise ValueError(f"--states {states} holds {len(episodes)} episode of 17 frames or more; give at least 2")
        training = windows(episodes[:split], clips, seed)
        kept = windows(episodes[split:], held_out, seed + 1)
    return draw_bank(training, workers), draw_bank(kept, workers)
