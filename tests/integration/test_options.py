"""One federation that takes the less usual turn at every choice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from federation_kit import Run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from privtune_flwr.audit.auditor import Auditor
from privtune_flwr.audit.operator import AuditError
from privtune_flwr.audit.plan import QUICK

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import save_tiny

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def run(federate: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a randomly initialised Llama from a local folder: LoRA, int8, Dirichlet, per epoch."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"))
    settings = {
        "model.name": str(folder),
        "model.cut": 1,
        "model.max-length": 16,
        "model.tuning": "lora",
        "model.lora-rank": 2,
        "data.source": "election-tweets",
        "data.train-examples": 96,
        "data.partitioner": "dirichlet",
        "data.dirichlet-alpha": 1.0,
        "data.test-source": "none",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "privacy.wire": "int8",
        "privacy.release-policy": "per-epoch",
        "train.optimizer": "sgd",
        "train.schedule": "cosine",
        "train.evaluate-every": 3,
    }
    return federate("options", settings, devices=4)


def test_every_epoch_released_anew(run: Run) -> None:
    index = run.lines("store/index.jsonl")
    epochs = {e["epoch"] for e in index if e["split"] == "train"}
    assert epochs == {0, 1}
    sizes = [
        sum(len(e["lengths"]) for e in index if e["split"] == "train" and e["epoch"] == epoch)
        for epoch in (0, 1)
    ]
    assert sizes == [96, 96]
    privacy = run.results["privacy"]
    assert privacy["releases_per_example"] == 2
    # basic composition over the two releases
    assert privacy["spent_eta_per_token"] == pytest.approx(2 * privacy["eta_max"])


def test_devices_evaluate_on_the_way(run: Run) -> None:
    evaluated = [r["round"] for r in run.lines("rounds.jsonl") if "eval_accuracy" in r]
    assert evaluated[0] == 3
    assert "test_accuracy" not in run.results["final"]


def test_the_merged_decoder_loads(run: Run) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    assert sorted(model.config.id2label.values()) == ["Clinton", "Trump"]
    assert AutoTokenizer.from_pretrained(run.folder / "model")


def test_text_without_a_word_of_the_vocabulary_is_not_audited(run: Run) -> None:
    # the tiny tokenizer knows none of these tweets' words
    with pytest.raises(AuditError, match="nothing to recover"):
        Auditor(run.folder, QUICK)
