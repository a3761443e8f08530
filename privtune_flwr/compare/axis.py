"""Accuracy at equal epochs, equal bytes a device, or equal device seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from privtune_flwr.compare.measure import Point
from privtune_flwr.compare.methods import OURS

Axis = Literal["epochs", "bytes", "seconds"]
AXES: dict[str, tuple[str, str]] = {
    "epochs": ("epoch", "passes over all training text"),
    "bytes": ("bytes", "bytes a device, up and down, of training"),
    "seconds": ("seconds", "device seconds, compute on one device"),
}
# sums of floats that are equal on paper
_SLACK = 1 + 1e-9


def accuracy_at(points: Sequence[Point], key: str, budget: float) -> float | None:
    """Give the last accuracy that was measured within a budget; None where there is none."""
    within = [p for p in points if key in p and p[key] <= budget * _SLACK]
    return within[-1]["accuracy"] if within else None


def total_of(curves: Sequence[Sequence[Point]], key: str) -> float | None:
    """Give what a method spends in all, the mean over its seeds."""
    if not curves or any(not points or key not in points[-1] for points in curves):
        return None
    return statistics.fmean(points[-1][key] for points in curves)


def equal(
    rows: Sequence[Mapping[str, Any]], axis: Axis, budget: float | None = None, of: str = ""
) -> dict[str, Any] | None:
    """Hold methods against each other at one budget.

    Parameters
    ----------
    rows : sequence of dict
        As in ``comparison.json``'s ``methods``.
    axis : str
    budget : float, optional
        In the axis's unit; else the total of the method ``of``, else the least total of those
        compared, bounds left out.

    Returns
    -------
    dict or None
        ``budget``, ``of`` (whose total it is) and ``accuracy`` by method: mean over seeds, None
        where a seed had not been tested within the budget; a bound that has no such cost is given
        at its end. None where no budget is known.
    """
    key, unit = AXES[axis]
    curves = {row["method"]: [c["points"] for c in row["curves"]] for row in rows}
    if budget is None:
        totals = {
            row["method"]: total
            for row in rows
            if row["family"] != "bound"
            and (total := total_of(curves[row["method"]], key)) is not None
        }
        if not totals or (of and of not in totals):
            return None
        of = of or min(totals, key=lambda name: totals[name])
        # with several seeds, the mean of their totals must hold each of them
        budget = max(points[-1][key] for points in curves[of])
    found: dict[str, float | None] = {}
    bounds = {row["method"]: row["accuracy"] for row in rows if row["family"] == "bound"}
    for name, own in curves.items():
        if name in bounds and total_of(own, key) is None:
            found[name] = bounds[name]
            continue
        reached = [accuracy_at(points, key, budget) for points in own]
        known = [value for value in reached if value is not None]
        found[name] = statistics.fmean(known) if known and len(known) == len(reached) else None
    return {"axis": axis, "unit": unit, "budget": budget, "of": of, "accuracy": found}


def standard_axes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give what every comparison stores: equal epochs, and least and our own bytes and seconds."""
    wanted: list[tuple[Axis, str]] = [
        ("epochs", ""),
        ("bytes", ""),
        ("bytes", OURS),
        ("seconds", ""),
        ("seconds", OURS),
    ]
    found: list[dict[str, Any]] = []
    for axis, of in wanted:
        one = equal(rows, axis, of=of)
        if one is not None and one not in found:
            found.append(one)
    return found
