"""Training on one machine's text: what every method that moves weights has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.federated.whole import WholeModel, pad
from privtune_flwr.training.batches import batch_order
from privtune_flwr.training.trainer import accuracy_and_loss, span_factors

Ids = Sequence[NDArray[np.int32]]
#: Outputs beyond it count as this much where a device evaluates.
MAX_LOGIT = 20.0
#: Called after backward and before the step: changes gradients in place.
Correction = Callable[[dict[str, nn.Parameter]], None]


@dataclass(frozen=True)
class LocalResult:
    """What training on one machine came to.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    loss_sum : float
        Cross-entropy summed over the examples as they were trained on.
    correct : int
        Right answers among them, at that moment.
    seen : int
        Examples trained on, once for each pass.
    rate_sum : float
        The schedule's factors summed over the steps: times a group's base rate, the sum of the
        learning rates that its parameters were stepped with.
    """

    steps: int
    loss_sum: float
    correct: int
    seen: int
    rate_sum: float = 0.0


def local_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Count the steps of ``epochs`` passes."""
    return epochs * math.ceil(examples / batch_size)


def make_optimizer(model: WholeModel) -> torch.optim.Optimizer:
    """Build the optimiser that ``train.optimizer`` names; its state is fresh.

    Each group keeps its base rate as ``initial_lr``: ``lr`` is the last step's.
    """
    optimizer: torch.optim.Optimizer
    if model.settings.train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.groups())
    else:
        optimizer = torch.optim.SGD(model.groups(), momentum=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def train_locally(
    model: WholeModel,
    sequences: Ids,
    labels: Sequence[int],
    *,
    epochs: int,
    seed: int,
    progress: tuple[float, float] = (0.0, 1.0),
    proximal_mu: float = 0.0,
    correction: Correction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first_epoch: int = 0,
) -> LocalResult:
    """Train what ``model`` declares trainable, in place.

    Parameters
    ----------
    model : WholeModel
        Starts from the state that is in it.
    sequences, labels
        Token ids and classes.
    epochs : int
        Passes over them.
    seed : int
        Of the order of batches.
    progress : (float, float)
        From which share of the run's schedule to which this training goes: learning rates decay
        over the run, not over a round.
    proximal_mu : float
        FedProx: adds ``mu / 2 * ||w - w_0||^2`` (the *squared* norm, over all trained parameters)
        to the loss of every batch. Li et al., arXiv 1812.06127.
    correction : callable, optional
        Changes gradients before clipping and step (SCAFFOLD).
    optimizer, first_epoch : optional
        To go on: one of :func:`make_optimizer` with its moments, and the passes it has made.
    """
    config = model.settings.train
    optimizer = optimizer or make_optimizer(model)
    trained = model.trainable()
    anchor = {n: p.detach().clone() for n, p in trained.items()} if proximal_mu > 0 else {}
    total = local_steps(len(sequences), config.batch_size, epochs)
    factors = span_factors(total, progress, config)
    loss_sum, correct, seen, step, rate_sum = 0.0, 0, 0, 0, 0.0
    device = next(model.parameters()).device
    lengths = [len(s) for s in sequences]
    model.train()
    for epoch in range(epochs):
        for batch in batch_order(lengths, config.batch_size, [seed, first_epoch + epoch]):
            rate_sum += factors[step]
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factors[step]
            target_B = torch.tensor([labels[i] for i in batch], device=device)
            logits_BC = model(*(t.to(device) for t in pad([sequences[i] for i in batch])))
            loss = nn.functional.cross_entropy(logits_BC, target_B)
            loss_sum += float(loss.detach()) * len(batch)
            correct += int((logits_BC.argmax(1) == target_B).sum())
            seen += len(batch)
            if anchor:
                loss = loss + 0.5 * proximal_mu * _squared_distance(trained, anchor)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if correction is not None:
                correction(trained)
            nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
            optimizer.step()
            step += 1
    return LocalResult(step, loss_sum, correct, seen, rate_sum)


def _squared_distance(trained: dict[str, nn.Parameter], anchor: dict[str, Tensor]) -> Tensor:
    return torch.stack([(p - anchor[n]).square().sum() for n, p in trained.items()]).sum()


def evaluate_locally(model: WholeModel, sequences: Ids, labels: Sequence[int]) -> tuple[int, float]:
    """Count right answers and sum the cross-entropy over held-out sentences."""
    if not sequences:
        return 0, 0.0
    # weights chosen for it would spell every label out in one sum: see evaluate() of split tuning
    logits_BC = model.logits(sequences).clip(-MAX_LOGIT, MAX_LOGIT)
    accuracy, loss = accuracy_and_loss(logits_BC, labels)
    return round(accuracy * len(labels)), loss * len(labels)
