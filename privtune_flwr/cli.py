"""The ``privtune`` command."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from privtune_flwr.assets import AssetError, fetch_default, list_assets, verify_assets
from privtune_flwr.assets import asset_folder as fetch_asset
from privtune_flwr.audit.options import AuditOptions, SideAudit
from privtune_flwr.compare.axis import Axis
from privtune_flwr.config import ConfigError, Scalar
from privtune_flwr.errors import PrivTuneError, RunError
from privtune_flwr.launcher import app_folder, federate, local_superlink
from privtune_flwr.results.table import print_results
from privtune_flwr.scenario import load_scenario, packaged_scenarios

main = typer.Typer(no_args_is_help=True, add_completion=False, help="Private split tuning.")
assets = typer.Typer(no_args_is_help=True, help="Packaged models and text.")
main.add_typer(assets, name="assets")
console = Console()

_ROUND = re.compile(r"round (\d+)/(\d+)")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """End with one line instead of a traceback where the cause is the user's to mend."""
    try:
        yield
    except (ConfigError, PrivTuneError, AssetError) as error:
        console.print(f"[red]privtune:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@assets.command("list")
def assets_list() -> None:
    """Show what can be fetched, and what is here."""
    table = Table("name", "what", "MB", "here")
    for info in list_assets():
        here = "yes" if info.present else "no"
        table.add_row(info.name, info.description, f"{info.size / 1e6:.1f}", here)
    console.print(table)


@assets.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Nothing: what the demo needs.")] = None,
) -> None:
    """Fetch archives, check their hashes and unpack them into the cache."""
    with _clear_errors():
        folders = [fetch_asset(name) for name in names] if names else fetch_default()
        for folder in folders:
            console.print(str(folder), highlight=False, soft_wrap=True)


@assets.command("verify")
def assets_verify() -> None:
    """Hash what is unpacked once more; ends with 1 if anything is damaged."""
    damaged = False
    for status in verify_assets():
        damaged |= status.state == "damaged"
        console.print(f"{status.name}: {status.state} {'; '.join(status.problems)}".rstrip())
    if damaged:
        raise typer.Exit(1)


@main.command()
def scenarios() -> None:
    """List the scenarios that come with the package."""
    table = Table("name", "what")
    for name, description in packaged_scenarios().items():
        table.add_row(name, description)
    console.print(table)


@main.command()
def run(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a packaged scenario's name.")],
    name: Annotated[str, typer.Option(help="Name of the run; default: scenario and time.")] = "",
    folder: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    resume: Annotated[str, typer.Option(help="Go on with this run.")] = "",
    then_audit: Annotated[
        bool, typer.Option("--audit", help="End with a quick audit of the run.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, as in TOML; repeatable.")
    ] = None,
) -> None:
    """Run a scenario through ``flwr run``, with a SuperLink of its own."""
    with _clear_errors():
        chosen = load_scenario(scenario)
        started = time.strftime("%Y%m%d-%H%M%S")
        settings: dict[str, Scalar] = {
            **_parse_overrides(overrides or []),
            "run.folder": str(folder.absolute()),
            "run.name": resume or name or f"{chosen.name}-{started}",
            "run.resume": bool(resume),
            # a simulation's nodes appear within seconds; wait for all of them
            "run.min-devices": chosen.federation.num_supernodes,
        }
        config = chosen.run_config(settings)
        target = Path(config.run.folder) / config.run.name
        with local_superlink() as superlink, app_folder() as app:
            try:
                federate(
                    config,
                    chosen.federation,
                    superlink=superlink,
                    app=app,
                    on_output=lambda lines: _follow(lines, config.run.name),
                )
            except RunError as error:
                raise RunError(f"{error}; {_resume_hint(target, scenario)}") from None
        if then_audit:
            _audit([target], AuditOptions(preset="quick"))


def _resume_hint(target: Path, scenario: str) -> str:
    if (target / "checkpoint.pt").exists():
        place = f"--folder {target.parent} --resume {target.name}"
        return f"go on with: privtune run {scenario} {place}"
    return "nothing was released; its log is above"


@main.command()
def bank(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or a packaged scenario's name.")
    ] = "demo",
    file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, as in TOML; repeatable.")
    ] = None,
) -> None:
    """Build PrivTune's bank and graph for a run's model and cut, and show what they are."""
    with _clear_errors():
        from privtune_flwr.privacy.privtune.command import show_bank

        config = load_scenario(scenario).run_config(_parse_overrides(overrides or []))
        found = show_bank(config, console=console)
        if file is not None:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@main.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    texts: Annotated[
        Path, typer.Argument(help="A file with one text a line; - for standard input.")
    ],
) -> None:
    """Classify texts with a run's model, through its mechanism: one JSON object a line."""
    with _clear_errors():
        from privtune_flwr.predict import predict as classify

        if str(texts) != "-" and not texts.is_file():
            raise ConfigError(f"texts = {str(texts)!r}: no such file")
        content = sys.stdin.read() if str(texts) == "-" else texts.read_text(encoding="utf-8")
        for found in classify(run.absolute(), [line for line in content.splitlines() if line]):
            print(json.dumps({"label": found.label, "probabilities": found.probabilities}))


