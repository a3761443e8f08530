"""A small bottleneck for tests: its recipe, its learner, one that is frozen, and a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import HIDDEN, sentences

from privtune_flwr.models import BottomModel
from privtune_flwr.privacy.bottleneck.learner import BottleneckLearner
from privtune_flwr.privacy.bottleneck.mechanism import Bottleneck
from privtune_flwr.privacy.bottleneck.recipe import Recipe
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.registry import create_mechanism

POSITIONS = 16


def recipe(**changes: Any) -> Recipe:
    """A small one for the tiny models."""
    values: dict[str, Any] = {
        "width": 2,
        "levels": 4,
        "eta": 0.0,
        "flip": 0.0,
        "lora_rank": 0,
        "hidden_size": HIDDEN,
        "positions": POSITIONS,
        "rounds": 2,
        "epochs": 1,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "adversary": 0.0,
        "warm_start": "none",
        "clip": 0.0,
        "noise": 0.0,
    }
    return Recipe(**values | changes)


def learner_of(bottom: BottomModel, num_labels: int = 3, **changes: Any) -> BottleneckLearner:
    return BottleneckLearner(recipe(**changes), bottom, num_labels)


def frozen(bottom: BottomModel, folder: Path, **changes: Any) -> Bottleneck:
    """Freeze the start, attached."""
    learner = learner_of(bottom, **changes)
    mechanism = create_mechanism(learner.finish(learner.start(), folder), folder, bottom)
    assert isinstance(mechanism, Bottleneck)
    return mechanism


def task(count: int = 24, seed: int = 0) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Sentences whose class is that of their first word."""
    found = sentences([3 + i % 6 for i in range(count)], seed=seed)
    return found, [int(s[0]) % 3 for s in found]


def release(mechanism: Bottleneck, ids_T: NDArray[np.int32], seed: int = 0) -> NDArray[np.float32]:
    hidden = np.zeros((len(ids_T), HIDDEN), dtype=np.float32)
    return mechanism.perturb(hidden, ids_T, keyed_generator(bytes(32), "test", seed))


def without(state: State, name: str) -> State:
    """A state that lacks an array."""
    return {n: a for n, a in state.items() if n != name}
