"""Context and exact inversion against answers that are known otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import Real, real
from numpy.typing import NDArray
from tiny_models import one_thread

from privtune_flwr.audit.attacks import context
from privtune_flwr.audit.attacks.base import PosteriorAttack, Released
from privtune_flwr.audit.attacks.bigram import Bigram
from privtune_flwr.audit.attacks.context import Context
from privtune_flwr.audit.attacks.exact import Exact, expected_map_accuracy
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.floors import constant_floor
from privtune_flwr.audit.measure import recovery, special_mask
from privtune_flwr.privacy.base import Channel, Mechanism
from simulations.cells import Cells


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _little_text_to_choose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the usual tokens choose between four exponents: each is a pass over the vocabulary."""
    monkeypatch.setattr(context, "_TRIED_TOKENS", 300)


class Blank(PosteriorAttack):
    """Sees nothing in any row; counts how often it is fitted."""

    family = "gaussian"
    name = "blank"
    fits = 0

    def fit(self, knowledge: Any, released: Any, tell: Any = None) -> None:
        self.fits += 1
        self._log_prior_V = np.log(knowledge.prior)

    def log_posterior(self, rows_td: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.tile(self._log_prior_V, (len(rows_td), 1)).astype(np.float32)

    def held_out(self, knowledge: Any) -> Any:
        return knowledge.pairs(60)  # however far it is believed, it says nothing


def attacked(
    world: Real, attack: Any, mechanism: Mechanism, released: Released
) -> tuple[float, float]:
    attack.prepare(world.knowledge(attack.level, mechanism, own=2000), released)
    guesses = [g[:, 0] for g in attack.guess(released)]
    found = recovery(world.sequences[: len(guesses)], guesses, world.public.tokenizer)
    return found.all, found.content


def tiny_text(seed: int, sentences: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [
        np.array([0, *rng.choice([2, 3, 4], p=[0.6, 0.3, 0.1], size=rng.integers(1, 4)), 1], "i4")
        for _ in range(sentences)
    ]


def probability(bigram: Bigram, sequence: tuple[int, ...]) -> float:
    chain = bigram.seen_VV.toarray() + np.outer(bigram.backoff_V, bigram.unigram_V)
    steps = [chain[v, w] for v, w in itertools.pairwise(sequence)]
    return float(bigram.start_V[sequence[0]] * np.prod(steps) * bigram.end_V[sequence[-1]])


@pytest.mark.parametrize("own", [0, 12])
def test_bigram_is_a_distribution_over_successors_and_the_end(own: int) -> None:
    bigram = Bigram.fit(tiny_text(1, 30), 6, in_domain=tiny_text(2, own))
    leaving_v = bigram.seen_VV.sum(axis=1) + bigram.backoff_V * bigram.unigram_V.sum()
    np.testing.assert_allclose(leaving_v + bigram.end_V, 1.0)
    assert bigram.start_V[0] > 0.9
    assert bigram.end_V[1] > 0.9
    assert min(probability(bigram, s) for s in itertools.product(range(6), repeat=3)) > 0


def test_in_domain_text_counts_for_more() -> None:
    general = [np.array([0, 2, 3, 1])] * 40
    own = [np.array([0, 2, 4, 1])] * 10
    chain = Bigram.fit(general, 6, in_domain=own)
    assert probability(chain, (0, 2, 4, 1)) > 2 * probability(chain, (0, 2, 3, 1))


@pytest.mark.parametrize("own", [0, 12])
def test_forward_backward_equals_enumeration(own: int) -> None:
    bigram = Bigram.fit(tiny_text(1, 30), 6, in_domain=tiny_text(2, own))
    rng = np.random.default_rng(4)
    lengths = [1, 4, 2, 4, 3]
    seen = [rng.normal(scale=2, size=(n, 6)) for n in lengths]
    seen[1][2, 3] = -np.inf
    for length, like_tv, found_tv in zip(lengths, seen, bigram.marginals(seen), strict=True):
        expected_tv = np.zeros((length, 6))
        for sequence in itertools.product(range(6), repeat=length):
            weight = np.exp(sum(like_tv[t, v] for t, v in enumerate(sequence)))
            for t, v in enumerate(sequence):
                expected_tv[t, v] += weight * probability(bigram, sequence)
        expected_tv /= expected_tv.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.exp(found_tv), expected_tv, atol=1e-12)
        best = bigram.top([length], lambda _, like_tv=like_tv: like_tv, k=2)[0]
        np.testing.assert_array_equal(best, np.argsort(-expected_tv, axis=1)[:, :2])


def test_nothing_released_reads_as_much_as_the_lengths_alone() -> None:
    world = real(0, 150)
    mechanism = world.build(Path(), mechanism="none")
    private = world.sequences[:30]
    released = Released([np.zeros_like(h) for h in world.clean[:30]])
    inner = Blank("in-domain")
    attack = Context(inner)
    knowledge = world.knowledge("in-domain", mechanism)
    attack.prepare(knowledge, released)
    public, size = world.public, world.public.vocab_size
    chain = Bigram.fit(public.sequences, size, in_domain=world.in_domain)
    alone = [g[:, 0] for g in chain.prior_guess(released.lengths)]
    expected = recovery(private, alone, public.tokenizer)
    read = [g[:, 0] for g in attack.guess(released)]
    assert recovery(private, read, public.tokenizer) == expected
    # The length says where the full stop is, which the guess by position does not know.
    assert 0 < expected.all < constant_floor(private, public.tokenizer)[0] + 0.03
    # The inner attack is shared, not fitted again.
    Context(inner).prepare(knowledge, released)
    assert inner.fits == 1


def test_exact_map_reads_what_the_table_says_and_context_reads_more() -> None:
    world = real(0, 150)
    mechanism = Cells(world.public)
    released = world.release(mechanism)
    rounded = Released([r.astype(np.float16).astype(np.float32) for r in released.rows])
    exact = Exact("adaptive")
    found, _ = attacked(world, exact, mechanism, rounded)

    ids = np.concatenate(world.sequences)
    text = ids[~special_mask(world.public.tokenizer, world.public.vocab_size)[ids]]
    frequency_v = np.bincount(text, minlength=world.public.vocab_size)
    prior_v = world.knowledge("adaptive", mechanism).prior
    expected = expected_map_accuracy(mechanism.channel(), prior_v, frequency_v)
    error = np.sqrt(expected * (1 - expected) / len(text))
    assert abs(found - expected) < 3 * error

    gaussian, _ = attacked(world, Gaussian("adaptive"), mechanism, rounded)
    assert found > gaussian - error  # the best in expectation, not on every sample
    fewer = Released(rounded.rows[:40])
    with_context, _ = attacked(world, Context(exact), mechanism, fewer)
    assert with_context > 1.5 * found
    own_text, _ = attacked(world, Context(Exact("in-domain")), mechanism, fewer)
    assert own_text > 1.2 * with_context


def test_expectation_by_hand_and_what_has_no_table() -> None:
    # Symbol 0 reads as token 0 (.6 * .9 > .4 * .3), symbol 1 as token 1 (.6 * .1 < .4 * .7).
    table_vc = np.array([[0.9, 0.1], [0.3, 0.7]])
    channel = Channel(np.eye(2), table_vc)
    assert expected_map_accuracy(channel, np.array([6, 4])) == pytest.approx(0.6 * 0.9 + 0.4 * 0.7)
    assert expected_map_accuracy(channel, np.array([6, 4]), np.array([0, 5])) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="distribution"):
        Channel(np.eye(2), table_vc * 2)
    with pytest.raises(ValueError, match="unaware"):
        Exact("unaware")
    world = real(0, 150)
    mechanism = world.build(Path(), mechanism="none")
    assert mechanism.channel() is None
    with pytest.raises(ValueError, match="none has no table"):
        Exact("adaptive").fit(world.knowledge("adaptive", mechanism), Released(world.clean))


def test_context_helps_against_noise() -> None:
    world = real(2, 60)
    mechanism = world.build(Path(), mechanism="dchi", noise=4.0)
    released = Released(world.release(mechanism).rows[:40])
    inner = Gaussian("adaptive")
    alone, _ = attacked(world, inner, mechanism, released)
    with_context, _ = attacked(world, Context(inner), mechanism, released)
    assert with_context > alone


def test_noise_far_beyond_the_unit_leaves_the_floor() -> None:
    world = real(2, 60)
    mechanism = world.build(Path(), mechanism="dchi", noise=40.0)
    released = world.release(mechanism)
    found = attacked(world, Context(Gaussian("adaptive")), mechanism, released)
    public = world.public
    floor = constant_floor(world.sequences, public.tokenizer)
    chain = Bigram.fit(public.sequences, public.vocab_size)
    alone = [g[:, 0] for g in chain.prior_guess(released.lengths)]
    lengths = recovery(world.sequences, alone, public.tokenizer)
    assert found[0] < max(floor[0], lengths.all) + 0.02
    assert found[1] < max(floor[1], lengths.content) + 0.02
