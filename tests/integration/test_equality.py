"""A federation without noise is the same training as one process on the joined data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from federation_kit import Run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from privtune_flwr.assets import model_folder
from privtune_flwr.data import load_source, split_source
from privtune_flwr.device import Holdings, open_holdings, open_home
from privtune_flwr.models import cut_model, export
from privtune_flwr.training.plan import make_plan
from simulations.central import Pass, train_uncut

pytestmark = pytest.mark.flower

DEVICES = 3


@pytest.fixture(scope="module")
def run(federate: Callable[..., Run]) -> Run:
    settings = {
        "privacy.mechanism": "none",
        "privacy.wire": "float32",
        "model.cut": 2,
        "train.fraction": 0.7,
    }
    # devices hop between processes, which must make no difference
    return federate("equality", settings, devices=DEVICES, cores=1)


def uncut_losses(run: Run, tmp_path: Path) -> list[float]:
    """Train the uncut model on the joined text in the federation's order, frozen below the cut."""
    config = run.config
    start = cut_model(model_folder("minilm"), cut=2, num_labels=2, seed=config.run.seed)
    export(start, tmp_path / "start")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "start",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
        attn_implementation="eager",
    )
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:2].requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    held: dict[str, Holdings] = {}
    for partition in range(DEVICES):
        node = {"partition-id": partition, "num-partitions": DEVICES}
        home = open_home(node, run_id="0" * 32, simulated=True, seed=config.run.seed)
        held[home.device_id] = open_holdings(config, node, home)
    plan = make_plan(
        {device: len(h.train.texts) for device, h in held.items()},
        {device: len(h.evaluation.texts) for device, h in held.items()},
        config,
    )
    passes = []
    for current in plan.rounds:
        chunks = [
            held[ask.device].chunk("train", ask.chunk, config.privacy.chunk_size)
            for ask in plan.train_asks(current.number)
        ]
        texts = [text for chunk in chunks for text in chunk.texts]
        passes.append(Pass(current.number, texts, [v for chunk in chunks for v in chunk.labels]))
    return train_uncut(model, tokenizer, passes, config, head="classifier").losses


def test_the_loss_curve_is_that_of_one_process(run: Run, tmp_path: Path) -> None:
    federated = [step[1] for step in run.lines("steps.jsonl")]
    torch.set_num_threads(1)
    alone = uncut_losses(run, tmp_path)
    assert len(federated) == len(alone)
    np.testing.assert_allclose(federated, alone, atol=1e-5, rtol=0)


def test_the_exported_model_is_an_ordinary_checkpoint(run: Run) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    data = run.config.data
    test = split_source(load_source(data.source), data, seed=run.config.run.seed).test
    assert test is not None
    batch = tokenizer(
        list(test["text"]),
        padding=True,
        truncation=True,
        max_length=run.config.model.max_length,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(**batch).logits
    labels = torch.tensor(list(test["label"]))
    final = run.results["final"]
    assert int((logits.argmax(1) == labels).sum()) / len(labels) == final["test_accuracy"]
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert loss == pytest.approx(final["test_loss"], abs=1e-5)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_results_tell_what_happened(run: Run) -> None:
    results = run.results
    assert results["devices"] == {"used": DEVICES, "quarantined": {}, "refused": {}}
    assert results["examples"]["train_received"] == 192
    assert results["privacy"]["mechanism"] == "none"
    assert results["privacy"]["eta_max"] is None
    assert results["privacy"]["releases_per_example"] == 1
    accounts = results["traffic"]["devices"]
    assert len(accounts) == DEVICES
    assert all(a["up"] > 100_000 and a["messages"] > 3 for a in accounts.values())
    rounds = run.lines("rounds.jsonl")
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))
    assert rounds[-1]["eval_examples"] == 24
    assert (run.folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    for stage in ("bottom", "mechanism", "codec", "wire", "top"):
        assert results["seconds"][stage] > 0
