"""A run that is killed and resumed ends like one that was not."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import psutil
import pytest
from federation_kit import Run

from privtune_flwr.errors import RunError
from privtune_flwr.launcher import SuperLink

pytestmark = pytest.mark.flower

SETTINGS = {
    "privacy.mechanism": "privtune",
    "privacy.decoder": True,
    "model.cut": 2,
    "run.seed": 3,
    "train.evaluate-every": 2,
    # as many messages and rounds as with twice the text in chunks twice as large
    "data.train-examples": 96,
    "data.test-examples": 32,
    "privacy.chunk-size": 8,
    "train.batch-size": 8,
}


def kill_simulation(link: SuperLink) -> None:
    """End the process that runs the server app, as a power cut would."""
    for process in psutil.Process(link.pid).children(recursive=True):
        # helpers of the SuperLink come and go while the list is read
        with contextlib.suppress(psutil.Error):
            if any("flwr-simulation" in part for part in process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)


def test_a_killed_run_resumes_to_the_same_metrics(
    federate: Callable[..., Run], superlink: SuperLink
) -> None:
    whole = federate("unbroken", SETTINGS)

    def kill_in_round_two(line: str) -> None:
        if "round 2/" in line:
            kill_simulation(superlink)

    with pytest.raises(RunError, match="left no results"):
        federate("broken", SETTINGS, on_line=kill_in_round_two)
    resumed = federate("broken", {**SETTINGS, "run.resume": True})
    assert "resuming after round" in resumed.log

    assert resumed.lines("steps.jsonl") == whole.lines("steps.jsonl")
    assert resumed.results["final"] == whole.results["final"]
    # every example once: the resumed run's devices entered no second release
    assert resumed.results["privacy"]["releases_per_example"] == 1
    index = resumed.lines("store/index.jsonl")
    keys = [(e["device"], e["split"], e["epoch"], e["chunk"]) for e in index]
    assert len(keys) == len(set(keys))
    asked_twice = sum(a["up"] for a in resumed.results["traffic"]["devices"].values())
    once = sum(a["up"] for a in whole.results["traffic"]["devices"].values())
    # at most the chunks that were on their way when it died crossed again
    assert asked_twice <= once * 1.6


def test_a_resumed_run_keeps_its_configuration(federate: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match=r"model\.max-length = 64: the run to resume has 128"):
        federate("unbroken", {**SETTINGS, "run.resume": True, "model.max-length": 64})
