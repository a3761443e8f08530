"""A mechanism is learned by the devices, then released with; under real Flower."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from federation_kit import Run
from test_resume import KilledError, kill_simulation

from privtune_flwr.audit.operator import open_run, released_text
from privtune_flwr.launcher import SuperLink
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
def resumed(
    federate: Callable[..., Run], superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Killed in its second learning round, and resumed."""

    def kill_in_round_two(line: str) -> None:
        if "learning round 2/" in line:
            kill_simulation(superlink)

    with pytest.raises(KilledError):
        federate("learned", SETTINGS, on_line=kill_in_round_two)
    return federate("learned", {**SETTINGS, "run.resume": True})


def learning_rounds(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.lines("rounds.jsonl") if r["kind"] == "learn"]


def test_a_mechanism_is_learned_across_a_kill_then_released_with(resumed: Run) -> None:
    rounds = resumed.lines("rounds.jsonl")
    learned = learning_rounds(resumed)
    assert [(r["round"], r["devices"], r["examples"]) for r in learned] == [
        (1, 3, 48),
        (2, 3, 48),
        (3, 3, 48),
    ]
    results = resumed.results
    privacy = results["privacy"]
    assert (results["learning_rounds"], results["rounds"]) == (3, len(rounds) - 3)
    # what an unbroken run would have learned is held against in one process: test_learning_cloud
    assert "resuming after learning round" in resumed.log
    assert "learning round 3/3:" in resumed.log
    assert privacy["releases_per_example"] == 1
    # rho = 3 * 2 / noise^2
    assert privacy["learning"]["zcdp_rho"] == pytest.approx(3 * 2 / 0.001**2)
    assert privacy["bits_max"] == pytest.approx(4.0)
    assert set(privacy["devices"]) == {f"device-{n:05d}" for n in range(3)}
    longest = max(max(e["lengths"]) for e in resumed.lines("store/index.jsonl"))
    assert 4.0 * 8 < privacy["spent"]["bits_total_max"] <= 4.0 * longest
    # two numbers of half a byte or more a token, not 384
    tokens = sum(sum(e["lengths"]) for e in resumed.lines("store/index.jsonl"))
    assert results["traffic"]["store_bytes"] == tokens * 2 * 2

    # whoever opens the run holds the learned mechanism: its rows can be made again
    config, cloud, store = open_run(resumed.folder)
    assert cloud.learned
    assert cloud.spec.to_json() == privacy["spec"]
    assert len(released_text(config, cloud, store, sentences=20).texts) == 20


def test_the_learned_model_can_be_asked(resumed: Run) -> None:
    """Symbols carry no noise here, so the answers are those that the run was tested with."""
    cloud = open_run(resumed.folder)[1]
    labels = json.loads((resumed.folder / "devices.json").read_text())["labels"]
    test = cloud.load_test_set(labels)
    found = predict(resumed.folder, list(test["text"]))
    right = [p.label == labels[int(v)] for p, v in zip(found, test["label"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(resumed.results["final"]["test_accuracy"])
    assert all(sum(p.probabilities.values()) == pytest.approx(1.0) for p in found)
    with pytest.raises(PredictionError, match=r"lacks config\.json"):
        predict(resumed.folder / "store", ["any"])
