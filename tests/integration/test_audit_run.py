"""``privtune audit`` on real runs: what it writes, resumes, refuses and finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_kit import Run
from typer.testing import CliRunner

from privtune_flwr.audit.auditor import Auditor
from privtune_flwr.audit.operator import AuditError, open_run, released_text
from privtune_flwr.audit.plan import QUICK
from privtune_flwr.cli import main

pytestmark = pytest.mark.flower
ONLY = ("retrieval-contextual-l2@*", "gaussian@adaptive", "context*")


@pytest.fixture(scope="module")
def run(noisy: Run) -> Run:
    return noisy


def audit(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["audit", *arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def audited(run: Run) -> dict[str, Any]:
    only = [word for pattern in ONLY for word in ("--only", pattern)]
    code, output = audit(str(run.folder), "--quick", *only)
    assert code == 0, output
    assert "audit.html" in output
    assert "gaussian" in output
    content: dict[str, Any] = json.loads((run.folder / "audit" / "audit.json").read_text())
    return content


def test_an_audit_says_what_it_found(run: Run, audited: dict[str, Any]) -> None:
    found = {a["key"]: a["measures"] for a in audited["attacks"]}
    assert set(found) == {
        "retrieval-contextual-l2@unaware",
        "gaussian@adaptive",
        "context-bigram+gaussian@in-domain",
    }
    floor = audited["floors"]["constant"]["top1"]["value"]
    for measures in found.values():
        assert floor + 0.1 < measures["top1"]["value"] < 0.9
        assert measures["top1"]["low"] < measures["top1"]["value"] < measures["top1"]["high"]
    assert (
        found["context-bigram+gaussian@in-domain"]["top1"]["value"]
        > found["gaussian@adaptive"]["top1"]["value"]
    )
    assert audited["best"]["in-domain"] == "context-bigram+gaussian@in-domain"
    assert audited["valid"]
    assert all(canary["passed"] for canary in audited["canaries"])
    assert audited["evidence"]["kind"] == "private"
    assert audited["evidence"]["sentences"] == 72
    assert {s["attack"] for s in audited["sentences"]} == {"context-bigram+gaussian@in-domain"}
    percent = f"{100 * found['context-bigram+gaussian@in-domain']['top1']['value']:.1f} %"
    assert percent in audited["headline"]
    page = (run.folder / "audit" / "audit.html").read_text()
    assert percent in page
    assert "://" not in page


def test_repeats_in_the_store_are_averaged(run: Run, audited: dict[str, Any]) -> None:
    repeats = audited["repeats"]
    assert (repeats["policy"], repeats["releases_in_store"]) == ("per-epoch", 2)
    assert repeats["differing"] == 72
    once = next(a for a in audited["attacks"] if a["key"] == "gaussian@adaptive")["measures"]
    twice = repeats["averaged_in_store"]["measures"]
    assert twice["top1"]["value"] > once["top1"]["value"] + 0.05
    page = (run.folder / "audit" / "audit.html").read_text()
    assert f"reads <strong>{100 * twice['top1']['value']:.1f} %" in page.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_what_is_done_is_not_done_again(run: Run, audited: dict[str, Any]) -> None:
    parts = run.folder / "audit" / "parts"
    before = {p.name: p.stat().st_mtime_ns for p in parts.iterdir()}

    def interrupt(name: str, share: float) -> None:
        if name == "gaussian@in-domain":
            raise KeyboardInterrupt

    auditor = Auditor(run.folder, QUICK, only=["gaussian@*"])
    with pytest.raises(KeyboardInterrupt):
        auditor.run(interrupt)
    assert (parts / "gaussian@unaware.json").exists()
    assert not (parts / "gaussian@in-domain.json").exists()
    after = {p.name: p.stat().st_mtime_ns for p in parts.iterdir()}
    assert before.items() <= after.items()
    # Another seed draws other sentences: nothing of the old parts may stand for it.
    other = Auditor(run.folder, QUICK, seed=1, only=["retrieval-contextual-l2@*"])
    assert not other.parts.holds("retrieval-contextual-l2@unaware", {})
    assert auditor.parts.holds("retrieval-contextual-l2@unaware", {})


def test_several_runs_share_a_frontier(run: Run, audited: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    only = [word for pattern in ONLY for word in ("--only", pattern)]
    code, output = audit(str(run.folder), str(copy), "--quick", "--no-text", *only)
    assert code == 0, output
    for folder in (run.folder, copy):
        content = json.loads((folder / "audit" / "audit.json").read_text())
        assert [p["name"] for p in content["frontier"]] == ["noisy", "copy"]
        assert content["sentences"] == []
        accuracy = content["frontier"][0]["accuracy"]
        assert accuracy == run.results["final"]["test_accuracy"]


def test_a_run_that_cannot_be_audited_is_refused(run: Run, tmp_path: Path) -> None:
    code, output = audit(str(tmp_path))
    assert code == 1
    assert "not a run folder" in output
    code, output = audit(str(run.folder), "--quick", "--only", "gausian@*")
    assert code == 1
    assert "gausian@*" in output
    assert "gaussian@adaptive" in output


def test_rows_of_other_text_are_noticed(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    rows = np.fromfile(copy / "store" / "rows.bin", dtype=np.float16).reshape(-1, 384)
    rows[::-1].tofile(copy / "store" / "rows.bin")
    config, cloud, store = open_run(copy)
    with pytest.raises(AuditError, match="released again"):
        released_text(config, cloud, store, sentences=20)


def test_a_broken_attack_makes_the_audit_invalid(
    run: Run, audited: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from privtune_flwr.audit.attacks.gaussian import Gaussian

    real = Gaussian.guess

    def blind(self: Gaussian, *arguments: Any, **named: Any) -> Any:
        return [np.roll(guess, 1, axis=0) for guess in real(self, *arguments, **named)]

    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns("canary-*"))
    monkeypatch.setattr(Gaussian, "guess", blind)
    code, output = audit(str(copy), "--quick", "--only", "retrieval-contextual-l2@*")
    assert code == 1
    assert "INVALID" in output.upper()
    content = json.loads((copy / "audit" / "audit.json").read_text())
    assert not content["valid"]
    assert "codewords" in content["invalid_because"][0]
