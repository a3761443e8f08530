"""Lays ``frontier.json`` out for ``docs/results.md``; nothing in these tables is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from privtune_flwr.privacy.base import bound_words
from simulations.frontier.cases import (
    ABLATION,
    BUDGETS,
    MAIN,
    OTHER,
    PUBLIC,
    RECOVERY,
    SEARCHED,
    SWEEP,
    best_bottleneck,
    case,
    chosen,
)

Row = dict[str, Any]
_LEVELS = ("unaware", "adaptive", "in-domain")
_HEAD = (
    "| release | strength | accuracy | points lost | noise, units | guarantee "
    "| unaware | adaptive | in-domain | attribute |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def frontier(rows: Sequence[Row]) -> str:
    """Show every release of the sweep and of the recovery variants, one seed each."""
    named = {row["name"]: row for row in rows}
    lines = [_HEAD]
    for name in dict.fromkeys([*SWEEP, *SEARCHED[MAIN], *RECOVERY]):
        row = named.get(f"{MAIN}-{name}-seed0")
        if row is not None:
            lines.append(_line(row, named))
    floors = _floors(named.get(f"{MAIN}-none-seed0"))
    return "\n".join([*lines, *floors, *_references(rows, named)]) + "\n"


def seeds(rows: Sequence[Row]) -> str:
    """Show mean (lowest to highest) over seeds, on both texts."""
    lines = [
        "| text | release | seeds | accuracy | points lost | unaware | adaptive | in-domain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    named = {row["name"]: row for row in rows}
    for source in (MAIN, OTHER):
        for variant in dict.fromkeys(r["variant"] for r in rows):
            own = _seeds_of(rows, source, variant)
            # one seed alone is the sweep's or the search's
            if len(own) < 2:
                continue
            lost = [v for v in (points_lost(r, named) for r in own) if v is not None]
            cells = [
                source,
                variant,
                str(len(own)),
                _spread([100 * r["accuracy"] for r in own], 1),
                _spread(lost, 1) if lost else "",
                *(_read_spread(own, level) for level in _LEVELS),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ablation(rows: Sequence[Row]) -> str:
    """Show PrivTune with one part changed at a time."""
    named = {row["name"]: row for row in rows}
    lines = [_HEAD]
    for name, (label, _) in ABLATION.items():
        row = named.get(f"{MAIN}-{name}-seed0")
        if row is not None and name != "none":
            said = "as shipped" if name == "privtune-0.25" else label
            lines.append(_line({**row, "label": said}, named))
    return "\n".join(lines) + "\n"


def search(rows: Sequence[Row]) -> str:
    """Show the search's grids by the devices' evaluation examples, then its choices confirmed."""
    named = {row["name"]: row for row in rows}
    lines = [
        "| text | release | strength | judged by | accuracy | points lost | adaptive | in-domain "
        "| floor | read-out alone | one device alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source, grid in SEARCHED.items():
        for name in grid:
            row = named.get(f"search-{source}-{name}")
            if row is not None:
                lines.append(_search_line(row, named, "evaluation examples"))
        best = chosen(rows, source)
        for name in dict.fromkeys(best.values()):
            row = named.get(f"{source}-{name}-seed0")
            if row is not None:
                within = " and ".join(f"{b:g}" for b in BUDGETS if best.get(b) == name)
                said = f"test set; chosen within {within} points"
                lines.append(_search_line(row, named, said))
    return "\n".join(lines) + "\n"


#: What ``simulations.readme`` puts between the marks of ``docs/results.md``.
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "frontier": frontier,
    "frontier-seeds": seeds,
    "ablation": ablation,
    "search": search,
}


def points_lost(row: Row, named: dict[str, Row]) -> float | None:
    """Give the points lost against the clean release of the same text, seed and judge."""
    clean = named.get(
        f"search-{row['source']}-none"
        if row["scored"] == "validation"
        else f"{row['source']}-none-seed{row['seed']}"
    )
    return None if clean is None else 100 * (clean["accuracy"] - row["accuracy"])


def guarantee(row: Row) -> str:
    """Put a release's bound in a few signs."""
    return bound_words(row["strength"]) or "none"


