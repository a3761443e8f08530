"""Real Flower: one SuperLink in simulation mode for all runs of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_kit import COMPARED, NOISY, SMALL, Run, finished
from filelock import FileLock
from typer.testing import CliRunner

from privtune_flwr.cli import main
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.launcher import SuperLink, local_superlink, stage_app
from privtune_flwr.launcher import federate as launch
from privtune_flwr.scenario import Federation

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def superlink() -> Iterator[SuperLink]:
    with local_superlink() as link:
        yield link


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stage the app, with a client app of these tests in place of ours where one is named."""
    made: dict[str, Path] = {}

    def stage(client_app: str) -> Path:
        if client_app not in made:
            target = tmp_path_factory.mktemp("app")
            stage_app(target, client_app=client_app)
            module = client_app.partition(":")[0]
            if (HERE / f"{module}.py").exists():
                (target / f"{module}.py").write_text((HERE / f"{module}.py").read_text())
            made[client_app] = target
        return made[client_app]

    return stage


@pytest.fixture(scope="session")
def federate(
    superlink: SuperLink,
    staged: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Run]:
    """Run a federation through ``flwr run``."""
    root = tmp_path_factory.mktemp("runs")

    def run(
        name: str,
        settings: dict[str, Scalar],
        *,
        devices: int = 3,
        client_app: str = "privtune_flwr.client_app:app",
        on_line: Callable[[str], None] = lambda line: None,
        cores: int = 2,
        folder: Path = root,
    ) -> Run:
        fixed = {"run.name": name, "run.folder": str(folder), "run.min-devices": devices}
        config = load_run_config(flatten(RunConfig()) | SMALL | settings | fixed)
        log: list[str] = []

        def read(lines: Any) -> None:
            for line in lines:
                log.append(line)
                on_line(line)

        try:
            found = launch(
                config,
                # one process for all devices on a machine of two cores: another one would import
                # and load everything once more, while other tests need the second core
                Federation(num_supernodes=devices, client_cpus=min(cores, os.cpu_count() or 1)),
                superlink=superlink,
                app=staged(client_app),
                on_output=read,
            )
        except Exception as error:
            # the run's own words are what explains a failure
            error.add_note("".join(log[-60:]))
            raise
        return Run(found, config, "".join(log))

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers see, for what one of them makes for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def noisy(federate: Callable[..., Run], shared: Path) -> Run:
    """One federation for every file that looks at it; whichever worker is first runs it."""
    log = shared / "noisy.log"
    with FileLock(shared / "noisy.lock"):
        if not log.exists():
            log.write_text(federate("noisy", NOISY, folder=shared).log)
    return finished(shared / "noisy", log)


@pytest.fixture(scope="session")
def compared(shared: Path) -> Path:
    """The folder of one comparison: ``tiny.toml`` and ``runs``."""
    folder = shared / "compared"
    with FileLock(shared / "compared.lock"):
        runs = folder / "runs"
        if not (runs / "comparison.json").exists():
            folder.mkdir(exist_ok=True)
            (folder / "tiny.toml").write_text(COMPARED)
            options = ["--runs", str(runs), "--prune", "--jobs", "2"]
            result = CliRunner().invoke(main, ["compare", str(folder / "tiny.toml"), *options])
            logs = "".join(path.read_text()[-3000:] for path in runs.glob("*.log"))
            assert result.exit_code == 0, result.output + logs
    return folder
