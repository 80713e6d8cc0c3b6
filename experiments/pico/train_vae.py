"""Train Cosmos3-Pico's VAE: an `AutoencoderKLWan` with Wan 2.2's contract (48 channels, 4 x 16 x 16), tiny.

    torchrun --nproc-per-node GPUS experiments/pico/train_vae.py --output DIR --minutes 4 --workers 16 --states FILE.npz

Without torchrun it is one process, on one GPU or the CPU.

Notable choices. Most clips are drawn beforehand by the simulator's own camera (pusht_bank.py), the others on the
training device as they are needed, in other looks and sizes (pusht_scenes.py). Sizes are set by
encoding on a CPU: 16 channels where the picture is large, 64 where it is small, bf16 weights. The two mid-block
attentions are held at zero, so that nothing looks at the whole canvas, and most of the training uses a smaller one
than the pipeline's 256 x 256. Its last part does not: told to say where things are, the codec looks at edges, up to
more than 96 px away. Single frames first, then clips: a step on stills costs a tenth of one on clips, and most of what
is to be learnt is in them. Decoding sees the cropped latent only, as in deployment. A linear head that is thrown away
reads agent and block off every cell of the latent: what a policy has to find there is then easy to find. The absolute
error gives way to the squared one, which PSNR is made of, towards the end. The schedule runs on the clock: a run is
reproducible in its data, not in its number of steps.
Writes DIR/vae (diffusers layout, bf16), DIR/vae_report.json and DIR/vae_reconstructions.png.
"""

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResidualBlock,
    WanRMS_norm,
    unpatchify,
)
from PIL import Image
from pusht_bank import Bank, make_banks
from pusht_scenes import (
    PALETTE,
    Clips,
    change_look,
    disguise,
    pad_canvas,
    palettes,
    places,
    random_poses,
    render,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos3_train.evaluation.simulators.pusht_camera import LOOKS

logger = logging.getLogger("train_vae")

SPATIAL, TEMPORAL, CHANNELS = 16, 4, 48
CLIP_FRAMES = (1, 5, 17)
STILL_SHARE = 0.3  # of the time, spent on single frames before clips come in
CLIPS_AFTERWARDS = (0.3, 0.2, 0.5)  # shares of the lengths from then on
MARGIN, WHOLE_MARGIN = 32, 160  # px of canvas beside the content: in most of the run, and in its last part (256 - 96)
WHOLE_MARGIN_FROM = 0.85  # of the time
CONTENT_SIZES = (
    (96, 96),
    (96, 128),
    (128, 96),
    (64, 64),
    (144, 144),
)  # height, width; the first is PushT's own
KL_WEIGHT = 1e-5
PLACE_WEIGHT = 2.0
SQUARES_FROM = 0.6  # of the time: from here to the end the absolute error fades out
BANK = 0.9  # share of the steps on clips that a camera drew
OTHER_LOOKS = 0.4  # of them, share seen by one of the other cameras
PLAIN = 0.5  # share of made-up clips that keep PushT's own look
REPORT_EVERY_SECONDS = 30


def build_vae() -> AutoencoderKLWan:
    """The untrained codec, its attentions silenced and frozen."""
    vae = AutoencoderKLWan(
        base_dim=16,  # encoding 17 frames of 256 x 256 takes 0.2 s on one core; half of that is this first stage
        decoder_base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=SPATIAL,
    )
    for name, parameter in vae.named_parameters():
        if ".attentions." in name:
            parameter.requires_grad_(False)
            if ".proj." in name:
                nn.init.zeros_(parameter)
    return vae


def load_vae(folder: Path) -> AutoencoderKLWan:
    """A codec that was trained before, to go on with, in float32."""
    vae = build_vae()
    vae.load_state_dict(AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).state_dict())
    return vae


def _norm_then_silu(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).clamp(min=1e-24).rsqrt()
    return nn.functional.silu(wide * scale * gamma.float()).to(x.dtype)


class NormThenSiLU(WanRMS_norm):
    """A norm and the SiLU behind it as one kernel, in the precision of its input.

    Upstream's make about eight, most of them in float32 (its weight's), which is most of what a step costs here.
    """

    fused = staticmethod(torch.compile(_norm_then_silu))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        flat = x.movedim(1, -1).reshape(-1, x.shape[1])
        if flat.is_cuda:
            torch._dynamo.maybe_mark_dynamic(flat, 0)
        out = (self.fused if flat.is_cuda else _norm_then_silu)(flat, self.gamma.flatten())
        return out.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def fuse_norms(vae: AutoencoderKLWan) -> None:
    """Let the residual blocks of `vae` use `NormThenSiLU`: it computes the same but for rounding, and faster."""
    # A kernel for each number of channels, any number of pixels; by itself it would make one for all, a slow one.
    torch._dynamo.config.automatic_dynamic_shapes = False
    for block in vae.modules():
        if isinstance(block, WanResidualBlock):
            block.norm1.__class__ = block.norm2.__class__ = NormThenSiLU
            block.nonlinearity = nn.Identity()


