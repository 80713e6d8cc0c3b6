"""PushT frames drawn in batches on any torch device, with the motions and disguises the VAE is trained on.

gym-pusht draws a 512 px scene with pygame and samples it at 96 x 96 without antialiasing; this draws the same
geometry and colours from signed distances at the very points which that sampling reads, thousands of frames a
second on a GPU and without pygame or OpenCV at work. No physics: the codec sees poses and motion, never forces.
A scene is `poses`, float32 [B, T, 5]: agent x, agent y, block x, block y (table px, 0-512), block angle (rad).
Images are float32 [B, 3, T, H, W] in [-1, 1].
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_train.evaluation.simulators.pusht_camera import Look

TABLE_PX = 512.0
GOAL_POSE = (256.0, 256.0, math.pi / 4)
BAR = (0.0, 15.0, 60.0, 15.0)  # centre x, centre y, half width, half height, in the block's own frame
STEM = (0.0, 75.0, 15.0, 45.0)
OUTLINE_PX = 2.5  # pygame draws a line of width 4 five px wide
AGENT_RADIUS_PX = 15.0
WALLS_PX = (5.0, 506.0)

BLOCK_WEIGHT, AGENT_WEIGHT = 4.0, 24.0
"""Added to the weight of a pixel on and around the block and the agent. The agent is 25 of 9,216 pixels: with the
block's weight a codec leaves it out, and a policy that cannot find its own hand in the latent (40 px off, measured)
does not push well."""

# Rows: table, goal, wall, agent rim, agent, block rim, block. RGB, 0-255, as gym-pusht paints them.
PALETTE = (
    (255, 255, 255),
    (144, 238, 144),
    (211, 211, 211),
    (65, 105, 225),
    (78, 126, 255),
    (119, 136, 153),
    (142, 163, 183),
)


class Clips(NamedTuple):
    """`pixels` float32 [B, 3, T, H, W] in [-1, 1]; `weight` float32 [B, 1, T, H, W], 1 on the still background.

    `places` float32 [B, T, 6]: where agent and block are in the picture, see `places`; NaN where they may be hidden.
    """

    pixels: Tensor
    weight: Tensor
    places: Tensor


def sample_points(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Table coordinates (x, y), each [H, W], that an output pixel of a bilinear 512 px -> H x W resize reads."""
    y = (torch.arange(height, device=device) + 0.5) * (TABLE_PX / height) - 0.5
    x = (torch.arange(width, device=device) + 0.5) * (TABLE_PX / width) - 0.5
    return x.expand(height, width), y[:, None].expand(height, width)


def places(poses: Tensor) -> Tensor:
    """Poses [..., 5] as [..., 6] numbers in about [-1, 1]: agent (x, y), block (x, y), cosine and sine of its angle."""
    angle = poses[..., 4:]
    return torch.cat([poses[..., :4] / (TABLE_PX / 2) - 1, angle.cos(), angle.sin()], -1)


def turned(seen: Tensor, turns: int) -> Tensor:
    """`places` in the picture after quarter turns counter-clockwise."""
    for _ in range(turns % 4):
        seen = torch.stack([seen[..., k + 1] if k % 2 == 0 else -seen[..., k - 1] for k in range(6)], -1)
    return seen


