"""The audit's figures on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from privtune_flwr.audit.report.view import (
    FLOORS,
    NOT_APPLICABLE,
    Audit,
    by_family,
    floor_of,
    levels_of,
    measure,
    not_applicable,
    percent,
    strongest,
    verdict,
)


def audit_table(audit: Audit) -> Table:
    """Lay out attacks by what the attacker knows: all tokens / content words at the first guess."""
    levels = list(levels_of(audit))
    table = Table(title=Text(f"Audit of {_name(audit)}: recovered, all tokens / content words"))
    table.add_column("attack")
    for level in levels:
        table.add_column(Text(level), justify="right")
    best = {level: strongest(audit, level) for level in levels}
    skipped = not_applicable(audit)
    for family, rows in by_family(audit).items():
        table.add_section()
        table.add_row(Text(family, style="dim"))
        for name, by_level in rows.items():
            cells = [
                Text(NOT_APPLICABLE, style="dim")
                if f"{name}@{level}" in skipped
                else _cell(by_level.get(level), best[level])
                for level in levels
            ]
            table.add_row(Text(f"  {name}"), *cells)
    table.add_section()
    for key, floor in (audit.get("floors") or {}).items():
        shown = [level for level in levels if key != "in-domain-prior" or level == "in-domain"]
        cells = [_cell(floor if level in shown else None) for level in levels]
        table.add_row(Text(f"floor: {FLOORS.get(key, key)}", style="italic"), *cells)
    return table


def runs_table(audits: Sequence[Audit]) -> Table:
    """Lay runs side by side, each with its strongest attackers."""
    table = Table(title="Runs: best attacker, all tokens / content words")
    table.add_column("")
    for audit in audits:
        table.add_column(Text(_name(audit)), justify="right")
    accuracy = [((a.get("run") or {}).get("final") or {}).get("test_accuracy") for a in audits]
    table.add_row("accuracy, public test", *map(percent, accuracy))
    for level in dict.fromkeys(level for audit in audits for level in levels_of(audit)):
        table.add_row(Text(level), *(_strongest(audit, level) for audit in audits))
        table.add_row(
            Text(f"  floor, {level}", style="dim"),
            *(" / ".join(percent(floor_of(a, level, m)) for m in _PAIR) for a in audits),
        )
    table.add_row("audit", *(_verdict(audit) for audit in audits))
    return table


def print_audit(audits: Sequence[dict[str, Any]]) -> None:
    """Print each audit, then the runs side by side where there are several.

    Where there is no terminal, the console is wide enough for all columns.

    Parameters
    ----------
    audits : sequence of dict
        As in ``audit.json``.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(140, 40 + 24 * len(audits)))
    for audit in audits:
        console.print(audit_table(audit))
        for name, said in _lines(audit):
            console.print(Text.assemble((f"{name}: ", "bold"), said))
        verdict = _verdict(audit)
        console.print(
            Text.assemble(("audit: ", "bold"), verdict, ". ", audit.get("headline") or "")
        )
        for why in audit.get("invalid_because") or ():
            console.print(Text(f"  {why}", style="bold red"))
    if len(audits) > 1:
        console.print(runs_table(audits))


_PAIR = ("top1", "content_top1")


def _name(audit: Audit) -> str:
    return str((audit.get("run") or {}).get("name") or "a run")


def _cell(holder: Any, best: Any = None) -> Text:
    if not holder:
        return Text("-", style="dim")
    text = " / ".join(percent(measure(holder, name)) for name in _PAIR)
    return Text(f"▲ {text}", style="bold") if holder is best else Text(text)


def _strongest(audit: Audit, level: str) -> str:
    return " / ".join(percent(measure(strongest(audit, level, m), m)) for m in _PAIR)


def _verdict(audit: Audit) -> Text:
    said = verdict(audit)
    if said == "unchecked":
        return Text("unchecked: no leak was planted", style="yellow")
    return Text("valid", style="green") if said == "valid" else Text("INVALID", style="bold red")


def _lines(audit: Audit) -> list[tuple[str, str]]:
    lines = [
        (
            f"{row['attribute']} by {row['attack']}",
            f"{percent(row.get('accuracy'))} (majority {percent(row.get('majority'))}, "
            f"shuffled {percent(row.get('shuffled'))})",
        )
        for row in audit.get("attributes") or ()
    ]
    linkage = (audit.get("repeats") or {}).get("linkage")
    if linkage:
        by_length, chance = percent(linkage.get("by_length")), percent(linkage.get("chance"))
        said = f"{percent(linkage.get('linked'))} (length alone {by_length}, chance {chance})"
        lines.append(("same sentence linked", said))
    canaries = audit.get("canaries") or ()
    if canaries:
        found = sum(bool(c.get("passed")) for c in canaries)
        failed = ", ".join(str(c["name"]) for c in canaries if not c.get("passed"))
        said = f"{found} of {len(canaries)} passed" + (f"; FAILED: {failed}" if failed else "")
        lines.append(("canaries", said))
    skipped = audit.get("skipped") or ()
    if skipped:
        apart = not_applicable(audit)
        left = [str(s["key"]) for s in skipped if s["key"] not in apart]
        if left:
            lines.append(("left out", ", ".join(left)))
        for why in dict.fromkeys(apart.values()):
            keys = ", ".join(key for key, reason in apart.items() if reason == why)
            lines.append((keys, why))
    return lines