@main.command()
def audit(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several give a frontier.")],
    quick: Annotated[bool, typer.Option(help="Fewer sentences, weaker learned attackers.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Attacks, as 'gaussian@*'; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of sentences.")] = 0,
    text: Annotated[bool, typer.Option(help="Show a simulation's sentences.")] = True,
    fresh: Annotated[bool, typer.Option(help="Do finished parts again.")] = False,
) -> None:
    """Attack what a run's cloud received, and say how much of the text comes out."""
    with _clear_errors():
        options = AuditOptions("quick" if quick else "full", seed, only or (), text, fresh)
        _audit(runs, options)


def _audit(runs: list[Path], options: AuditOptions) -> None:
    from privtune_flwr.audit.command import audit_runs
    from privtune_flwr.audit.report.console import print_audit

    try:
        audits = audit_runs([run.absolute() for run in runs], options, console=console)
    except KeyboardInterrupt:
        console.print("what is done is kept: the same command goes on from here")
        raise typer.Exit(130) from None
    print_audit(audits)
    for run in runs:
        page = run / "audit" / "audit.html"
        if page.is_file():  # baselines have none
            console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if any(audit["valid"] is False for audit in audits):
        raise typer.Exit(1)


def _follow(lines: Iterable[str], title: str) -> None:
    """Pass a run's log on; on a terminal, with a bar for its rounds below."""
    if not console.is_terminal:
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rounds", total=None)
        for line in lines:
            if found := _ROUND.search(line):
                progress.update(task, completed=int(found[1]), total=int(found[2]))
            progress.console.print(line.rstrip(), markup=False, highlight=False)


def _parse_overrides(entries: list[str]) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for entry in entries:
        key, found, text = entry.partition("=")
        if not found:
            raise ConfigError(f"--set {entry!r}: must be section.key=value")
        try:
            values[key] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            # a bare word is a string, as people type it
            values[key] = text
    return values


@main.command()
def compare(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or a packaged scenario's name.")],
    methods: Annotated[str, typer.Option(help="Joined by commas; default: the scenario's.")] = "",
    seeds: Annotated[str, typer.Option(help="Joined by commas; default: the scenario's.")] = "",
    axis: Annotated[Axis, typer.Option(help="What methods are equal in, last column.")] = "epochs",
    budget: Annotated[
        float | None, typer.Option(help="On that axis; default: the least total.", min=0)
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Run folders; default: runs/compare/SCENARIO.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; CSV and Markdown go beside it.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Pictures' folder; default: beside.")] = None,
    only: Annotated[str, typer.Option(help="Pattern of run names.")] = "*",
    prune: Annotated[
        bool, typer.Option("--prune/--keep", help="Delete what only an audit needs.")
    ] = False,
    audit: Annotated[SideAudit, typer.Option(help="Attack the table's runs as well.")] = "no",
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep the JSON file's rows that are not run now.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the runs.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and their sizes.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Show what is finished.")] = False,
) -> None:
    """Run methods x seeds on one scenario, and write one table and the figures to choose by."""
    with _clear_errors():
        from privtune_flwr.compare import command

        options = command.CompareOptions(
            methods=_parts(methods),
            seeds=[_seed(part) for part in _parts(seeds)],
            axis=axis,
            budget=budget,
            runs=runs,
            out=out,
            figures=figures,
            only=only,
            prune=prune,
            audit=audit,
            jobs=jobs,
            extend=extend,
        )
        if plan:
            command.show_plan(command.plan_of(scenario, options), console, only)
            return
        try:
            failed = command.compare(scenario, options, console=console, table_only=table)
        except KeyboardInterrupt:
            console.print("what is done is kept: the same command goes on from here")
            raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--seeds {text!r}: must be whole numbers joined by commas")
    return int(text)


@main.command()
def results(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or their results.json.")],
) -> None:
    """Print the results of runs side by side."""
    loaded: list[dict[str, Any]] = []
    for path in runs:
        file = path if path.suffix == ".json" else path / "results.json"
        if not file.is_file():
            message = f"[red]privtune:[/red] {path}: has no results.json (yet)"
            console.print(message, highlight=False, soft_wrap=True)
            raise typer.Exit(1)
        loaded.append(json.loads(file.read_text(encoding="utf-8")))
    print_results(loaded)