class PlaceHead(nn.Conv3d):
    """Reads `pusht_scenes.places` off each cell of the latent of a 96 x 96 picture. It serves the training alone.

    It is linear, and asks every cell for the whole picture's answer, most of all the cells about the agent for the
    agent's and those about the block for the block's: a policy then finds them at one glance.
    """

    NEAR = 1.5
    """Cells from what is asked for at which a cell's answer still counts most of what it counts there."""
    FAR = 0.05
    """What the answer of a far cell counts at least."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, 6, kernel_size=1)

    def error(self, latents: Tensor, seen: Tensor) -> Tensor:
        """Mean absolute error against `seen` [B, T, 6] at each latent's last frame; 0 where it is NaN."""
        found = self(latents).permute(0, 2, 3, 4, 1)  # [B, t, h, w, 6]
        wanted = seen[:, ::TEMPORAL, None, None]
        known = ~wanted.isnan()
        wanted = wanted.nan_to_num()
        rows, columns = (2 * (torch.arange(n, device=latents.device) + 0.5) / n - 1 for n in latents.shape[-2:])
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # x, y of the cells' centres, in [-1, 1]
        near = 2 * self.NEAR / latents.shape[-1]

        def counts(place: Tensor) -> Tensor:
            return self.FAR + (-0.5 * ((cells - place) / near).square().sum(-1, keepdim=True)).exp()

        agent, block = counts(wanted[..., :2]), counts(wanted[..., 2:4])
        weight = known * torch.cat([agent.expand(*agent.shape[:-1], 2), block.expand(*block.shape[:-1], 4)], -1)
        return ((found - wanted).abs() * weight).sum() / weight.sum().clamp(min=1)


def convolve_flat(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """`WanCausalConv3d.forward` as one 2D convolution, channels last; equal up to rounding, several times as fast.

    The taps in time become input channels; the first frame of a clip, before which there is nothing, needs the last
    tap alone.
    """
    taps, stride = self.kernel_size[0], self.stride[0]
    weight, padding = self.weight, cast(tuple[int, ...], self._padding)  # as F.pad wants it: last axis first
    past = 0 if cache_x is None else cache_x.shape[2]
    if past == 0 and x.shape[2] == 1 and padding[4] == taps - 1:
        weight, steps = weight[:, :, -1:], x
    else:
        known = x if cache_x is None or padding[4] == 0 else torch.cat([cache_x, x], 2)
        missing = max(0, padding[4] - past)
        known = F.pad(known, (0, 0, 0, 0, missing, 0)) if missing else known
        last = known.shape[2] - taps + 1
        steps = torch.cat([known[:, :, tap : tap + last : stride] for tap in range(taps)], 1) if taps > 1 else known
    batch, channels, frames, height, width = steps.shape
    flat = steps.transpose(1, 2).reshape(batch * frames, channels, height, width)
    flat = flat.contiguous(memory_format=torch.channels_last)
    kernel = weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(flat, kernel, self.bias, padding=(padding[2], padding[0]))
    return out.unflatten(0, (batch, frames)).transpose(1, 2)


def encode_content(vae: AutoencoderKLWan, pixels: Tensor, margin: int = WHOLE_MARGIN) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, each [B, 48, t, h, w], of the content's latent: padded canvas in, crop out."""
    height, width = pixels.shape[-2] // SPATIAL, pixels.shape[-1] // SPATIAL
    (posterior,) = vae.encode(pad_canvas(pixels, margin), return_dict=False)
    return posterior.mean[..., :height, :width], posterior.logvar[..., :height, :width]


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Upstream's chunked decode without its final clamp, under which saturated pixels get no gradient."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, index : index + 1]
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=2)


def bank_clips(bank: Bank, chosen: Tensor, frames: int, first: int = 0) -> Clips:
    """`frames` frames from `first` on of the chosen clips [B] of a bank, as the camera drew them."""
    device = bank.pixels.device
    poses = bank.poses[chosen, first : first + frames]
    own = torch.tensor(PALETTE, device=device, dtype=torch.float32).expand(len(chosen), -1, -1)
    pixels = bank.pixels[chosen, first : first + frames].permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    return Clips(pixels, render(poses, own).weight, places(poses))


