"""A baseline whose devices remember, through real Flower."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from federation_kit import Run
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import save_tiny

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def run(federate: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run SCAFFOLD on a tiny model: two rounds, three devices."""
    settings = {
        "model.name": str(save_tiny("bert", tmp_path_factory.mktemp("model"))),
        "model.max-length": 16,
        "model.tuning": "lora",
        "model.lora-rank": 2,
        "train.strategy": "scaffold",
        "train.optimizer": "sgd",
        "train.learning-rate": 0.05,
        "train.head-learning-rate": 0.2,
        "train.test-every": 1,
    }
    return federate("scaffold", settings)


def test_controls_travel_and_are_kept(run: Run) -> None:
    with safe_open(run.folder / "checkpoint.pt", framework="numpy") as file:
        names = set(file.keys())
    weights = {n.removeprefix("state/") for n in names if n.startswith("state/")}
    assert {f"kept/c/{n}" for n in weights} == {n for n in names if n.startswith("kept/")}
    rounds = run.lines("rounds.jsonl")
    assert [r["round"] for r in rounds] == [1, 2]
    assert all(r["devices"] == 3 and r["control_norm"] > 0 for r in rounds)
    assert [r["new_fits"] for r in rounds] == [3, 3]
    assert all("test_accuracy" in r for r in rounds)


def test_its_results(run: Run) -> None:
    results = json.loads((run.folder / "results.json").read_text())
    assert results["devices"] == {"used": 3, "quarantined": {}, "refused": {}}
    assert results["privacy"]["mechanism"] == "scaffold"
    # twice what FedAvg sends: weights, and the change of the control
    with safe_open(run.folder / "checkpoint.pt", framework="numpy") as file:
        numbers = sum(file.get_tensor(n).size for n in file.keys() if n.startswith("state/"))  # noqa: SIM118
    up = results["traffic"]["training"]["bytes_up"]
    assert up > 3 * 2 * 2 * 4 * numbers
    assert (run.folder / "model" / "config.json").exists()
