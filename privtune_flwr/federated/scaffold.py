"""SCAFFOLD's device: every gradient is corrected by what the others' gradients are like.

Karimireddy et al., arXiv 1910.06378, option II. Written by hand because Flower has no SCAFFOLD.

A device's control variate ``c_i`` is the mean gradient of its last round, the server's ``c`` the
mean of those. A step follows ``g + c - c_i``. The round's change leaves beside the weights; it
tells the cloud nothing that weights, ``c`` and the learning rates do not tell it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privtune_flwr.errors import Refusal
from privtune_flwr.federated.local import train_locally
from privtune_flwr.federated.methods import FitMethod, Outcome, Schema, Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel
from privtune_flwr.privacy.learning import State

#: Prefixes of what travels: weights; and the server's control variate, or a device's change of it.
WEIGHTS, CONTROL = "w/", "c/"


def join_parts(weights: State, control: State) -> State:
    """Put weights and control variate into one state."""
    return {f"{WEIGHTS}{n}": v for n, v in weights.items()} | {
        f"{CONTROL}{n}": v for n, v in control.items()
    }


def split_parts(state: State) -> tuple[State, State]:
    """Take weights and control variate out of one state.

    Raises
    ------
    ValueError
        If an array belongs to neither, or the two do not have the same arrays.
    """
    weights = {n.removeprefix(WEIGHTS): v for n, v in state.items() if n.startswith(WEIGHTS)}
    control = {n.removeprefix(CONTROL): v for n, v in state.items() if n.startswith(CONTROL)}
    if len(weights) + len(control) != len(state) or weights.keys() != control.keys():
        raise ValueError("state: not weights and a control variate of the same names")
    if any(weights[n].shape != control[n].shape for n in weights):
        raise ValueError("state: a control variate has not its weight's shape")
    return weights, control


class ScaffoldMethod(FitMethod):
    """Local steps against the drift: SGD on ``g + c - c_i``; then ``c_i`` is learned anew.

    The correction comes before clipping. Where ``c_i`` fits, what is clipped is the small corrected
    gradient, so that the point at which all devices rest is the true stationary one, not one of
    clipped gradients; and the cloud, which chooses ``c``, cannot push a step beyond
    ``train.clip-norm``. SGD's weight decay comes after both and counts as part of the gradient.

    Raises
    ------
    Refusal
        If the settings name another optimiser than SGD, or ask for DP-SGD, which this is not.
    """

    remembers: ClassVar[bool] = True

    def __init__(self, settings: FitSettings, folder: Path, labels: tuple[str, ...]) -> None:
        super().__init__(settings, folder, labels)
        if settings.train.optimizer != "sgd":
            raise Refusal("request.settings: train.optimizer must be sgd for scaffold")
        if settings.epsilon is not None:
            raise Refusal("request.settings: federated.example-privacy must be none for scaffold")

    def fit(self, state: State, work: Work) -> Outcome:
        """Train, and give the weights and the change of the control variate.

        A device that has no memory of this run, because it was not drawn yet, starts from a control
        variate of zeros.
        """
        start, server = split_parts(state)
        model = self.model
        model.load(start)
        own = {n: work.memory.get(f"{CONTROL}{n}", np.zeros_like(v)) for n, v in server.items()}
        device = next(model.parameters()).device
        correction = {n: torch.from_numpy(server[n] - own[n]).to(device) for n in server}

        def correct(trained: dict[str, nn.Parameter]) -> None:
            for name, parameter in trained.items():
                # a parameter that no example of the batch reached has no gradient yet
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad += correction[name]

        result = train_locally(
            model,
            work.sequences,
            work.labels,
            epochs=self.settings.federated.local_epochs,
            seed=work.seed,
            progress=((work.round - 1) / work.rounds, work.round / work.rounds),
            correction=correct,
        )
        weights = model.state()
        change = control_change(start, weights, server, _rates(model), result.rate_sum)
        metrics = {
            "loss_sum": result.loss_sum,
            "correct": result.correct,
            "seen": result.seen,
            "steps": result.steps,
        }
        memory = {f"{CONTROL}{n}": own[n] + change[n] for n in own}
        return Outcome(join_parts(weights, change), metrics, memory)

    def reply_schema(self, state: State, public: Path | None = None) -> Schema:
        """Promise the arrays that came: weights, and the change where the control variate was."""
        return self.same_arrays(state)


def control_change(
    start: State,
    end: State,
    server: State,
    rates: Mapping[str, float],
    rate_sum: float,
) -> State:
    """Compute ``c_i' - c_i = (x - y) / sum of learning rates - c`` for each array.

    The paper divides by ``K * lr``; under a schedule, and rates that differ by group, that is the
    sum of the rates which an array's steps were made with.

    Parameters
    ----------
    start, end : State
        Weights before (x) and after (y) the round.
    server : State
        The server's control variate c.
    rates : Mapping
        Base learning rate of each array.
    rate_sum : float
        The schedule's factors summed over the steps.
    """
    change: State = {}
    for name, control in server.items():
        moved = start[name].astype(np.float64) - end[name]
        total = rates[name] * rate_sum
        mean: NDArray[np.float64] = moved / total if total > 0 else np.zeros_like(moved)
        change[name] = (mean - control).astype(np.float32)
    return change


def _rates(model: WholeModel) -> dict[str, float]:
    """Name the base learning rate of everything that is trained."""
    rate = {id(p): float(group["lr"]) for group in model.groups() for p in group["params"]}
    return {name: rate[id(p)] for name, p in model.trainable().items()}
