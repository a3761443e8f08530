"""The frontier study in small: the in-process release, resuming, tables from stored rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import message_to, wire_copy
from flwr.app import Context, RecordDict

from privtune_flwr import client_app
from privtune_flwr.audit.plan import FRONTIER
from privtune_flwr.config import flatten
from privtune_flwr.privacy import mods
from privtune_flwr.protocol import SMASHED
from simulations.frontier import __main__ as study
from simulations.frontier import tables
from simulations.frontier.cases import GROUPS, MAIN, SEARCHED, SWEEP, case, chosen
from simulations.frontier.figure import draw_frontier
from simulations.frontier.release import LocalRun, RememberedBottom, Stopwatch, local_run
from simulations.frontier.rows import Case
from simulations.study import stored_rows

TINY = {
    "data.train-examples": 48,
    "data.eval-examples": 12,
    "data.test-examples": 20,
    "train.epochs": 1,
    "privacy.chunk-size": 12,
}
PRESET = replace(FRONTIER, sentences=10, in_domain=60, learned=(), attribute_sentences=30)


def tiny(name: str) -> Case:
    """A case of the sweep with few sentences and devices."""
    whole = case(MAIN, name, SWEEP)
    return replace(whole, settings={**whole.settings, **TINY}, devices=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    runs = tmp_path_factory.mktemp("runs")
    config = tiny("dchi-1").config(runs, 1)
    with local_run(config, 2, runs / "clean", Stopwatch()) as opened:
        opened.open_store()
        opened.release_training()
        yield opened


def test_the_store_holds_what_a_simulated_device_sends(
    run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: the real app with both mods answers the same request."""
    monkeypatch.setattr(mods, "in_simulation", lambda: True)
    asks = [ask for round_ in run.plan.rounds for ask in round_.asks]
    assert len(asks) == 4
    received = run.store.received()
    for ask in asks:
        device = next(d for d in run.devices if d.name == ask.device)
        if not device.home.bundles.holds(run.cloud.bottom_id):
            device.home.bundles.add_folder(run.cloud.bundles[0][1])
        request = run.request(ask)
        context = Context(
            run_id=1,
            node_id=1,
            node_config={"partition-id": run.devices.index(device), "num-partitions": 2},
            state=RecordDict(),
            run_config=flatten(run.config),
        )
        reply = client_app.app(message_to(wire_copy(request.to_content()), request.action), context)
        assert not reply.has_error(), reply.error
        sent = reply.content.array_records[SMASHED]
        examples = run.store.examples(ask.key)
        start, stop = examples[0].offset, examples[-1].offset + examples[-1].length
        assert sent["values"].numpy().tobytes() == received[start:stop].tobytes()
        labels = reply.content.array_records["labels"]["labels"].numpy().tolist()
        assert labels == [e.label for e in examples]


def test_clean_rows_are_remembered_by_their_text(run: LocalRun, tmp_path: Path) -> None:
    bottom = RememberedBottom(run.cloud.bottom, "ab", tmp_path)
    ids = [np.arange(5, 305, dtype=np.int32) % 900 for _ in range(1)] * 2
    ids = [i[:120] for i in (ids * 3)]
    first = bottom.encode(ids)
    assert len(list(tmp_path.iterdir())) == 1
    again = bottom.encode(ids)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(list(tmp_path.iterdir())) == 1
    other = bottom.encode([ids[0], *[i[::-1] for i in ids[1:]]])
    assert len(list(tmp_path.iterdir())) == 2
    assert not np.array_equal(first[1], other[1])


def test_validation_examples_have_labels_that_the_store_does_not(run: LocalRun) -> None:
    asked = [ask for wave in run.plan.evaluation for ask in wave]
    examples = run.release_validation()
    held = [v for d in run.devices for v in d.holdings.evaluation.labels]
    assert sorted(e.label for e in examples) == sorted(held)
    assert all(e.label == -1 for ask in asked for e in run.store.examples(ask.key))


def test_a_study_is_resumed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case once, a broken one apart; then tables and figure from what is stored."""
    cases = [tiny("none"), replace(tiny("none"), name="broken", devices=0), tiny("dchi-1")]
    monkeypatch.setitem(GROUPS, "sweep", lambda rows, seeds: cases)
    target, runs = tmp_path / "results" / "frontier.json", tmp_path / "runs"
    assert study.run_cases(["sweep"], target, runs, PRESET) == ["broken"]
    assert "Traceback" in (runs / "broken.error").read_text()
    rows = stored_rows(target)
    assert [r["name"] for r in rows] == [f"{MAIN}-dchi-1-seed0", f"{MAIN}-none-seed0"]
    assert not any((runs / r["name"] / "store").exists() for r in rows)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    before = target.read_bytes()
    monkeypatch.setattr(study, "measure", never)
    assert study.run_cases(["sweep"], target, runs, PRESET, only=f"{MAIN}-*") == []
    assert target.read_bytes() == before

    noisy, clean = rows
    assert clean["noise_units"] == 0.0
    assert noisy["noise_units"] == pytest.approx(1.0, abs=0.02)
    assert noisy["wire_bytes_per_token"] == 2 * noisy["sizes"]["width"]
    assert clean["recovered"]["unaware"]["top1"] > 0.95
    assert (
        clean["recovered"]["adaptive"]["content_top1"]
        >= noisy["floors"]["constant"]["content_top1"]
    )
    text = tables.frontier(rows)
    lost = 100 * (clean["accuracy"] - noisy["accuracy"])
    line = next(li for li in text.splitlines() if li.startswith("| dchi-1 | noise 1.0 |"))
    assert f"| {100 * noisy['accuracy']:.1f} | {lost:.1f} | 1.0" in line
    assert f"eta {noisy['strength']['eta']:.3g}" in line
    assert all(make(rows) for make in tables.TABLES.values())
    draw_frontier(tmp_path / "one.svg", rows)
    draw_frontier(tmp_path / "two.svg", rows)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "dchi" in (tmp_path / "one.svg").read_text()


def test_the_search_chooses_the_least_read_within_each_budget() -> None:
    def row(name: str, accuracy: float, content: float) -> dict[str, Any]:
        recovered = {"adaptive": {"content_top1": content}}
        return {
            "name": f"search-{MAIN}-{name}",
            "variant": name,
            "accuracy": accuracy,
            "recovered": recovered,
        }

    rows = [row("none", 0.84, 1.0), *(row(n, 0.70, 0.0) for n in SEARCHED[MAIN])]
    assert chosen(rows, MAIN) == {}  # nothing loses little enough
    names = list(SEARCHED[MAIN])
    rows[1] = row(names[0], 0.82, 0.30)
    rows[2] = row(names[1], 0.815, 0.10)
    rows[3] = row(names[2], 0.79, 0.05)
    assert chosen(rows, MAIN) == {3.33: names[1], 6.0: names[2]}
    assert chosen(rows[:-1], MAIN) == {}  # not done yet


def test_every_case_has_a_valid_configuration(tmp_path: Path) -> None:
    """And one name, one case: groups share rows."""
    found: dict[str, Case] = {}
    for make in GROUPS.values():
        for one in make([], 3):
            assert found.setdefault(one.name, one) == one
            one.config(tmp_path, 1)
    assert len(found) > 80
    json.dumps([dict(c.settings) for c in found.values()])
