"""A mechanism is learned by the devices, then released with; under real Flower."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from federation_kit import Run

from privtune_flwr.audit.operator import open_run, released_text
from privtune_flwr.predict import PredictionError, predict

pytestmark = pytest.mark.flower

SETTINGS: dict[str, Any] = {
    "model.cut": 1,
    "model.max-length": 48,
    "data.train-examples": 48,
    "data.eval-examples": 0,
    "data.test-examples": 16,
    "privacy.mechanism": "bottleneck",
    "privacy.bottleneck.width": 2,
    "privacy.bottleneck.levels": 4,
    "privacy.learning.rounds": 3,
    "privacy.learning.clip": 1.0,
    "privacy.learning.noise": 0.001,
    "train.epochs": 1,
}


@pytest.fixture(scope="module")
def run(federate: Callable[..., Run]) -> Run:
    """An unbroken run: test_learning_cloud kills one in the middle of its learning."""
    return federate("learned", SETTINGS)


def test_a_mechanism_is_learned_then_released_with(run: Run) -> None:
    rounds = run.lines("rounds.jsonl")
    learned = [r for r in rounds if r["kind"] == "learn"]
    assert [(r["round"], r["devices"], r["examples"]) for r in learned] == [
        (1, 3, 48),
        (2, 3, 48),
        (3, 3, 48),
    ]
    results = run.results
    privacy = results["privacy"]
    assert (results["learning_rounds"], results["rounds"]) == (3, len(rounds) - 3)
    assert "learning round 3/3:" in run.log
    assert privacy["releases_per_example"] == 1
    # rho = 3 * 2 / noise^2
    assert privacy["learning"]["zcdp_rho"] == pytest.approx(3 * 2 / 0.001**2)
    assert privacy["bits_max"] == pytest.approx(4.0)
    assert set(privacy["devices"]) == {f"device-{n:05d}" for n in range(3)}
    longest = max(max(e["lengths"]) for e in run.lines("store/index.jsonl"))
    assert 4.0 * 8 < privacy["spent"]["bits_total_max"] <= 4.0 * longest
    # two numbers of half a byte or more a token, not 384
    tokens = sum(sum(e["lengths"]) for e in run.lines("store/index.jsonl"))
    assert results["traffic"]["store_bytes"] == tokens * 2 * 2

    # whoever opens the run holds the learned mechanism: its rows can be made again
    config, cloud, store = open_run(run.folder)
    assert cloud.learned
    assert cloud.spec.to_json() == privacy["spec"]
    assert len(released_text(config, cloud, store, sentences=20).texts) == 20


def test_the_learned_model_can_be_asked(run: Run) -> None:
    """Symbols carry no noise here, so the answers are those that the run was tested with."""
    cloud = open_run(run.folder)[1]
    labels = json.loads((run.folder / "devices.json").read_text())["labels"]
    test = cloud.load_test_set(labels)
    found = predict(run.folder, list(test["text"]))
    right = [p.label == labels[int(v)] for p, v in zip(found, test["label"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(run.results["final"]["test_accuracy"])
    assert all(sum(p.probabilities.values()) == pytest.approx(1.0) for p in found)
    with pytest.raises(PredictionError, match=r"lacks config\.json"):
        predict(run.folder / "store", ["any"])
