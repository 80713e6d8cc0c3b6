"""An experiment's evaluation settings carried out on its data: one way, for a run that trains and for `evaluate`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from cosmos3_train.config import Dataset, Experiment
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.mixture import Mixture, usable_windows
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.closed_loop import Episode, rollout
from cosmos3_train.evaluation.heldout import ActionError, HeldoutLoss, action_error, heldout_loss
from cosmos3_train.evaluation.sampling import RobotSampler
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.runtime import leave_if_asked

logger = logging.getLogger(__name__)

FILMED = 2
"""Episodes of a closed loop that are filmed: those of the first seeds."""


def measure_loss(
    backbone: Cosmos3PackedTransformer,
    encoder: Encoder,
    datasets: Mapping[str, tuple[PreparedDataset | ConversationDataset, Dataset]],
    experiment: Experiment,
) -> HeldoutLoss | None:
    """The held-out loss over a mixture, None where nothing is held out or no sample is asked for.

    The same windows every time: the first samples of the held-out split in an order of its own.
    """
    with_heldout = {name: pair for name, pair in datasets.items() if usable_windows(*pair, "heldout")}
    for name, (dataset, _) in datasets.items():
        if name not in with_heldout and dataset.count("heldout"):
            logger.warning("%s: none of its held-out windows has sound, so its held-out loss is not measured", name)
    if not with_heldout or not experiment.evaluation.heldout_samples:
        return None
    mixture = Mixture(with_heldout, experiment.training.seed, split="heldout")
    samples = []
    for number in range(min(experiment.evaluation.heldout_samples, mixture.windows)):
        leave_if_asked()
        samples.append(mixture.sample(number))
    return heldout_loss(
        backbone,
        encoder.encode(samples),
        experiment.objective,
        experiment.training.seed,
        tokens_per_pack=experiment.training.tokens_per_micro_batch,
    )


def measure_actions(
    backbone: Cosmos3PackedTransformer,
    encoder: Encoder,
    dataset: PreparedDataset,
    tasks: Sequence[str],
    experiment: Experiment,
) -> list[ActionError]:
    """The action errors on a robot's held-out windows, one for each of `tasks`, none without window or wish."""
    config = experiment.evaluation
    if not config.action_samples or not dataset.count("heldout"):
        return []
    return [
        action_error(
            backbone,
            encoder,
            dataset,
            task,
            windows=config.action_samples,
            steps=config.solver_steps,
            seed=experiment.training.seed,
            tokens_per_pack=experiment.training.tokens_per_micro_batch,
        )
        for task in tasks
    ]


def measure_closed_loop(
    backbone: Cosmos3PackedTransformer,
    encoder: Encoder,
    dataset: PreparedDataset,
    experiment: Experiment,
    episodes: int,
) -> list[Episode]:
    """Rollouts in the embodiment's simulator from the experiment's seeds, the first `FILMED` of them filmed."""
    config, simulator = experiment.evaluation, dataset.embodiment.simulator
    assert simulator is not None
    seeds = range(config.closed_loop_first_seed, config.closed_loop_first_seed + episodes)
    policy = RobotSampler(backbone, encoder, dataset.embodiment, dataset.normaliser, config.solver_steps)
    return rollout(policy, simulator, seeds, dataset.row(0)["instruction"], record=set(seeds[:FILMED]))
