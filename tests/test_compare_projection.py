"""Projected wall time of recorded runs."""

from __future__ import annotations

import pytest
from compare_kit import recorded

from privtune_flwr.compare.measure import measure
from privtune_flwr.compare.projection import Link, Stage, predict, project, stages_of

LINK = Link(up=8e6, down=16e6, round_trip=0.1)


def stage(kind: str, compute: float, cloud: float) -> Stage:
    """Send 3 MB, receive 4 MB and exchange 5 messages: 3 + 2 + 0.5 seconds on LINK."""
    return Stage(kind, compute, 3e6, 4e6, 5, cloud)  # type: ignore[arg-type]


def test_a_synchronous_round_waits_for_compute_and_both_ways() -> None:
    assert predict([stage("sync", 2, 1)], LINK, 1) == pytest.approx(2 + 5.5 + 1)
    assert predict([stage("sync", 2, 1)] * 2, LINK, 4) == pytest.approx(2 * (8 + 5.5 + 1))
    # a slow device computes slower, its link is the others'
    assert predict([stage("sync", 2, 1)], LINK, 4, slow=5) == pytest.approx(40 + 5.5 + 1)


def test_the_release_overlaps_with_training() -> None:
    device = 1 + 5.5
    quick, slow = stage("release", 1, 1), stage("release", 1, 100)
    assert predict([quick] * 3, LINK, 1) == pytest.approx(3 * device + 1)
    assert predict([slow] * 3, LINK, 1) == pytest.approx(device + 300)
    mixed = [stage("sync", 1, 1), slow, quick, stage("cloud", 0, 7)]
    # the round after the slow one's training waits for it; then the cloud is alone
    assert predict(mixed, LINK, 1) == pytest.approx((device + 1) + device + 100 + 1 + 7)


def test_the_stages_of_a_real_run_hold_all_that_it_measured() -> None:
    for name in ("split", "fedavg-lora"):
        results = recorded(name)
        stages = stages_of(results)
        assert stages is not None
        found = measure(results)
        assert sum(s.bytes_up for s in stages) == pytest.approx(found.bytes_up)
        assert sum(s.messages for s in stages) == pytest.approx(found.messages)
        assert sum(s.compute for s in stages) == pytest.approx(found.device_seconds)
        assert sum(s.cloud for s in stages) == pytest.approx(found.cloud_seconds)
    kinds = ["sync", "sync", "release", "release", "cloud", "cloud"]
    assert [s.kind for s in stages_of(recorded("split")) or []] == kinds
    # what the cloud learned before any device did
    results = recorded("split")
    before, spent = stages_of(results) or [], measure(results).cloud_seconds
    results["seconds"]["start"] = 60.0
    later = stages_of(results) or []
    assert [s.kind for s in later] == ["cloud", *kinds]
    assert predict(later, LINK, 1) == pytest.approx(60 + predict(before, LINK, 1))
    assert measure(results).cloud_seconds == pytest.approx(60 + spent)


def test_a_projection_says_that_it_is_one() -> None:
    found = project(recorded("fedavg-lora"))
    assert found is not None
    assert found["projected"] is True
    known = {(s["link"], s["device"], s["slow"]): s["seconds"] for s in found["seconds"]}
    assert known["LTE", "phone", 1.0] > known["home", "phone", 1.0] > known["LAN", "phone", 1.0]
    assert known["LAN", "phone", 5.0] > known["LAN", "phone", 1.0]
    held = recorded("fedavg-lora")["traffic"]["model_bytes"]
    assert found["model_seconds"]["LTE"] == pytest.approx(8 * held / 20e6)
    # one after the other, one in four is slow; together, all wait for it
    serial = project(recorded("fedavg-lora"), serial=True)
    assert serial is not None
    slowed = {(s["link"], s["device"], s["slow"]): s["seconds"] for s in serial["seconds"]}
    assert slowed["LAN", "phone", 5.0] < known["LAN", "phone", 5.0]
    assert slowed["LAN", "phone", 1.0] == known["LAN", "phone", 1.0]


def test_a_run_whose_records_lack_bytes_is_not_projected() -> None:
    results = recorded("fedavg-lora")
    del results["per_round"][1]["bytes_up"]
    assert project(results) is None
