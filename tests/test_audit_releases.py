"""Attacks on releases that are not clean rows plus noise: replaced tokens, symbols, narrow rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from audit_kit import Real, real
from numpy.typing import NDArray
from tiny_models import one_thread

from privtune_flwr.audit.attacks.base import Attack, Released
from privtune_flwr.audit.attacks.bigram import Bigram
from privtune_flwr.audit.attacks.counts import Counts
from privtune_flwr.audit.attacks.exact import Exact, expected_map_accuracy
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.learned import Learned
from privtune_flwr.audit.attacks.levels import Levels
from privtune_flwr.audit.attacks.scratch import FromScratch
from privtune_flwr.audit.attacks.table import Table
from privtune_flwr.audit.attributes import infer_attribute
from privtune_flwr.audit.floors import constant_floor
from privtune_flwr.audit.measure import recovery, special_mask
from privtune_flwr.audit.plan import FRONTIER, FULL, QUICK, Kind, attacks_on_tokens
from privtune_flwr.audit.repeats import Averaged
from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.base import Guarantee, Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.privacy.released import released_law

CUT, SENTENCES = 0, 80
FEW = 40  # for the sequence attack, whose reading is costly


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Narrow(Mechanism):
    """A random projection of a bank entry to a few numbers, rounded to levels.

    ``ahead`` is how many places further on the token stands that a row is about: with 0 a row tells
    of its own token and nothing else does, with 1 a row alone tells only of its successor.
    """

    name = "narrow-for-tests"
    additive = False

    def __init__(self, world: Real, width: int, levels: int, ahead: int = 0) -> None:
        params = {"width": width, "levels": levels, "ahead": ahead}
        super().__init__(MechanismSpec(self.name, params))
        bank_vd = np.asarray(world.public.bank, np.float64)
        numbers_vr = (bank_vd - bank_vd.mean(axis=0)) @ np.random.default_rng(4).normal(
            size=(bank_vd.shape[1], width)
        )
        squashed_vr = np.tanh(numbers_vr / numbers_vr.std(axis=0))
        steps = max(1, levels - 1)
        rounded_vr = np.round((squashed_vr + 1) / 2 * steps) / steps
        self.numbers_vr = rounded_vr if levels else squashed_vr
        self.ahead = ahead

    @classmethod
    def design(cls, *arguments: Any) -> NoReturn:
        raise MechanismError("is attacked, never designed")

    @classmethod
    def load(cls, *arguments: Any) -> NoReturn:
        raise MechanismError("no device runs it")

    eta_max = None

    def guarantee(self) -> Guarantee:
        return Guarantee("none", "none", None, "Nothing.")

    def width(self, hidden_size: int) -> int:
        return self.numbers_vr.shape[1]

    def _perturb(
        self, hidden_td: NDArray[Any], ids_t: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        return self.numbers_vr[np.roll(ids_t, -self.ahead)]


class Constant(Narrow):
    """Releases nothing but lengths."""

    name = "constant-for-tests"

    def _perturb(
        self, hidden_td: NDArray[Any], ids_t: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        return np.zeros((len(ids_t), self.numbers_vr.shape[1]))


class Scaled(Narrow):
    """Half the clean row plus much noise: neither additive nor narrow."""

    name = "scaled-for-tests"

    def width(self, hidden_size: int) -> int:
        return hidden_size

    def _perturb(
        self, hidden_td: NDArray[Any], ids_t: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        return 0.5 * hidden_td + 0.1 * rng.normal(size=hidden_td.shape)


@pytest.fixture(scope="module")
def world() -> Real:
    return real(CUT, SENTENCES)


def attacked(
    world: Real, attack: Attack, mechanism: Mechanism, released: Released
) -> tuple[float, float]:
    attack.prepare(world.knowledge(attack.level, mechanism, own=400), released)
    guesses = [g[:, 0] for g in attack.guess(released)]
    found = recovery(world.sequences[: len(guesses)], guesses, world.public.tokenizer)
    return found.all, found.content


def text_tokens(world: Real) -> NDArray[np.int64]:
    ids = np.concatenate(world.sequences).astype(np.int64)
    return ids[~special_mask(world.public.tokenizer, world.public.vocab_size)[ids]]


# ---------------------------------------------------------------- replaced tokens


@pytest.fixture(scope="module")
def custext(world: Real, tmp_path_factory: pytest.TempPathFactory) -> Mechanism:
    folder = tmp_path_factory.mktemp("custext")
    config = PrivacyConfig().model_copy(update={"mechanism": "custext+"})
    config = config.model_copy(update={"text": config.text.model_copy(update={"epsilon": 1.0})})
    spec = mechanism_class("custext+").design(config, world.public, folder)
    return create_mechanism(spec, folder, world.bottom)


def test_the_table_reads_more_than_the_replacement(world: Real, custext: Any) -> None:
    released = world.release(custext)
    attack = Table("adaptive")
    found, _ = attacked(world, attack, custext, released)

    replaced = [attack.replaced(np.asarray(rows)) for rows in released.rows]
    naive = recovery(world.sequences, replaced, world.public.tokenizer).all
    assert naive < 0.9 * found

    # the same by the table alone, on replacements drawn again and again: no row is looked at
    channel = custext.token_channel()
    prior_v = world.knowledge("adaptive", custext).prior
    ids_n, rng = text_tokens(world), np.random.default_rng(5)
    new_rn = np.stack([custext.rewrite(ids_n, rng) for _ in range(8)])
    distinct_u, place_rn = np.unique(new_rn, return_inverse=True)
    best_u = np.concatenate(
        [
            (channel.log_likelihood(part) + np.log(prior_v)).argmax(axis=1)
            for part in np.array_split(distinct_u, 8)
        ]
    )
    expected = float((best_u[place_rn.reshape(new_rn.shape)] == ids_n).mean())
    assert abs(found - expected) < 3 * np.sqrt(expected * (1 - expected) / len(ids_n))


def test_the_table_is_a_distribution_for_every_row(world: Real, custext: Any) -> None:
    attack = Table("adaptive")
    attack.prepare(world.knowledge("adaptive", custext), world.release(custext))
    rows = world.release(custext).rows[0]
    far = np.full((1, rows.shape[1]), 1e3, np.float32)  # no token looks like it
    log_tv = attack.log_posterior(np.concatenate([rows, far]))
    assert np.isfinite(log_tv).all()
    np.testing.assert_allclose(np.exp(log_tv.astype(np.float64)).sum(axis=1), 1, atol=1e-3)
    with pytest.raises(ValueError, match="unaware"):
        Table("unaware")
    nothing = world.build(Path(), mechanism="none")
    with pytest.raises(ValueError, match="none has no table"):
        Table("adaptive").fit(world.knowledge("adaptive", nothing), Released(world.clean))


# ---------------------------------------------------------------- symbols and narrow rows


def test_levels_are_found_and_survive_the_wire() -> None:
    rng = np.random.default_rng(0)
    places = rng.integers([3, 1, 16], size=(1000, 3))
    rows = np.stack([places[:, 0] / 2 - 1, places[:, 1] * 0.0, places[:, 2] / 15], axis=1)
    levels = Levels.of(rows)
    assert levels is not None
    assert levels.sizes == [3, 1, 16]
    assert levels.symbols == 48
    np.testing.assert_array_equal(levels.places(rows.astype(np.float16)), places)
    assert levels.one_hot(rows).sum() == 3 * len(rows)
    assert Levels.of(rows + 0.01 * rng.normal(size=rows.shape)) is None
    assert Levels.of(rng.normal(size=(5, 2))) is None  # few rows: nothing to be seen
    assert Levels.of(np.zeros((1000, 384))) is None


def test_counts_read_what_the_true_table_says(world: Real) -> None:
    mechanism = Narrow(world, width=2, levels=8)
    released = world.release(mechanism)
    rounded = Released([r.astype(np.float16).astype(np.float32) for r in released.rows])
    attack = Counts("adaptive", tokens=40_000)
    found, _ = attacked(world, attack, mechanism, rounded)
    # a row is a function of its token: of all that share it the commonest is the best guess
    prior_v = world.knowledge("adaptive", mechanism).prior
    _, symbol_v = np.unique(mechanism.numbers_vr, axis=0, return_inverse=True)
    symbol_v = symbol_v.reshape(-1)
    order = np.lexsort((prior_v, symbol_v))
    best = np.zeros(len(prior_v), dtype=bool)
    best[order[np.append(np.diff(symbol_v[order]) > 0, True)]] = True
    ids = text_tokens(world)
    expected = float(best[ids].mean())
    assert abs(found - expected) < 3 * np.sqrt(expected * (1 - expected) / len(ids)) + 0.01
    # its posterior knows which tokens cannot be meant: probability sums to one, mass lies there
    log_tv = attack.log_posterior(rounded.rows[0])
    np.testing.assert_allclose(np.exp(log_tv.astype(np.float64)).sum(axis=1), 1, atol=1e-4)
    assert attacked(world, Gaussian("adaptive"), mechanism, rounded)[0] <= found + 0.01
    with pytest.raises(ValueError, match="not symbols"):
        attacked(world, Counts("adaptive", tokens=4000), Narrow(world, 8, 16), released)


def test_exact_map_reads_real_cells_as_their_table_says(world: Real, tmp_path: Path) -> None:
    mechanism = world.build(tmp_path, mechanism="cells")
    released = world.release(mechanism)
    kind = Kind.of(mechanism, world.public.hidden_size, released)
    assert kind.discrete
    assert not kind.additive
    found, _ = attacked(world, Exact("adaptive"), mechanism, released)
    frequency_v = np.bincount(text_tokens(world), minlength=world.public.vocab_size)
    prior_v = world.knowledge("adaptive", mechanism).prior
    channel = mechanism.channel()
    assert channel is not None
    # a cell is certain: nothing is left to chance
    assert found == pytest.approx(expected_map_accuracy(channel, prior_v, frequency_v), abs=1e-6)
    assert attacked(world, Gaussian("adaptive"), mechanism, released)[0] <= found + 0.01


def test_a_sequence_attack_finds_what_stands_in_the_neighbours(world: Real) -> None:
    # rows this wide tell much of the successor: few steps and little text do to learn to read it
    mechanism = Narrow(world, width=32, levels=0, ahead=1)
    released = Released(world.release(mechanism).rows[:FEW])
    attack = FromScratch("in-domain", steps=36, tokens=5_500)
    found, _ = attacked(world, attack, mechanism, released)
    single, _ = attacked(world, Gaussian("in-domain"), mechanism, released)
    floor, _ = constant_floor(world.sequences[:FEW], world.public.tokenizer)
    assert found > 1.3 * single
    assert found > 1.3 * floor
    losses = attack.curve["y"]  # type: ignore[index]
    assert min(losses) < losses[0] - 0.5
    # its own text is not what it is judged by
    held_out = attack.held_out(world.knowledge("in-domain", mechanism))
    assert sum(len(p.ids) for p in held_out) > 500


def test_nothing_released_leaves_the_floor(world: Real) -> None:
    mechanism = Constant(world, width=3, levels=4)
    released = world.release(mechanism)
    public = world.public
    chain = Bigram.fit(public.sequences, public.vocab_size, in_domain=world.in_domain[:400])
    alone = [g[:, 0] for g in chain.prior_guess(released.lengths)]
    lengths = recovery(world.sequences, alone, public.tokenizer)
    floor = constant_floor(world.sequences, public.tokenizer)
    for attack in (
        FromScratch("in-domain", steps=8, tokens=4_000),
        Counts("in-domain", tokens=4_000),
        Gaussian("in-domain"),
    ):
        found, content = attacked(world, attack, mechanism, released)
        assert found < max(floor[0], lengths.all) + 0.02, attack.key
        assert content < max(floor[1], lengths.content) + 0.01, attack.key


# ---------------------------------------------------------------- means that have to be learned


def test_released_means_are_learned_for_seen_and_unseen_tokens(world: Real) -> None:
    mechanism = Scaled(world, width=1, levels=0)
    public = world.public
    law = released_law(mechanism, public)
    half_vd = 0.5 * np.asarray(public.bank)
    for some in (public.counts > 20, public.counts == 0):
        apart = np.square(law.means_VR[some] - half_vd[some]).mean()
        assert apart < 0.05 * np.square(half_vd[some] - half_vd[some].mean(axis=0)).mean()
    released = world.release(mechanism)
    found, _ = attacked(world, Gaussian("adaptive"), mechanism, released)
    assert found > 0.95
    averaged = Averaged(mechanism, 4)
    assert not averaged.additive
    again = ShiftPosterior.fit(averaged, public, rows=1000).top(released.rows[0], 1)[:, 0]
    assert np.mean(again == world.sequences[0]) > 0.8
    knowledge = world.knowledge("unaware", mechanism)
    np.testing.assert_array_equal(knowledge.means, knowledge.clean_means)
    with pytest.raises(ValueError, match="not additive"):
        Learned("adaptive", network="mlp", steps=1, tokens=500).fit(
            world.knowledge("adaptive", mechanism), released
        )


# ---------------------------------------------------------------- which attacks run on what


def keys(kind: Kind, preset: Any = FULL) -> tuple[set[str], set[str]]:
    run, skipped = attacks_on_tokens(preset, kind, in_domain=True, seed=0)
    assert all(s.why.startswith("not applicable") for s in skipped)
    return {a.key for a in run}, {s.attack.key for s in skipped}


def test_each_kind_of_release_has_its_attacks() -> None:
    additive, none = keys(Kind())
    assert not none
    assert {"learned-sequence@adaptive", "optimisation@adaptive"} <= additive
    assert not any("scratch" in key or "table" in key for key in additive)

    narrow, left = keys(Kind(additive=False, narrow=True, countable=True))
    assert not any(key.endswith("@unaware") for key in narrow)
    assert {"gaussian@unaware", "retrieval-contextual-l2@unaware"} <= left
    assert {
        "symbol-counts@adaptive",
        "learned-from-scratch@in-domain",
        "context-bigram+symbol-counts@in-domain",
        "context-bigram+learned-from-scratch@in-domain",
    } <= narrow
    assert "optimisation@adaptive" in left

    replaced, left = keys(Kind(additive=False, replaced=True), QUICK)
    assert {"table-of-tokens@adaptive", "gaussian@unaware"} <= replaced
    assert "context-bigram+table-of-tokens@in-domain" in replaced
    assert left == {"optimisation@adaptive"}

    discrete, _ = keys(Kind(additive=False, discrete=True, narrow=True, countable=True), QUICK)
    assert {"exact-map@adaptive", "context-bigram+exact-map@in-domain"} <= discrete
    assert "symbol-counts@adaptive" not in discrete

    study, _ = keys(Kind(additive=False, narrow=True), FRONTIER)
    assert "learned-from-scratch@in-domain" in study
    assert not any("optimisation" in key for key in study)


def test_attributes_are_told_from_symbols() -> None:
    rng = np.random.default_rng(1)

    def sentences(labels: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        # the middle level for the one class, both ends for the other: means say nothing
        return [
            np.where(
                rng.random((12, 1)) < 0.5, 0.5, rng.integers(0, 2, (12, 1)) if label else 0.5
            ).astype(np.float32)
            for label in labels
        ]

    own, victims = rng.integers(0, 2, 200), rng.integers(0, 2, 100)
    [linear] = infer_attribute(
        sentences(own), own, sentences(victims), victims, attacks=["logistic: mean"]
    )
    assert linear.accuracy.value is not None
    assert linear.accuracy.value > 0.95
