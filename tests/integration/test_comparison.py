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

SCENARIO = """
description = "two devices"
[federation]
num-supernodes = 2
[config.data]
train-examples = 32
eval-examples = 8
test-examples = 16
[config.model]
max-length = 32
[config.train]
epochs = 1
test-every = 1
batch-size = 16
threads = 1
[compare]
methods = ["split-clear", "fedavg-lora"]
"""


@pytest.mark.flower
def test_two_methods_end_in_one_table(tmp_path: Path) -> None:
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(SCENARIO)
    runs = tmp_path / "runs"
    options = ["--runs", str(runs), "--prune", "--jobs", "2"]
    result = CliRunner().invoke(main, ["compare", str(scenario), *options])
    logs = "".join(path.read_text()[-3000:] for path in runs.glob("*.log"))
    assert result.exit_code == 0, result.output + logs
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
    # the same command again finds all done, and starts nothing
    before = {p: p.stat().st_mtime_ns for p in runs.glob("*.log")}
    again = CliRunner().invoke(main, ["compare", str(scenario), "--runs", str(runs)])
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in runs.glob("*.log")} == before

    # one run was attacked by hand, with one attack; the other is attacked now, the first not again
    options = AuditOptions("quick", only=["retrieval-contextual-l2@*"])
    audit_runs([runs / "split-clear-x1-seed0"], options, console=Console(quiet=True))
    done = (runs / "split-clear-x1-seed0" / "audit" / "audit.json").stat().st_mtime_ns
    audited = CliRunner().invoke(
        main, ["compare", str(scenario), "--runs", str(runs), "--audit", "quick"]
    )
    assert audited.exit_code == 0, audited.output
    assert (runs / "split-clear-x1-seed0" / "audit" / "audit.json").stat().st_mtime_ns == done
    split, federated = json.loads((runs / "comparison.json").read_text())["methods"]
    assert split["attack"]["of"] == "positions"
    assert split["attack"]["tokens"] > 0.9  # clean representations
    assert federated["attack"]["of"] == "distinct tokens"
    assert {p: p.stat().st_mtime_ns for p in runs.glob("*.log")} == before
