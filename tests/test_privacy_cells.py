"""Cells: rows of a codebook, and word-label counts under discrete Laplace noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import real
from numpy.typing import NDArray
from privacy_toy import CLS, HIDDEN, PAD, SEP, VOCABULARY, ToyBottom, toy_public
from safetensors.numpy import load_file, save_file
from scipy import stats

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.mechanism_config import CellsSection, LearningSection
from privtune_flwr.privacy.base import Channel, Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.cells.codebook import word_scores
from privtune_flwr.privacy.cells.learner import TENSORS, CellsLearner, discrete_laplace
from privtune_flwr.privacy.cells.mechanism import Cells, LabelCells
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.registry import create_mechanism

REJECT = 1e-4


def config(**cells: Any) -> PrivacyConfig:
    return PrivacyConfig().model_copy(
        update={"cells": CellsSection(**cells), "learning": LearningSection(rounds=1)}
    )


def designed(folder: Path, kind: type[Cells] = Cells, **cells: Any) -> Mechanism:
    spec = kind.design(config(**cells), toy_public(folder / "cache"), folder)
    return create_mechanism(spec, folder)


def learner_at(folder: Path, **cells: Any) -> CellsLearner:
    spec = designed(folder, LabelCells, **cells).spec
    return LabelCells.learner(spec, folder, ToyBottom(), 2)


def channel_of(mechanism: Mechanism) -> Channel:
    channel = mechanism.channel()
    assert channel is not None
    return channel


def release(mechanism: Mechanism, ids: list[int], dimension: int = HIDDEN) -> NDArray[np.float32]:
    rows = np.random.default_rng(0).normal(size=(len(ids), dimension))
    return mechanism.perturb(rows, np.array(ids), keyed_generator(bytes(32), "test"))


def task(sentences: int = 400, seed: int = 0) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Words 10 to 19 stand in class 0 only, 20 to 29 in class 1 only, 30 to 49 in both."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=sentences).tolist()
    found = []
    for label in labels:
        own = rng.integers(10, 20, size=3) + 10 * label
        both = rng.integers(30, 50, size=4)
        found.append(np.array([CLS, *own, *both, SEP], dtype=np.int32))
    return found, labels


def gathered(learner: CellsLearner, devices: int = 4, seed: int = 0) -> State:
    ids, labels = task(seed=seed)
    state = learner.start()
    updates = [
        learner.update(state, ids[i::devices], labels[i::devices], round_number=1, seed=i)
        for i in range(devices)
    ]
    total = sum(u.examples for u in updates)
    mean = {
        n: np.asarray(sum(u.change[n] * (u.examples / total) for u in updates), np.float32)
        for n in state
    }
    return learner.apply(state, mean)


def test_released_rows_are_the_codebooks_and_depend_on_the_cell_alone(tmp_path: Path) -> None:
    mechanism = designed(tmp_path, cells=6)
    channel = channel_of(mechanism)
    assert channel.codebook_cd.shape == (6, HIDDEN)
    assert channel.table_vc.shape == (VOCABULARY, 6)
    assert set(np.unique(channel.table_vc)) == {0.0, 1.0}
    np.testing.assert_array_equal(channel.table_vc.sum(axis=1), 1)
    cell = channel.table_vc.argmax(axis=1)
    ids = list(range(VOCABULARY))
    np.testing.assert_array_equal(release(mechanism, ids), channel.codebook_cd[cell])
    assert cell[CLS] == cell[SEP] == cell[PAD] == 0
    assert (cell[3:] > 0).all()
    assert set(cell) == set(range(6))
    assert mechanism.strength.bits == pytest.approx(np.log2(6))
    assert Cells.declared(mechanism.spec).bits == pytest.approx(np.log2(6))


def test_real_cells_hold_words_that_are_alike(tmp_path: Path) -> None:
    """MiniLM: entries of one cell are closer than of two, and cells as far apart as words."""
    model = real()
    mechanism = model.build(tmp_path, mechanism="cells", cells=CellsSection(cells=32))
    channel = channel_of(mechanism)
    assert channel.codebook_cd.shape == (32, 384)
    cell = channel.table_vc.argmax(axis=1)
    bank = np.asarray(model.public.bank)
    words = np.random.default_rng(0).choice(model.public.text_ids, 1500, replace=False)
    sizes = np.bincount(cell[model.public.text_ids], minlength=32)[1:]
    assert sizes.max() < 0.4 * sizes.sum()
    centred = bank[words] - bank[words].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    alike = centred @ centred.T
    same = cell[words][:, None] == cell[words][None]
    np.fill_diagonal(same, False)
    assert alike[same].mean() > alike[~same].mean() + 0.05
    apart = np.linalg.norm(channel.codebook_cd[1:] - channel.codebook_cd[0], axis=1)
    typical = np.linalg.norm(bank[words] - bank[words].mean(axis=0), axis=1)
    assert 0.5 < np.median(apart) / np.median(typical) < 2
    released = model.release(mechanism)
    rows = np.concatenate(released.rows)
    assert len(np.unique(rows, axis=0)) <= 32


def laplace_p_value(noise: NDArray[np.int64], rate: float) -> float:
    """Chi-square of integers against P(z) proportional to exp(-rate |z|)."""
    edge = int(4 / rate)
    values = np.arange(-edge, edge + 1)
    tail = np.exp(-rate * (edge + 1)) / (1 + np.exp(-rate))
    mass = np.tanh(rate / 2) * np.exp(-rate * np.abs(values))
    counts = [(noise == v).sum() for v in values]
    counts += [(noise < -edge).sum(), (noise > edge).sum()]
    expected = np.array([*mass, tail, tail]) * noise.size
    return float(stats.chisquare(counts, expected).pvalue)


def _rounded_normal(
    rng: np.random.Generator, shape: tuple[int, ...], rate: float
) -> NDArray[np.int64]:
    return np.rint(rng.normal(scale=np.sqrt(2) / rate, size=shape)).astype(np.int64)


def _one_sided(rng: np.random.Generator, shape: tuple[int, ...], rate: float) -> NDArray[np.int64]:
    return rng.geometric(-np.expm1(-rate), shape) - 1


def _half_the_scale(
    rng: np.random.Generator, shape: tuple[int, ...], rate: float
) -> NDArray[np.int64]:
    return discrete_laplace(rng, shape, 2 * rate)


@pytest.mark.parametrize("rate", [0.05, 0.25, 1.0])
def test_noise_is_discrete_laplace(rate: float) -> None:
    noise = discrete_laplace(keyed_generator(bytes(32), "law"), (40_000,), rate)
    assert laplace_p_value(noise, rate) > REJECT


@pytest.mark.parametrize("broken", [_rounded_normal, _one_sided, _half_the_scale])
def test_wrong_noise_is_rejected(broken: Callable[..., NDArray[np.int64]]) -> None:
    assert laplace_p_value(broken(np.random.default_rng(0), (40_000,), 0.25), 0.25) < REJECT


def test_what_a_device_sends_is_counts_plus_noise_of_the_stated_law(tmp_path: Path) -> None:
    learner = learner_at(tmp_path, cells=6, words=4, epsilon=2.0)
    ids, labels = task(50)
    noise = []
    for seed in range(120):
        update = learner.update(learner.start(), ids, labels, round_number=1, seed=seed)
        rates = update.change["rates"].astype(np.float64) * 50
        np.testing.assert_allclose(rates, np.rint(rates), atol=1e-3)
        assert (rates[[CLS, SEP, PAD]] == 0).all()
        noise.append(np.rint(rates[50:]).astype(np.int64))  # words that no sentence holds
    assert laplace_p_value(np.concatenate(noise).ravel(), 2.0 / (2 * 4)) > REJECT


def test_one_sentence_changes_the_counts_by_its_bound_at_most(tmp_path: Path) -> None:
    """Without noise worth mentioning, replacing a sentence moves 2m entries by one."""
    learner = learner_at(tmp_path, cells=6, words=3, epsilon=1e4)
    ids, labels = task(30)
    other = [np.arange(30, 50, dtype=np.int32), *ids[1:]]
    flipped = [1 - labels[0], *labels[1:]]

    def sums(texts: list[NDArray[np.int32]], classes: list[int]) -> NDArray[np.float64]:
        change = learner.update(learner.start(), texts, classes, round_number=1, seed=3).change
        return np.rint(change["rates"].astype(np.float64) * 30)

    whole = sums(ids, labels)
    # special tokens and repetitions count for nothing, further words neither
    assert whole.sum() == sum(min(3, len(np.unique(s)) - 2) for s in ids)
    first = sums([ids[0]], [labels[0]]) / 30
    assert np.abs(first).sum() == 3
    assert np.abs(first).max() == 1
    moved = sums(other[:1], flipped[:1]) / 30 - first
    assert np.abs(moved).sum() <= 2 * 3


def test_updates_are_deterministic_and_said_once(tmp_path: Path) -> None:
    learner = learner_at(tmp_path, cells=6)
    ids, labels = task(40)
    state = learner.start()
    first = learner.update(state, ids, labels, round_number=1, seed=2**200 + 1)
    again = learner.update(state, ids, labels, round_number=1, seed=2**200 + 1)
    other = learner.update(state, ids, labels, round_number=1, seed=1)
    assert (first.change["rates"] == again.change["rates"]).all()
    assert (first.change["rates"] != other.change["rates"]).any()
    later = learner.update(state, ids, labels, round_number=2, seed=1)
    assert not later.change["rates"].any()
    with pytest.raises(MechanismError, match="state"):
        learner.update({"rates": state["rates"]}, ids, labels, round_number=1, seed=1)
    with pytest.raises(MechanismError, match="label"):
        learner.update(state, ids, [2] * 40, round_number=1, seed=1)


def test_learned_cells_follow_the_labels(tmp_path: Path) -> None:
    learner = learner_at(tmp_path, cells=4, epsilon=50.0, words=8)
    (tmp_path / "done").mkdir()
    spec = learner.finish(gathered(learner), tmp_path / "done")
    mechanism = create_mechanism(spec, tmp_path / "done")
    cell = channel_of(mechanism).table_vc.argmax(axis=1)
    negative, positive, both = set(cell[10:20]), set(cell[20:30]), set(cell[30:50])
    assert len(negative) == len(positive) == 1
    assert len(negative | positive) == 2
    assert not both & (negative | positive)
    assert release(mechanism, [10, 25, 40]).shape == (3, HIDDEN)
    # the public clustering of this bank knows nothing of the labels
    (tmp_path / "public").mkdir()
    unaware = channel_of(designed(tmp_path / "public", cells=4)).table_vc.argmax(axis=1)
    assert len(set(unaware[10:20])) > 1


def test_scores_drown_in_noise_gracefully() -> None:
    rng = np.random.default_rng(0)
    rates = np.zeros((2000, 2))
    rates[:50, 0] = rates[50:100, 1] = 1.0
    clear = word_scores(rates, 0.01)
    np.testing.assert_allclose(clear.sum(axis=1), 0, atol=1e-12)
    assert (clear[:50, 0] > 1).all()
    noisy = word_scores(rates + rng.laplace(scale=0.05, size=rates.shape), 0.01)
    assert (noisy[:50, 0] > 0.5).all()
    assert (noisy[50:100, 1] > 0.5).all()
    assert np.median(np.abs(noisy[100:, 0])) < 0.5
    assert np.isfinite(word_scores(rng.laplace(scale=1e6, size=rates.shape), 0.0)).all()


def test_a_draft_releases_nothing(tmp_path: Path) -> None:
    draft = designed(tmp_path, LabelCells, cells=6)
    assert draft.channel() is None
    assert draft.strength.bits == pytest.approx(np.log2(6))
    with pytest.raises(MechanismError, match="not been learned"):
        release(draft, [3, 4])
    for rounds, clip in ((2, 0.0), (1, 1.0)):
        bad = config().model_copy(update={"learning": LearningSection(rounds=rounds, clip=clip)})
        with pytest.raises(MechanismError, match=r"rounds|clip"):
            LabelCells.design(bad, toy_public(tmp_path / "cache"), tmp_path)


def test_hostile_artefacts_are_refused(tmp_path: Path) -> None:
    spec = designed(tmp_path, cells=6).spec
    good = load_file(tmp_path / TENSORS)
    outside, twice = good["cell"].copy(), good["codebook"].copy()
    outside[5] = 6
    twice[1] = twice[2]
    cases = {
        "lies outside": good | {"cell": outside},
        "the same": good | {"codebook": twice},
        "finite": good | {"codebook": np.full_like(twice, np.nan)},
        "must be": good | {"codebook": twice[:, :2]},
        "exactly": good | {"more": twice},
    }
    for number, (message, tables) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({n: np.ascontiguousarray(t) for n, t in tables.items()}, folder / TENSORS)
        with pytest.raises(MechanismError, match=message):
            create_mechanism(spec, folder)
    for name, value in (("codewords", 7), ("codewords", 0), ("cells", 1), ("cells", 4096)):
        params = {**spec.params, name: value}
        with pytest.raises(MechanismError, match=name):
            Cells.load(MechanismSpec("cells", params, spec.artefact), tmp_path)
    mechanism = create_mechanism(spec, tmp_path)
    with pytest.raises(MechanismError, match="vocabulary"):
        release(mechanism, [VOCABULARY])
    with pytest.raises(MechanismError, match="dimension"):
        release(mechanism, [5], dimension=HIDDEN + 1)
