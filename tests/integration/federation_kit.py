"""What a finished federation of these tests is, and how small they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privtune_flwr.config import RunConfig, Scalar

SMALL: dict[str, Scalar] = {
    "data.train-examples": 192,
    "data.eval-examples": 24,
    "data.test-examples": 64,
    "privacy.chunk-size": 16,
    "train.epochs": 2,
    "train.batch-size": 16,
    "train.threads": 1,
}

# noise that hides something, released anew at each of two epochs; evaluated on the way
NOISY: dict[str, Scalar] = {
    "privacy.mechanism": "dchi",
    "privacy.noise": 6.0,
    "privacy.release-policy": "per-epoch",
    "data.train-examples": 120,
    "data.test-examples": 40,
    "train.evaluate-every": 2,
    "run.seed": 3,
}


@dataclass
class Run:
    """A finished run: its folder, results and log."""

    folder: Path
    config: RunConfig
    log: str

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
