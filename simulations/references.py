"""Lines to hold a private run against: ``python -m simulations.references``.

- *public only*: the whole model tuned on public labelled text (amazon- and nyt-snippets), as many
  sentences as the devices hold; no private example. A private run that does not beat it has gained
  nothing. There are no public labels for bbc-news.
- *device alone*: one device tunes the blocks that it holds (two) on its own text, no cloud.
- *devices' text in one place*: the same two blocks tuned on the text of all devices: more than a
  device can reach without others, and what a cloud that adds nothing would be held against.

Clean input, the recipe of the federations, mean pooling. Figures go to
``simulations/results/references.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock
from transformers import AutoModel, AutoTokenizer

from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.data import load_public_dataset, load_source, split_source
from privtune_flwr.models import resolve_model
from privtune_flwr.models.heads import MeanPooledClassifier
from privtune_flwr.results.run_folder import write_text
from simulations.audited import SOURCES
from simulations.central import Pass, accuracy, train_uncut
from simulations.study import RESULTS

_DEVICES = 10
_ALONE_EPOCHS = 20  # a tenth of the text: three passes would be too few steps to learn anything


def public_only(config: RunConfig) -> dict[str, Any]:
    """Tune the whole model on public labelled text."""
    public = load_public_dataset(config.data.public_corpora).shuffle(seed=config.run.seed)
    size = min(config.data.train_examples, len(public))
    return _tuned(config, public[:size]["text"], public[:size]["label"], config.train.epochs, None)


def device_alone(config: RunConfig) -> dict[str, Any]:
    """Tune a device's blocks on one device's share."""
    pool = split_source(_source(config), config.data, seed=config.run.seed).pool
    share = pool[: config.data.train_examples // _DEVICES]
    return _tuned(config, share["text"], share["label"], _ALONE_EPOCHS, config.model.cut)


def devices_text_in_one_place(config: RunConfig) -> dict[str, Any]:
    """Tune a device's blocks on all devices' text."""
    pool = split_source(_source(config), config.data, seed=config.run.seed).pool
    share = pool[: config.data.train_examples]
    return _tuned(config, share["text"], share["label"], config.train.epochs, config.model.cut)


LINES: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "public-only": public_only,
    "device-alone": device_alone,
    "devices-text-in-one-place": devices_text_in_one_place,
}


def _source(config: RunConfig) -> Any:
    return load_source(config.data.source)


def _tuned(
    config: RunConfig, texts: list[str], labels: list[int], epochs: int, blocks: int | None
) -> dict[str, Any]:
    """Tune MiniLM, or its first blocks, and test on the federations' test set."""
    source = _source(config)
    folder = resolve_model(config.model.name)
    depth = {} if blocks is None else {"num_hidden_layers": blocks}
    base = AutoModel.from_pretrained(
        folder,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **depth,
    )
    classes = len(source.features["label"].names)
    # the mean of rows: the native head reads one row that the first blocks alone do not fill
    model = MeanPooledClassifier(base, classes, config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    passes = [Pass(number, texts, labels) for number in range(epochs)]
    train_uncut(model, tokenizer, passes, config, head="classifier")
    test = split_source(source, config.data, seed=config.run.seed).test
    assert test is not None
    right = accuracy(
        model, tokenizer, list(test["text"]), list(test["label"]), config.model.max_length
    )
    return {"accuracy": right, "sentences": len(texts), "epochs": epochs, "blocks": blocks or 6}


def main(
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = all.")] = 0,
) -> None:
    """Measure all lines; what is stored already is kept."""
    if threads:
        torch.set_num_threads(threads)
    for seed in range(seeds):
        for source in ("movie-snippets", "bbc-news"):
            settings = flatten(RunConfig()) | SOURCES[source] | {"run.seed": seed}
            for name, line in LINES.items():
                # no public text has the topics of bbc-news for labels
                if (name, source) != ("public-only", "bbc-news"):
                    _store(f"{source}-{name}-seed{seed}", line, load_run_config(settings))


def _store(name: str, line: Callable[[RunConfig], dict[str, Any]], config: RunConfig) -> None:
    target = RESULTS / "references.json"
    if name in _stored(target):
        return
    row = {"command": "python -m simulations.references", **line(config)}
    with FileLock(target.with_suffix(".lock")):
        rows = {**_stored(target), name: row}
        write_text(target, json.dumps({"rows": rows}, indent=1, sort_keys=True) + "\n")
    print(name, json.dumps(row))


def _stored(target: Path) -> dict[str, Any]:
    if not target.exists():
        return {}
    rows: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))["rows"]
    return rows


if __name__ == "__main__":
    typer.run(main)
