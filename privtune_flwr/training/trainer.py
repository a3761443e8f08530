"""Training the top model on what is in the store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from privtune_flwr.config import TrainConfig
from privtune_flwr.training.batches import batch_order, collate
from privtune_flwr.training.store import Example

EVAL_BATCH = 64


@dataclass(frozen=True)
class Step:
    """One optimiser step: its number from 1, the batch's mean loss, the blocks' learning rate."""

    number: int
    loss: float
    learning_rate: float


def pick_device(name: str) -> torch.device:
    """Resolve ``train.device``: an accelerator when there is one, unless told otherwise."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def schedule_factor(step: int, total: int, config: TrainConfig) -> float:
    """Multiplier of the base learning rates at ``step`` (from 0) of ``total``."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def span_factors(total: int, span: tuple[float, float], config: TrainConfig) -> list[float]:
    """Give the schedule's factor for each of ``total`` steps that make up a part of a run.

    Parameters
    ----------
    total : int
        Steps of one machine in this part.
    span : (float, float)
        From which share of the run to which it goes; the run has as many steps as this machine
        would make in all of it.
    config : TrainConfig
        ``schedule`` and ``warmup``.
    """
    first, last = span
    run_steps = max(total, round(total / max(last - first, 1e-9)))
    begin = round(first * run_steps)
    return [schedule_factor(begin + step, run_steps, config) for step in range(total)]


class TopModelTrainer:
    """Optimiser, schedule and loop for a classifier fed with representations.

    Parameters
    ----------
    model : nn.Module
        ``(hidden_BTD, mask_BT) -> logits_BC``.
    groups : list of dict
        Parameter groups with their base ``lr`` and ``weight_decay``.
    config : TrainConfig
        The ``train`` section.
    seed : int
        The run's seed; batches are keyed by it and the round, so that nothing of a generator's
        state needs saving.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig, *, seed: int
    ) -> None:
        self.model = model
        self.device = pick_device(config.device)
        model.to(self.device)
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups)
        else:
            self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self._base = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._config = config
        self._seed = seed
        self.steps = 0

    def train_pass(
        self,
        rows_ND: npt.NDArray[Any],
        examples: Sequence[Example],
        *,
        round_number: int,
        total_steps: int,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> list[Step]:
        """Train on every example once.

        Parameters
        ----------
        rows_ND : array (N, D)
            The store's rows.
        examples : sequence of Example
            In plan order.
        round_number : int
            Keys the order of batches.
        total_steps : int
            Steps of the whole run, for the schedule.
        on_step : callable
            Called after each step, for progress.
        """
        self.model.train()
        steps: list[Step] = []
        lengths = [e.length for e in examples]
        for batch in batch_order(lengths, self._config.batch_size, [self._seed, 2, round_number]):
            loss = self._step([examples[i] for i in batch], rows_ND, total_steps)
            step = Step(self.steps, loss, self.optimizer.param_groups[0]["lr"])
            steps.append(step)
            on_step(step)
        return steps

    def _step(self, batch: list[Example], rows_ND: npt.NDArray[Any], total: int) -> float:
        factor = schedule_factor(self.steps, total, self._config)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor
        hidden_BTD, mask_BT, labels_B = (t.to(self.device) for t in collate(rows_ND, batch))
        loss = nn.functional.cross_entropy(self.model(hidden_BTD, mask_BT), labels_B)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(
            [p for g in self.optimizer.param_groups for p in g["params"]], self._config.clip_norm
        )
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())

    @torch.inference_mode()
    def logits(
        self, rows_ND: npt.NDArray[Any], examples: Sequence[Example]
    ) -> npt.NDArray[np.float32]:
        """Compute outputs for examples in their order, float32 (B, C)."""
        self.model.eval()
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        pieces: dict[int, npt.NDArray[np.float32]] = {}
        for part in _pieces(order, EVAL_BATCH):
            hidden_BTD, mask_BT, _ = collate(rows_ND, [examples[i] for i in part])
            out = self.model(hidden_BTD.to(self.device), mask_BT.to(self.device))
            pieces |= dict(zip(part, out.float().cpu().numpy(), strict=True))
        return np.stack([pieces[i] for i in range(len(examples))])


def _pieces(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def accuracy_and_loss(
    logits_BC: npt.NDArray[np.float32], labels: Sequence[int]
) -> tuple[float, float]:
    """Share of right predictions and mean cross-entropy."""
    target = torch.tensor(list(labels))
    logits = torch.from_numpy(logits_BC)
    accuracy = int((logits.argmax(1) == target).sum()) / len(target)
    return accuracy, float(nn.functional.cross_entropy(logits, target))