def training_clips(
    bank: Bank, generator: torch.Generator, draws: np.random.Generator, batch: int, frames: int, size: tuple[int, int]
) -> Clips:
    """One training batch, all clips of one length and size: as a camera drew them, or made up, some disguised."""
    height, width = size
    if draws.random() < BANK and size == CONTENT_SIZES[0]:
        chosen = torch.randint(len(bank.poses), (batch,), generator=generator, device=generator.device)
        clips = bank_clips(bank, chosen, frames, first=int(draws.integers(CLIP_FRAMES[-1] - frames + 1)))
        others = [look for name, look in LOOKS.items() if name != "own"]
        return change_look(clips, others[draws.integers(len(others))]) if draws.random() < OTHER_LOOKS else clips
    palette = palettes(batch, generator, PLAIN)
    clips = render(random_poses(batch, frames, generator), palette, height, width)
    return disguise(clips, generator, PLAIN)


def losses(
    vae: AutoencoderKLWan, head: PlaceHead, clips: Clips, margin: int, squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction, KL, places): weighted error of the pixels, nats per latent element, error of the head.

    The error of a pixel goes over from |e| + 5 e² to 20 e² as `squares` [] goes from 0 to 1.
    """
    mean, logvar = encode_content(vae, clips.pixels, margin)
    mean, logvar = mean.float(), logvar.float()
    latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    error = (decode_unclamped(vae, latents).float() - clips.pixels).abs()
    weight = clips.weight / clips.weight.mean()
    reconstruction = (weight * ((1 - squares) * error + (5.0 + 15.0 * squares) * error.square())).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    if clips.pixels.shape[-2:] != CONTENT_SIZES[0]:
        return reconstruction, kl, torch.zeros_like(kl)
    return reconstruction, kl, head.error(latents, clips.places)


def held_out_clips(held_out: Bank) -> dict[str, Clips]:
    """All clips of the held-out bank under each contract's camera."""
    own = bank_clips(held_out, torch.arange(len(held_out.poses), device=held_out.poses.device), CLIP_FRAMES[-1])
    return {"pusht": own, "pusht_moves": change_look(own, LOOKS["warm"])}


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: Clips) -> dict[str, float]:
    """dB over whole frames, over what moves, and of the worst frame, through canvas, crop and decode."""
    weights = next(vae.parameters())
    mean, _ = encode_content(vae, clips.pixels.to(weights.dtype))
    error = (vae.decode(mean, return_dict=False)[0].float() - clips.pixels).square()
    moving = (clips.weight > 1).expand_as(error)
    per_frame = error.mean((1, 3, 4)).clamp(min=1e-10)

    def decibel(mse: Tensor) -> float:
        return round(float(10 * torch.log10(4.0 / mse)), 3)

    return {
        "frames": decibel(error.mean()),
        "moving": decibel(error[moving].mean()),
        "worst_frame": decibel(per_frame.max()),
    }


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Learning rate: 100 steps of warm-up, then a cosine over the run's share of time, to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * cosine)


