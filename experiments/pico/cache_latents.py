r"""Prepare the logs of experiments/pico.yaml, or of another of Pico's experiments, and cache their latents, quickly.

    python experiments/pico/cache_latents.py [--experiment FILE] [key=value ...] [--only NAME ...] \
        [--poses FILE.npz ...]

`cosmos3 train experiments/pico.yaml` does the same with upstream's own convolutions and frame by frame, whose tiny
kernels keep a GPU waiting; here each convolution is a 2D one and clips are padded together, with equal latents up to
rounding. With `--poses`, the states files from which the logs were drawn, frames are drawn from them again instead of
decoded, which takes no video at all and shows the codec what the simulator's camera will show the policy. `--only`
names entries of the mixture, so that several processes can share the work.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from pusht_scenes import pad_canvas
from torch import Tensor
from train_vae import convolve_flat, fuse_norms

from cosmos3_train.config import Clips, Embodiment, load_experiment
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.simulators.pusht_camera import PushTCamera
from cosmos3_train.model.caches import BATCH, ensure_latents
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts
from cosmos3_train.runtime import set_up_logging
from cosmos3_train.training.datamodule import open_dataset
from cosmos3_train.training.strategy import device_for

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data" / "pusht"))
from make_episodes import CONTRACTS, read_states


class PaddingEncoder(Encoder):
    """Puts a robot's square pictures on upstream's canvas all at once instead of frame by frame."""

    def _prepare(self, clips: Tensor, contract: Embodiment | Clips) -> tuple[Tensor, Tensor | None]:
        side, canvas = clips.shape[-1], contract.resolution_tier
        pixels = clips.to(self.parts.vae.device).transpose(1, 2).float() / 127.5 - 1
        sizes = torch.tensor([canvas, canvas, side, side], dtype=torch.float32)
        return pad_canvas(pixels, canvas - side), sizes


class DrawnDataset(PreparedDataset):
    """A prepared folder whose frames are drawn from the poses that its log was drawn from."""

    def __init__(self, folder: Path, embodiment: Embodiment, source: Path | None, files: list[Path]) -> None:
        super().__init__(folder, embodiment, source)
        self._files = files
        self._picture = lru_cache(4 * BATCH)(self._draw)  # windows overlap: a frame is in several of a batch

    @cached_property
    def _episodes(self) -> list[Any]:
        return [episode for file in self._files for episode in read_states(self.embodiment.name, file)]

    @cached_property
    def _cameras(self) -> dict[str, PushTCamera]:
        return {look: PushTCamera(look) for look in CONTRACTS[self.embodiment.name].looks}

    def frames(
        self, row: dict[str, Any], first_only: bool = False, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """As `PreparedDataset.frames`."""
        first = row["start"]
        last = first + (1 if first_only else len(row["timestamps"]))
        frames = torch.stack([self._picture(row["episode_index"], step) for step in range(first, last)])
        return frames if change is None else change(frames)

    def _draw(self, episode_index: int, step: int) -> Tensor:
        episode = self._episodes[episode_index]
        picture = self._cameras[episode.look].draw(episode.agent[step].tolist(), episode.block[step].tolist())
        return torch.from_numpy(picture).permute(2, 0, 1)


def main() -> None:
    """Prepare, encode, say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="experiments/pico.yaml", metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--poses", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    set_up_logging()
    loaded = load_experiment(options.experiment, options.overrides)
    experiment = loaded.experiment
    WanCausalConv3d.forward = convolve_flat  # in this process alone
    parts = load_parts(loaded.model, device_for(experiment.strategy))
    fuse_norms(parts.vae)
    encoder = PaddingEncoder(parts, experiment.embodiments)
    for name, entry in experiment.data.datasets.items():
        if entry.embodiment is None or (options.only and name not in options.only):
            continue
        if not options.poses:
            dataset = open_dataset(loaded, name, entry, encoder)
        else:
            if entry.card:
                open_dataset(loaded, name, entry, None)
            source = loaded.root / entry.source if entry.source else None
            robot = experiment.embodiments[entry.embodiment]
            dataset = DrawnDataset(loaded.root / entry.prepared, robot, source, options.poses)
            ensure_latents(dataset, encoder, experiment.data.workers)
        logging.getLogger("cosmos3_train").info("%s: %d windows to train on", name, dataset.count("train"))


if __name__ == "__main__":
    main()
