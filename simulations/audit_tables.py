"""Lays ``audited.json`` out as a table, beside the lines a private run is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from privtune_flwr.audit.attacks.base import LEVELS
from simulations.audited import VARIANTS

Row = dict[str, Any]
_MEASURES = ("top1", "content_top1")
_FAMILIES = ("retrieval", "gaussian", "learned", "optimisation", "context")


def recovery_table(rows: Sequence[Row], headline: Sequence[Row], references: dict[str, Row]) -> str:
    """Show what is recovered from each release, beside accuracy and the reference lines.

    Parameters
    ----------
    rows, headline : sequence of dict
        Of ``audited.json`` and ``headline.json``, which has the accuracy on movie-snippets.
    references : dict
        Rows of ``references.json`` by name.
    """
    lines = [
        "| text | release | seeds | accuracy | unaware | adaptive | in-domain "
        "| floor: constant guess | floor: public prior |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source in ("movie-snippets", "bbc-news"):
        for variant in VARIANTS:
            own = _audited(rows, source, variant)
            if not own:
                continue
            known = [r for r in headline if r["name"].startswith(f"{variant}-seed")]
            trained = (
                known if source == "movie-snippets" and known else _named(rows, source, variant)
            )
            accuracy = [r["final"]["test_accuracy"] for r in trained]
            cells = [
                source,
                variant,
                str(len(own)),
                _spread(accuracy),
                *(_best(own, level) for level in LEVELS),
                *(_floor(own, floor) for floor in ("constant", "public-prior")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        for name in ("public-only", "device-alone", "devices-text-in-one-place"):
            found = [
                r["accuracy"] for key, r in references.items() if key.startswith(f"{source}-{name}")
            ]
            if found:
                said = f"| {source} | *{name.replace('-', ' ')}* | {len(found)} | {_spread(found)} "
                lines.append(said + "| | | | | |")
    return "\n".join(lines) + "\n"


def family_table(rows: Sequence[Row]) -> str:
    """Hold each family's best at the levels against each other: movie-snippets, first seed."""
    audited = {
        variant: row
        for variant in VARIANTS
        for row in _audited(rows, "movie-snippets", variant)
        if row["name"].endswith("-seed0") and variant != "privtune-decoder"
    }
    columns = [
        (family, level)
        for family in _FAMILIES
        for level in LEVELS
        if any(_family(row, family, level) is not None for row in audited.values())
    ]
    lines = [
        "| release | " + " | ".join(f"{f}, {level}" for f, level in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for variant, row in audited.items():
        cells = [_percent(_family(row, *column)) for column in columns]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def attribute_table(rows: Sequence[Row]) -> str:
    """Show how often tweets' author is inferred: the best of the attackers of each seed."""
    lines = [
        "| release | seeds | author found, % (min-max) | best attacker's control | majority |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        own = _named(rows, "election-tweets", variant)
        if not own:
            continue
        best = [
            max(r["audit"]["attributes"], key=lambda a: float(a["accuracy"]["value"])) for r in own
        ]
        found = [a["accuracy"]["value"] for a in best]
        lines.append(
            f"| {variant} | {len(own)} | {100 * statistics.fmean(found):.1f} "
            f"({100 * min(found):.1f}-{100 * max(found):.1f}) "
            f"| {100 * statistics.fmean(a['shuffled'] for a in best):.1f} "
            f"| {100 * statistics.fmean(a['majority'] for a in best):.1f} |"
        )
    return "\n".join(lines) + "\n"


def _named(rows: Iterable[Row], source: str, variant: str) -> list[Row]:
    return [r for r in rows if r["name"].rsplit("-seed", 1)[0] == f"{source}-{variant}"]


def _audited(rows: Sequence[Row], source: str, variant: str) -> list[Row]:
    """Give a variant's audits; the decoder changes no release, so its twin's stand for it."""
    released = "privtune-plain" if variant == "privtune-decoder" else variant
    return [r for r in _named(rows, source, released) if "audit" in r]


def _best(rows: Sequence[Row], level: str) -> str:
    """Average over seeds the best attack of a level, among those that ran at every seed."""
    common = set.intersection(*(set(r["audit"]["attacks"]) for r in rows))
    order: list[str] = list(LEVELS)
    able = [k for k in common if order.index(k.partition("@")[2]) <= order.index(level)]
    return _pair(
        lambda name: [max(_value(r["audit"]["attacks"][k], name) for k in able) for r in rows]
    )


def _floor(rows: Sequence[Row], floor: str) -> str:
    return _pair(lambda name: [_value(r["audit"]["floors"][floor], name) for r in rows])


def _pair(values: Callable[[str], list[float]]) -> str:
    return "/".join(f"{100 * statistics.fmean(values(name)):.1f}" for name in _MEASURES)


def _family(row: Row, family: str, level: str) -> float | None:
    found = [
        _value(measures, "top1")
        for key, measures in row["audit"]["attacks"].items()
        if key.startswith(family) and key.endswith(f"@{level}")
    ]
    return max(found, default=None)


def _value(measures: dict[str, Any], name: str) -> float:
    value = measures[name]["value"]
    return 0.0 if value is None else float(value)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
