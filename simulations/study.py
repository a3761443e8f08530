"""Running many federations in a row, resumably, into one results file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.launcher import SuperLink, app_folder, federate, local_superlink
from privtune_flwr.results.run_folder import write_text
from privtune_flwr.scenario import Federation

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One federation of a study: a row of its results.

    Attributes
    ----------
    name : str
        Identifies the row; a row that is there already is not run again.
    settings : dict
        Run configuration keys that differ from the defaults.
    devices : int
        Virtual devices.
    """

    name: str
    settings: Mapping[str, Scalar]
    devices: int = 10


def run_study(
    title: str,
    cases: Iterable[Case],
    *,
    runs: Path,
    measure: Callable[[Path], dict[str, Any]] | None,
    extra: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run the cases that have no row yet; store after each one.

    The same command in a second process takes its share of the cases.

    Parameters
    ----------
    title : str
        Name of ``simulations/results/<title>.json``.
    cases : iterable of Case
        In the order in which they run.
    runs : Path
        Where run folders go; they are large and not part of the results.
    measure : callable or None
        Run folder to the row's figures, beside those of the run's own ``results.json``. ``None``
        only runs the federations; a later call with a measure finds them done.
    extra : Mapping, optional
        Facts about the whole study, kept beside the rows.

    Returns
    -------
    list of dict
        All rows, old and new.
    """
    target = RESULTS / f"{title}.json"
    RESULTS.mkdir(exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    command = f"python -m {_module()} {' '.join(sys.argv[1:])}".strip()
    chosen = list(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), console=Console()) as progress,
        local_superlink() as superlink,
        app_folder() as app,
    ):
        task = progress.add_task(title, total=len(chosen))
        for case in chosen:
            progress.update(task, description=f"{title}: {case.name}")
            with contextlib.suppress(Timeout), FileLock(runs / f"{case.name}.lock", timeout=0):
                # a case that another process works on right now is left to it
                if case.name not in {row["name"] for row in stored_rows(target)}:
                    folder = _run(case, runs, superlink, app)
                    if measure is not None:
                        row = {"name": case.name, "command": command, **_figures(folder, measure)}
                        add_row(target, row, extra or {})
            progress.advance(task)
    return stored_rows(target)


def _figures(folder: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {**_kept(results), **measure(folder)}


def _run(case: Case, runs: Path, superlink: SuperLink, app: Path) -> Path:
    config = _config(case, runs)
    folder = Path(config.run.folder) / config.run.name
    if (folder / "results.json").exists():
        return folder
    log = runs / f"{case.name}.log"
    return federate(
        config,
        Federation(num_supernodes=case.devices),
        superlink=superlink,
        app=app,
        on_output=lambda lines: _to_file(lines, log),
    )


def stored_rows(target: Path) -> list[dict[str, Any]]:
    """Read a study's rows; none where it has not begun."""
    if not target.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8"))["rows"]
    return rows


def add_row(target: Path, row: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Add a row under a lock, so that two processes can share a study's cases."""
    with FileLock(target.with_suffix(".lock")):
        rows = sorted([*stored_rows(target), row], key=lambda r: str(r["name"]))
        kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        content = {**kept, **facts, "rows": rows}
        write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _config(case: Case, runs: Path) -> RunConfig:
    name = case.name
    started = (runs / name / "config.json").exists()
    settings: dict[str, Scalar] = {
        **case.settings,
        "run.name": name,
        "run.folder": str(runs.absolute()),
        # a study that was interrupted goes on inside its unfinished run
        "run.resume": started,
        "run.min-devices": case.devices,
    }
    return load_run_config(flatten(RunConfig()) | settings)


def _kept(results: dict[str, Any]) -> dict[str, Any]:
    """Keep what a table or a plot needs; the configuration only where it is not the default."""
    default = flatten(RunConfig())
    changed = {
        key: value
        for key, value in results["config"].items()
        if value != default.get(key) and key not in ("run.folder", "run.resume", "run.name")
    }
    keys = ("final", "seconds", "memory", "privacy", "versions", "examples", "steps")
    traffic = {k: v for k, v in results["traffic"].items() if k != "devices"}
    return {**{k: results[k] for k in keys}, "traffic": traffic, "config": changed}


def _to_file(lines: Iterable[str], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)


def _module() -> str:
    import __main__

    spec = getattr(__main__, "__spec__", None)
    return spec.name if spec else "simulations"
