r"""Assemble Cosmos3-Pico, a complete Cosmos 3 folder in the published diffusers layout, from its parts.

    python experiments/pico/build_folder.py --transformer DIR_OR_NONE --vae DIR_OR_NONE --output DIR \
        [--statistics DIR ...]

A part given as `none` is made here: the transformer at random from the seed, the VAE untrained. Weights are bf16,
as published, in shards of at most 10 MB. The statistics of the prepared folders that the transformer learnt from go
beside it under the names that an export gives them, for they say what its actions mean. The README in the output
folder is left as it is. The folder is written part by part and then loaded once as a pipeline, so a mistake shows here
and not at its user's.
"""

import argparse
import json
import logging
import math
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_cosmos3 import DomainAwareLinear
from torch import nn
from train_vae import build_vae
from transformers import AutoTokenizer

from cosmos3_train.data.statistics import Statistics

logger = logging.getLogger("build_folder")

LAYERS = 6
MAX_SHARD_SIZE = "10MB"
LIMIT_BYTES, LIMIT_FILE_BYTES = 24_000_000, 12_000_000
INITIAL_STD = 0.02


def new_transformer(vocabulary: int, seed: int) -> Cosmos3OmniTransformer:
    """A random transformer (fp32): normal(0, 0.02), what writes into the residual scaled by 1/sqrt(2 layers)."""
    transformer = Cosmos3OmniTransformer(
        hidden_size=256,
        num_hidden_layers=LAYERS,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=480,  # keeps the folder within 24 MB, the timestep embedder's float32 tensors included
        rope_axes_dim=[12, 10, 10],
        rope_scaling={"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        vocab_size=math.ceil(vocabulary / 64) * 64,
        action_gen=True,
        action_dim=64,
        num_embodiment_domains=32,
        sound_gen=True,
        sound_dim=64,
        sound_latent_fps=25.0,
    )
    generator = torch.Generator().manual_seed(seed)
    residual_std = INITIAL_STD / math.sqrt(2 * LAYERS)
    with torch.no_grad():
        for name, module in transformer.named_modules():
            writes_residual = name.endswith(("to_out", "to_add_out", "down_proj"))
            if isinstance(module, DomainAwareLinear):
                nn.init.trunc_normal_(module.fc.weight, std=INITIAL_STD, generator=generator)
                nn.init.zeros_(module.bias.weight)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, residual_std if writes_residual else INITIAL_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif name == "embed_tokens":
                module.weight.normal_(0, INITIAL_STD, generator=generator)
        # Velocities start near zero, so early training is the mean's and not the noise of random heads.
        for head in (transformer.proj_out, transformer.audio_proj_out, transformer.action_proj_out.fc):
            head.weight.mul_(0.1)
    return transformer


def new_scheduler() -> UniPCMultistepScheduler:
    """UniPC on the training's own σ: shift 3, which is what the 256 tier trains with, and no Karras sigmas.

    Karras sigmas as published spend their steps near σ = 1 for 720p video; ten steps on a small clip want the
    schedule of the training.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=2,
        solver_type="bh2",
        final_sigmas_type="zero",
    )


def write_parts(transformer: str, vae: str, tokenizer: Path, output: Path, seed: int) -> None:
    """Write every part of the pipeline; `transformer` and `vae` are folders or `none`."""
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    if transformer == "none":
        model = new_transformer(vocabulary, seed)
        nn.Module.to(model, dtype=torch.bfloat16)  # upstream's own is decorated out of its type
    else:
        model = Cosmos3OmniTransformer.from_pretrained(transformer, dtype=torch.bfloat16)
    if model.vocab_size < vocabulary:
        raise ValueError(f"transformer holds {model.vocab_size} tokens, the tokenizer {vocabulary}")
    if vae == "none":
        torch.manual_seed(seed)
        codec = build_vae()
    else:
        codec = AutoencoderKLWan.from_pretrained(vae)
    for name in ("transformer", "vae", "scheduler"):
        shutil.rmtree(output / name, ignore_errors=True)  # or stale shards of another size would stay
    model.save_pretrained(output / "transformer", max_shard_size=MAX_SHARD_SIZE)
    nn.Module.to(codec, dtype=torch.bfloat16)  # upstream's own is decorated out of its type
    codec.save_pretrained(output / "vae", max_shard_size=MAX_SHARD_SIZE)
    new_scheduler().save_pretrained(output / "scheduler")
    for name in ("transformer", "vae"):
        path = output / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the folder that the part came from
        path.write_text(json.dumps(config, indent=2) + "\n")
        for weights in path.parent.glob("*.safetensors"):
            weights.chmod(0o644)
    if tokenizer.resolve() != (output / "text_tokenizer").resolve():
        shutil.copytree(tokenizer, output / "text_tokenizer", dirs_exist_ok=True)
    index = {
        "_class_name": "Cosmos3OmniPipeline",
        "_diffusers_version": diffusers.__version__,
        "default_use_system_prompt": False,
        "enable_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "sound_tokenizer": [None, None],
        "text_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "use_native_flow_schedule": False,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_statistics(robots: dict[str, Statistics], output: Path) -> None:
    """The statistics of each robot that the transformer learnt from, the first under the plain name."""
    for path in output.glob("statistics.*json"):
        path.unlink()
    for place, (name, statistics) in enumerate(robots.items()):
        statistics.save(output / f"statistics{f'.{name}' if place else ''}.json")


def check_folder(folder: Path) -> None:
    """Load the folder as its users do and hold it to its size limits."""
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False, dtype=torch.bfloat16)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    largest = max(sizes, key=lambda path: sizes[path])
    if sum(sizes.values()) > LIMIT_BYTES or sizes[largest] > LIMIT_FILE_BYTES:
        raise ValueError(f"{folder}: {sum(sizes.values())} bytes, of which {largest.name} {sizes[largest]}")
    for name in ("transformer", "vae"):
        count = sum(p.numel() for p in getattr(pipeline, name).parameters())
        logger.info("%s: %d parameters", name, count)
    logger.info("%d bytes in %d files, largest %s %d", sum(sizes.values()), len(sizes), largest, sizes[largest])


def main() -> None:
    """Assemble and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transformer", default="none", help="folder of trained weights, or none")
    parser.add_argument("--vae", default="none", help="folder of a trained VAE, or none")
    parser.add_argument("--statistics", nargs="*", default=[], type=Path, help="prepared folders of the trained robots")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/cosmos3_pico/text_tokenizer"))
    parser.add_argument("--output", type=Path, default=Path("data/cosmos3_pico"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = [Statistics.load(folder) for folder in args.statistics]
    robots = {statistics.embodiment: statistics for statistics in found}
    if len(robots) < len(found):
        parser.error(f"--statistics: two folders of one robot among {', '.join(s.embodiment for s in found)}")
    write_parts(args.transformer, args.vae, args.tokenizer, args.output, args.seed)
    write_statistics(robots, args.output)
    check_folder(args.output)


if __name__ == "__main__":
    main()
