"""``privtune compare``: plan, run, write, show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.table import Table

from privtune_flwr.audit.options import AuditOptions, SideAudit
from privtune_flwr.compare.axis import Axis, equal
from privtune_flwr.compare.figures import draw_figures
from privtune_flwr.compare.jobs import Jobs
from privtune_flwr.compare.outcome import Outcome, prune
from privtune_flwr.compare.plan import Plan, make_plan
from privtune_flwr.compare.runner import Execute, Flower, gather, known_runs, run_all, total_runs
from privtune_flwr.compare.stored import check_rows_survive, extended, read_stored
from privtune_flwr.compare.summary import summarise
from privtune_flwr.compare.table import as_csv, console_table, markdown
from privtune_flwr.results.run_folder import write_text
from privtune_flwr.scenario import load_scenario


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line says.

    Attributes
    ----------
    methods, seeds
        Instead of the scenario's; empty = the scenario's.
    axis : str
        Of the console's last column.
    budget : float or None
        On that axis, in its unit; None = the least total of those compared.
    runs : Path or None
        Where run folders go; None = ``runs/compare/<scenario>``.
    out : Path or None
        The JSON file; CSV and Markdown lie beside it. None = ``comparison.json`` among the runs.
    figures : Path or None
        Where pictures go; None = beside the JSON file.
    only : str
        Pattern of run names.
    prune : bool
        Whether finished runs that no audit needs lose checkpoint, store and model.
    audit : {"no", "quick", "full"}
        Whether the table's runs are attacked as well, and how thoroughly.
    jobs : int
        Processes that share the runs, this one counted in.
    extend : bool
        Whether rows that the JSON file has, and this comparison does not run, stay in it.
    """

    methods: Sequence[str] = ()
    seeds: Sequence[int] = ()
    axis: Axis = "epochs"
    budget: float | None = None
    runs: Path | None = None
    out: Path | None = None
    figures: Path | None = None
    only: str = "*"
    prune: bool = False
    audit: SideAudit = "no"
    jobs: int = 1
    extend: bool = False

    def target(self, plan: Plan) -> Path:
        """Say where the JSON file goes."""
        return self.out or plan.runs / "comparison.json"


def plan_of(scenario: str, options: CompareOptions) -> Plan:
    """Load a scenario and plan its comparison.

    Raises
    ------
    ConfigError
        Naming the key, method or seed that cannot be.
    """
    loaded = load_scenario(scenario)
    runs = options.runs or Path("runs") / "compare" / loaded.name
    return make_plan(loaded, runs, methods=options.methods, seeds=options.seeds)


def compare(
    scenario: str,
    options: CompareOptions,
    *,
    console: Console,
    table_only: bool = False,
    execute: Execute | None = None,
) -> list[str]:
    """Run what is not finished, write the outputs after each run, and show the table.

    Parameters
    ----------
    scenario : str
        A TOML file, or a packaged scenario's name.
    options : CompareOptions
    console : Console
    table_only : bool
        Whether only to write and show what is finished.
    execute : callable, optional
        Instead of Flower.

    Returns
    -------
    list of str
        Names of the runs that failed in this call.
    """
    plan = plan_of(scenario, options)
    command = _command(scenario, options)
    _check_target(plan, options, command)

    def after() -> None:
        write_outputs(plan, options, command)
        if options.prune:
            prune_finished(plan)

    failed: list[str] = []
    if not table_only:
        work = partial(compare, scenario, replace(options, jobs=1))
        with Jobs(work, options.jobs, plan.runs) as jobs, Flower(plan) as flower:
            _share(plan, options, jobs, execute or flower, after, console)
        known = [o for o in known_runs(plan) if fnmatch(o.run.name, options.only)]
        failed = [o.run.name for o in known if o.state == "failed"]
    content = write_outputs(plan, options, command)
    show(content, options, console)
    return failed


def _check_target(plan: Plan, options: CompareOptions, command: str) -> None:
    """Refuse now, and not hours later, what could not be written."""
    target = options.target(plan)
    stored = read_stored(target)
    if stored is not None and options.extend:
        extended(stored, summarise(plan, command), target)
    elif stored is not None:
        check_rows_survive(stored, plan, target)


