"""What a finished federation of these tests is, and how small they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privtune_flwr.config import RunConfig, Scalar, load_run_config

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
    "data.train-examples": 72,
    "data.test-examples": 40,
    "train.evaluate-every": 2,
    "run.seed": 3,
}

# two methods under `privtune compare`, each in a process of its own
COMPARED = """
description = "two devices"
[federation]
num-supernodes = 2
[config.data]
train-examples = 48
eval-examples = 8
test-examples = 40
[config.model]
max-length = 32
lora-rank = 2
[config.train]
epochs = 2
test-every = 1
batch-size = 8
threads = 1
[compare]
methods = ["split-clear", "fedavg-lora"]
"""


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


def finished(folder: Path, log: Path) -> Run:
    """Open what a run of another test left."""
    known = json.loads((folder / "config.json").read_text())
    return Run(folder, load_run_config(known["config"]), log.read_text())