class Steps:
    """Optimizer steps, one CUDA graph a shape: the codec is so small that launching its kernels would be the cost.

    Gradients lie in one buffer, which is what several processes sum between the graphs of backward and of descent.
    """

    def __init__(self, vae: AutoencoderKLWan, head: PlaceHead, average: AutoencoderKLWan, peak: float) -> None:
        self.vae, self.head = vae, head
        self.trained = [p for p in (*vae.parameters(), *head.parameters()) if p.requires_grad]
        self.averaged = [a for a, p in zip(average.parameters(), vae.parameters(), strict=True) if p.requires_grad]
        self.device = self.trained[0].device
        self.graphed = self.device.type == "cuda"
        self.rate = torch.tensor(peak, device=self.device)
        self.keep = torch.tensor(0.0, device=self.device)
        self.squares = torch.tensor(0.0, device=self.device)
        rate = self.rate if self.graphed else peak
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=self.graphed, capturable=self.graphed
        )
        self.gradients = torch.zeros(sum(p.numel() for p in self.trained), device=self.device)
        for parameter, part in zip(self.trained, self.gradients.split([p.numel() for p in self.trained]), strict=True):
            parameter.grad = part.view_as(parameter)
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Clips, Tensor]] = {}
        self.descent: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self.memory = torch.cuda.graph_pool_handle() if self.graphed else None

    def __call__(self, clips: Clips, margin: int, rate: float, keep: float, squares: float) -> tuple[Tensor, Tensor]:
        """One step on a batch; returns the `losses` [3] of this process's share and the gradient's norm.

        It does not wait for them.
        """
        self.rate.fill_(rate)
        self.keep.fill_(1 - keep)
        self.squares.fill_(squares)
        if not self.graphed:
            self.optimizer.param_groups[0]["lr"] = rate
            return self._backward(clips, margin), self._descend()
        shape = (*clips.pixels.shape, margin)
        if shape not in self.graphs:
            buffers = Clips(*(part.clone() for part in clips))
            graph, seen = self._captured(lambda: self._backward(buffers, margin))
            self.graphs[shape] = graph, buffers, seen
        graph, buffers, seen = self.graphs[shape]
        for buffer, part in zip(buffers, clips, strict=True):
            buffer.copy_(part)
        graph.replay()
        if dist.is_initialized():
            dist.all_reduce(self.gradients, op=dist.ReduceOp.AVG)
        if self.descent is None:
            self.descent = self._captured(self._descend)  # its trial runs are steps too, on the same gradient
        graph, norm = self.descent
        graph.replay()
        return seen, norm

    def _captured(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            out = work()
        return graph, out

    def _backward(self, clips: Clips, margin: int) -> Tensor:
        self.gradients.zero_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.graphed, cache_enabled=False):
            reconstruction, kl, place = losses(self.vae, self.head, clips, margin, self.squares)
        (reconstruction + KL_WEIGHT * kl + PLACE_WEIGHT * place).backward()
        return torch.stack((reconstruction, kl, place)).detach()

    def _descend(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.averaged, self.trained):  # noqa: B905 # the head, last, is not averaged
                average.lerp_(parameter, self.keep)  # with a tensor: a graph would freeze a number
        return norm


class Clock:
    """How much of the run's time has passed, 0 to 1, the same in all processes: told by the first every few steps."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.started, self.seconds, self.device = time.monotonic(), seconds, device
        self._told = 0.0

    def progress(self, step: int) -> float:
        """Of step `step`; a new reading every 16 steps."""
        if step % 16 == 0:
            told = torch.tensor((time.monotonic() - self.started) / self.seconds, device=self.device)
            if dist.is_initialized():
                dist.broadcast(told, 0)
            self._told = float(told)
        return self._told


def train(
    args: argparse.Namespace, bank: Bank, held_out: dict[str, Clips], device: torch.device
) -> tuple[AutoencoderKLWan, dict[str, Any]]:
    """Run the clock down; returns the averaged codec (fp32) and what the run was."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    draws = np.random.default_rng(args.seed)  # of lengths and sizes: the same in all processes
    vae = (load_vae(args.trained) if args.trained else build_vae()).train()
    nn.Module.to(vae, device=device)  # upstream's own is decorated out of its type
    average = copy.deepcopy(vae).eval()
    fuse_norms(vae)
    head = PlaceHead().to(device)
    make_step = Steps(vae, head, average, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed + rank)
    torch.manual_seed(args.seed + rank)  # of the latents' noise
    clock = Clock(args.minutes * 60, device)
    reported, step, frames_seen = clock.started, 0, 0
    while (progress := clock.progress(step)) < 1:
        frames, size, batch = 1, CONTENT_SIZES[0], 4 * args.clips_per_step
        if progress > STILL_SHARE:
            frames = int(draws.choice(CLIP_FRAMES, p=CLIPS_AFTERWARDS))
            batch = batch if frames == 1 else args.clips_per_step
        if frames == 1 and draws.random() < 0.08:
            size = CONTENT_SIZES[int(draws.integers(len(CONTENT_SIZES)))]
        clips = training_clips(bank, generator, draws, batch, frames, size)
        keep = min(0.999, (1 + step) / (10 + step))
        margin = WHOLE_MARGIN if progress > WHOLE_MARGIN_FROM else MARGIN
        squares = max(0.0, (progress - SQUARES_FROM) / (1 - SQUARES_FROM))
        seen, norm = make_step(clips, margin, learning_rate(progress, step, args.lr), keep, squares)
        step, frames_seen = step + 1, frames_seen + batch * frames
        if time.monotonic() - reported > REPORT_EVERY_SECONDS:
            reported = time.monotonic()
            if not math.isfinite(float(norm)):
                raise FloatingPointError(f"gradient norm {float(norm)} at step {step}: lower --lr")
            if rank == 0:
                logger.info(
                    "%5.0f s  step %d  loss %.4f  kl %.2f  places %.4f  frames/s %.0f  psnr %s",
                    reported - clock.started,
                    step,
                    *seen.tolist(),
                    frames_seen / (reported - clock.started),
                    psnr(average, held_out["pusht"]),
                )
    seconds = round(time.monotonic() - clock.started, 1)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return average, {"steps": step, "frames": frames_seen * processes, "seconds": seconds, "processes": processes}


