"""p* by projected gradient descent: its constraints, its objective, and what a device does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_kit import real
from privacy_toy import CLS, PAD, SEP, toy_public
from safetensors.numpy import load_file, save_file
from tiny_models import one_thread

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.mechanism_config import PrivTuneSection
from privtune_flwr.privacy.base import Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.privtune import optimise
from privtune_flwr.privacy.privtune.geometry import Geometry
from privtune_flwr.privacy.privtune.mechanism import TENSORS, PrivTune
from privtune_flwr.privacy.privtune.optimise import Descent, Program, Rows
from privtune_flwr.privacy.privtune.tables import hop_sets, program_params, shift_table
from privtune_flwr.privacy.registry import create_mechanism

CONSTRAINTS = ("consistency", "semantic", "validity", "radius")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@dataclass
class Bench:
    """256 entries of MiniLM cut at 2, with the closed form of each."""

    geometry: Geometry
    rows: Rows
    closed: torch.Tensor
    program: Program
    unit: float

    def measures(self, p: torch.Tensor) -> dict[str, np.ndarray]:
        """What the constraints bound, computed in float64 and from the tables alone."""
        g, clean = self.geometry, self.rows.clean_bd.double().numpy()
        x = clean + p.double().numpy()
        weights, bias = g._probe_dc.double().numpy(), g._bias_c.double().numpy()
        logs = [_log_softmax(v @ weights + bias) for v in (clean, x)]
        centre, whiten = g.centre_d.double().numpy(), g._whiten_dd.double().numpy()
        reach = [np.linalg.norm((v - centre) @ whiten, axis=1) for v in (clean, x)]
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(clean, axis=1)
        return {
            "consistency": (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1),
            "semantic": -(x * clean).sum(axis=1) / norms,
            "validity": reach[1] / np.maximum(g.limit, reach[0]),
            "radius": np.linalg.norm(x - clean, axis=1) / self.unit,
        }

    def bounds(self) -> dict[str, float]:
        """Largest allowed value of each measure."""
        p = self.program
        return {
            "consistency": p.consistency,
            "semantic": -p.semantic,
            "validity": 1.0,
            "radius": p.radius,
        }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@pytest.fixture(scope="module")
def bench() -> Bench:
    public = real(2).public
    config = PrivacyConfig()
    geometry = Geometry.of(public, hop_sets(config, public), 0.99, public.unit)
    ids = np.random.default_rng(0).choice(public.text_ids, 256, replace=False)
    clean = torch.from_numpy(np.asarray(public.bank[ids]))
    closed = torch.from_numpy(shift_table(config, public)[ids].astype(np.float32))
    values: dict[str, Any] = program_params(config)
    rows = geometry.rows(clean, torch.from_numpy(ids))
    return Bench(geometry, rows, closed, Program(**values), public.unit)


def _mean(bench: Bench, program: Program, p: torch.Tensor) -> float:
    return float(Descent(program, bench.geometry).objective(bench.rows, p).mean())


def test_every_constraint_holds_also_after_rounding(bench: Bench) -> None:
    # far enough from the defaults that each constraint has something to do
    program = replace(bench.program, consistency=0.5, semantic=0.7, radius=1.0)
    tight = replace(bench, program=program)
    p, _ = Descent(program, bench.geometry).solve(bench.rows, bench.closed)
    stored = p.half().float()
    measured = tight.measures(stored)
    for name, bound in tight.bounds().items():
        assert (measured[name] <= bound + 1e-4).all(), name
    assert Descent(program, bench.geometry).holds(bench.rows, stored).float().mean() > 0.99
    assert (stored.norm(dim=1) > 0.05 * bench.unit).float().mean() > 0.95


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_without_its_constraint_the_descent_violates_it(name: str, bench: Bench) -> None:
    alone = replace(bench.program, consistency=0.0, semantic=0.0, validity=0.0, radius=0.0)
    free, _ = Descent(alone, bench.geometry).solve(bench.rows, bench.closed)
    assert (bench.measures(free)[name] > bench.bounds()[name]).mean() > 0.3
    # and switched on by itself it is what mends this
    only = replace(alone, **{name: getattr(bench.program, name)})
    p, _ = Descent(only, bench.geometry).solve(bench.rows, bench.closed)
    assert (bench.measures(p)[name] <= bench.bounds()[name] + 1e-4).all()


def test_the_descent_beats_nothing_and_the_closed_form(bench: Bench) -> None:
    descent = Descent(bench.program, bench.geometry)
    p, trace = descent.solve(bench.rows, bench.closed)
    assert all(later <= earlier for earlier, later in itertools.pairwise(trace))
    assert trace[-1] == pytest.approx(_mean(bench, bench.program, p), abs=1e-3)
    each = descent.objective(bench.rows, p)
    projected = descent.feasible(bench.rows, bench.closed)
    for start in (torch.zeros_like(p), projected):
        assert (each <= descent.objective(bench.rows, start) + 1e-4).all()
    assert each.mean() < descent.objective(bench.rows, bench.closed).mean() - 2
    assert each.mean() < descent.objective(bench.rows, torch.zeros_like(p)).mean() - 10
    # converged: from the other start, and with twice the steps, it ends near the same value
    from_zero, _ = descent.solve(bench.rows)
    longer, _ = Descent(replace(bench.program, steps=60), bench.geometry).solve(bench.rows)
    fall = trace[0] - trace[-1]
    assert abs(_mean(bench, bench.program, from_zero) - trace[-1]) < 0.2 * fall
    assert abs(_mean(bench, bench.program, longer) - trace[-1]) < 0.2 * fall


def test_an_ascent_would_be_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    graded = Descent._graded

    def backwards(self: Descent, rows: Rows, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = graded(self, rows, p)
        return value, -gradient

    monkeypatch.setattr(Descent, "_graded", backwards)
    _, trace = Descent(bench.program, bench.geometry).solve(bench.rows)
    assert trace[-1] > trace[0] - 0.5


@pytest.mark.parametrize("term", ["repel", "far", "spread"])
def test_each_term_does_what_it_is_for(term: str, bench: Bench) -> None:
    heavy = {"repel": 5.0, "far": 50.0, "spread": 50.0}[term]
    base = replace(bench.program, repel=0.0, far=0.0, spread=0.0)
    without, _ = Descent(base, bench.geometry).solve(bench.rows)
    weighted = replace(base, **{term: heavy})
    with_it, _ = Descent(weighted, bench.geometry).solve(bench.rows)
    # the term alone: the difference of two objectives at one point
    values = [_mean(bench, weighted, p) - _mean(bench, base, p) for p in (with_it, without)]
    assert values[0] < values[1] - 1e-2 * heavy


def test_the_objective_is_its_definition(bench: Bench) -> None:
    public = real(2).public
    config = PrivacyConfig()
    sets = hop_sets(config, public)
    bank = np.asarray(public.bank, dtype=np.float64)
    text, row = public.text_ids, 3
    ids = np.random.default_rng(0).choice(text, 256, replace=False)
    node = int(np.searchsorted(text, ids[row]))
    x = bank[ids[row]] + bench.closed[row].double().numpy()
    program, tau = bench.program, bench.program.temperature * bench.unit**2
    towards = [int(text[v]) for v in sets[1].ids[node, :16] if v >= 0]
    near = [int(text[v]) for v in sets[0].ids[node, :12] if v >= 0]
    sample = np.sort(np.random.default_rng(0).choice(text, 128, replace=False))
    listed = {*towards, *near, int(ids[row])}
    mass = {v: np.exp(-(((x - bank[v]) ** 2).sum()) / tau) for v in listed}
    rest = sum(
        len(bank) / 128 * np.exp(-(((x - bank[v]) ** 2).sum()) / tau)
        for v in sample
        if int(v) not in mass
    )
    total = sum(mass.values()) + rest
    directions = bank[sample] / np.linalg.norm(bank[sample], axis=1, keepdims=True)
    similar = directions @ (bank[ids[row]] / np.linalg.norm(bank[ids[row]]))
    far = directions[np.argsort(similar)[:32]] @ (x / np.linalg.norm(x))
    expected = (
        -np.log(sum(mass[v] for v in towards) / total)
        + program.repel * np.log(sum(mass[v] for v in {*near, int(ids[row])}) / total)
        + program.far * far.mean()
        - program.spread * np.mean([np.linalg.norm(x - bank[v]) for v in near]) / bench.unit
    )
    value = Descent(program, bench.geometry).objective(bench.rows, bench.closed)[row]
    assert float(value) == pytest.approx(expected, abs=2e-3)


def test_the_cone_projection_is_the_nearest_point_of_the_cone() -> None:
    rng = np.random.default_rng(0)
    axis = torch.from_numpy(rng.normal(size=(1, 3))).float()
    x = torch.from_numpy(rng.normal(size=(1, 3))).float() * 3
    projected = optimise._onto_cone(x, axis, 0.8)
    assert float(torch.cosine_similarity(projected, axis)) == pytest.approx(0.8, abs=2e-3)
    inside = torch.from_numpy(rng.normal(size=(200_000, 3))).float() * 3
    inside = inside[torch.cosine_similarity(inside, axis) >= 0.8]
    nearest = (inside - x).norm(dim=1).min()
    assert float((projected - x).norm()) <= float(nearest) + 5e-3


# ---------------------------------------------------------------------------------------- mechanism


def _designed(tmp_path: Path, **settings: Any) -> tuple[MechanismSpec, Path]:
    folder = tmp_path / f"artefact-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    section = PrivTuneSection(vector="pgd", **settings)
    config = PrivacyConfig(neighbours=4, targets=3, privtune=section)
    return PrivTune.design(config, toy_public(tmp_path / "cache"), folder), folder


def _release(mechanism: Mechanism, hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return mechanism.perturb(hidden, ids, keyed_generator(bytes(32), "one", "sentence"))


def test_a_descended_shift_goes_through_design_and_load(tmp_path: Path) -> None:
    spec, folder = _designed(tmp_path)
    shift = create_mechanism(spec, folder).shift()
    assert shift is not None
    assert (shift[[CLS, SEP, PAD]] == 0).all()
    assert (np.linalg.norm(shift[3:].astype(float), axis=1) > 0).mean() > 0.9
    (tmp_path / "elsewhere").mkdir()
    again, _ = _designed(tmp_path / "elsewhere")  # solved anew, from another cache
    assert again == spec
    other, _ = _designed(tmp_path, repel=3.0)
    assert other.artefact != spec.artefact


def test_per_occurrence_solves_for_the_row_and_says_so(tmp_path: Path) -> None:
    spec, folder = _designed(tmp_path, per="occurrence")
    mechanism = create_mechanism(spec, folder)
    assert not mechanism.additive
    assert create_mechanism(*_designed(tmp_path)).additive
    public = toy_public(tmp_path / "cache")
    ids = np.array([CLS, 7, 7, 20, SEP])
    hidden = np.array(public.bank[ids])
    hidden[2] += 0.4  # the second occurrence of 7 stands elsewhere
    silent = create_mechanism(
        MechanismSpec(spec.name, {**spec.params, "eta": 1e9}, spec.artefact), folder
    )
    mean = _release(silent, hidden, ids) - hidden
    entry = mechanism.shift()
    assert entry is not None
    assert np.abs(mean[[0, 4]]).max() < 1e-5  # special tokens stay
    for row in (1, 3):  # at the bank entry itself: the entry's, descended a little further
        away = np.linalg.norm(mean[row] - entry[ids[row]]) / np.linalg.norm(entry[ids[row]])
        assert away < 0.2
    assert np.linalg.norm(mean[2] - mean[1]) > 0.02 * public.unit
    first, second = (_release(mechanism, hidden, ids) for _ in range(2))
    assert (first == second).all()  # a retry sends the same bytes
    assert "solved on the device" in mechanism.guarantee().statement


def test_per_occurrence_trusts_no_table(tmp_path: Path) -> None:
    spec, folder = _designed(tmp_path, per="occurrence")
    good = load_file(folder / TENSORS)
    wrong: dict[str, np.ndarray] = {
        "bank": good["bank"][:, :-1].copy(),
        "support": np.full_like(good["support"], 60),
        "sample": np.full_like(good["sample"], -1),
        "probe": np.full_like(good["probe"], np.nan),
        "centre": good["centre"].astype(np.float64),
        "whiten": good["whiten"][:-1].copy(),
        "limit": np.zeros_like(good["limit"]),
    }
    assert set(wrong) == set(good) - {"shift", "scale"}
    for name, table in wrong.items():
        save_file({**good, name: table}, folder / TENSORS)
        with pytest.raises(MechanismError, match=name):
            create_mechanism(spec, folder)
    save_file({k: v for k, v in good.items() if k != "probe"}, folder / TENSORS)
    with pytest.raises(MechanismError, match="probe"):
        create_mechanism(spec, folder)
    save_file(good, folder / TENSORS)
    create_mechanism(spec, folder)
    for name, value in (("semantic", -0.1), ("steps", 10**6), ("temperature", 0.0)):
        bad = MechanismSpec(spec.name, {**spec.params, name: value}, spec.artefact)
        with pytest.raises(MechanismError, match=name):
            create_mechanism(bad, folder)
