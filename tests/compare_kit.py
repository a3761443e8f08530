"""Recorded runs for the tests of comparisons, and a stand-in for Flower that hands them out."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from privtune_flwr.compare.plan import Plan, make_plan
from privtune_flwr.compare.runner import run_all
from privtune_flwr.config import RunConfig, flatten
from privtune_flwr.scenario import load_scenario

DATA = Path(__file__).parent / "data"
QUIET = Console(file=io.StringIO())
#: Beginnings of a ``[compare]`` table.
TWO = 'methods = ["ours", "fedavg-lora"]\n'
GRID = "grid = [0.3, 1, 3]\n"
#: As the recorded runs were made: 4 devices, 320 examples, 3 epochs.
SCENARIO = """
description = "four devices"
[federation]
num-supernodes = 4
[config.data]
train-examples = 320
eval-examples = 40
test-examples = 200
[config.privacy]
chunk-size = 40
[config.privacy.learning]
rounds = 2
[config.train]
epochs = 3
test-every = 1
threads = 1
[compare]
"""


def recorded(name: str) -> dict[str, Any]:
    """Give a real run's ``results.json`` (trimmed): ``split`` or ``fedavg-lora``."""
    found: dict[str, Any] = json.loads((DATA / f"results-{name}.json").read_text())
    return found


def write_scenario(folder: Path, compare: str) -> str:
    path = folder / "small.toml"
    path.write_text(SCENARIO + compare)
    return str(path)


def plan_from(folder: Path, compare: str, **chosen: Any) -> Plan:
    return make_plan(load_scenario(write_scenario(folder, compare)), folder / "runs", **chosen)


class Recorded:
    """Finishes a run by writing a recorded one's results, changed as a test wants.

    Parameters
    ----------
    change : callable
        Run name and results to change, in place; what it raises is the run's failure.
    """

    def __init__(self, change: Callable[[str, dict[str, Any]], None] = lambda n, r: None) -> None:
        self.change = change
        self.asked: list[str] = []
        self.resumed: list[str] = []

    def __call__(self, config: RunConfig, follow: Callable[[Iterable[str]], None]) -> None:
        name = config.run.name
        self.asked.append(name)
        if config.run.resume:
            self.resumed.append(name)
        folder = Path(config.run.folder) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"config": flatten(config)}))
        follow(["round 1/2\n", "round 2/2\n"])
        split = config.train.strategy in ("split", "sequential")
        results = copy.deepcopy(recorded("split" if split else "fedavg-lora"))
        results |= {"name": name, "config": flatten(config)}
        self.change(name, results)
        (folder / "results.json").write_text(json.dumps(results))


def run(plan: Any, execute: Recorded, **options: Any) -> list[str]:
    return run_all(plan, execute=execute, after=lambda: None, console=QUIET, **options)


def by_multiplier(name: str, results: dict[str, Any]) -> None:
    """Let the devices prefer x 3; the test set prefers x 0.3."""
    point = float(name.split("-x")[1].split("-")[0])
    results["final"] |= {"eval_accuracy": 0.5 + point / 10, "test_accuracy": 0.9 - point / 10}
