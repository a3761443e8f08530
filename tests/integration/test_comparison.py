"""``privtune compare`` through real Flower: two methods, one seed, one grid point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from privtune_flwr.audit.command import audit_runs
from privtune_flwr.audit.options import AuditOptions
from privtune_flwr.cli import main

pytestmark = pytest.mark.flower


def compare_again(compared: Path, *options: str) -> None:
    scenario, runs = str(compared / "tiny.toml"), str(compared / "runs")
    result = CliRunner().invoke(main, ["compare", scenario, "--runs", runs, *options])
    assert result.exit_code == 0, result.output


def times_of_logs(compared: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (compared / "runs").glob("*.log")}


def test_two_methods_end_in_one_table(compared: Path) -> None:
    runs = compared / "runs"
    content = json.loads((runs / "comparison.json").read_text())
    split, federated = content["methods"]
    assert (split["method"], federated["method"]) == ("split-clear", "fedavg-lora")
    for row in (split, federated):
        assert 0 <= row["accuracy"] <= 1
        assert row["grid"][0]["eval_accuracy"] is not None
        assert row["device_seconds"] > 0
        assert row["device_peak_bytes"] > 10**8
        assert row["model_bytes"] > 10**7
        assert row["curves"][0]["points"][-1]["bytes"] == pytest.approx(
            row["bytes_up"] + row["bytes_down"]
        )
        assert row["projection"]["projected"] is True
    # representations go up; adapters go both ways and weigh the same
    assert split["bytes_up"] > 10 * split["bytes_down"]
    assert federated["bytes_up"] == pytest.approx(federated["bytes_down"], rel=0.1)
    # a whole model weighs more than its lower part
    assert federated["model_bytes"] > split["model_bytes"]
    assert (runs / "comparison-bytes.svg").exists()
    # each method was run by a process of its own
    assert (runs / "job-2.log").exists()


def test_what_is_done_is_not_started_again(compared: Path) -> None:
    before = times_of_logs(compared)
    compare_again(compared)
    assert times_of_logs(compared) == before


def test_each_run_is_attacked_once(compared: Path) -> None:
    """One was attacked by hand, with one attack; the other is attacked now, the first not again."""
    runs, before = compared / "runs", times_of_logs(compared)
    options = AuditOptions("quick", only=["retrieval-contextual-l2@*"])
    audit_runs([runs / "split-clear-x1-seed0"], options, console=Console(quiet=True))
    done = (runs / "split-clear-x1-seed0" / "audit" / "audit.json").stat().st_mtime_ns
    compare_again(compared, "--audit", "quick")
    assert (runs / "split-clear-x1-seed0" / "audit" / "audit.json").stat().st_mtime_ns == done
    split, federated = json.loads((runs / "comparison.json").read_text())["methods"]
    assert split["attack"]["of"] == "positions"
    assert split["attack"]["tokens"] > 0.9  # clean representations
    assert federated["attack"]["of"] == "distinct tokens"
    assert times_of_logs(compared) == before
