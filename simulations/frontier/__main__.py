"""Run the frontier study, a row a case: ``python -m simulations.frontier``.

The same command in a second process takes its share of the cases; what is stored is not run again.
Rows go to ``simulations/results/frontier.json``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from privtune_flwr.audit.plan import FRONTIER, Preset
from simulations.frontier import tables
from simulations.frontier.cases import GROUPS
from simulations.frontier.figure import draw_frontier
from simulations.frontier.rows import Case, Row, measure
from simulations.study import RESULTS, add_row, stored_rows

TARGET = RESULTS / "frontier.json"
FIGURE = Path(__file__).parents[2] / "docs" / "frontier.svg"
Group = StrEnum("Group", {name: name for name in [*GROUPS, "all"]})  # type: ignore[misc]


def cases_of(groups: Iterable[str], target: Path, seeds: int, only: str) -> list[Case]:
    """List the groups' cases that have no row yet, each once, in the order in which they run."""
    rows = stored_rows(target)
    done = {row["name"] for row in rows}
    found: dict[str, Case] = {}
    for group in groups:
        for case in GROUPS[group](rows, seeds):
            if case.name not in done and fnmatch(case.name, only):
                found.setdefault(case.name, case)
    return list(found.values())


def run_cases(
    groups: list[str],
    target: Path,
    runs: Path,
    preset: Preset,
    *,
    seeds: int = 3,
    threads: int = 1,
    only: str = "*",
    keep: bool = False,
) -> list[str]:
    """Run what has no row yet; store after each case.

    A case that fails is reported and left out, so that the others still get their rows; its
    traceback lies beside the run folders. A search's choices are cases only once it is done, so
    the list is made anew after each case.

    Returns
    -------
    list of str
        Names of the cases that failed.
    """
    runs.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(exist_ok=True)
    command = f"python -m simulations.frontier {' '.join(sys.argv[1:])}".strip()
    tried: set[str] = set()
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console()) as progress:
        bar = progress.add_task("frontier")
        while left := [c for c in cases_of(groups, target, seeds, only) if c.name not in tried]:
            case = left[0]
            tried.add(case.name)
            progress.update(
                bar,
                total=len(tried) + len(left) - 1,
                completed=len(tried) - 1,
                description=case.name,
            )
            try:
                # a case that another process works on right now is left to it
                with FileLock(runs / f"{case.name}.lock", timeout=0):
                    if case.name not in {row["name"] for row in stored_rows(target)}:
                        row = measure(case, runs, preset, threads=threads, keep=keep)
                        add_row(target, {**row, "command": command}, {})
            except Timeout:
                continue
            except Exception:
                failed.append(case.name)
                (runs / f"{case.name}.error").write_text(traceback.format_exc(), encoding="utf-8")
                progress.console.print(f"failed: {case.name}, see {runs / case.name}.error")
    return failed


def show(rows: list[Row]) -> None:
    """Print all tables and draw the figure, from what is stored."""
    for name, make in tables.TABLES.items():
        print(f"\n## {name}\n\n{make(rows)}")
    draw_frontier(FIGURE, rows)


def main(
    group: Annotated[list[Group] | None, typer.Option(help="Which cases; default all.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of the group seeds.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of this process.")] = 1,
    only: Annotated[str, typer.Option(help="Pattern of case names.")] = "*",
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs/frontier"),
    keep: Annotated[bool, typer.Option(help="Keep run folders.")] = False,
    table: Annotated[bool, typer.Option(help="Print tables and draw the figure only.")] = False,
    plan: Annotated[bool, typer.Option(help="List the cases that have no row yet.")] = False,
) -> None:
    """Run the study; what is stored already is kept."""
    names = [g.value for g in group or [Group("all")]]
    groups = list(GROUPS) if "all" in names else names
    if plan:
        for case in cases_of(groups, TARGET, seeds, only):
            print(case.name)
        return
    if table:
        show(stored_rows(TARGET))
        return
    failed = run_cases(
        groups, TARGET, runs, FRONTIER, seeds=seeds, threads=threads, only=only, keep=keep
    )
    show(stored_rows(TARGET))
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
