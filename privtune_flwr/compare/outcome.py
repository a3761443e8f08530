"""How a planned run stands: to do, interrupted, failed or finished; and what it measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privtune_flwr.compare.plan import Plan, PlannedRun
from privtune_flwr.config import ConfigError, Scalar, flatten
from privtune_flwr.results.run_folder import FREE_KEYS, write_text

State = Literal["to do", "interrupted", "failed", "finished"]
# what a run leaves that its figures do not need: an audit does
_LARGE = ("store", "model", "checkpoint.pt")


@dataclass(frozen=True)
class Outcome:
    """What became of a planned run.

    Attributes
    ----------
    run : PlannedRun
    state : str
    results : dict or None
        ``results.json`` of a finished run.
    reason : str
        Why it failed.
    """

    run: PlannedRun
    state: State
    results: dict[str, Any] | None = None
    reason: str = ""

    @property
    def eval_accuracy(self) -> float | None:
        """Accuracy on the devices' own evaluation examples: what a learning rate is chosen by."""
        value = (self.results or {}).get("final", {}).get("eval_accuracy")
        return None if value is None else float(value)

    @property
    def eval_loss(self) -> float:
        """Loss on them; infinite where it is not told."""
        value = (self.results or {}).get("final", {}).get("eval_loss")
        return float("inf") if value is None else float(value)

    @property
    def seconds(self) -> float | None:
        """Wall seconds of the federation."""
        value = (self.results or {}).get("seconds", {}).get("total")
        return None if value is None else float(value)


def find_outcome(plan: Plan, run: PlannedRun) -> Outcome:
    """Look at a run's folder.

    Raises
    ------
    ConfigError
        If a finished run there had another configuration: it would be a row of another table.
    """
    folder = plan.runs / run.name
    results = folder / "results.json"
    if results.is_file():
        content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        check_same(content["config"], flatten(plan.config(run)), folder)
        return Outcome(run, "finished", content)
    failure = failure_file(plan, run)
    if failure.is_file():
        reason = json.loads(failure.read_text(encoding="utf-8"))["reason"]
        return Outcome(run, "failed", reason=str(reason))
    return Outcome(run, "interrupted" if (folder / "config.json").exists() else "to do")


def check_same(before: Mapping[str, Scalar], now: Mapping[str, Scalar], folder: Path) -> None:
    """Refuse a finished run of another configuration; keys it did not know yet are let pass."""
    for key in sorted(set(before) & set(now)):
        free = key.startswith(FREE_KEYS) and key != "run.seed"
        if not free and before[key] != now[key]:
            raise ConfigError(
                f"{key} = {now[key]!r}: {folder} was run with {before[key]!r}; "
                "name another --runs folder, or delete that run"
            )


def failure_file(plan: Plan, run: PlannedRun) -> Path:
    """Say where a run's failure is recorded: beside its folder, which may not exist."""
    return plan.runs / f"{run.name}.failed.json"


def record_failure(plan: Plan, run: PlannedRun, reason: str) -> None:
    """Write down why a run failed."""
    content = {"run": run.name, "reason": reason[:1000]}
    write_text(failure_file(plan, run), json.dumps(content, indent=1) + "\n")


def choose(grid: Mapping[float, Outcome]) -> float | None:
    """Choose a learning rate by accuracy on the devices, never by the test set.

    Parameters
    ----------
    grid : Mapping
        Multiplier to outcome, of every grid point.

    Returns
    -------
    float or None
        The best multiplier among finished runs; of equals the one with less loss on the devices,
        then the one closest to 1. None while a point is still to be run, or if none can be judged.
    """
    if any(outcome.state in ("to do", "interrupted") for outcome in grid.values()):
        return None
    finished = {point: o for point, o in grid.items() if o.state == "finished"}
    if len(grid) == 1:
        # nothing to choose between
        return next(iter(finished), None)
    judged = {point: o for point, o in finished.items() if o.eval_accuracy is not None}
    if not judged:
        return None
    return max(
        judged,
        key=lambda p: (judged[p].eval_accuracy, -judged[p].eval_loss, -max(p, 1 / p)),
    )


def best_end(grid: Mapping[float, Outcome]) -> tuple[float, float] | None:
    """Give the end of a grid that is better than its neighbour and all else, and that neighbour.

    Returns
    -------
    tuple or None
        None while a point is still to be run, if the best is inside, or if the end is only as
        accurate as its neighbour: then nothing says that more lies beyond.
    """
    best = choose(grid)
    points = sorted(grid)
    if best is None or len(points) < 2 or best not in (points[0], points[-1]):
        return None
    inner = points[1] if best == points[0] else points[-2]
    at_end, beside = grid[best].eval_accuracy, grid[inner].eval_accuracy
    if at_end is None or (beside is not None and beside >= at_end):
        return None
    return best, inner


def prune(plan: Plan, names: set[str]) -> int:
    """Delete checkpoint, store and model of finished runs; give the bytes that were freed."""
    freed = 0
    for folder in sorted(plan.runs / name for name in names):
        for path in (folder / name for name in _LARGE):
            if path.is_dir():
                freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(path)
            elif path.exists():
                freed += path.stat().st_size
                path.unlink()
    return freed
