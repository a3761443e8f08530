"""SplitFed through real Flower: a message a step, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from federation_kit import Run
from transformers import AutoModelForSequenceClassification

from privtune_flwr.audit.updates.run import invert_run

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import save_tiny

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def run(federate: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two devices of 16 sentences each: two batches of eight a round, two rounds."""
    settings = {
        "model.name": str(save_tiny("bert", tmp_path_factory.mktemp("model"))),
        "model.cut": 1,
        "model.max-length": 16,
        "model.tuning": "lora",
        "model.lora-rank": 2,
        "data.source": "election-tweets",
        "data.train-examples": 32,
        "data.eval-examples": 8,
        "privacy.mechanism": "none",
        "train.strategy": "splitfed",
    }
    return federate("splitfed", settings, devices=2)


def test_every_step_is_a_message_and_both_halves_learn(run: Run) -> None:
    results = run.results
    rounds = run.lines("rounds.jsonl")
    assert [(r["round"], r["devices"], r["steps"], r["seen"]) for r in rounds] == [
        (1, 2, 2, 32),
        (2, 2, 2, 32),
    ]
    assert all(r["update_norm"] > 0 for r in rounds)
    for account in results["traffic"]["devices"].values():
        # joining, two rounds of three messages, provisioning and evaluation apart
        apart = account.get("provision_messages", 0) + account["evaluate_messages"]
        assert account["messages"] - apart == 1 + 2 * 3
        # rows of every epoch go up in half precision, as many gradients come down
        assert account["up"] > 0
        assert account["down"] / account["up"] > 0.5
    assert results["privacy"]["cloud_sees"].startswith("representations")
    assert results["privacy"]["epsilon"] is None
    assert {"test_accuracy", "eval_accuracy", "loss"} <= results["final"].keys()
    assert results["final"]["eval_examples"] == 8
    assert results["memory"]["device_peak_bytes"] > 0
    assert results["devices"] == {"used": 2, "quarantined": {}, "refused": {}}


def test_an_audit_reads_the_rows_that_left(run: Run) -> None:
    found = invert_run(run.folder)
    assert found == json.loads((run.folder / "inversion.json").read_text())
    # the tiny model knows none of the words, so how much is read is another test's
    assert (found["attack"], found["devices"], found["examples"]) == ("retrieval", 2, [16, 16])
    assert set(found["rounds"]) == {"first", "later"}
    assert found["token_recall"] is None


def test_the_joined_model_loads_without_adapters(run: Run) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    assert len(model.bert.encoder.layer) == 3
