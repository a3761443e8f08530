"""Attacks and measures, by hand on toys, and on real text through a real model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import Real
from audit_kit import real as real_model

from privtune_flwr.audit.attacks.base import Attack, Released
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.retrieval import NearestEntries, Retrieval
from privtune_flwr.audit.floors import constant_floor, constant_guess
from privtune_flwr.audit.measure import Recovery, content_mask, recovery
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior

WORDS = ["[CLS]", "[SEP]", "the", "battery", "##ing", "##s", "!", "Ġcamera", "42", "a", "▁lens"]


class WordTokenizer:
    """Only what the measures need."""

    all_special_ids = (0, 1)

    def __len__(self) -> int:
        return len(WORDS)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]


TOKENIZER: Any = WordTokenizer()
SENTENCES = 75  # of real text


def test_content_tokens() -> None:
    mask = content_mask(TOKENIZER, 13)
    assert [w for w, m in zip(WORDS, mask, strict=False) if m] == [
        "battery",
        "##ing",
        "Ġcamera",
        "▁lens",
    ]
    assert not mask[11:].any()


def test_recovery_counts_what_it_says() -> None:
    true = [np.array([0, 2, 3, 6, 1]), np.array([0, 3, 7, 9, 1])]
    guess = [np.array([0, 2, 4, 6, 1]), np.array([5, 3, 7, 2, 0])]
    result = recovery(true, guess, TOKENIZER)
    assert (result.n_all, result.n_content) == (6, 3)
    assert result.all == pytest.approx(4 / 6)
    assert result.content == pytest.approx(2 / 3)
    assert result.interval_all[0] <= result.all <= result.interval_all[1]
    with pytest.raises(ValueError, match="differ"):
        recovery(true, guess[:1], TOKENIZER)
    with pytest.raises(ValueError, match="no sentences"):
        recovery([], [], TOKENIZER)
    nothing = recovery([np.array([0, 1])], [np.array([0, 1])], TOKENIZER)
    assert np.isnan(nothing.all)
    assert nothing.n_all == 0


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        true = [np.full(10, 3) for _ in range(80)]
        # All tokens of a sentence fall together: an interval over tokens would be far too narrow.
        guess = [np.full(10, 3 if rng.random() < 0.3 else 4) for _ in range(80)]
        low, high = recovery(true, guess, TOKENIZER, seed=trial).interval_all
        covered += low <= 0.3 <= high
    assert covered >= 50


def test_constant_guess_by_position() -> None:
    rng = np.random.default_rng(0)
    sequences = [
        np.array([0, 3 if rng.random() < 0.7 else 7, *rng.integers(2, 7, size=2), 1])
        for _ in range(100)
    ]
    sequences.append(np.array([0, 3, 3, 3, 8, 1]))  # its fifth token stands alone there
    eligible = np.ones(len(WORDS), dtype=bool)
    eligible[:2] = False
    guess = constant_guess(sequences, eligible)
    assert [len(g) for g in guess] == [len(s) for s in sequences]
    assert guess[0][1] == 3
    assert guess[-1][4] == 3  # the overall commonest, not the one it would overfit to
    everything, content = constant_floor(sequences, TOKENIZER)
    assert 0.3 < everything < 0.5
    assert content > everything


@pytest.mark.parametrize("metric", ["l2", "cosine", "mahalanobis"])
def test_nearest_entries_are_exact(metric: Any) -> None:
    rng = np.random.default_rng(1)
    bank, rows = rng.normal(size=(50, 4)) + 3, rng.normal(size=(200, 4)) * [5, 1, 1, 0.2] + 3
    if metric == "cosine":
        cosine = (
            rows @ bank.T / np.linalg.norm(bank, axis=1) / np.linalg.norm(rows, axis=1)[:, None]
        )
        far = -cosine
    else:
        covariance = np.cov(rows, rowvar=False)
        covariance += 0.01 * np.mean(np.diag(covariance)) * np.eye(4)
        inverse = np.linalg.inv(covariance) if metric == "mahalanobis" else np.eye(4)
        gap = rows[:, None] - bank[None]
        far = np.einsum("nvd,de,nve->nv", gap, inverse, gap)
    found = NearestEntries(bank, metric=metric, rows_ND=rows).top(rows, 5)
    np.testing.assert_array_equal(found, np.argsort(far, axis=1)[:, :5])


def test_retrieval_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="metric"):
        Retrieval("unaware", metric="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bank = 'table'"):
        Retrieval("unaware", bank="table")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level unaware"):
        Retrieval("unaware", bank="aware")
    with pytest.raises(ValueError, match="level adaptive"):
        Retrieval("adaptive", bank="contextual")
    with pytest.raises(ValueError, match="released rows"):
        NearestEntries(np.eye(3), metric="mahalanobis")


# ---------------------------------------------------------------- a real model and real text


@pytest.fixture(scope="module")
def real() -> Real:
    """Half of the private sentences that other files look at: a model in memory serves both."""
    whole = real_model(cut=2, sentences=150)
    return replace(
        whole,
        texts=whole.texts[:SENTENCES],
        sequences=whole.sequences[:SENTENCES],
        clean=whole.clean[:SENTENCES],
    )


def attacked(real: Real, attack: Attack, mechanism: Mechanism, released: Released) -> Recovery:
    attack.fit(real.knowledge(attack.level, mechanism), released)
    guesses = [guess[:, 0] for guess in attack.guess(released)]
    return recovery(real.sequences, guesses, real.public.tokenizer)


def test_the_unit_is_that_of_the_feasibility_study(real: Real) -> None:
    assert real.public.unit == pytest.approx(8.7, abs=0.5)


def test_weak_noise_hides_nothing(real: Real, tmp_path: Path) -> None:
    mechanism = real.build(tmp_path, mechanism="dchi", noise=0.01)
    released = real.release(mechanism)
    for attack in (
        Retrieval("unaware", bank="embedding", metric="cosine"),
        Retrieval("unaware", metric="l2"),
        Gaussian("unaware"),
    ):
        found = attacked(real, attack, mechanism, released)
        assert found.all > 0.97, attack.key
        assert found.content > 0.97, attack.key


@dataclass
class PrivTuned:
    """Private sentences released through PrivTune with its defaults."""

    mechanism: Mechanism
    released: Released


@pytest.fixture(scope="module")
def privtuned(real: Real, tmp_path_factory: pytest.TempPathFactory) -> PrivTuned:
    mechanism = real.build(tmp_path_factory.mktemp("artefact"))
    return PrivTuned(mechanism, real.release(mechanism))


def test_privtune_hides_from_the_unaware_and_not_from_the_adaptive(
    real: Real, privtuned: PrivTuned
) -> None:
    unaware = [
        Retrieval("unaware", bank=bank, metric=metric)  # type: ignore[arg-type]
        for bank, metric in (
            ("embedding", "cosine"),
            ("contextual", "l2"),
            ("contextual", "mahalanobis"),
        )
    ]
    for attack in [*unaware, Gaussian("unaware")]:
        found = attacked(real, attack, privtuned.mechanism, privtuned.released)
        assert found.all < 0.10, attack.key
        assert found.content < 0.12, attack.key
    aware = [Retrieval("adaptive", bank="aware", metric=m) for m in ("l2", "mahalanobis")]  # type: ignore[arg-type]
    for attack in [*aware, Gaussian("adaptive"), Gaussian("in-domain")]:
        found = attacked(real, attack, privtuned.mechanism, privtuned.released)
        assert found.all > 0.90, attack.key
        assert found.content > 0.90, attack.key


def test_levels_know_what_they_are_said_to_know(real: Real, privtuned: PrivTuned) -> None:
    unaware = real.knowledge("unaware", privtuned.mechanism)
    adaptive = real.knowledge("adaptive", privtuned.mechanism)
    own = real.knowledge("in-domain", privtuned.mechanism)
    assert unaware.shift is None
    clean, pair = unaware.clean(2000)[0], unaware.pairs(2000)[0]
    np.testing.assert_array_equal(clean.rows, pair.rows)
    assert adaptive.shift is not None
    moved = adaptive.pairs(2000)[0]
    np.testing.assert_array_equal(moved.ids, pair.ids)
    assert np.linalg.norm(moved.rows - pair.rows, axis=1).mean() > 0.3 * real.public.unit
    np.testing.assert_allclose(adaptive.means - adaptive.clean_means, adaptive.shift, atol=1e-3)
    # In-domain text comes first and moves counts, prior and means of the words it has.
    np.testing.assert_array_equal(own.clean(500)[0].ids, real.in_domain[0])
    assert own.counts.sum() == adaptive.counts.sum() + sum(len(s) for s in own.in_domain)
    assert own.prior.sum() == pytest.approx(1)
    unseen = own.counts == 0
    np.testing.assert_array_equal(own.clean_means[unseen], adaptive.clean_means[unseen])
    first = int(real.in_domain[0][1])
    assert not np.array_equal(own.clean_means[first], adaptive.clean_means[first])
    with pytest.raises(ValueError, match="no in-domain text"):
        type(own)("adaptive", real.bottom, real.public, privtuned.mechanism, own.in_domain)


def test_unshifted_rows_are_nearer_to_the_clean_ones(real: Real, privtuned: PrivTuned) -> None:
    posterior = ShiftPosterior.fit(privtuned.mechanism, real.public)
    clean = np.concatenate(real.clean)
    unshifted = posterior.unshift(privtuned.released.stacked)
    before = np.linalg.norm(privtuned.released.stacked - clean, axis=1).mean()
    after = np.linalg.norm(unshifted - clean, axis=1).mean()
    assert after < 0.3 * before
    # What is left is the random part, at most `noise` units.
    assert after < 0.25 * real.public.unit * 1.1


def test_strong_noise_brings_everyone_near_the_floor(real: Real, tmp_path: Path) -> None:
    mechanism = real.build(tmp_path, mechanism="dchi", noise=40.0)
    released = real.release(mechanism)
    floor, _ = constant_floor(real.sequences, real.public.tokenizer)
    assert 0.03 < floor < 0.10
    for attack in (
        Retrieval("unaware", bank="embedding"),
        Retrieval("unaware"),
        Retrieval("adaptive", bank="aware", metric="mahalanobis"),
    ):
        assert attacked(real, attack, mechanism, released).all < floor, attack.key
    for level in ("adaptive", "in-domain"):
        found = attacked(real, Gaussian(level), mechanism, released)  # type: ignore[arg-type]
        assert found.all < 2 * floor
