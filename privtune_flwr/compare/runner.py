"""Running what a comparison still lacks, through real Flower, one federation after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from privtune_flwr.compare.methods import Method
from privtune_flwr.compare.outcome import (
    Outcome,
    best_end,
    choose,
    failure_file,
    find_outcome,
    record_failure,
)
from privtune_flwr.compare.plan import Plan, PlannedRun
from privtune_flwr.config import RunConfig
from privtune_flwr.errors import PROCESS_DIED
from privtune_flwr.launcher import SuperLink, app_folder, federate, local_superlink

_ROUND = re.compile(r"round (\d+)/(\d+)")
_POLL_SECONDS = 2.0
_ATTEMPTS = 3
#: Runs one federation to its end, handing its log on; raises if it fails.
Execute = Callable[[RunConfig, Callable[[Iterable[str]], None]], None]


@dataclass(frozen=True)
class MethodOutcomes:
    """What there is of one method.

    Attributes
    ----------
    grid : dict
        Multiplier to outcome, first seed; ascending.
    chosen : float or None
        The multiplier that the devices' evaluation examples chose.
    seeds : list of Outcome
        The table's runs: the chosen grid point, then the other seeds.
    """

    grid: dict[float, Outcome]
    chosen: float | None
    seeds: list[Outcome]


def gather(plan: Plan, method: Method) -> MethodOutcomes:
    """Look at all runs of a method; the other seeds are known once a rate is chosen."""
    grid = {run.multiplier: find_outcome(plan, run) for run in plan.grid_runs(method)}
    for _ in range(plan.scenario.compare.grid_extensions):
        ends = best_end(grid)
        if ends is None:
            break
        further = plan.beyond(method, *ends)
        grid[further.multiplier] = find_outcome(plan, further)
    grid = dict(sorted(grid.items()))
    chosen = choose(grid)
    seeds: list[Outcome] = []
    if chosen is not None:
        others = plan.seed_runs(method, chosen)
        seeds = [grid[chosen], *(find_outcome(plan, run) for run in others)]
    return MethodOutcomes(grid, chosen, seeds)


def known_runs(plan: Plan) -> list[Outcome]:
    """List every run that is known by now: all grids, then seed after seed."""
    found = [gather(plan, method) for method in plan.methods]
    grids = [outcome for one in found for outcome in one.grid.values()]
    later = [outcome for one in found for outcome in one.seeds[1:]]
    order = {seed: number for number, seed in enumerate(plan.seeds)}
    return [*grids, *sorted(later, key=lambda o: order[o.run.seed])]


def next_run(plan: Plan, tried: set[str], only: str) -> PlannedRun | None:
    """Give the next run to start; None where all are finished or tried in this call."""
    for outcome in known_runs(plan):
        name = outcome.run.name
        if outcome.state != "finished" and name not in tried and fnmatch(name, only):
            return outcome.run
    return None


def total_runs(plan: Plan, only: str = "*") -> int:
    """Count the runs of the whole comparison, those of seeds that hang on a choice included."""
    known = {o.run.name for o in known_runs(plan) if fnmatch(o.run.name, only)}
    for method in plan.methods:
        if gather(plan, method).chosen is None:
            later = plan.seed_runs(method, plan.grid[0])
            known |= {f"{r.name}?" for r in later if fnmatch(r.name, only)}
    return len(known)


def run_all(
    plan: Plan,
    *,
    execute: Execute,
    after: Callable[[], None],
    only: str = "*",
    console: Console | None = None,
    others: Callable[[], bool] = lambda: False,
    tried: set[str] | None = None,
) -> list[str]:
    """Run what is not finished, an interrupted run from its checkpoint, a failed one once more.

    The same command in a second process takes its share: a run that another process works on is
    left to it.

    Parameters
    ----------
    plan : Plan
    execute : callable
        Runs one federation: :class:`Flower`.
    after : callable
        Called after each run: writes the outputs.
    only : str
        Pattern of run names.
    console : Console, optional
    others : callable
        Whether processes that this one should wait for are at work: what they finish may make
        further runs known, and what one of them leaves half done is taken over.
    tried : set of str, optional
        Runs not to start (again); those that are started here are added.

    Returns
    -------
    list of str
        Names of the runs that failed; the others went on.
    """
    plan.runs.mkdir(parents=True, exist_ok=True)
    tried = set() if tried is None else tried
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console or Console()) as progress:
        share = _Share(plan, execute, after, only, progress, tried)
        while True:
            waiting = others()
            busy = share.run_free()
            if not (waiting and busy):
                break
            time.sleep(_POLL_SECONDS)
        share.show()
    return share.failed


class _Share:
    """What one process runs of a comparison."""

    def __init__(
        self,
        plan: Plan,
        execute: Execute,
        after: Callable[[], None],
        only: str,
        progress: Progress,
        tried: set[str],
    ) -> None:
        self.failed: list[str] = []
        self._plan, self._execute, self._after, self._only = plan, execute, after, only
        self._tried = tried
        self._seen_busy: set[str] = set()
        self._progress = progress
        self._total = progress.add_task("comparison", total=None)
        self._rounds = progress.add_task("rounds", total=None)

    def run_free(self) -> set[str]:
        """Run all that no other process works on; give the names of those that one does."""
        busy: set[str] = set()
        while (run := next_run(self._plan, self._tried | busy, self._only)) is not None:
            self.show()
            if run.name in self._seen_busy and find_outcome(self._plan, run).state == "failed":
                self._tried.add(run.name)  # the other process has just tried it
                continue
            try:
                with FileLock(self._plan.runs / f"{run.name}.lock", timeout=0):
                    self._tried.add(run.name)
                    # another process may have finished it in the meantime
                    if find_outcome(self._plan, run).state != "finished":
                        self._run(run)
            except Timeout:
                busy.add(run.name)
        self._seen_busy |= busy
        return busy

    def show(self) -> None:
        """Bring the bar up to date with what all processes have finished."""
        done = sum(
            o.state == "finished" for o in known_runs(self._plan) if fnmatch(o.run.name, self._only)
        )
        total = total_runs(self._plan, self._only)
        self._progress.update(self._total, total=total, completed=done)

    def _run(self, run: PlannedRun) -> None:
        log = self._plan.runs / f"{run.name}.log"
        self._progress.reset(self._rounds, description=run.name, total=None)

        def follow(lines: Iterable[str]) -> None:
            for number, rounds in _followed(lines, log):
                self._progress.update(self._rounds, completed=number, total=rounds)

        try:
            self._try(run, follow)
            failure_file(self._plan, run).unlink(missing_ok=True)
        except Exception as error:
            self.failed.append(run.name)
            record_failure(self._plan, run, str(error) or type(error).__name__)
            self._progress.console.print(f"failed: {run.name}: see {log}", highlight=False)
        self._after()

    def _try(self, run: PlannedRun, follow: Callable[[Iterable[str]], None]) -> None:
        """Run a federation; one whose machine failed it is resumed at once, a few times."""
        for left in reversed(range(_ATTEMPTS)):
            try:
                self._execute(self._plan.config(run), follow)
                return
            except Exception as error:
                if not left or PROCESS_DIED not in str(error):
                    raise
                said = f"{run.name}: {PROCESS_DIED}; resuming"
                self._progress.console.print(said, highlight=False)


def _followed(lines: Iterable[str], log: Path) -> Iterator[tuple[int, int]]:
    """Write a log to its file, and give the rounds it speaks of."""
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            if found := _ROUND.search(line):
                yield int(found[1]), int(found[2])


class Flower(AbstractContextManager["Flower"]):
    """One SuperLink of a comparison's own, started when the first run needs it."""

    def __init__(self, plan: Plan) -> None:
        self._federation = plan.scenario.federation
        self._stack = ExitStack()
        self._started: tuple[SuperLink, Path] | None = None

    def __call__(self, config: RunConfig, follow: Callable[[Iterable[str]], None]) -> None:
        """Run one federation through ``flwr run``."""
        if self._started is None:
            link = self._stack.enter_context(local_superlink())
            self._started = link, self._stack.enter_context(app_folder())
        link, app = self._started
        federate(config, self._federation, superlink=link, app=app, on_output=follow)

    def __exit__(self, *_: object) -> None:
        """End the SuperLink."""
        self._stack.close()
