"""A run that is killed and resumed ends like one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from federation_kit import NOISY, Run

from privtune_flwr.config import ConfigError, flatten, load_run_config
from privtune_flwr.launcher import SuperLink
from privtune_flwr.results.run_folder import open_run_folder

pytestmark = pytest.mark.flower

INDEX = "store/index.jsonl"


class KilledError(Exception):
    """The simulation was killed: its log is not read on.

    Flower misses a dead simulation after 50 seconds of silence, which nothing here needs to wait.
    """


def kill_simulation(link: SuperLink) -> None:
    """End the process that runs the server app, as a power cut would."""
    for process in psutil.Process(link.pid).children(recursive=True):
        # helpers of the SuperLink come and go while the list is read
        with contextlib.suppress(psutil.Error):
            if any("flwr-simulation" in part for part in process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
    raise KilledError


def wait_for_chunks(index: Path, wanted: int, seconds: float = 120) -> None:
    """Wait until the store holds so many chunks of training examples."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = index.read_text().split("\n")[:-1] if index.exists() else []
        if sum(json.loads(line)["split"] == "train" for line in lines) >= wanted:
            return
        time.sleep(0.005)
    raise AssertionError(f"{index} did not get {wanted} chunks")


@pytest.fixture(scope="module")
def resumed(
    federate: Callable[..., Run], superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    index = folder / "broken" / INDEX

    def kill_in_round_two(line: str) -> None:
        # three devices, a chunk each a round: the fourth is round 2's, whose checkpoint is not yet
        if "release rounds" in line:
            wait_for_chunks(index, 4)
            kill_simulation(superlink)

    with pytest.raises(KilledError):
        federate("broken", NOISY, on_line=kill_in_round_two, folder=folder)
    return federate("broken", {**NOISY, "run.resume": True}, folder=folder)


def test_a_killed_run_resumes_to_the_same_metrics(noisy: Run, resumed: Run) -> None:
    assert "resuming after round 1 " in resumed.log
    assert resumed.lines("steps.jsonl") == noisy.lines("steps.jsonl")
    assert resumed.results["final"] == noisy.results["final"]
    # every example once an epoch: the resumed run's devices entered no further release
    assert resumed.results["privacy"]["releases_per_example"] == 2
    keys = [(e["device"], e["split"], e["epoch"], e["chunk"]) for e in resumed.lines(INDEX)]
    assert len(keys) == len(set(keys))


def test_a_killed_run_counts_what_it_had_received(noisy: Run, resumed: Run) -> None:
    for key in ("examples", "privacy"):
        assert resumed.results[key] == noisy.results[key]
    rounds = zip(resumed.lines("rounds.jsonl"), noisy.lines("rounds.jsonl"), strict=True)
    for again, once in rounds:
        for key in ("devices", "examples_new", "eta_max"):
            assert again.get(key) == once.get(key)
    once, again = noisy.results["traffic"], resumed.results["traffic"]
    # devices introduce themselves once more, and answer what was on its way at the kill
    assert once["bytes_up"] < again["bytes_up"] < 1.02 * once["bytes_up"]
    for device, account in again["devices"].items():
        assert account["messages"] > once["devices"][device]["messages"]


def test_a_resumed_run_keeps_its_configuration(noisy: Run) -> None:
    changed = {"run.resume": True, "model.max-length": 64}
    with pytest.raises(ConfigError, match=r"model\.max-length = 64: the run to resume has 128"):
        open_run_folder(load_run_config(flatten(noisy.config) | changed))
