"""Prepare the log of experiments/pico.yaml and cache its latents, with the codec's convolutions made fast.

    python experiments/pico/cache_latents.py [key=value ...]

`cosmos3 train experiments/pico.yaml` does the same with upstream's own convolutions, whose tiny 3D kernels keep a GPU
waiting: equal latents up to rounding, in several times the time.
"""

import logging
import sys

from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from train_vae import convolve_flat

from cosmos3_train.config import load_experiment
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts
from cosmos3_train.runtime import set_up_logging
from cosmos3_train.training.datamodule import open_datasets
from cosmos3_train.training.strategy import device_for


def main() -> None:
    """Prepare, encode, say how much there is."""
    set_up_logging()
    loaded = load_experiment("experiments/pico.yaml", sys.argv[1:])
    WanCausalConv3d.forward = convolve_flat  # in this process alone
    encoder = Encoder(load_parts(loaded.model, device_for(loaded.experiment.strategy)), loaded.experiment.embodiments)
    for name, (dataset, _) in open_datasets(loaded, encoder).items():
        logging.getLogger("cosmos3_train").info("%s: %d windows to train on", name, dataset.count("train"))


if __name__ == "__main__":
    main()
