"""Running many federations in a row, resumably, into one results file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.launcher import app_folder, federate, local_superlink
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
    measure: Callable[[Path], dict[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run the cases that have no row yet; store after each one.

    Parameters
    ----------
    title : str
        Name of ``simulations/results/<title>.json``.
    cases : iterable of Case
        In the order in which they run.
    runs : Path
        Where run folders go; they are large and not part of the results.
    measure : callable
        Run folder to the row's figures, beside those of the run's own ``results.json``.
    extra : Mapping, optional
        Facts about the whole study, kept beside the rows.

    Returns
    -------
    list of dict
        All rows, old and new.
    """
    target = RESULTS / f"{title}.json"
    done = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    wanted = [c for c in cases if c.name not in {row["name"] for row in done}]
    command = f"python -m {_module()} {' '.join(sys.argv[1:])}".strip()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console()
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        local_superlink() as superlink,
        app_folder() as app,
    ):
        task = progress.add_task(title, total=len(wanted))
        for case in wanted:
            progress.update(task, description=f"{title}: {case.name}")
            config = _config(case, runs)
            target_run = Path(config.run.folder) / config.run.name
            if not (target_run / "results.json").exists():
                log = runs / f"{case.name}.log"
                federate(
                    config,
                    Federation(num_supernodes=case.devices),
                    superlink=superlink,
                    app=app,
                    on_output=lambda lines, log=log: _to_file(lines, log),  # type: ignore[misc]
                )
            results = json.loads((target_run / "results.json").read_text(encoding="utf-8"))
            done.append({"name": case.name, **_kept(results), **measure(target_run)})
            RESULTS.mkdir(exist_ok=True)
            content = {"command": command, **(extra or {}), "rows": done}
            write_text(target, json.dumps(content, indent=1, sort_keys=True) + "\n")
            progress.advance(task)
    return list(done)


def _config(case: Case, runs: Path) -> RunConfig:
    runs.mkdir(parents=True, exist_ok=True)
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