def _box_distance(x: Tensor, y: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    dx = (x - box[0]).abs() - box[2]
    dy = (y - box[1]).abs() - box[3]
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _tee_distances(x: Tensor, y: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Distances in px to the T's bar and stem; pose [..., 3] broadcasts against points [H, W]."""
    cos, sin = pose[..., 2].cos()[..., None, None], pose[..., 2].sin()[..., None, None]
    dx, dy = x - pose[..., 0, None, None], y - pose[..., 1, None, None]
    local_x, local_y = cos * dx + sin * dy, cos * dy - sin * dx
    return _box_distance(local_x, local_y, BAR), _box_distance(local_x, local_y, STEM)


def _cover(distance: Tensor) -> Tensor:
    return (0.5 - distance).clamp(0, 1)  # one table px of antialiasing, as the bilinear resize gives


def render(poses: Tensor, palette: Tensor, height: int = 96, width: int = 96) -> Clips:
    """Draw `poses` [B, T, 5] in `palette` [B, 7, 3] (0-255). The weight is higher on and around what moves."""
    x, y = sample_points(height, width, poses.device)
    colour = (palette / 127.5 - 1.0)[:, None, :, None, None, :]  # [B, 1, 7, 1, 1, 3]

    def paint(image: Tensor, cover: Tensor, row: int) -> Tensor:
        return torch.lerp(image, colour[:, :, row], cover[..., None])

    goal = torch.tensor(GOAL_POSE, device=poses.device)
    wall = torch.stack([(axis - at).abs() for axis in (x, y) for at in WALLS_PX]).amin(0) - OUTLINE_PX
    inside = ((x - 255.5).abs().maximum((y - 255.5).abs()) < 253.0).float()  # walls end at the table's corners
    wall_cover = _cover(wall) * inside
    image = colour[:, :, 0].expand(*poses.shape[:2], height, width, 3)
    image = paint(image, _cover(torch.minimum(*_tee_distances(x, y, goal)) - 0.5), 1)
    agent = torch.hypot(x - poses[..., 0, None, None], y - poses[..., 1, None, None]) - AGENT_RADIUS_PX
    image = paint(image, _cover(agent), 3)
    image = paint(image, _cover(agent + 4), 4)
    bar, stem = _tee_distances(x, y, poses[..., 2:])
    image = paint(image, _cover(torch.minimum(bar, stem) - OUTLINE_PX), 6)
    image = paint(image, _cover(torch.minimum(bar.abs(), stem.abs()) - OUTLINE_PX), 5)
    image = paint(image, wall_cover, 2)
    reach = TABLE_PX / min(height, width) * 1.5
    near_agent, near_block = (agent < reach).float(), (torch.minimum(bar, stem) < reach).float()
    weight = 1.0 + torch.maximum(AGENT_WEIGHT * near_agent, BLOCK_WEIGHT * near_block)
    return Clips(image.permute(0, 4, 1, 2, 3).contiguous(), weight[:, None], places(poses))


def random_poses(batch: int, frames: int, generator: torch.Generator) -> Tensor:
    """Smooth made-up motion [B, T, 5]: the agent near the block or anywhere, the block still or pushed."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    block = torch.cat([70 + 370 * uniform(batch, 2), (uniform(batch, 1) * 2 - 1) * math.pi], 1)
    spread = torch.tensor([25.0, 25.0, 0.25], device=device)
    near_goal = torch.tensor(GOAL_POSE, device=device) + spread * normal(batch, 3)
    block = torch.where(uniform(batch, 1) < 0.3, near_goal, block)
    speed = torch.tensor([8.0, 8.0, 0.08], device=device) * normal(batch, 1, 3)
    drift = speed + 0.4 * speed.abs() * normal(batch, frames, 3)
    drift = drift * (uniform(batch, 1, 1) < 0.6) * (uniform(batch, 1, 1) * 1.5)
    block_path = block[:, None] + drift.cumsum(1) - drift[:, :1]
    # The agent starts beside the block in 60 % of clips and then moves roughly with it.
    local = torch.stack([200 * uniform(batch) - 100, 200 * uniform(batch) - 40], 1)
    cos, sin = block[:, 2].cos(), block[:, 2].sin()
    beside = block[:, :2] + torch.stack(
        [cos * local[:, 0] - sin * local[:, 1], sin * local[:, 0] + cos * local[:, 1]], 1
    )
    follows = uniform(batch, 1) < 0.6
    start = torch.where(follows, beside, 512 * uniform(batch, 2))
    pace = 30 * uniform(batch, 1, 1) ** 2
    own = (normal(batch, 1, 2) + 0.5 * normal(batch, frames, 2)) * pace
    own = own.cumsum(1) - own[:, :1]
    shared = (block_path[..., :2] - block_path[:, :1, :2]) * follows[:, :, None]
    agent_path = (start[:, None] + shared + own).clamp(12, 500)
    return torch.cat([agent_path, block_path], 2)


def change_look(clips: Clips, look: Look) -> Clips:
    """The same clips as another of the simulator's cameras sees them: turned and tinted."""
    device = clips.pixels.device
    gain = torch.tensor(look.gain, device=device).view(1, 3, 1, 1, 1)
    offset = gain - 1 + torch.tensor(look.lift, device=device).view(1, 3, 1, 1, 1) / 127.5  # of pixels in [-1, 1]
    pixels = (clips.pixels * gain + offset).clamp(-1, 1)
    pixels, weight = (x.rot90(look.turns, (3, 4)).contiguous() for x in (pixels, clips.weight))
    return Clips(pixels, weight, turned(clips.places, look.turns))


def palettes(batch: int, generator: torch.Generator, plain: float) -> Tensor:
    """Palettes [B, 7, 3], 0-255: gym-pusht's own with probability `plain`, else jittered, else arbitrary."""
    device = generator.device
    own = torch.tensor(PALETTE, device=device, dtype=torch.float32).expand(batch, 7, 3)
    jitter = 20 * torch.randn((batch, 7, 3), device=device, generator=generator)
    wild = 255 * torch.rand((batch, 7, 3), device=device, generator=generator)
    draw = torch.rand((batch, 1, 1), device=device, generator=generator)
    mixed = torch.where(draw < plain + (1 - plain) * 0.7, own + jitter, wild)
    return torch.where(draw < plain, own, mixed).clamp(0, 255)


def disguise(clips: Clips, generator: torch.Generator, plain: float) -> Clips:
    """Rotate, tint, darken, shift and texture: clip by clip, leaving the share `plain` as it is."""
    pixels, weight, hidden = clips.pixels, clips.weight, torch.full_like(clips.places, math.nan)
    device, batch = pixels.device, pixels.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    per_clip = (batch, 1, 1, 1, 1)
    touched = uniform(*per_clip) >= plain
    gain = (0.45 + 0.6 * uniform(*per_clip)) * (0.75 + 0.35 * uniform(batch, 3, 1, 1, 1))
    offset = 0.2 * (uniform(*per_clip) - 0.4)
    tinted = ((pixels + 1) * gain - 1 + offset).clamp(-1, 1)
    pixels = torch.where(touched, tinted, pixels)
    # Still or slowly drifting smooth texture: keeps the codec from being a T-block detector only.
    coarse = torch.randn((batch, 3, 4, 8, 8), device=device, generator=generator)
    texture = F.interpolate(coarse, size=pixels.shape[2:], mode="trilinear", align_corners=False)
    strength = uniform(*per_clip).pow(2) * (touched & (uniform(*per_clip) < 0.35))
    pixels = torch.lerp(pixels, texture.clamp(-1, 1), strength)
    turns = int(torch.randint(4, (1,), device=device, generator=generator))
    half = batch // 2  # one turn for half of the batch, whose images must be square to be joined again
    if turns and pixels.shape[3] == pixels.shape[4]:
        pixels = torch.cat([pixels[:half].rot90(turns, (3, 4)), pixels[half:]])
        weight = torch.cat([weight[:half].rot90(turns, (3, 4)), weight[half:]])
    return Clips(pixels, weight, hidden)


def pad_canvas(pixels: Tensor, margin: int = 96) -> Tensor:
    """Repeat the right and bottom edge for `margin` px, as the pipeline does: 160 for 96 x 96 and its 256 px canvas."""
    batch, channels, frames, height, width = pixels.shape
    flat = pixels.transpose(1, 2).reshape(batch * frames, channels, height, width)
    flat = F.pad(flat, (0, margin, 0, margin), mode="replicate")
    return flat.view(batch, frames, channels, height + margin, width + margin).transpose(1, 2)
