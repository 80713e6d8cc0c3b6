"""What one push does to the T, and how to walk around it: tables in the block's own frame.

The block slides without friction and without inertia, so a disc that presses on one point of an edge moves it
along that edge's normal only: the motion is a constant twist in the block's frame, and a push is two numbers,
the contact and the length. Its outcome does not depend on where the block lies. That makes planning a matter of
composing table entries; the physics is only needed to carry a plan out.

Lengths in table pixels, angles in radians; poses are (x, y, angle) of the block's centre of gravity.
"""

from dataclasses import dataclass

import numpy as np

AGENT_RADIUS = 15.0
CENTRE_OF_GRAVITY = np.array([0.0, 45.0])
MOMENT_OVER_MASS = 3000.0
RECTANGLES = np.array([[-60.0, 0.0, 60.0, 30.0], [-15.0, 30.0, 15.0, 120.0]])  # x0, y0, x1, y1
STANDOFF = 12.0
"""Gap between agent and block where an approach ends and a push begins."""
WALK_CLEARANCE = AGENT_RADIUS + 4.0
"""Least distance of the agent's centre from the block on a walk."""
LENGTHS = np.array(
    [1.2, 2, 3, 4, 5, 6.5, 8, 10, 12, 15, 18, 22, 27, 33, 40, 48, 58, 70, 84, 100, 120, 140, 165, 190, 220.0]
)
"""Push lengths (normal travel of the contact) that a plan chooses from: fine near the goal."""


def rotate(points: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Rotate points [..., 2] by `angle` (broadcast over the leading axes)."""
    c, s = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([c * x - s * y, s * x + c * y], axis=-1)


def distance_to_block(points: np.ndarray) -> np.ndarray:
    """Distance [...] of block-frame points [..., 2] from the T; 0 inside."""
    gap = np.maximum(RECTANGLES[:, :2] - points[..., None, :], points[..., None, :] - RECTANGLES[:, 2:])
    return np.sqrt((np.maximum(gap, 0.0) ** 2).sum(-1)).min(-1)


def _contacts() -> tuple[np.ndarray, np.ndarray]:
    """Contact points [C, 2] and inward normals [C, 2]; clear of corners and of the T's inner corners."""
    rows: list[tuple[float, float, float, float]] = []
    rows += [(x, 0.0, 0.0, 1.0) for x in np.linspace(-54, 54, 13)]
    rows += [(side * x, 30.0, 0.0, -1.0) for side in (-1, 1) for x in (38.0, 46.0, 54.0)]
    rows += [(side * 60.0, y, -side, 0.0) for side in (-1, 1) for y in (6.0, 15.0, 24.0)]
    rows += [(side * 15.0, y, -side, 0.0) for side in (-1, 1) for y in np.linspace(52, 114, 9)]
    rows += [(x, 120.0, 0.0, -1.0) for x in (-9.0, 0.0, 9.0)]
    table = np.array(rows)
    return table[:, :2], table[:, 2:]


def _segments_clear(starts: np.ndarray, ends: np.ndarray, clearance: float) -> np.ndarray:
    """Which block-frame segments [..., 2] keep `clearance` from the T."""
    along = np.linspace(0.0, 1.0, 20)[:, None]
    points = starts[..., None, :] + along * (ends - starts)[..., None, :]
    return distance_to_block(points).min(-1) >= clearance


@dataclass(frozen=True)
class PushTables:
    """Everything the planner looks up. C contacts, L lengths, N = C + corners walk nodes."""

    contact: np.ndarray
    """[C, 2] block frame, origin at the T's origin."""
    normal: np.ndarray
    """[C, 2] inward."""
    turn: np.ndarray
    """[C] rotation per pixel pushed."""
    slide: np.ndarray
    """[C, 2] motion of the centre of gravity per pixel pushed, at the push's start."""
    moved: np.ndarray
    """[C, L, 2] where the centre of gravity goes, in the block frame before the push."""
    turned: np.ndarray
    """[C, L]"""
    nodes: np.ndarray
    """[N, 2] block frame: the contacts' standoffs, then corners to walk around."""
    legs: np.ndarray
    """[N, N] length of the straight leg between nodes; inf where it comes too near the block."""
    walk: np.ndarray
    """[N, N] shortest walk between nodes that keeps clear of the block, as if the table had no edge."""

    def pushed(self, contact: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Motion [..., 2] of the centre of gravity in the frame before the push, and rotation [...]."""
        return twist(self.slide[contact], self.turn[contact], lengths)


def twist(slide: np.ndarray, turn: np.ndarray | float, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integrate a constant body twist over `lengths`: translation [..., 2] and rotation [...]."""
    angle = turn * lengths
    half = 0.5 * angle
    # chord of the arc: sinc keeps it exact where the push does not turn the block
    chord = lengths * np.sinc(half / np.pi)
    return rotate(slide, half) * chord[..., None], angle


def build_tables() -> PushTables:
    """Compute the tables (about 50 ms)."""
    contact, normal = _contacts()
    arm = contact - CENTRE_OF_GRAVITY
    lever = arm[:, 0] * normal[:, 1] - arm[:, 1] * normal[:, 0]
    gain = 1.0 / (1.0 + lever**2 / MOMENT_OVER_MASS)
    slide, turn = gain[:, None] * normal, gain * lever / MOMENT_OVER_MASS
    moved, turned = twist(slide[:, None, :], turn[:, None], np.broadcast_to(LENGTHS, (len(contact), len(LENGTHS))))
    d = 23.0
    corners = [(side * x, y) for side in (-1.0, 1.0) for x, y in ((60 + d, -d), (60 + d, 30 + d), (15 + d, 120 + d))]
    nodes = np.concatenate([contact - (AGENT_RADIUS + STANDOFF) * normal, np.array(corners)])
    legs = np.linalg.norm(nodes[:, None] - nodes[None], axis=-1)
    legs[~_segments_clear(nodes[:, None], nodes[None], WALK_CLEARANCE)] = np.inf
    return PushTables(contact, normal, turn, slide, moved, turned, nodes, legs, shortest_walks(legs))


def shortest_walks(legs: np.ndarray) -> np.ndarray:
    """Shortest walk [N, N] over straight legs [N, N], inf where there is none (Floyd and Warshall)."""
    walk = legs.copy()
    for k in range(len(legs)):
        np.minimum(walk, walk[:, k, None] + walk[None, k], out=walk)
    return walk


def visible_nodes(tables: PushTables, agent: np.ndarray) -> np.ndarray:
    """Which walk nodes [N] an agent at block-frame `agent` [2] can go to in a straight line."""
    return _segments_clear(np.broadcast_to(agent, tables.nodes.shape), tables.nodes, WALK_CLEARANCE)
