"""What the auditor reads from each release: ``python -m simulations.audited``.

MiniLM cut at 2, ten devices; ``none``, ``dchi`` at three strengths, ``privtune`` with and without
the cloud's decoder. Movie-snippets and bbc-news for tokens, election-tweets for an attribute (the
author). Rows go to ``simulations/results/audited.json``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from privtune_flwr.audit.attacks.base import Level
from privtune_flwr.audit.attacks.learned import NETWORKS
from privtune_flwr.audit.auditor import Auditor
from privtune_flwr.audit.plan import QUICK, Preset
from privtune_flwr.audit.summary import summarise
from privtune_flwr.config import Scalar
from simulations.headline import VARIANTS as HEADLINE
from simulations.study import Case, run_study

VARIANTS: dict[str, dict[str, Scalar]] = {
    "none": {"privacy.mechanism": "none"},
    "dchi-1": {"privacy.mechanism": "dchi", "privacy.noise": 1.0},
    "dchi-2": {"privacy.mechanism": "dchi", "privacy.noise": 2.0},
    "dchi-4": {"privacy.mechanism": "dchi", "privacy.noise": 4.0},
    "privtune-decoder": {"privacy.mechanism": "privtune", "privacy.decoder": True},
    "privtune-plain": {"privacy.mechanism": "privtune", "privacy.decoder": False},
}
SOURCES: dict[str, dict[str, Scalar]] = {
    "movie-snippets": {},
    # more than a thousand documents are left over for an attacker who owns similar text
    "bbc-news": {
        "data.source": "bbc-news",
        "data.train-examples": 600,
        "data.eval-examples": 60,
        "data.test-examples": 500,
        "model.max-length": 64,
    },
    "election-tweets": {
        "data.source": "election-tweets",
        "data.train-examples": 1200,
        "data.eval-examples": 100,
        "data.test-examples": 400,
        "train.epochs": 1,
    },
}

#: Attacks that lead their family somewhere.
LEADING = (
    "retrieval-embedding-cosine@unaware",
    "retrieval-contextual-l2@unaware",
    "retrieval-contextual-cosine@unaware",
    "retrieval-aware-l2@adaptive",
    "retrieval-aware-mahalanobis@adaptive",
    "gaussian@*",
    "context*",
)


def cases(seeds: int, threads: int) -> list[Case]:
    """List all federations, one seed after the other.

    The decoder changes the cloud's training, not the release, so that where accuracy is not asked
    for one of the two privtune variants is enough. It is not on election-tweets, nor, from the
    second seed on, where ``headline.json`` holds it: there one pass of training is all.
    """
    chosen = []
    for seed, source, variant in product(range(seeds), SOURCES, VARIANTS):
        known = source == "movie-snippets" and seed > 0 and variant in HEADLINE
        if variant == "privtune-decoder" and (known or source == "election-tweets"):
            continue
        settings = {**SOURCES[source], **VARIANTS[variant], "run.seed": seed}
        if known:
            settings["train.epochs"] = 1
        settings["train.threads"] = threads
        chosen.append(Case(f"{source}-{variant}-seed{seed}", settings))
    return chosen


def preset(source: str, *, whole: bool) -> Preset:
    """Give the sizes of a source's audits: about as many tokens of each."""
    sentences = {"movie-snippets": 200, "bbc-news": 120, "election-tweets": 400}[source]
    own = 1500 if source == "election-tweets" else 600
    levels: tuple[Level, ...] = ("unaware", "adaptive")
    learned = tuple((network, level) for level in levels for network in NETWORKS)
    repeats = QUICK.repeats if whole else 20
    return replace(
        QUICK, sentences=sentences, attribute_sentences=own, learned=learned, repeats=repeats
    )


def attack(folder: Path) -> dict[str, Any]:
    """Audit a run.

    All attacks look at movie-snippets' first seed, elsewhere those that lead a family; on
    election-tweets the attribute is what is asked for. The decoder changes no release, so its twin
    is audited alone.
    """
    if "privtune-decoder" in folder.name:
        return {}
    source = next(name for name in SOURCES if folder.name.startswith(name))
    whole = source == "movie-snippets" and folder.name.endswith("seed0")
    only: tuple[str, ...] = () if whole else LEADING
    if source == "election-tweets":
        only = ("retrieval-contextual-l2@*",)
    auditor = Auditor(folder, preset(source, whole=whole), only=only)
    found = auditor.run(lambda name, share: None)
    audit = summarise(auditor, found, show_text=False)
    return {
        "audit": {
            "attacks": {a["key"]: _short(a["measures"]) for a in audit["attacks"]},
            "floors": {name: _short(measures) for name, measures in audit["floors"].items()},
            "best": audit["best"],
            "best_content": audit["best_content"],
            "attributes": audit["attributes"],
            "repeats": audit["repeats"],
            "valid": audit["valid"],
            "canaries": audit["canaries"],
            "evidence": audit["evidence"],
        }
    }


def _short(measures: dict[str, Any]) -> dict[str, Any]:
    return {name: measures[name] for name in ("top1", "content_top1", "top5", "rare")}


def main(
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs/audited"),
    threads: Annotated[int, typer.Option(help="CPU threads of each process; 0 = all.")] = 0,
    federate_only: Annotated[bool, typer.Option(help="Run the federations, audit later.")] = False,
) -> None:
    """Run the study; what is stored already is kept."""
    measure = None if federate_only else attack
    run_study("audited", cases(seeds, threads), runs=runs, measure=measure)


if __name__ == "__main__":
    typer.run(main)
