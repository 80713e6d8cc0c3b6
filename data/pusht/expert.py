"""An expert for PushT: plan pushes by composing table entries, carry them out with feedback, plan again.

A plan is up to three pushes, found by a beam search that adds up the time to walk, to push, and to mend what is
left. Only its first push is carried out; then a new plan is made from where the block really is. What the expert
does is a function of the picture (agent and block pose) and of the push it is engaged in; it draws nothing at
random, walks around the block, keeps the target near the agent, and slows down before it stops.
"""

from dataclasses import dataclass

import numpy as np
from pushes import (
    AGENT_RADIUS,
    CENTRE_OF_GRAVITY,
    LENGTHS,
    RECTANGLES,
    STANDOFF,
    WALK_CLEARANCE,
    PushTables,
    build_tables,
    distance_to_block,
    rotate,
    shortest_walks,
    visible_nodes,
)

GOAL_ANGLE = np.pi / 4
GOAL_CENTRE = np.array([256.0, 256.0]) + rotate(CENTRE_OF_GRAVITY, GOAL_ANGLE)
SPREAD = 52.0
"""Root mean square distance of the T's area and outline from its centre of gravity, px: an angle's price."""
T_CORNERS = np.array([(-60, 0), (60, 0), (-60, 30), (60, 30), (-15, 120), (15, 120)], float) - CENTRE_OF_GRAVITY
TABLE_MARGIN, AGENT_MARGIN = 10.0, 8.0
JAMMED = 40.0
"""How far beyond the margin a block that is stuck in a corner may be asked to go: the walls turn it, px."""
BEAM, DEPTH = 64, 3
HOME = 1.8
"""Misplacement, px, at which a plan may end: coverage is then about 0.95."""
SECONDS_A_PUSH = 0.7
"""What a push costs besides its walk and its length: to settle, to turn."""


@dataclass(frozen=True)
class Pace:
    """How far ahead of the agent its target goes, px: under PushT's PD law that is a speed."""

    walk: float
    push: float
    walk_speed: float
    """What `walk` comes to, px/s: prices a walk in a plan."""
    push_speed: float


PACES = {10.0: Pace(36.0, 20.0, 140.0, 75.0), 5.0: Pace(40.0, 24.0, 140.0, 75.0)}
"""By control rate in Hz."""


