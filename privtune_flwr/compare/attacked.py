"""Attacking the table's runs, so that accuracy stands beside what the cloud could read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from privtune_flwr.audit.command import audit_runs
from privtune_flwr.audit.operator import AuditError
from privtune_flwr.audit.options import AuditOptions
from privtune_flwr.compare.measure import attacked
from privtune_flwr.compare.plan import Plan
from privtune_flwr.compare.runner import gather


def attack_table(
    plan: Plan,
    options: AuditOptions,
    *,
    after: Callable[[], None],
    console: Console,
    tried: set[str] | None = None,
) -> None:
    """Attack the first of the table's runs of every method, once.

    A method whose cloud gets what no attack of ours is for says so and has no figure.

    Parameters
    ----------
    plan : Plan
    options : AuditOptions
        How thoroughly.
    after : callable
        Called after each: writes the outputs.
    console : Console
    tried : set of str, optional
        Names of runs not to attack; those that are attacked here are added.
    """
    tried = set() if tried is None else tried
    for folder in unattacked(plan):
        if folder.name in tried:
            continue
        try:
            with FileLock(plan.runs / f"{folder.name}.audit.lock", timeout=0):
                tried.add(folder.name)
                _attack(folder, options, console)
        except Timeout:
            continue  # another process of the same command is at it
        after()


def unattacked(plan: Plan) -> Sequence[Path]:
    """Give the folders that an audit of the table would attack and none has."""
    found = (gather(plan, method) for method in plan.methods)
    folders = (plan.runs / one.seeds[0].run.name for one in found if one.seeds)
    return [folder for folder in folders if not attacked(folder)]


def _attack(folder: Path, options: AuditOptions, console: Console) -> None:
    if attacked(folder):
        return  # by another process, in the meantime
    try:
        audit_runs([folder], options, console=console)
    except AuditError as error:
        console.print(f"no attack: {error}", markup=False, highlight=False)
