"""The first table: what PrivTune costs in accuracy, and what two attackers read from it.

``python -m simulations.headline``: MiniLM cut at 2, movie-snippets, ten devices, three seeds;
``none``, ``privtune`` as first shipped with and without the cloud's decoder, ``dchi`` at two
strengths. Rows go to
``simulations/results/headline.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from privtune_flwr.audit.attacks.base import Attack, Released
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.retrieval import Metric, Retrieval
from privtune_flwr.audit.floors import constant_floor
from privtune_flwr.audit.knowledge import Knowledge
from privtune_flwr.audit.measure import Recovery, recovery
from privtune_flwr.audit.operator import ReleasedText, open_run, released_text
from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import Scalar
from simulations.study import Case, run_study

SENTENCES = 400
VARIANTS: dict[str, dict[str, Scalar]] = {
    "none": {"privacy.mechanism": "none"},
    "privtune-decoder": {"privacy.mechanism": "privtune", "privacy.decoder": True},
    "privtune-plain": {"privacy.mechanism": "privtune", "privacy.decoder": False},
    "dchi-1": {"privacy.mechanism": "dchi", "privacy.noise": 1.0},
    "dchi-4": {"privacy.mechanism": "dchi", "privacy.noise": 4.0},
}


def attack(folder: Path, sentences: int = SENTENCES) -> dict[str, Any]:
    """Read tokens from what a run's cloud received.

    Parameters
    ----------
    folder : Path
        A finished run of a simulation.
    sentences : int
        Released training sentences, drawn at random, that are attacked.

    Returns
    -------
    dict
        ``recovered`` with a figure for each attacker: ``nearest`` is the paper's kind, which does
        not know the perturbation (the better of L2 and cosine); ``adaptive`` knows everything but
        the secret. ``floor`` is the best constant guess by position.
    """
    config, cloud, store = open_run(folder)
    text = released_text(config, cloud, store, sentences=sentences)
    metrics: tuple[Metric, ...] = ("l2", "cosine")
    nearest = [_measure(Retrieval("unaware", metric=m), text, cloud) for m in metrics]
    adaptive = _measure(Gaussian("adaptive"), text, cloud)
    floor_all, floor_content = constant_floor(text.ids, cloud.bottom.tokenizer)
    return {
        "recovered": {
            "sentences": sentences,
            "nearest": _figures(max(nearest, key=lambda r: r.all)),
            "adaptive": _figures(adaptive),
            "floor": {"all": floor_all, "content": floor_content},
        }
    }


def _measure(attack: Attack, text: ReleasedText, cloud: CloudSide) -> Recovery:
    released = Released(text.rows)
    attack.fit(Knowledge(attack.level, cloud.bottom, cloud.public, cloud.mechanism), released)
    guesses = [guess[:, 0] for guess in attack.guess(released)]
    return recovery(text.ids, guesses, cloud.bottom.tokenizer)


def _figures(found: Recovery) -> dict[str, Any]:
    return {
        "all": found.all,
        "content": found.content,
        "interval_all": list(found.interval_all),
        "interval_content": list(found.interval_content),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the mean over seeds out as a Markdown table."""
    none = _mean(rows, "none", "final", "test_accuracy")
    lines = [
        "| release | seeds | accuracy (min-max) | points lost | noise, units | largest eta "
        "| nearest neighbour, all/content % | adaptive, all/content % | floor, all/content % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        own = _rows(rows, variant)
        if not own:
            continue
        accuracy = [row["final"]["test_accuracy"] for row in own]
        mean = statistics.fmean(accuracy)
        units = own[0]["privacy"]["mean_noise_norm_units"]
        eta = own[0]["privacy"]["eta_max"]
        cells = [
            variant,
            str(len(own)),
            f"{mean:.4f} ({min(accuracy):.4f}-{max(accuracy):.4f})",
            f"{100 * (none - mean):+.2f}",
            "-" if units is None else f"{units:.2f}",
            "-" if eta is None else f"{eta:.4g}",
            *(_pair(own, kind) for kind in ("nearest", "adaptive", "floor")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].rsplit("-seed", 1)[0] == variant]


def _mean(rows: Sequence[dict[str, Any]], variant: str, *path: str) -> float:
    values = []
    for row in _rows(rows, variant):
        value: Any = row
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.fmean(values) if values else float("nan")


def _pair(rows: Sequence[dict[str, Any]], kind: str) -> str:
    figures = [
        100 * statistics.fmean(row["recovered"][kind][key] for row in rows)
        for key in ("all", "content")
    ]
    return f"{figures[0]:.1f}/{figures[1]:.1f}"


def main(
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs/headline"),
    threads: Annotated[int, typer.Option(help="CPU threads of the cloud; 0 = all.")] = 0,
) -> None:
    """Run the study; what is stored already is kept."""
    cases = [
        Case(f"{variant}-seed{seed}", {**settings, "run.seed": seed, "train.threads": threads})
        for seed in range(seeds)
        for variant, settings in VARIANTS.items()
    ]
    rows = run_study("headline", cases, runs=runs, measure=attack)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
