"""What a mechanism costs a device beside the bottom model's own forward pass.

``python -m simulations.device_cost`` writes ``simulations/results/device_cost.json``: for every
registered mechanism with default settings (learned ones as their learning starts), at cut 0, 1 and
2 of MiniLM on one thread: milliseconds a sentence of movie-snippets of the mechanism and of the
bottom model, measured in alternating blocks of one process, so that a busy machine slows both; the
artefact's bytes; peak memory. For ``privtune`` also the seconds of its set-up from an empty cache.
Each case runs in a process of its own: memory is the process's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from privtune_flwr.assets import cache_root
from privtune_flwr.bundle import Manifest
from privtune_flwr.config import PrivacyConfig
from privtune_flwr.data import load_public_text, load_source, tokenise
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.models import BottomModel, cut_model, resolve_model
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import example_identity, keyed_generator
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class, mechanism_names
from privtune_flwr.results.run_folder import write_text
from privtune_flwr.usage import peak_memory_bytes
from simulations.study import RESULTS

CUTS = (0, 1, 2)
PUBLIC = ("amazon-snippets", "nyt-snippets")
VARIANTS: dict[str, dict[str, str]] = {
    "privtune-pgd": {"vector": "pgd"},
    "privtune-occurrence": {"vector": "pgd", "per": "occurrence"},
}
_BLOCK = 10  # sentences of one alternation

Sentences = list[NDArray[np.int32]]


def cases() -> list[str]:
    """Name every registered mechanism, and PrivTune's variants."""
    return [*mechanism_names(), *VARIANTS]


def config_of(case: str) -> PrivacyConfig:
    """Give the default settings of a mechanism, or those of a variant of PrivTune."""
    if case not in VARIANTS:
        return PrivacyConfig(mechanism=case)
    return PrivacyConfig.model_validate({"mechanism": "privtune", "privtune": VARIANTS[case]})