def misplacement(centre: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Root mean square distance, px, of the T's points from where the goal has them."""
    offset = ((centre - GOAL_CENTRE) ** 2).sum(-1)
    return np.sqrt(offset + 2.0 * SPREAD**2 * (1.0 - np.cos(angle - GOAL_ANGLE)))


def _seconds_to_mend(error: np.ndarray) -> np.ndarray:
    """Rough time to remove a misplacement (px) with further pushes."""
    return error / 70.0 + 2.0 * np.log1p(np.maximum(error - 1.0, 0.0) / 1.5)


@dataclass
class _Push:
    contact: int
    centre: np.ndarray
    angle: float
    engaged: bool = False
    steps: int = 0


class Expert:
    """Chooses the agent's next target, in table pixels, from the agent's position and the block's pose.

    `control_hz` is 10 or 5. One expert serves one episode at a time; `reset` between them.
    """

    def __init__(self, control_hz: float, tables: PushTables | None = None) -> None:
        self._tables = tables if tables is not None else build_tables()
        self._pace = PACES[control_hz]
        self._control_hz = control_hz
        self._push: _Push | None = None
        self._walks_pose: tuple[float, float, float] | None = None
        self._walks, self._on_table = self._tables.walk, np.ones(len(self._tables.nodes), bool)
        self.plans = 0

    def reset(self) -> None:
        """Forget the push of the last episode."""
        self._push = None

    def target(self, agent: tuple[float, float], block: tuple[float, float, float], *, done: bool) -> np.ndarray:
        """Next target [2], px. `done`: the block is home; step back from it and wait."""
        position, angle = np.array(agent), block[2]
        centre = np.array(block[:2]) + rotate(CENTRE_OF_GRAVITY, angle)
        local = rotate(position - np.array(block[:2]), -angle)
        if done:
            return self._step_back(position, local, angle)
        for _ in range(2):
            if self._push is None:
                self._push = self._plan(local, centre, angle, 0.0) or self._plan(local, centre, angle, JAMMED)
            if self._push is None:
                return self._step_back(position, local, angle)
            target = self._follow(self._push, position, local, centre, angle)
            if target is not None:
                return target
            self._push = None
        return self._step_back(position, local, angle)

    def _step_back(self, position: np.ndarray, local: np.ndarray, angle: float) -> np.ndarray:
        step = _step_clear(local, WALK_CLEARANCE + 10.0) - local
        length = float(np.linalg.norm(step))
        return position + rotate(step, angle) * min(1.0, self._pace.push / max(length, 1e-6))

    # Carrying a push out

    def _follow(
        self, push: _Push, position: np.ndarray, local: np.ndarray, centre: np.ndarray, angle: float
    ) -> np.ndarray | None:
        """Target of the current push, or None when it is over."""
        tables, k = self._tables, push.contact
        seat = tables.contact[k] - AGENT_RADIUS * tables.normal[k]
        push.steps += 1
        if push.steps > 8 * self._control_hz:
            return None
        offset = local - seat
        ahead = offset @ tables.normal[k]  # negative: still away from the block
        aside = np.linalg.norm(offset - ahead * tables.normal[k])
        if not push.engaged:
            push.engaged = bool(aside < 6.0 and ahead > -(STANDOFF + 9.0))
        elif aside > 14.0:
            return None
        if not push.engaged:
            return self._walk(push, position, local, centre, angle)
        remaining = self._remaining(push, centre, angle)
        # Only the last push has to be exact; before it, do not wait for the agent to settle.
        last = misplacement(push.centre, push.angle) < 2.0 * HOME
        if remaining < (0.6 if last else 2.5):
            return None
        moved, turned = tables.pushed(k, np.minimum(np.array([self._pace.push, remaining]), remaining))
        ends = centre + rotate(moved, angle) + rotate(seat - CENTRE_OF_GRAVITY, angle + turned)
        step = ends[0] - position
        length = float(np.linalg.norm(step))
        # A contact far from the centre of gravity moves further than the push: keep to the pace.
        return position + step * min(1.0, self._pace.push / max(length, 1e-6))

    def _remaining(self, push: _Push, centre: np.ndarray, angle: float) -> float:
        """How much further to push to come nearest the planned pose, px."""
        lengths = np.arange(0.0, 230.0, 0.5)
        moved, turned = self._tables.pushed(push.contact, lengths)
        off = centre + rotate(moved, angle) - push.centre
        cost = (off**2).sum(-1) + 2.0 * SPREAD**2 * (1.0 - np.cos(angle + turned - push.angle))
        return float(lengths[np.argmin(cost)])

    def _walk(
        self, push: _Push, position: np.ndarray, local: np.ndarray, centre: np.ndarray, angle: float
    ) -> np.ndarray | None:
        """Next target on the way around the block to the push's standoff; None where there is no way."""
        walk, node = self._routes(local, centre, angle)
        if not np.isfinite(walk[push.contact]):
            return None
        goal = self._tables.nodes[node[push.contact]]
        clear = _step_clear(local, WALK_CLEARANCE)
        if clear is not local:  # too near the block: off it first, already leaning the way it will go
            step = _step_clear(local, WALK_CLEARANCE + 5.0) - local
            side = (goal - local) - step * ((goal - local) @ step) / (step @ step)
            step = 1.5 * step + side * min(1.0, 10.0 / max(float(np.linalg.norm(side)), 1e-6))
        else:
            step = goal - local
        length = float(np.linalg.norm(step))
        return position + rotate(step, angle) * min(1.0, self._pace.walk / max(length, 1e-6))

    def _routes(self, local: np.ndarray, centre: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Walk length [C] from `local` to each standoff, and the node [C] to head for first."""
        tables = self._tables
        pose = (float(centre[0]), float(centre[1]), angle)
        if pose != self._walks_pose:  # the block lies still during a walk: compute the walks once
            on_table = _agent_fits(centre + rotate(tables.nodes - CENTRE_OF_GRAVITY, angle))
            legs = np.where(on_table[:, None] & on_table[None], tables.legs, np.inf)
            self._walks_pose, self._walks, self._on_table = pose, shortest_walks(legs), on_table
        start = _step_clear(local, WALK_CLEARANCE)
        usable = visible_nodes(tables, start) & self._on_table
        # A touch cheaper than it is, so that of two equal ways the one with the longer first leg is taken: an
        # agent that stands on a node would otherwise head for that node.
        first = np.where(usable, 0.99 * np.linalg.norm(tables.nodes - start, axis=-1), np.inf)
        total = first[:, None] + self._walks[:, : len(tables.contact)]
        return total.min(0), total.argmin(0)

    # Planning

    def _plan(self, local: np.ndarray, centre: np.ndarray, angle: float, extra: float) -> _Push | None:
        """Best first push of the best plan, or None; the block may go `extra` px beyond the table's margin."""
        self.plans += 1
        tables, count = self._tables, len(self._tables.contact)
        # A block that starts in a wall cannot be asked to leave it with one push.
        slack = max(0.0, float(_over_edge(centre, np.array(angle)))) + extra
        walks, _ = self._routes(local, centre, angle)
        centres, angles, spent, walk_in = centre[None], np.array([angle]), np.zeros(1), walks[None]
        firsts: list[_Push] = []
        origin = np.zeros(1, np.int64)
        best_score, best_first = np.inf, -1
        for depth in range(DEPTH):
            seconds = self._seconds(spent, walk_in)
            child_centre = centres[:, None, None] + rotate(tables.moved[None], angles[:, None, None])
            child_angle = angles[:, None, None] + tables.turned[None]
            score = seconds + _seconds_to_mend(misplacement(child_centre, child_angle))
            order = _best(score, score.size if depth == 0 else 6000)
            row, contact, length = np.unravel_index(order, score.shape)
            c, a = child_centre[row, contact, length], child_angle[row, contact, length]
            keep = np.isfinite(score.reshape(-1)[order]) & self._fits(c, a, contact, slack)
            order, row, contact, length, c, a = (x[keep] for x in (order, row, contact, length, c, a))
            if not len(order):
                break
            if depth == 0:
                firsts = [_Push(int(k), p, float(t)) for k, p, t in zip(contact, c, a, strict=True)]
                origin = np.arange(len(order))
            else:
                origin = origin[row]
            # A plan ends at home or at full depth: the price of mending is too rough to stop on halfway.
            error = misplacement(c, a)
            ends = np.flatnonzero((error < HOME) | (depth == DEPTH - 1))[:1]
            if len(ends) and score.reshape(-1)[order[ends[0]]] < best_score:
                best_score, best_first = float(score.reshape(-1)[order[ends[0]]]), int(origin[ends[0]])
            # Short pushes only finish a plan; every second of the others starts the next.
            grow = np.flatnonzero((LENGTHS[length] >= 5.0) & ((length % 2 == 0) | (depth > 0)))
            grow = grow[: len(grow) if depth == 0 else BEAM]
            contact, centres, angles, origin = contact[grow], c[grow], a[grow], origin[grow]
            spent = seconds.reshape(-1)[order[grow]]
            walk_in = tables.walk[contact, :count] + STANDOFF
            walk_in[np.arange(len(contact)), contact] = np.inf
            standoffs = centres[:, None] + rotate(tables.nodes[None, :count] - CENTRE_OF_GRAVITY, angles[:, None])
            walk_in[~_agent_fits(standoffs)] = np.inf
        return firsts[best_first] if best_first >= 0 else None

    def _seconds(self, spent: np.ndarray, walk_in: np.ndarray) -> np.ndarray:
        """Time [row, contact, length] up to the end of the next push."""
        before = spent[:, None] + walk_in / self._pace.walk_speed + SECONDS_A_PUSH
        return before[:, :, None] + LENGTHS / self._pace.push_speed

    def _fits(self, centre: np.ndarray, angle: np.ndarray, contact: np.ndarray, slack: float) -> np.ndarray:
        """Whether block and agent are on the table after each push [K]."""
        seat = self._tables.contact[contact] - AGENT_RADIUS * self._tables.normal[contact] - CENTRE_OF_GRAVITY
        return _agent_fits(centre + rotate(seat, angle)) & (_over_edge(centre, angle) <= slack)


def _agent_fits(positions: np.ndarray) -> np.ndarray:
    """Whether an agent at world `positions` [..., 2] is on the table."""
    return np.all((positions > AGENT_MARGIN) & (positions < 512.0 - AGENT_MARGIN), axis=-1)


def _over_edge(centre: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """How far, px, the block's outermost corner is beyond the table's margin; negative inside."""
    corners = centre[..., None, :] + rotate(T_CORNERS, angle[..., None])
    return np.maximum(TABLE_MARGIN - corners, corners - (512.0 - TABLE_MARGIN)).max((-1, -2))


def _away(local: np.ndarray) -> np.ndarray:
    """Unit direction, block frame, away from the T; out of its inner corner, away from both edges at once."""
    nearest = np.clip(local, RECTANGLES[:, :2], RECTANGLES[:, 2:])
    gap = np.linalg.norm(local - nearest, axis=-1)
    if gap.min() < 1e-6:  # inside, which the physics does not allow for long: leave by the long axis
        return np.array([0.0, -1.0]) if local[1] < 15.0 else np.array([np.copysign(1.0, local[0]), 0.0])
    weight = np.maximum(gap.min() + 6.0 - gap, 0.0) / gap
    direction = (weight[:, None] * (local - nearest)).sum(0)
    return direction / np.linalg.norm(direction)


def _step_clear(local: np.ndarray, clearance: float) -> np.ndarray:
    """Block-frame point near `local` that is at least `clearance` from the T."""
    for _ in range(8):
        gap = float(distance_to_block(local))
        if gap >= clearance:
            break
        local = local + _away(local) * (clearance + 0.5 - gap)
    return local


def _best(score: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the `count` lowest entries, lowest first."""
    flat = score.reshape(-1)
    count = min(count, len(flat))
    chosen = np.argpartition(flat, count - 1)[:count]
    return chosen[np.argsort(flat[chosen], kind="stable")]