def _share(
    plan: Plan,
    options: CompareOptions,
    jobs: Jobs,
    execute: Execute,
    after: Callable[[], None],
    console: Console,
) -> None:
    """Run and attack this process's share, and in the end what the others may have left."""
    tried: set[str] = set()
    attacked: set[str] = set()
    while True:
        others = jobs.alive()
        run_all(
            plan,
            execute=execute,
            after=after,
            only=options.only,
            console=console,
            others=jobs.alive,
            tried=tried,
        )
        if options.audit != "no":
            # the attackers' models and learners are loaded only if wanted
            from privtune_flwr.compare.attacked import attack_table

            chosen = AuditOptions(options.audit)
            attack_table(plan, chosen, after=after, console=console, tried=attacked)
        if not others:
            return
        jobs.join()


def write_outputs(plan: Plan, options: CompareOptions, command: str) -> dict[str, Any]:
    """Write JSON, CSV, Markdown and figures, each whole or not at all."""
    target = options.target(plan)
    plan.runs.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a second process of the same command writes the same files
    with FileLock(plan.runs / "outputs.lock"):
        content = summarise(plan, command)
        stored = read_stored(target) if options.extend else None
        if stored is not None:
            content = extended(stored, content, target)
        write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")
        write_text(target.with_suffix(".csv"), as_csv(content))
        write_text(target.with_suffix(".md"), markdown(content))
        draw_figures(options.figures or target.parent, target.stem, content)
    return content


def prune_finished(plan: Plan) -> None:
    """Delete what is large in finished runs, but for the run of each method that is audited."""
    keep: set[str] = set()
    for method in plan.methods:
        found = gather(plan, method)
        # before a rate is chosen, any of the grid may become that run
        held = found.seeds[:1] or found.grid.values()
        keep |= {outcome.run.name for outcome in held}
    names = {o.run.name for o in known_runs(plan) if o.state == "finished"}
    prune(plan, names - keep)


def show(content: dict[str, Any], options: CompareOptions, console: Console) -> None:
    """Print the table with one axis, how rates were chosen, and what failed."""
    rows = [row for row in content["methods"] if row["accuracy"] is not None]
    axis = equal(rows, options.axis, options.budget) if rows else None
    wide = console if console.is_terminal else Console(width=220)
    wide.print(console_table(content, axis))
    wide.print(content["tuning"]["statement"], highlight=False)
    for run in content["runs"]:
        if "reason" in run:
            wide.print(f"failed: {run['name']}: {run['reason']}", markup=False, highlight=False)


def show_plan(plan: Plan, console: Console, only: str = "*") -> None:
    """List the runs with their sizes, states and minutes, measured or expected.

    A run is expected to take what finished runs of its method took on average; runs of seeds that
    hang on a rate not chosen yet are counted, not listed.
    """
    known = [o for o in known_runs(plan) if fnmatch(o.run.name, only)]
    took = _minutes_of(known)
    table = Table("run", "state", "devices", "examples", "epochs", "minutes")
    left, unknown = 0.0, 0
    for outcome in known:
        config = plan.config(outcome.run)
        expected = took.get(outcome.run.method.name)
        done = outcome.seconds
        said = f"{done / 60:.1f}" if done is not None else _about(expected)
        if done is None:
            left, unknown = left + (expected or 0.0), unknown + (expected is None)
        table.add_row(
            outcome.run.name,
            outcome.state,
            str(plan.scenario.federation.num_supernodes),
            str(config.data.train_examples or "all"),
            str(config.train.epochs),
            said,
        )
    wide = console if console.is_terminal else Console(width=120)
    wide.print(table)
    later = total_runs(plan, only) - len(known)
    if later:
        wide.print(f"{later} more once learning rates are chosen")
    rest = f", {unknown} of unknown length" if unknown else ""
    wide.print(f"expected for what is listed: {left:.0f} minutes{rest}", highlight=False)


def _minutes_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Give the mean minutes of each method's finished runs."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.seconds is not None:
            found.setdefault(outcome.run.method.name, []).append(outcome.seconds / 60)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _about(minutes: float | None) -> str:
    return "-" if minutes is None else f"about {minutes:.1f}"


def _command(scenario: str, options: CompareOptions) -> str:
    words = ["privtune compare", Path(scenario).name]
    words += [f"--methods {','.join(options.methods)}"] if options.methods else []
    words += [f"--seeds {','.join(map(str, options.seeds))}"] if options.seeds else []
    words += [f"--audit {options.audit}"] if options.audit != "no" else []
    words += ["--extend"] if options.extend else []
    return " ".join(words)
