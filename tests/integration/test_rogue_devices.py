"""Devices that send nonsense are quarantined with a reason; the others finish the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from federation_kit import Run

from privtune_flwr.errors import RunError

pytestmark = pytest.mark.flower

SETTINGS = {
    "privacy.mechanism": "privtune",
    "privacy.decoder": True,
    "model.cut": 2,
    "train.epochs": 2,
    "data.train-examples": 192,
    "privacy.chunk-size": 8,
}
REASONS = {
    2: "NaN or Inf",
    3: "wrong shape",
    4: "wrong chunk",
    5: "wrong dtype",
    6: "oversize",
    7: "lengths",
    8: "records: must be",
    9: "no wish to take part",
    10: "NaN or Inf",
    11: "wrong chunk",
}


def test_every_kind_of_bad_reply_is_quarantined(federate: Callable[..., Run]) -> None:
    run = federate("rogue", SETTINGS, devices=12, client_app="rogue_app:app")
    devices = run.results["devices"]
    assert set(devices["quarantined"]) == {f"device-{p:05d}" for p in REASONS}
    for partition, reason in REASONS.items():
        assert reason in devices["quarantined"][f"device-{partition:05d}"]
        assert f"device-{partition:05d}" in run.log
    # the two honest ones, and the replaying one's first chunk
    assert devices["used"] == 3
    assert run.results["examples"]["train_received"] == 2 * 16 + 8
    assert 0 < run.results["final"]["test_accuracy"] < 1
    assert len(run.lines("rounds.jsonl")) == 3


def test_a_run_without_a_usable_device_says_so(federate: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match=r"no usable device: refused: policy\.mechanisms"):
        federate("nobody", SETTINGS, devices=2, client_app="absent_app:app")
