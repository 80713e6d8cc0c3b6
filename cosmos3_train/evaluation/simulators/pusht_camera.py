"""The cameras that watch the PushT table: 96×96 pictures from poses alone.

gym-pusht draws the table at 512×512 with pygame and shrinks it with OpenCV (bilinear, no antialiasing); that
costs 1.9 ms a picture. This camera makes the same picture (to one grey level) in about a fifth of the time: the
table and the goal are drawn once, and only the 192×192 pixels that the bilinear shrink reads are ever touched.
It needs neither a window nor OpenCV nor the physics, so episodes stored as poses can be drawn anywhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pygame

TABLE_PIXELS = 512
IMAGE_PIXELS = 96
AGENT_RADIUS = 15.0
BLOCK_RECTANGLES = (
    ((-60.0, 30.0), (60.0, 30.0), (60.0, 0.0), (-60.0, 0.0)),
    ((-15.0, 30.0), (-15.0, 120.0), (15.0, 120.0), (15.0, 30.0)),
)
"""Bar and stem of the T in the block's frame, table pixels."""
GOAL_POSE = (256.0, 256.0, math.pi / 4)

_WHITE, _WALL, _GOAL = (255, 255, 255), (211, 211, 211), (144, 238, 144)
_BLOCK, _BLOCK_FILL = (119, 136, 153), (143, 163, 184)
_AGENT, _AGENT_FILL = (65, 105, 225), (78, 126, 255)
_WALLS = (((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506)))
_OUTLINE_RADIUS = 2


class Look(NamedTuple):
    """How a camera sees the table: quarter turns counter-clockwise, and gain and lift of each channel (R, G, B)."""

    turns: int = 0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lift: tuple[float, float, float] = (0.0, 0.0, 0.0)


# Tints are kept modest: every colour stays distinct.
LOOKS = {
    "own": Look(),
    "warm": Look(1, (0.84, 0.74, 0.60), (10.0, 6.0, 4.0)),
    "cool": Look(2, (0.66, 0.78, 0.86), (4.0, 6.0, 10.0)),
    "dim": Look(3, (0.70, 0.74, 0.70), (8.0, 12.0, 6.0)),
    "violet": Look(1, (0.76, 0.68, 0.84), (8.0, 4.0, 12.0)),
    "grey": Look(0, (0.78, 0.78, 0.76), (14.0, 14.0, 14.0)),
}
"""`own` is gym-pusht's camera, `warm` the quickstart's; with the others Pico learns that cameras differ."""


def block_corners(pose: Sequence[float]) -> list[list[tuple[float, float]]]:
    """World corners of the block's two rectangles; `pose` is (x px, y px, angle rad) of the block's origin."""
    x, y, angle = pose
    c, s = math.cos(angle), math.sin(angle)
    return [[(x + c * u - s * v, y + s * u + c * v) for u, v in corners] for corners in BLOCK_RECTANGLES]


def _rounded(point: tuple[float, float]) -> tuple[int, int]:
    return round(point[0]), round(point[1])


def _draw_thick(surface: pygame.Surface, a: tuple[int, int], b: tuple[int, int], color: tuple[int, int, int]) -> None:
    """A line with round ends, as wide as gym-pusht draws walls and outlines (4 px)."""
    radius = _OUTLINE_RADIUS
    pygame.draw.line(surface, color, a, b, 2 * radius)
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    if length == 0:
        return
    # Absolute values on purpose: gym-pusht's outline has this lopsided quad, and the pictures must match.
    dx, dy = round(abs(b[1] - a[1]) * radius / length), round(abs(b[0] - a[0]) * radius / length)
    quad = [(a[0] - dx, a[1] - dy), (a[0] + dx, a[1] + dy), (b[0] + dx, b[1] + dy), (b[0] - dx, b[1] - dy)]
    pygame.draw.polygon(surface, color, quad)
    pygame.draw.circle(surface, color, a, radius)
    pygame.draw.circle(surface, color, b, radius)


def _shrink_plan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First source pixel, second source pixel and the second one's weight, for each of the 96 targets."""
    centre = (np.arange(IMAGE_PIXELS) + 0.5) * TABLE_PIXELS / IMAGE_PIXELS - 0.5
    first = np.floor(centre).astype(np.int64)
    return first, first + 1, (centre - first).astype(np.float32)


class PushTCamera:
    """Draws the table from poses, as a look of `LOOKS` has it."""

    def __init__(self, look: str = "own") -> None:
        self._look = LOOKS[look]
        tinted = np.arange(256)[:, None] * np.array(self._look.gain) + np.array(self._look.lift)
        self._tint = np.clip(np.rint(tinted), 0, 255).astype(np.uint8)
        # depth=32 works without a display; channels lie as B, G, R, X in memory.
        self._surface = pygame.Surface((TABLE_PIXELS, TABLE_PIXELS), depth=32)
        self._empty = pygame.Surface((TABLE_PIXELS, TABLE_PIXELS), depth=32)
        self._empty.fill(_WHITE)
        for corners in block_corners(GOAL_POSE):
            pygame.draw.polygon(self._empty, _GOAL, [_rounded(p) for p in corners])
        for a, b in _WALLS:
            _draw_thick(self._empty, a, b, _WALL)
        first, second, weight = _shrink_plan()
        rows = (first[:, None], second[:, None])
        self._gather = [(r * TABLE_PIXELS + c[None, :]) for r in rows for c in (first, second)]
        w, v = weight[:, None], weight[None, :]
        self._weights = [g[..., None] for g in ((1 - w) * (1 - v), (1 - w) * v, w * (1 - v), w * v)]

    def draw(self, agent: Sequence[float], block: Sequence[float]) -> np.ndarray:
        """Picture uint8 [96, 96, 3] of agent (x, y) and block (x, y, angle), in table pixels and radians."""
        surface = self._surface
        surface.blit(self._empty, (0, 0))
        centre = _rounded((agent[0], agent[1]))
        pygame.draw.circle(surface, _AGENT, centre, round(AGENT_RADIUS))
        pygame.draw.circle(surface, _AGENT_FILL, centre, round(AGENT_RADIUS - 4))
        for corners in block_corners(block):
            points = [_rounded(p) for p in corners]
            pygame.draw.polygon(surface, _BLOCK_FILL, points)
            for a, b in zip(points, points[1:] + points[:1], strict=True):
                _draw_thick(surface, a, b, _BLOCK)
        turned = np.rot90(self._shrink(surface), self._look.turns)
        return np.ascontiguousarray(self._tint[turned, np.arange(3)])

    def _shrink(self, surface: pygame.Surface) -> np.ndarray:
        # [x, y] in memory order y, x: the transpose is a view. It locks the surface until this returns.
        pixels = pygame.surfarray.pixels2d(surface).T.reshape(-1)
        total = np.zeros((IMAGE_PIXELS, IMAGE_PIXELS, 4), np.float32)
        for index, weight in zip(self._gather, self._weights, strict=True):
            total += weight * pixels[index].view(np.uint8).reshape(IMAGE_PIXELS, IMAGE_PIXELS, 4)
        return np.ascontiguousarray((total[..., 2::-1] + 0.5).astype(np.uint8))
