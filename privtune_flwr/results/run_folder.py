"""A run's folder: one place, made once, resumed under the same configuration only."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from privtune_flwr.config import ConfigError, RunConfig, Scalar, flatten
from privtune_flwr.errors import RunError

# what a resumed run may change without becoming another run
FREE_KEYS = ("run.", "train.timeout", "train.threads", "train.device")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Attributes
    ----------
    path : Path
        ``<run.folder>/<run.name>``.
    run_id : str
        Random, made with the folder; every message carries it.
    """

    path: Path
    run_id: str
    lock: FileLock

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        """State after the last finished round."""
        return self.path / "checkpoint.pt"

    @property
    def store(self) -> Path:
        """What the cloud received."""
        return self.path / "store"

    @property
    def results(self) -> Path:
        """Final results."""
        return self.path / "results.json"

    def write_json(self, name: str, value: Any) -> None:
        """Write one file whole or not at all."""
        write_text(self.path / name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def write_jsonl(self, name: str, rows: Iterable[Any]) -> None:
        """Write one record a line, whole or not at all."""
        write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def read_json(self, name: str) -> Any | None:
        """Read a file; None where it is not there yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_run_folder(config: RunConfig) -> RunFolder:
    """Make the run's folder, or open it again with ``run.resume``.

    Raises
    ------
    ConfigError
        If a new run's name is taken, or a resumed one's configuration differs: it names the key.
    RunError
        If there is nothing to resume, or another process is running this run.
    """
    name = config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.privacy.mechanism}"
    path = Path(config.run.folder).expanduser().absolute() / name
    known = path / "config.json"
    if config.run.resume:
        if not known.exists():
            raise RunError(f"run.resume: there is no run to resume at {path}")
        before = json.loads(known.read_text(encoding="utf-8"))
        _check_same(before["config"], flatten(config))
        run_id = str(before["run_id"])
    else:
        if known.exists():
            raise ConfigError(
                f"run.name = {name!r}: {path} exists; set run.resume = true or another name"
            )
        path.mkdir(parents=True, exist_ok=True)
        run_id = uuid.uuid4().hex
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is running {path}") from None
    folder = RunFolder(path, run_id, lock)
    if not known.exists():
        folder.write_json("config.json", {"run_id": run_id, "config": flatten(config)})
    return folder


def _check_same(before: dict[str, Scalar], now: dict[str, Scalar]) -> None:
    for key in sorted(set(before) | set(now)):
        free = key.startswith(FREE_KEYS) and key != "run.seed"
        if not free and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key} = {now.get(key)!r}: the run to resume has {before.get(key)!r}; "
                "a resumed run keeps its configuration"
            )
