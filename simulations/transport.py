"""Release once against a message a step against one process: time, messages, bytes, accuracy.

``make bench`` (``python -m simulations.transport``) writes ``simulations/results/transport.json``.
Same text, same epochs, same batches of 32, MiniLM cut at 2, no noise: only the transport differs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.data import load_source, split_source
from privtune_flwr.models import cut_model, export, resolve_model
from privtune_flwr.results.run_folder import write_text
from simulations.central import Pass, accuracy, train_uncut
from simulations.study import RESULTS, Case, run_study

SETTINGS: dict[str, Scalar] = {"privacy.mechanism": "none", "model.cut": 2}
ONCE = Case("release-once", SETTINGS)
STEPWISE = Case(
    "message-a-step",
    {
        **SETTINGS,
        "train.strategy": "stepwise",
        "privacy.release-policy": "per-epoch",
        # what plain split learning sends: single precision, padded to the batch's longest
        "privacy.wire": "float32-padded",
        "privacy.chunk-size": 32,
    },
)


def central(config: RunConfig) -> dict[str, Any]:
    """Fine-tune the whole, uncut model in this process for the same number of epochs."""
    split = split_source(load_source(config.data.source), config.data, seed=config.run.seed)
    assert split.test is not None
    train = split.pool.select(range(config.data.train_examples))
    cut = cut_model(
        resolve_model(config.model.name), cut=config.model.cut, num_labels=2, seed=config.run.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        export(cut, folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            classifier_dropout=0.0,
            attn_implementation="eager",
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, labels = list(train["text"]), list(train["label"])
    passes = [Pass(epoch + 1, texts, labels) for epoch in range(config.train.epochs)]
    run = train_uncut(model, tokenizer, passes, config, head="classifier")
    right = accuracy(
        model,
        tokenizer,
        list(split.test["text"]),
        list(split.test["label"]),
        config.model.max_length,
    )
    return {
        "name": "one-process",
        "training_seconds": run.seconds,
        "steps": len(run.losses),
        "accuracy": right,
        "threads": torch.get_num_threads(),
        "messages": 0,
        "bytes_up_per_example": 0.0,
        "bytes_down_per_example": 0.0,
    }


def _training(folder: Path) -> dict[str, Any]:
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {"training_seconds": sum(r["seconds_round"] for r in rounds)}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    # devices send each example epochs times under a message a step; an example is still one
    examples = 3200
    return {
        "name": row["name"],
        "training_seconds": row["training_seconds"],
        "steps": row["steps"],
        "accuracy": row["final"]["test_accuracy"],
        "messages": row["traffic"]["messages"],
        "bytes_up_per_example": row["traffic"]["bytes_up"] / examples,
        "bytes_down_per_example": row["traffic"]["bytes_down"] / examples,
    }


def main(
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs/transport"),
    seeds: Annotated[int, typer.Option(help="Seeds of the one process's accuracy.")] = 3,
) -> None:
    """Run the three side by side and store figures and ratios; what is stored already is kept."""
    target = RESULTS / "transport.json"
    rows = run_study("transport", [ONCE, STEPWISE], runs=runs, measure=_training)
    once, stepwise = (
        next(_row(r) for r in rows if r["name"] == case.name) for case in (ONCE, STEPWISE)
    )
    content = json.loads(target.read_text(encoding="utf-8"))
    alone = content.setdefault("one_process", {})
    for seed in range(seeds):
        if str(seed) not in alone:
            settings = SETTINGS | {"run.seed": seed}
            alone[str(seed)] = central(load_run_config(flatten(RunConfig()) | settings))
            write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")
    content |= {
        "comparison": [once, stepwise, alone["0"]],
        "ratios": _ratios(once, stepwise, alone["0"]),
        "one_process_accuracy": [alone[str(seed)]["accuracy"] for seed in range(seeds)],
    }
    write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(json.dumps({k: content[k] for k in ("comparison", "ratios")}, indent=1))


def _ratios(
    once: dict[str, Any], stepwise: dict[str, Any], alone: dict[str, Any]
) -> dict[str, float]:
    seconds, up = "training_seconds", "bytes_up_per_example"
    return {
        "training time, release-once / one-process": once[seconds] / alone[seconds],
        "training time, release-once / message-a-step": once[seconds] / stepwise[seconds],
        "bytes up, message-a-step / release-once": stepwise[up] / once[up],
        "messages, message-a-step / release-once": stepwise["messages"] / once["messages"],
        "accuracy, release-once - one-process": once["accuracy"] - alone["accuracy"],
        "accuracy, release-once - message-a-step": once["accuracy"] - stepwise["accuracy"],
    }


if __name__ == "__main__":
    typer.run(main)