def attribute(row: Row) -> str:
    """Give the best attacker's share of right guesses of the label, in percent, over majority."""
    found = row.get("attributes") or []
    if not found:
        return ""
    best = max(found, key=lambda a: float(a["accuracy"]["value"]))
    return f"{100 * best['accuracy']['value']:.1f} ({100 * best['majority']:.1f})"


def _line(row: Row, named: dict[str, Row]) -> str:
    lost, units = points_lost(row, named), row["noise_units"]
    cells = [
        row["variant"],
        row["label"],
        f"{100 * row['accuracy']:.1f}",
        "" if lost is None else f"{lost:.1f}",
        "" if units is None else f"{units:.2f}",
        guarantee(row),
        *(read(row, level) for level in _LEVELS),
        attribute(row),
    ]
    return "| " + " | ".join(cells) + " |"


def _search_line(row: Row, named: dict[str, Row], judge: str) -> str:
    lost, references = points_lost(row, named), row.get("references") or {}
    cells = [
        row["source"],
        row["variant"],
        row["label"],
        judge,
        f"{100 * row['accuracy']:.1f}",
        "" if lost is None else f"{lost:.1f}",
        read(row, "adaptive"),
        read(row, "in-domain"),
        floor(row),
        *(f"{100 * references[k]:.1f}" if k in references else "" for k in ("federated", "alone")),
    ]
    return "| " + " | ".join(cells) + " |"


def read(row: Row, level: str) -> str:
    """Give what is read at a level: all tokens / content words, in percent."""
    found = (row.get("recovered") or {}).get(level) or {}
    if found.get("top1") is None:
        return ""
    # None: an audit without planted leaks has not checked itself
    valid = " (invalid)" if row["valid"] is False else ""
    return f"{_percent(found['top1'])}/{_percent(found['content_top1'])}{valid}"


def floor(row: Row) -> str:
    """Give what the best guess without any released row reads: all tokens / content words, %."""
    figures = list((row.get("floors") or {}).values())
    if not figures:
        return ""
    return "/".join(_percent(max(f[m] or 0.0 for f in figures)) for m in ("top1", "content_top1"))


def _read_spread(rows: Sequence[Row], level: str) -> str:
    pairs = []
    for name in ("top1", "content_top1"):
        values = [(r.get("recovered") or {}).get(level, {}).get(name) for r in rows]
        known = [100 * v for v in values if v is not None]
        pairs.append(_spread(known, 1) if known else "")
    return " / ".join(pairs) if all(pairs) else ""


def _floors(row: Row | None) -> list[str]:
    if row is None or "floors" not in row:
        return []
    return [
        f"| *floor: {name.replace('-', ' ')}* | | | | | | "
        + " | ".join([f"{_percent(f['top1'])}/{_percent(f['content_top1'])}"] * 3)
        + " | |"
        for name, f in row["floors"].items()
    ]


def _references(rows: Iterable[Row], named: dict[str, Row]) -> list[str]:
    """List lines without a release: public labels alone, and what devices reach by themselves."""
    lines = []
    for name in PUBLIC:
        row = named.get(f"{MAIN}-{name}-seed0")
        if row is not None:
            lost = points_lost(row, named)
            through = name.partition("+")[2]
            said = "" if lost is None else f"{lost:.1f}"
            lines.append(
                f"| *public only* | through {through} | {100 * row['accuracy']:.1f} | {said} "
                "| | | | | | |"
            )
    learned = named.get(case(MAIN, best_bottleneck(rows, MAIN), SWEEP | SEARCHED[MAIN]).name)
    for key, said in (("federated", "read-out without a cloud"), ("alone", "one device alone")):
        value = ((learned or {}).get("references") or {}).get(key)
        if learned is not None and value is not None:
            lines.append(
                f"| *{said}* | of {learned['variant']} | {100 * value:.1f} | | | | | | | |"
            )
    return lines


def _seeds_of(rows: Iterable[Row], source: str, variant: str) -> list[Row]:
    return sorted(
        (
            r
            for r in rows
            if r["source"] == source and r["variant"] == variant and r["scored"] == "test"
        ),
        key=lambda r: int(r["seed"]),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"
