"""Finished parts of an audit on disk: an interrupted audit goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.results.run_folder import write_text

FORMAT = 1  # raise it whenever a part's meaning changes: old parts are then done again


class Parts:
    """A folder of results, each under the hash of all that determines it.

    Parameters
    ----------
    folder : Path
        Made on demand.
    common : mapping
        What determines every part: the run, the sentences drawn, the seed.
    fresh : bool
        Do everything again.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._folder = folder
        self._common = dict(common)
        self._fresh = fresh
        folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Give a part's result, computing and storing it first if it is not there.

        Parameters
        ----------
        name : str
            What the part is; becomes the file's name.
        settings : mapping
            All that determines it beside what is common.
        compute : callable
            Gives the result as JSON values; arrays under the key ``guesses`` are kept beside it.
        """
        path, identity = self._path(name), self._identity(name, settings)
        if (known := self._read(path, identity)) is not None:
            return known
        result = compute()
        guesses: list[NDArray[Any]] | None = result.pop("guesses", None)
        if guesses is not None:
            np.savez_compressed(path.with_suffix(".npz"), *guesses)
        write_text(path, json.dumps({"identity": identity, "result": result}) + "\n")
        return result

    def holds(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether a part is there already."""
        return self._read(self._path(name), self._identity(name, settings)) is not None

    def guesses(self, name: str) -> list[NDArray[np.int64]]:
        """Read the guesses of a stored part, one array (T, k) a sentence."""
        with np.load(self._path(name).with_suffix(".npz"), allow_pickle=False) as stored:
            return [np.asarray(stored[f"arr_{i}"], np.int64) for i in range(len(stored.files))]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _identity(self, name: str, settings: Mapping[str, Any]) -> str:
        content = [FORMAT, self._common, name, dict(settings)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _read(self, path: Path, identity: str) -> dict[str, Any] | None:
        if self._fresh or not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("identity") != identity:
            return None
        result: dict[str, Any] = stored["result"]
        return result
