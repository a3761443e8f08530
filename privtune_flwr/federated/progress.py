"""A federated baseline's checkpoint: one file, the old or the new one whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save

from privtune_flwr.privacy.learning import State


@dataclass
class FitProgress:
    """Where a run stands after a finished round.

    Attributes
    ----------
    round : int
        Last finished round; 0 = none.
    rounds : list of dict
        One record a round, as in ``rounds.jsonl``.
    quarantined, refused : dict
        Device (or node) to reason.
    traffic : dict
        Device to bytes and messages.
    seconds : float
        Wall time so far.
    """

    round: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0


def save_progress(path: Path, progress: FitProgress, state: State, kept: State) -> None:
    """Write progress, model state and what the method keeps."""
    arrays = {f"state/{n}": v for n, v in state.items()} | {f"kept/{n}": v for n, v in kept.items()}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(save(arrays, metadata={"progress": json.dumps(asdict(progress))}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_progress(path: Path) -> tuple[FitProgress, State, State] | None:
    """Read a checkpoint; None where there is none yet."""
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        progress = FitProgress(**json.loads(file.metadata()["progress"]))
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts: dict[str, State] = {"state": {}, "kept": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return progress, parts["state"], parts["kept"]
