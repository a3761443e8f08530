"""What a cloud reads from the updates of a bottleneck's learning phase.

The default release is learned by federated averaging of the tuned blocks before anything is
released; here the same attacks as on federated baselines read those updates. Embeddings are not
among them, so no row of a table can tell a token; the first block's projections are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import CloudKnowledge, Update
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import load_whole
from privtune_flwr.models import cut_model, resolve_model
from privtune_flwr.models.families import last_parts, linear_names
from privtune_flwr.privacy.bottleneck.learner import WEIGHT_DECAY, BottleneckLearner
from privtune_flwr.privacy.bottleneck.recipe import Recipe
from privtune_flwr.privacy.learning import State

#: Adapters take a higher rate than the weights that they stand for.
LORA_RATE: dict[str, Scalar] = {"privacy.learning.learning-rate": 1e-3}
_BASE = "base."


class LearningPhase:
    """The default bottleneck's learner, and a model in whose terms its updates are read.

    Parameters
    ----------
    cut : int
        Blocks on the device.
    labels : sequence of str
        Names of the classes.
    public : sequence of int arrays (T,)
        Public text as token ids.
    lora_rank : int
        Of adapters in the blocks; 0: whole blocks are tuned.
    """

    def __init__(
        self,
        cut: int,
        labels: Sequence[str],
        public: Sequence[NDArray[Any]],
        *,
        lora_rank: int = 0,
    ) -> None:
        adapters: dict[str, Scalar] = (
            {"privacy.bottleneck.lora-rank": lora_rank, **LORA_RATE} if lora_rank else {}
        )
        config = load_run_config(flatten(RunConfig()) | adapters)
        learning = config.privacy.learning
        source = resolve_model(config.model.name)
        bottom = cut_model(source, cut=cut, num_labels=len(labels), seed=0).bottom
        tuned: dict[str, Scalar] = {}
        if lora_rank:
            tuned = {
                "model.tuning": "lora",
                "model.lora-rank": lora_rank,
                "model.lora-alpha": 2 * lora_rank,
                "model.lora-targets": ",".join(
                    last_parts(linear_names(bottom.base, bottom.family))
                ),
            }
        # the learner's own optimiser; its rate falls by a few percent in a round, which weight
        # decay, the only thing that this is used for, does not notice
        same = load_run_config(
            flatten(config)
            | {
                "train.strategy": "fedavg",
                "train.learning-rate": learning.learning_rate,
                "train.weight-decay": WEIGHT_DECAY,
                "train.batch-size": learning.batch_size,
                "train.schedule": "constant",
                "train.warmup": 0.0,
                "federated.local-epochs": learning.epochs,
            }
            | tuned
        )
        model = load_whole(source, FitSettings.of(same), labels)
        recipe = Recipe.from_config(
            config.privacy, hidden_size=bottom.hidden_size, positions=config.model.max_length
        )
        self.learner = learner = BottleneckLearner(recipe, bottom, len(labels))
        self.rounds, self.rate = learning.rounds, learning.learning_rate
        self._names = _whole_names(learner.start(), [n for n, _ in model.named_parameters()])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._names.values())
        self.knowledge = CloudKnowledge(model, public)

    def update(
        self,
        state: State,
        sequences: Sequence[NDArray[Any]],
        labels: Sequence[int],
        *,
        number: int,
        seed: int,
    ) -> tuple[Update, State]:
        """Let a device learn; give the update as the cloud reads it, and the state after it."""
        change = self.learner.update(
            state, sequences, labels, round_number=number, seed=seed
        ).change
        received = self.learner.apply(state, dict(change))
        seen = Update(
            {whole: state[own] for own, whole in self._names.items()},
            {whole: received[own] for own, whole in self._names.items()},
            len(sequences),
            number,
            self.rounds,
        )
        return seen, received


def _whole_names(state: State, whole: Sequence[str]) -> dict[str, str]:
    """Find each tuned block's array among the model's own names."""
    found: dict[str, str] = {}
    for own in state:
        if own.startswith(_BASE):
            matches = [n for n in whole if n.endswith(f".{own.removeprefix(_BASE)}")]
            if len(matches) != 1:
                raise ValueError(f"{own}: {len(matches)} arrays of the model are called so")
            found[own] = matches[0]
    return found
