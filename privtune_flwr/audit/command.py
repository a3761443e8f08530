"""``privtune audit``: audits of several runs, their files and their common frontier."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from privtune_flwr.audit.auditor import Auditor, Watch
from privtune_flwr.audit.options import AuditOptions
from privtune_flwr.audit.plan import PRESETS
from privtune_flwr.audit.report.page import write_page
from privtune_flwr.audit.summary import frontier_point, summarise
from privtune_flwr.results.run_folder import write_text


def audit_runs(
    folders: Sequence[Path], options: AuditOptions, *, console: Console
) -> list[dict[str, Any]]:
    """Audit runs one after the other and write ``audit/audit.json`` and ``audit/audit.html``.

    With several runs every report shows the frontier of all of them. An interrupted call goes on
    where it stopped. Of a baseline whose devices send weights ``inversion.json`` is written and a
    table printed instead.

    Returns
    -------
    list of dict
        What was written of runs that release representations.
    """
    folders = _without_baselines(folders, console)
    audits = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for folder in folders:
            task = progress.add_task(f"{folder.name}: opening", total=1.0)

            def watch(name: str, share: float, folder: Path = folder, task: Any = task) -> None:
                progress.update(task, description=f"{folder.name}: {name}", completed=share)

            audits.append(audit_run(folder, options, watch))
    if len(audits) > 1:
        points = [frontier_point(audit) for audit in audits]
        for folder, audit in zip(folders, audits, strict=True):
            write_audit(folder, {**audit, "frontier": points})
    return audits


def _without_baselines(folders: Sequence[Path], console: Console) -> list[Path]:
    """Measure federated baselines' updates by their own attacks; give the other runs."""
    from privtune_flwr.audit.updates.run import invert_run, print_inversion, sends_weights

    kept = []
    for folder in folders:
        if sends_weights(folder):
            print_inversion(invert_run(folder), console)
        else:
            kept.append(folder)
    return kept


def audit_run(folder: Path, options: AuditOptions, watch: Watch) -> dict[str, Any]:
    """Audit one run and write its files.

    Parameters
    ----------
    folder : Path
        The run's.
    options : AuditOptions
    watch : callable
        Told what is done now and the share of the whole that is done.
    """
    start = time.perf_counter()
    auditor = Auditor(
        folder,
        PRESETS[options.preset],
        seed=options.seed,
        only=options.only,
        fresh=options.fresh,
    )
    found = auditor.run(watch)
    audit = summarise(auditor, found, show_text=options.show_text)
    audit["command"] = _command(folder, options)
    audit["seconds"] = time.perf_counter() - start
    write_audit(folder, audit)
    return audit


def write_audit(folder: Path, audit: dict[str, Any]) -> None:
    """Write the report beside the run."""
    write_text(folder / "audit" / "audit.json", json.dumps(audit, indent=1) + "\n")
    write_page(folder / "audit" / "audit.html", audit)


def _command(folder: Path, options: AuditOptions) -> str:
    words = ["privtune audit", folder.name]
    words += ["--quick"] if options.preset == "quick" else []
    words += [f"--seed {options.seed}"] if options.seed else []
    words += [f"--only '{pattern}'" for pattern in options.only]
    words += [] if options.show_text else ["--no-text"]
    return " ".join(words)
