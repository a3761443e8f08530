"""Checkpoints: everything a killed run needs beyond its store and its plan."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from privtune_flwr.training.trainer import TopModelTrainer


@dataclass
class Progress:
    """Where a run stands after a finished round.

    Attributes
    ----------
    round : int
        Last finished round; 0 = evaluation examples are in.
    rounds : list of dict
        One record a round, as in ``rounds.jsonl``.
    steps : list of [step, loss, learning rate]
    quarantined, refused : dict
        Device id (or node) to reason.
    traffic : dict
        Device id to ``{"up", "down", "messages"}``.
    spent : dict
        Device id to what its ledger says it has spent, as of its last reply.
    """

    round: int = -1
    rounds: list[dict[str, Any]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    spent: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def save(path: Path, trainer: TopModelTrainer, progress: Progress) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one whole."""
    state = {
        "model": {
            n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad
        },
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.steps,
        "progress": vars(progress),
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path, trainer: TopModelTrainer) -> Progress | None:
    """Restore trainer and progress; None where there is no checkpoint yet."""
    if not path.exists():
        return None
    # weights_only: plain containers and tensors, never code
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in state["model"].items():
            own[name].copy_(value)
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.steps = int(state["step"])
    return Progress(**state["progress"])
