"""Starting ``flwr run`` with a SuperLink of its own, and ending both.

Flower's default profile starts a detached SuperLink that outlives the run. Here each launch has
its own Flower home, port and process, so that runs do not meet and nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import tomli_w

import privtune_flwr
import simulations
import strategies
from privtune_flwr.assets import cache_root
from privtune_flwr.config import RunConfig, Scalar, flatten
from privtune_flwr.errors import CANNOT_START, ENDED, RunError
from privtune_flwr.scenario import Federation

_START_SECONDS = 60.0
_PROFILE = "privtune"
# what Flower packs into an app: source and scenarios, never the studies' stored results
_IGNORED = ["__pycache__", "*.pyc", "*.json", "*.png"]


def stage_app(target: Path, *, client_app: str = "privtune_flwr.client_app:app") -> Path:
    """Write the Flower app into a folder, from wherever the packages are installed.

    Parameters
    ----------
    target : Path
        An empty folder.
    client_app : str
        Another client app to run instead of ours; its module must be importable.
    """
    for package in (privtune_flwr, strategies, simulations):
        source = Path(str(package.__file__)).parent
        ignored = [*_IGNORED, "results"] if package is simulations else _IGNORED
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns(*ignored))
    config: dict[str, dict[str, Scalar]] = {}
    for key, value in flatten(RunConfig()).items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    project = {
        "project": {
            "name": "privtune-flwr",
            "version": metadata.version("privtune-flwr"),
            "description": "PrivTune split-learning federation",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "privtune",
                    "components": {
                        "serverapp": "privtune_flwr.server_app:app",
                        "clientapp": client_app,
                    },
                    "config": config,
                }
            }
        },
    }
    (target / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    return target


@contextmanager
def app_folder() -> Iterator[Path]:
    """Give the checkout one stands in, or a staged copy of the installed packages."""
    project = Path("pyproject.toml")
    if project.is_file():
        name = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name")
        if name == "privtune-flwr":
            yield Path()
            return
    with tempfile.TemporaryDirectory(prefix="privtune-app-") as folder:
        yield stage_app(Path(folder))


def federate(
    config: RunConfig,
    federation: Federation | None,
    *,
    superlink: SuperLink,
    app: Path,
    on_output: Callable[[Iterable[str]], None],
) -> Path:
    """Run one federation through ``flwr run`` and give its run folder back.

    Parameters
    ----------
    config : RunConfig
        With ``run.name`` set and ``run.folder`` absolute.
    federation : Federation or None
        Number of virtual devices and their resources; None where SuperNodes are real.
    superlink : SuperLink
        From :func:`local_superlink`.
    app : Path
        From :func:`app_folder` or :func:`stage_app`.
    on_output : callable
        Consumes the run's log, line by line, until it ends.

    Raises
    ------
    RunError
        If the run left no results.
    """
    target = Path(config.run.folder) / config.run.name
    before = _written(target / "results.json")
    process = superlink.flwr_run(app, flatten(config), federation)
    assert process.stdout is not None
    reasons: list[str] = []
    try:
        on_output(_watched(process.stdout, reasons))
    finally:
        process.terminate()
        process.wait()
    # a resumed run may have results of an earlier end: only new ones count
    if _written(target / "results.json") == before:
        reason = reasons[-1] if reasons else "its log says why"
        raise RunError(f"the run left no results in {target}: {reason}")
    return target


def _watched(lines: Iterable[str], reasons: list[str]) -> Iterator[str]:
    """Pass a log on and pick up why the server app ended, if it says so."""
    for line in lines:
        for mark in (CANNOT_START, ENDED):
            if mark in line:
                reasons.append(line.partition(mark)[2].strip())
        yield line


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes
    ----------
    home : Path
        Its ``FLWR_HOME``; ``superlink.log`` is in it.
    address : str
        Host and port.
    pid : int
        Its process; a simulation's processes are below it.
    environment : dict
        What ``flwr`` commands need to reach it.
    """

    home: Path
    address: str
    pid: int
    environment: dict[str, str]

    def flwr_run(
        self, app: Path, run_config: Mapping[str, Scalar], federation: Federation | None
    ) -> subprocess.Popen[str]:
        """Start ``flwr run`` and stream its log to the process's standard output."""
        overrides = self.home / f"run-{time.monotonic_ns()}.toml"
        overrides.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        # a SuperLink of real devices has no size to set
        size = federation and (
            f"num-supernodes={federation.num_supernodes} "
            f"client-resources-num-cpus={federation.client_cpus} "
            f"client-resources-num-gpus={federation.client_gpus}"
        )
        return subprocess.Popen(
            [
                _script("flwr"),
                "run",
                str(app),
                _PROFILE,
                "--stream",
                "--run-config",
                str(overrides),
                *(["--federation-config", size] if size else []),
            ],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def local_superlink(*, simulation: bool = True) -> Iterator[SuperLink]:
    """Start a SuperLink on loopback; end it and all it started on the way out, SIGTERM included.

    Parameters
    ----------
    simulation : bool
        Whether it simulates its devices; else SuperNodes connect to ``address``.

    Raises
    ------
    RunError
        If it does not come up; the message quotes the end of its log.
    """
    cache_root().mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="flower-", dir=cache_root()))
    port = free_port()
    (home / "config.toml").write_text(
        tomli_w.dumps(
            {
                "superlink": {
                    "default": _PROFILE,
                    _PROFILE: {"address": f"127.0.0.1:{port}", "insecure": True},
                }
            }
        ),
        encoding="utf-8",
    )
    environment = flower_environment(home)
    log = home / "superlink.log"
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [
                _script("flower-superlink"),
                "--insecure",
                *(["--simulation"] if simulation else []),
                "--isolation",
                "subprocess",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--database",
                str(home / "state.db"),
                "--disable-runtime-dependency-installation",
            ],
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=Path.cwd(),
        )
    try:
        with termination_unwinds():
            _wait_until_healthy(process, port, log)
            yield SuperLink(home, f"127.0.0.1:{port}", process.pid, environment)
    finally:
        end_process_tree(process.pid)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def termination_unwinds() -> Iterator[None]:
    """Let SIGTERM leave by way of every ``finally``, as an interrupt from the keyboard does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's and Ray's processes: own home, no telemetry, nothing installed."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # workers that Ray starts before it knows what for: an actor of ours starts its own
        "RAY_prestart_worker_first_driver": "0",
        "PRIVTUNE_CACHE": str(cache_root()),
        "TOKENIZERS_PARALLELISM": "false",
        # the SuperLink starts its helpers by name
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
    }


def free_port() -> int:
    """Find a TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
    raise RunError(f"the SuperLink did not start:\n{tail}")


def end_process_tree(pid: int) -> None:
    """End a process and everything below it: politely first, then by force."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        with contextlib.suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(alive, timeout=5)
