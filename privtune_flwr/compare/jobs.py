"""Further processes of a comparison, which take their share of its runs and audits."""

from __future__ import annotations

import contextlib
import multiprocessing
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from privtune_flwr.config import ConfigError
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.launcher import termination_unwinds

if TYPE_CHECKING:
    from privtune_flwr.compare.command import CompareOptions

_END_SECONDS = 30.0


class Jobs(AbstractContextManager["Jobs"]):
    """Processes that run the same comparison as this one; they end with it.

    Each has a SuperLink of its own and writes what it says to ``job-<number>.log`` among the runs.

    Parameters
    ----------
    scenario : str
        As for :func:`~privtune_flwr.compare.command.compare`.
    options : CompareOptions
        Their ``jobs`` counts this process in.
    folder : Path
        Where their logs go.
    """

    def __init__(self, scenario: str, options: CompareOptions, folder: Path) -> None:
        self._stack = ExitStack()
        # spawned: this process may have threads, which a fork would not survive
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = [
            context.Process(
                target=_work,
                args=(scenario, replace(options, jobs=1), folder / f"job-{number}.log"),
                name=f"job-{number}",
            )
            for number in range(2, options.jobs + 1)
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


def _work(scenario: str, options: CompareOptions, log: Path) -> None:
    from privtune_flwr.compare.command import compare

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        console = Console(file=file, width=120)
        try:
            compare(scenario, options, console=console)
        except KeyboardInterrupt:
            console.print("interrupted")
        except (ConfigError, PrivTuneError) as error:
            # the first process meets the same and says it to the user
            console.print(str(error), markup=False, highlight=False)