@torch.no_grad()
def write_statistics(vae: AutoencoderKLWan, bank: Bank, clips: int) -> dict[str, float]:
    """Put the latents' mean and std per channel, over the content of all cameras, into the config.

    A channel that the codec hardly uses would be blown up into noise: its std is held at 5 % of the median.
    """
    latents = []
    looks = list(LOOKS.values())
    for index, chosen in enumerate(torch.arange(clips, device=bank.poses.device).split(16)):
        seen = change_look(bank_clips(bank, chosen, CLIP_FRAMES[-1]), looks[index % len(looks)])
        mean, _ = encode_content(vae, seen.pixels)
        latents.append(mean.float().transpose(0, 1).flatten(1))
    stacked = torch.cat(latents, 1)
    mean, std = stacked.mean(1), stacked.std(1)
    floor = 0.05 * std.median()
    vae.register_to_config(
        latents_mean=[round(value, 6) for value in mean.tolist()],
        latents_std=[round(value, 6) for value in std.clamp(min=floor).tolist()],
    )
    return {
        "std_min": float(std.min()),
        "std_max": float(std.max()),
        "channels_held_at_floor": int((std < floor).sum()),
    }


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKLWan, clips: dict[str, Clips], path: Path) -> None:
    """Pairs of rows, original above reconstruction, for each contract; 3 x enlarged."""
    rows = []
    for contract in clips.values():
        pixels = contract.pixels[:4]
        mean, _ = encode_content(vae, pixels.to(vae.dtype))
        decoded = vae.decode(mean, return_dict=False)[0].float()
        for video in (pixels, decoded):
            shown = video[:, :, (0, 8, 16)].permute(0, 2, 3, 4, 1).flatten(0, 1)
            rows.append(torch.cat(list(shown), 1))
    image = ((torch.cat(rows) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    picture = Image.fromarray(image)
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write vae/ and the report into")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time; the schedule follows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--clips-per-step", type=int, default=24, help="clips in an optimizer step; four times as many single frames"
    )
    parser.add_argument("--bank-clips", type=int, default=6000, help="clips of the simulator's camera, 470 kB each")
    parser.add_argument("--held-out-clips", type=int, default=32, help="clips that PSNR is measured on")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw the bank")
    parser.add_argument("--states", type=Path, help="npz of recorded PushT poses; without it motion is made up")
    parser.add_argument("--trained", type=Path, help="a trained vae/ folder to go on from, not random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    WanCausalConv3d.forward = convolve_flat  # in this process alone; upstream's own is what the folder is used with
    rank = int(os.environ.get("RANK", "0"))
    banks = make_banks(args.states, args.bank_clips, args.held_out_clips, args.seed + 1000 * rank, args.workers)
    logger.info("drew %d + %d clips, seed %d", *(len(bank.poses) for bank in banks), args.seed)
    device = torch.device(args.device)
    if "RANK" in os.environ:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    bank, kept = (part.to(device) for part in banks)
    held_out = held_out_clips(kept)
    vae, report = train(args, bank, held_out, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    report["latents"] = write_statistics(vae, bank, min(256, 8 * args.held_out_clips, args.bank_clips))
    nn.Module.to(vae, dtype=torch.bfloat16)  # upstream's own is decorated out of its type
    vae.save_pretrained(args.output / "vae", safe_serialization=True)
    report["psnr_bf16"] = {name: psnr(vae, of) for name, of in held_out.items()}
    draw_reconstructions(vae, held_out, args.output / "vae_reconstructions.png")
    nn.Module.to(vae, dtype=torch.float32)  # the saved, rounded weights, computed in fp32
    report["psnr_fp32"] = {name: psnr(vae, of) for name, of in held_out.items()}
    report |= {
        "seed": args.seed,
        "trained": args.trained.as_posix() if args.trained else None,
        "states": args.states.name if args.states else None,
        "device": device.type,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "bytes": sum(f.stat().st_size for f in (args.output / "vae").iterdir()),
    }
    (args.output / "vae_report.json").write_text(json.dumps(report, indent=2) + "\n")
    logger.info("%s", json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
