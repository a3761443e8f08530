"""Further processes of a comparison, which take their share of its runs and audits."""

from __future__ import annotations

import contextlib
import multiprocessing
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

from rich.console import Console

from privtune_flwr.config import ConfigError
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.launcher import termination_unwinds

_END_SECONDS = 30.0


class Work(Protocol):
    """What a further process does; picklable."""

    def __call__(self, *, console: Console) -> object:
        """Work, and say what is done on a console."""


class Jobs(AbstractContextManager["Jobs"]):
    """Processes that do the same work as this one; they end with it.

    Parameters
    ----------
    work : callable
        What each does.
    count : int
        Of all processes, this one counted in.
    folder : Path
        Where each writes what it says: ``job-<number>.log``.
    """

    def __init__(self, work: Work, count: int, folder: Path) -> None:
        self._stack = ExitStack()
        # spawned: this process may have threads, which a fork would not survive
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = [
            context.Process(target=_run, args=(work, folder / f"job-{number}.log"))
            for number in range(2, count + 1)
        ]

    def __enter__(self) -> Jobs:
        """Start them."""
        if self._processes:
            self._stack.enter_context(termination_unwinds())
        for process in self._processes:
            process.start()
        return self

    def alive(self) -> bool:
        """Whether any of them is at work."""
        return any(process.is_alive() for process in self._processes)

    def join(self) -> None:
        """Wait until all have ended."""
        for process in self._processes:
            process.join()

    def __exit__(self, *_: object) -> None:
        """End those that are still at work: politely first, so that their SuperLinks end too."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
        self._stack.close()


def _run(work: Work, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        console = Console(file=file, width=120)
        try:
            work(console=console)
        except KeyboardInterrupt:
            console.print("interrupted")
        except (ConfigError, PrivTuneError) as error:
            # the first process meets the same and says it to the user
            console.print(str(error), markup=False, highlight=False)
