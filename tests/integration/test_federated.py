"""Federated averaging of adapters under real Flower: one run, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from federation_kit import Run, finished
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from privtune_flwr.config import ConfigError
from privtune_flwr.data import load_source, split_source
from privtune_flwr.data.held_out import load_test_set
from privtune_flwr.federated.progress import load_progress
from privtune_flwr.results.run_folder import open_run_folder

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def run(compared: Path) -> Run:
    """Run FedAvg on adapters of rank 2: two devices, 48 examples, two rounds."""
    name = "fedavg-lora-x1-seed0"
    return finished(compared / "runs" / name, compared / "runs" / f"{name}.log")


def test_the_results_tell_what_was_done(run: Run) -> None:
    results = run.results
    assert results["rounds"] == 2
    assert [r["devices"] for r in results["per_round"]] == [2, 2]
    assert [r["examples"] for r in results["per_round"]] == [48, 48]
    # three batches of eight a device and round
    assert results["steps"] == 2 * 2 * 3
    assert results["devices"] == {"used": 2, "quarantined": {}, "refused": {}}
    assert results["final"]["eval_examples"] == 8
    assert 0 < results["final"]["loss"] < 1.5
    privacy = results["privacy"]
    assert (privacy["mechanism"], privacy["epsilon"]) == ("fedavg", None)
    assert "adapters" in privacy["cloud_sees"]
    assert "No formal guarantee" in privacy["statement"]
    assert results["memory"]["device_peak_bytes"] > 10**7
    assert results["seconds"]["fit"] > 0
    # every round moves the model, and its test is told
    assert all(r["update_norm"] > 1e-3 for r in results["per_round"])
    assert all("test_accuracy" in r for r in results["per_round"])


def test_traffic_is_the_adapters_down_and_up(run: Run) -> None:
    found = load_progress(run.folder / "checkpoint.pt")
    assert found is not None
    progress, state, _ = found
    size = 4 * sum(v.size for v in state.values())
    training = run.results["traffic"]["training"]
    # a fit is one message; join is counted among training's too
    assert training["messages"] == 2 * (2 + 1)
    for key in ("bytes_up", "bytes_down"):
        assert 2 * 2 * size < training[key] < 1.25 * 2 * 2 * size
    for account in run.results["traffic"]["devices"].values():
        # the model goes down once more to be judged; sums come back
        assert account["evaluate_messages"] == 1
        assert size < account["evaluate_down"] < 1.25 * size
        assert account["evaluate_up"] < 2**10
        assert "lost" not in account
    assert set(progress.traffic) == {"device-00000", "device-00001"}


def test_the_exported_model_is_the_one_that_was_tested(run: Run) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    names = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    test = load_test_set(run.config, names)
    given = tokenizer(
        list(test["text"]), truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        answers = model(**given).logits.argmax(1).numpy()
    own = test.features["label"].names
    wanted = np.array([names.index(own[label]) for label in test["label"]])
    assert len(wanted) == 40
    assert float((answers == wanted).mean()) == run.results["final"]["test_accuracy"]


def test_the_log_holds_no_text(run: Run) -> None:
    source = load_source("movie-snippets")
    pool = split_source(source, run.config.data, seed=run.config.run.seed).pool
    assert not [text for text in pool["text"] if len(text) > 20 and text[:20] in run.log]
    assert "round 2/2: 2 devices, 48 examples" in run.log


def test_a_finished_run_is_not_overwritten_and_opens_again(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"run\.name = 'fedavg-lora-x1-seed0': .* exists"):
        open_run_folder(run.config)
    again = run.config.run.model_copy(update={"resume": True})
    folder = open_run_folder(run.config.model_copy(update={"run": again}))
    folder.lock.release()
    known = json.loads((run.folder / "config.json").read_text())
    assert folder.run_id == known["run_id"]
    restored = load_progress(folder.checkpoint)
    assert restored is not None
    assert restored[0].round == run.results["rounds"] == 2
    other = run.config.federated.model_copy(update={"local_epochs": 2})
    changed = run.config.model_copy(update={"run": again, "federated": other})
    with pytest.raises(ConfigError, match=r"federated\.local-epochs"):
        open_run_folder(changed)
