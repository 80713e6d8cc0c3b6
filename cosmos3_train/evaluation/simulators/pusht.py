"""PushT under two contracts: its own, and the quickstart's robot that a policy has not seen.

The world is gym-pusht's (pymunk physics, 100 Hz, the agent under a PD law); a control period runs its physics
directly, without gym-pusht's rendering and reward. The pictures come from `pusht_camera`, which draws what
gym-pusht draws. Neither opens a window.

The same seed gives the same start as `gym_pusht/PushT-v0`'s `reset(seed=...)`.
"""

import numpy as np
import pymunk
from gym_pusht.envs.pusht import PushTEnv

from cosmos3_train.evaluation.simulators import Observation
from cosmos3_train.evaluation.simulators.pusht_camera import TABLE_PIXELS, PushTCamera

EPISODE_SECONDS = 30
PHYSICS_HZ = 100
COVERAGE_HZ = 10
TABLE_CENTIMETRES = 100.0
PIXELS_PER_CENTIMETRE = TABLE_PIXELS / TABLE_CENTIMETRES


class PushTWorld:
    """The table, the agent and the block, in table pixels [0, 512], y down, radians. No camera, no contract."""

    def __init__(self) -> None:
        self._env = PushTEnv(obs_type="state")
        self._max_coverage = 0.0

    def reset(self, seed: int) -> None:
        """Place agent and block as gym-pusht does for `seed`."""
        self._env.reset(seed=seed)
        self._max_coverage = self.coverage

    @property
    def agent(self) -> tuple[float, float]:
        """Agent position (x, y), px."""
        return tuple(self._env.agent.position)

    @property
    def block(self) -> tuple[float, float, float]:
        """Pose (x px, y px, angle rad) of the block's origin, the middle of the T's top edge."""
        x, y = self._env.block.position
        return x, y, self._env.block.angle

    @property
    def coverage(self) -> float:
        """Area of block ∩ goal over the goal's area, in [0, 1]."""
        return float(self._env._get_coverage())

    @property
    def max_coverage(self) -> float:
        """Largest coverage since `reset`, looked at every 0.1 s."""
        return self._max_coverage

    def drive(self, target: tuple[float, float], seconds: float) -> None:
        """Pull the agent towards `target` (x, y) px by gym-pusht's PD law for `seconds`, a multiple of 0.1."""
        env, agent = self._env, self._env.agent
        k_p, k_v, dt = float(env.k_p), float(env.k_v), 1.0 / PHYSICS_HZ
        per_look = PHYSICS_HZ // COVERAGE_HZ
        for substep in range(round(seconds * PHYSICS_HZ)):
            (x, y), (vx, vy) = agent.position, agent.velocity
            ax, ay = k_p * (target[0] - x) + k_v * (0.0 - vx), k_p * (target[1] - y) + k_v * (0.0 - vy)
            agent.velocity = pymunk.Vec2d(vx + ax * dt, vy + ay * dt)
            env.space.step(dt)
            if (substep + 1) % per_look == 0:
                self._max_coverage = max(self._max_coverage, self.coverage)


def _finite_action(action: np.ndarray) -> np.ndarray:
    """`action` as float64 [2]; ValueError where it is anything else."""
    values = np.asarray(action, np.float64)
    if values.shape != (2,):
        raise ValueError(f"action has shape {values.shape}; PushT takes 2 channels: give an array of shape (2,)")
    if not np.isfinite(values).all():
        raise ValueError(f"action is {values.tolist()}; PushT takes finite values only: check the de-normaliser")
    return values


def _on_table(x: float, y: float) -> tuple[float, float]:
    return min(max(x, 0.0), float(TABLE_PIXELS)), min(max(y, 0.0), float(TABLE_PIXELS))


class PushT:
    """PushT's own contract: 10 Hz, action (x, y) = the agent's target in table pixels [0, 512].

    State: agent position (x, y), px. Image: 96×96 RGB, as gym-pusht draws it.
    """

    control_hz = 10.0
    episode_steps = 300
    action_width = 2

    def __init__(self) -> None:
        self.world = PushTWorld()
        self._camera = PushTCamera()

    def reset(self, seed: int) -> Observation:
        """See `Simulator.reset`."""
        self.world.reset(seed)
        return self._observe()

    def step(self, action: np.ndarray) -> Observation:
        """See `Simulator.step`."""
        self.world.drive(self.target_of(action), 1.0 / self.control_hz)
        return self._observe()

    @property
    def coverage(self) -> float:
        """See `Simulator.coverage`."""
        return self.world.coverage

    @property
    def max_coverage(self) -> float:
        """See `Simulator.max_coverage`."""
        return self.world.max_coverage

    def target_of(self, action: np.ndarray) -> tuple[float, float]:
        """Table pixels (x, y) that `action` asks for from where the agent stands, clipped to the table."""
        x, y = _finite_action(action)
        return _on_table(float(x), float(y))

    def action_to(self, target: tuple[float, float]) -> np.ndarray:
        """The action, float32 [2], that asks for `target` (x, y) px: the inverse of `target_of`."""
        return np.array(_on_table(*target), np.float32)

    def state_of(self, agent: tuple[float, float]) -> np.ndarray:
        """Robot state, float32 [2], of an agent at (x, y) px."""
        return np.array(agent, np.float32)

    def _observe(self) -> Observation:
        image = self._camera.draw(self.world.agent, self.world.block)
        return Observation(image=image, state=self.state_of(self.world.agent))


class PushTMoves(PushT):
    """The quickstart's robot: 5 Hz, action (dy, dx) = a move of the target from the agent's position, cm.

    The table is 100 cm wide (512 px) and the target is clipped to it. State: agent position (y, x), cm. Image:
    96×96 RGB from another camera, turned by 90° counter-clockwise, with a warm tint and a darker background.
    """

    control_hz = 5.0
    episode_steps = 150

    def __init__(self) -> None:
        super().__init__()
        self._camera = PushTCamera("warm")

    def target_of(self, action: np.ndarray) -> tuple[float, float]:
        """Table pixels (x, y) that the move `action` asks for from where the agent stands now."""
        dy, dx = _finite_action(action)
        x, y = self.world.agent
        return _on_table(x + float(dx) * PIXELS_PER_CENTIMETRE, y + float(dy) * PIXELS_PER_CENTIMETRE)

    def action_to(self, target: tuple[float, float]) -> np.ndarray:
        """The move, float32 [2] (dy, dx) cm, that asks for `target` (x, y) px: the inverse of `target_of`."""
        (x, y), (agent_x, agent_y) = _on_table(*target), self.world.agent
        return (np.array([y - agent_y, x - agent_x]) / PIXELS_PER_CENTIMETRE).astype(np.float32)

    def state_of(self, agent: tuple[float, float]) -> np.ndarray:
        """Robot state, float32 [2] (y, x) cm, of an agent at (x, y) px."""
        return (np.array([agent[1], agent[0]]) / PIXELS_PER_CENTIMETRE).astype(np.float32)