def measure(case: str, cut: int, sentences: int, repeats: int, cold: bool) -> dict[str, Any]:
    """Measure one mechanism at one cut; a ``skipped`` with a reason where it cannot be.

    Parameters
    ----------
    case : str
        One of :func:`cases`.
    cut : int
        Blocks on the device.
    sentences, repeats : int
        How many sentences are perturbed, and how often each; the median of the repeats counts.
    cold : bool
        Design from an empty cache and time it, with as many threads as there are cores.
    """
    config = config_of(case)
    row: dict[str, Any] = {"name": case, "cut": cut}
    kind = mechanism_class(config.mechanism)
    if case == "cells-labels":
        return {**row, "skipped": "releases as cells does, once its counts are learned"}
    model = cut_model(resolve_model("minilm"), cut=cut, num_labels=2, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        bundle, artefact, cache = (Path(scratch) / n for n in ("bundle", "artefact", "cache"))
        artefact.mkdir()
        model.bottom.save(bundle)
        public = PublicKnowledge(
            model.bottom,
            model.tokenizer,
            load_public_text(PUBLIC),
            cache if cold else cache_root(),
            bottom_id=Manifest.of(bundle).id,
        )
        torch.set_num_threads(os.cpu_count() or 1)
        start = time.perf_counter()
        try:
            spec = kind.design(config, public, artefact)
            if kind.learned:  # frozen as it starts: what the weights are does not change the cost
                learner = kind.learner(
                    spec, artefact if spec.artefact else None, model.bottom, num_labels=2
                )
                spec = learner.finish(learner.start(), artefact)
            mechanism = create_mechanism(spec, artefact if spec.artefact else None, model.bottom)
        except (PrivTuneError, ValueError, NotImplementedError) as error:
            return {**row, "skipped": f"cannot be designed: {error}"}
        if cold:
            row["setup_seconds"] = time.perf_counter() - start
            row["setup_cores"] = os.cpu_count()
        row["artefact_bytes"] = sum(path.stat().st_size for path in artefact.iterdir())
        row["reads"] = kind.reads
        torch.set_num_threads(1)
        texts = load_source("movie-snippets")["text"]
        chosen = np.random.default_rng(0).permutation(len(texts))[:sentences]
        ids = tokenise(model.tokenizer, [texts[int(i)] for i in chosen], 128)
        try:
            row |= side_by_side(mechanism, model.bottom, ids, repeats)
        except PrivTuneError as error:
            return {**row, "skipped": f"cannot be applied: {error}"}
    return {**row, "peak_memory_bytes": peak_memory_bytes()}


def side_by_side(
    mechanism: Mechanism, bottom: BottomModel, ids: Sentences, repeats: int
) -> dict[str, float]:
    """Time mechanism and bottom model sentence by sentence, in alternating blocks.

    Returns
    -------
    dict
        ``bottom_ms`` and ``mechanism_ms`` a sentence, and ``ratio``, mechanism to bottom: each
        the median over the repeats, the generator's keying included in the mechanism's time.
    """
    clean = [bottom.encode([s])[0] for s in ids]  # also warms both up
    key = bytes(32)

    def perturb(start: int, stop: int) -> None:
        for hidden, s in zip(clean[start:stop], ids[start:stop], strict=True):
            mechanism.perturb(hidden, s, keyed_generator(key, "cost", example_identity(s)))

    def encode(start: int, stop: int) -> None:
        for s in ids[start:stop]:
            bottom.encode([s])

    perturb(0, min(_BLOCK, len(ids)))
    spent: dict[str, list[float]] = {"bottom": [], "mechanism": []}
    for _ in range(repeats):
        seconds = dict.fromkeys(spent, 0.0)
        for start in range(0, len(ids), _BLOCK):
            block = start, min(start + _BLOCK, len(ids))
            seconds["bottom"] += _timed(encode, block)
            seconds["mechanism"] += _timed(perturb, block)
        for name, value in seconds.items():
            spent[name].append(1000 * value / len(ids))
    pairs = zip(spent["mechanism"], spent["bottom"], strict=True)
    return {
        "bottom_ms": statistics.median(spent["bottom"]),
        "mechanism_ms": statistics.median(spent["mechanism"]),
        "ratio": statistics.median(m / b for m, b in pairs),
    }


def _timed(work: Callable[[int, int], None], block: tuple[int, int]) -> float:
    start = time.perf_counter()
    work(*block)
    return time.perf_counter() - start


def _apart(*arguments: Any) -> dict[str, Any]:
    """Measure in a fresh process, whose peak memory is then that of the case alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main(
    sentences: Annotated[int, typer.Option(min=1, help="Of movie-snippets.")] = 200,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Mechanisms; default: all.")] = None,
    cut: Annotated[list[int] | None, typer.Option(help="Cuts; default: 0, 1 and 2.")] = None,
    cold: Annotated[bool, typer.Option(help="Time PrivTune's set-up from an empty cache.")] = True,
    target: Annotated[Path, typer.Option(help="File of figures.")] = RESULTS / "device_cost.json",
) -> None:
    """Measure every mechanism beside the bottom model and store the figures."""
    command = f"python -m simulations.device_cost {' '.join(sys.argv[1:])}".strip()
    sizes = {"sentences": sentences, "repeats": repeats, "command": command}
    for name in only or cases():
        for at in cut or CUTS:
            from_empty = cold and name.startswith("privtune")
            row = _apart(name, at, sentences, repeats, from_empty) | sizes
            typer.echo(json.dumps(row))
            _keep(target, row)


def _keep(target: Path, row: dict[str, Any]) -> None:
    """Store one row; it takes the place of an earlier one of the same mechanism and cut."""
    kept = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    own = row["name"], row["cut"]
    rows = [r for r in kept if (r["name"], r["cut"]) != own]
    rows = sorted([*rows, row], key=lambda r: (str(r["name"]), int(r["cut"])))
    content = {"model": "minilm", "threads": 1, "rows": rows}
    write_text(target, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
