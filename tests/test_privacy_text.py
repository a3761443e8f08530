"""Mechanisms that replace tokens: their exact laws on a toy, one real sentence through each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import real
from numpy.typing import NDArray
from privacy_toy import CLS, HIDDEN, PAD, SEP, VOCABULARY, ToyBottom, ToyTokenizer
from scipy import stats
from text_kit import (
    DRAWS,
    NAMES,
    REJECT,
    SPECIAL,
    STOPS,
    TEXT,
    TableBottom,
    _rng,
    build,
    design,
    distances,
    exponential_law,
    half_table,
    make_toy,
    ours,
    p_value,
    skewed_texts,
)

from privtune_flwr.mechanism_config import TextSection
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.privacy.text.base import IMPOSSIBLE, draw_by_weight
from privtune_flwr.privacy.text.custext import CusText, stop_entries
from privtune_flwr.privacy.text.rantext import RanText, noise_scale, shortfall
from privtune_flwr.privacy.text.rapt import RAPT
from privtune_flwr.privacy.text.santext import SanText
from privtune_flwr.privacy.text.vectors import Vectors


@pytest.fixture
def toy(tmp_path: Path) -> PublicKnowledge:
    return make_toy(tmp_path)


# ---- santext+ -----------------------------------------------------------------------------------


def santext_law(mechanism: SanText, token: int, epsilon: float, p: float) -> NDArray[np.float64]:
    """By hand, from the paper."""
    law = exponential_law(-epsilon / 2 * distances(token), mechanism.sensitive_V)
    if not mechanism.sensitive_V[token]:
        law = p * law + (1 - p) * np.eye(VOCABULARY)[token]
    return law


def test_santext_draws_by_its_exact_probabilities(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("santext+", toy, tmp_path / "a", epsilon=1.5, sensitive=0.5, replace=0.3)
    for token in (3, 10, 45, 59):
        law = santext_law(mechanism, token, 1.5, 0.3)
        assert p_value(ours(mechanism)(token, _rng(token)), law) > REJECT


@pytest.mark.parametrize("wrong", ["factor 1", "nearest", "whole vocabulary", "always replaced"])
def test_wrong_samplers_fail_the_same_check(
    toy: PublicKnowledge, tmp_path: Path, wrong: str
) -> None:
    mechanism = build("santext+", toy, tmp_path / "a", epsilon=1.5, sensitive=0.5, replace=0.3)
    token = 3 if wrong == "always replaced" else 45
    law = santext_law(mechanism, token, 1.5, 0.3)
    rng = _rng(1)
    if wrong == "nearest":
        drawn = np.full(DRAWS, np.where(law > 0, law, 0).argmax())
    else:
        factor = 1.0 if wrong == "factor 1" else 0.5
        allowed = np.arange(VOCABULARY) > 2 if wrong == "whole vocabulary" else (law > 0)
        allowed = allowed & (np.arange(VOCABULARY) != 3) if token == 3 else allowed
        drawn = rng.choice(
            VOCABULARY, DRAWS, p=exponential_law(-1.5 * factor * distances(token), allowed)
        )
    assert p_value(drawn, law) < REJECT


def test_the_rarest_share_is_sensitive(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("santext+", toy, tmp_path / "a", sensitive=0.5)
    # 57 text entries: the 29 rarest are the 19 unseen and 31 to 40, of which 31 was seen most
    assert np.flatnonzero(mechanism.sensitive_V).tolist() == list(range(31, 60))


def test_santext_is_private_as_it_says(toy: PublicKnowledge, tmp_path: Path) -> None:
    eta, p = 2.0, 0.3
    mechanism = build("santext+", toy, tmp_path / "a", epsilon=eta, sensitive=0.5, replace=p)
    log_law = mechanism.token_channel().log_likelihood(TEXT).astype(np.float64)[:, TEXT]
    sensitive = mechanism.sensitive_V[TEXT]
    apart = np.stack([distances(t)[TEXT] for t in TEXT])
    outputs = log_law[sensitive]
    for rows, columns, slack in (
        (sensitive, sensitive, 0.0),
        (~sensitive, ~sensitive, 0.0),
        (sensitive, ~sensitive, np.log(1 / p)),
    ):
        ratio = np.abs(outputs[:, rows, None] - outputs[:, None, columns]).max(axis=0)
        bound = eta * apart[np.ix_(rows, columns)] + slack
        assert (ratio <= bound + 1e-4).all()
    assert (log_law[~sensitive][:, sensitive] == IMPOSSIBLE).all()  # and there is no bound


# ---- custext+ -----------------------------------------------------------------------------------


def test_output_sets_cover_the_vocabulary_once(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("custext+", toy, tmp_path / "a", candidates=10)
    members = mechanism.members_GW[mechanism.members_GW >= 0]
    assert sorted(members.tolist()) == TEXT.tolist()
    sizes = (mechanism.members_GW >= 0).sum(axis=1)
    assert sorted(sizes.tolist()) == [10, 10, 10, 10, 17]  # what is left joins the last set
    # the most frequent token founds the first set, with the nearest of all
    first = np.flatnonzero(mechanism.set_V == 0)
    nearest = TEXT[np.argsort(distances(3)[TEXT])[:10]]
    assert sorted(first.tolist()) == sorted(nearest.tolist())
    # the second founder is the most frequent that was left; its set is nearest among the left
    left = np.setdiff1d(TEXT, first)
    second = left[np.argsort(distances(int(left[0]))[left])[:10]]
    assert set(np.flatnonzero(mechanism.set_V == mechanism.set_V[left[0]])) == set(second.tolist())


def custext_law(mechanism: CusText, token: int, epsilon: float) -> NDArray[np.float64]:
    """By hand: utility spans [0, 1] over the token's set."""
    mine = mechanism.set_V == mechanism.set_V[token]
    apart = distances(token)
    return np.asarray(exponential_law(epsilon / 2 * (1 - apart / apart[mine].max()), mine))


def test_custext_draws_by_its_exact_probabilities(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("custext+", toy, tmp_path / "a", epsilon=4.0, candidates=10)
    for token in (3, 20, 58):
        law = custext_law(mechanism, token, 4.0)
        assert p_value(ours(mechanism)(token, _rng(token)), law) > REJECT
        twice = np.where(law > 0, law**2, 0)  # epsilon where epsilon / 2 belongs
        wrong = _rng(token, 2).choice(VOCABULARY, DRAWS, p=twice / twice.sum())
        assert p_value(wrong, law) < REJECT


def test_custext_is_private_within_a_set(toy: PublicKnowledge, tmp_path: Path) -> None:
    epsilon = 3.0
    mechanism = build("custext+", toy, tmp_path / "a", epsilon=epsilon, candidates=10)
    log_law = mechanism.token_channel().log_likelihood(np.arange(VOCABULARY))
    largest = 0.0
    for members_W in mechanism.members_GW:
        members = members_W[members_W >= 0]
        inputs = np.array([m for m in members if m not in STOPS])
        columns = log_law[np.ix_(members, inputs)]
        largest = max(largest, float((columns.max(axis=1) - columns.min(axis=1)).max()))
    assert epsilon / 4 < largest <= epsilon + 1e-4


def test_stop_words_stay_and_may_be_drawn(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("custext+", toy, tmp_path / "a", epsilon=0.1, candidates=57)
    assert np.flatnonzero(mechanism.kept_V).tolist() == sorted(STOPS)
    sentence = np.array([CLS, 5, 9, 30, 11, SEP])
    for seed in range(20):
        new = mechanism.rewrite(sentence, _rng(seed))
        assert new[[1, 2, 3]].tolist() == [5, 9, 30]
    others = mechanism.rewrite(np.full(2000, 11), _rng(99))
    assert set(STOPS) < set(others.tolist())


def test_stop_words_are_known_by_their_spelling() -> None:
    class Spelled:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [["The", "Ġwith", "▁of", "##the", "knight", "Ġ"][i] for i in ids]

    assert stop_entries(Spelled(), np.arange(6)).tolist() == [0, 1, 2]


# ---- rantext ------------------------------------------------------------------------------------


def rantext_draws(token: int, epsilon: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Step by step as in the paper, one draw after the other; below epsilon = 2."""
    table = half_table()
    spread = (table[3:].max(axis=0) - table[3:].min(axis=0)) / epsilon
    apart = distances(token)
    drawn = []
    for _ in range(DRAWS):
        noisy = table[token] + rng.laplace(size=HIDDEN) * spread
        radius = np.linalg.norm(noisy - table[token])
        listed = [v for v in range(3, VOCABULARY) if apart[v] < radius]
        weights = np.exp(epsilon / 2 * (1 - apart[listed] / radius))
        drawn.append(listed[int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))])
    return np.array(drawn)


def test_rantext_agrees_with_the_paper_step_by_step(toy: PublicKnowledge, tmp_path: Path) -> None:
    mechanism = build("rantext", toy, tmp_path / "a", epsilon=1.9)
    mine = np.bincount(ours(mechanism)(17, _rng(1)), minlength=VOCABULARY)[3:]
    paper = np.bincount(rantext_draws(17, 1.9, _rng(2)), minlength=VOCABULARY)[3:]
    assert stats.chi2_contingency(np.stack([mine, paper])).pvalue > REJECT
    other = np.bincount(rantext_draws(17, 0.9, _rng(3)), minlength=VOCABULARY)[3:]
    assert stats.chi2_contingency(np.stack([mine, other])).pvalue < REJECT


@pytest.mark.parametrize(("epsilon", "fitted"), [(0.5, 0.5), (1.9, 1.9), (3, 9.36), (8, 9.39)])
def test_rantext_scales_its_noise_by_range_and_fit(epsilon: float, fitted: float) -> None:
    table = half_table()[3:]
    scale = noise_scale(Vectors(half_table().astype(np.float16), SPECIAL), epsilon)
    np.testing.assert_allclose(scale, np.ptp(table, axis=0) / fitted, rtol=1e-3)


def test_rantext_says_how_far_its_epsilon_holds() -> None:
    rng = np.random.default_rng(3)
    table = (rng.normal(size=(40, 30)) * 0.05).astype(np.float16)
    vectors = Vectors(table, np.array([0]))
    apart = np.linalg.norm(table[1:].astype(float) - table[1:].astype(float)[:, None], axis=-1)
    for epsilon in (0.5, 1.9, 4.0):
        spec = MechanismSpec("rantext", {})
        mechanism = RanText(
            spec, epsilon=epsilon, delta=1.0, special_S=np.array([0]), table_VD=table
        )
        short = float((mechanism.radii(_rng(5), 20_000) <= apart.max()).mean())
        assert short <= shortfall(vectors, epsilon) + 0.01
    assert shortfall(vectors, 0.5) < 1e-6
    assert shortfall(vectors, 100.0) > 0.1


def test_a_delta_that_is_too_small_is_refused(toy: PublicKnowledge, tmp_path: Path) -> None:
    spec, folder = design("rantext", toy, tmp_path / "a", epsilon=1.0)
    assert spec.params["delta"] > 0
    with pytest.raises(MechanismError, match=r"rantext\.delta"):
        create_mechanism(
            MechanismSpec(spec.name, {**spec.params, "delta": 0.0}, spec.artefact), folder
        )


# ---- rapt ---------------------------------------------------------------------------------------


def test_rapt_takes_the_nearest_to_noise_of_the_right_law(
    toy: PublicKnowledge, tmp_path: Path
) -> None:
    mechanism = build("rapt", toy, tmp_path / "a", eta=3.0)
    table = half_table()
    rng = _rng(2)
    direction = rng.normal(size=(DRAWS, HIDDEN))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)

    def by_hand(radius_N: NDArray[np.float64]) -> NDArray[np.int64]:
        points = table[20] + direction * radius_N[:, None]
        apart = np.linalg.norm(points[:, None] - table[3:], axis=2)
        return np.bincount(apart.argmin(axis=1), minlength=len(TEXT))

    mine = np.bincount(ours(mechanism)(20, _rng(1)), minlength=VOCABULARY)[3:]
    for radius, agrees in (
        (rng.gamma(HIDDEN, 1 / 3.0, DRAWS), True),
        (rng.gamma(HIDDEN, 1 / 6.0, DRAWS), False),
    ):
        both = np.stack([mine, by_hand(radius)])
        found = stats.chi2_contingency(both[:, both.sum(axis=0) > 0]).pvalue
        assert (found > REJECT) == agrees


def test_rapt_resolves_eta_like_dchi(toy: PublicKnowledge, tmp_path: Path) -> None:
    spec, _ = design("rapt", toy, tmp_path / "a", noise=2.0)
    apart = np.stack([distances(int(t))[TEXT] for t in TEXT])
    np.fill_diagonal(apart, np.inf)
    unit = np.median(apart.min(axis=1))
    assert spec.params["unit"] == pytest.approx(unit, rel=1e-5)
    assert spec.params["eta"] == pytest.approx(HIDDEN / (2.0 * unit), rel=1e-5)
    assert design("rapt", toy, tmp_path / "b", eta=7.0)[0].params["eta"] == 7.0


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_never_drawn_nor_replaced(
    toy: PublicKnowledge, tmp_path: Path, name: str
) -> None:
    mechanism = build(name, toy, tmp_path / "a", epsilon=0.5, noise=20.0)
    sentence = np.concatenate([[CLS], np.tile(TEXT, 40), [SEP, PAD]])
    new = mechanism.rewrite(sentence, _rng(3))
    assert len(new) == len(sentence)
    assert new[[0, -2, -1]].tolist() == [CLS, SEP, PAD]
    assert not np.isin(new[1:-2], SPECIAL).any()
    assert (new != sentence).any()
    assert mechanism.rewrite(np.array([], dtype=np.int64), _rng(3)).shape == (0,)
    with pytest.raises(MechanismError, match="outside"):
        mechanism.rewrite(np.array([VOCABULARY]), _rng(3))


@pytest.mark.parametrize("name", NAMES)
def test_released_rows_are_those_of_the_new_sentence(
    toy: PublicKnowledge, tmp_path: Path, name: str
) -> None:
    mechanism = build(name, toy, tmp_path / "a", epsilon=0.5, noise=5.0)
    sentence = np.array([CLS, 3, 4, 50, 20, SEP])
    hidden = TableBottom().encode([sentence])[0]
    rows = mechanism.perturb(hidden, sentence, _rng(4))
    expected = TableBottom().encode([mechanism.rewrite(sentence, _rng(4))])[0]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(rows, mechanism.perturb(hidden, sentence, _rng(4)))
    alone = create_mechanism(mechanism.spec, tmp_path / "a")
    with pytest.raises(MechanismError, match="needs the bottom model"):
        alone.perturb(hidden, sentence, _rng(4))


@pytest.mark.parametrize("name", NAMES)
def test_the_channel_is_the_law(toy: PublicKnowledge, tmp_path: Path, name: str) -> None:
    mechanism = build(
        name, toy, tmp_path / "a", epsilon=2.5, sensitive=0.6, candidates=12, noise=2.0
    )
    channel = mechanism.token_channel()
    assert mechanism.token_channel() is channel
    log_law = channel.log_likelihood(np.arange(VOCABULARY))
    assert log_law.dtype == np.float32
    assert log_law.shape == (VOCABULARY, VOCABULARY)
    law = np.exp(log_law.astype(np.float64))
    np.testing.assert_allclose(law.sum(axis=0), 1.0, atol=1e-5)
    np.testing.assert_array_equal(law[SPECIAL], np.eye(VOCABULARY)[SPECIAL])
    for token in (3, 5, 22, 57):
        drawn = ours(mechanism)(token, _rng(7, token))
        if name == "rapt":  # itself an estimate, from as many draws
            counts = np.bincount(drawn, minlength=VOCABULARY)
            both = np.stack([counts, law[:, token] * channel.draws])[:, TEXT]
            both = both[:, both.sum(axis=0) > 10]
            found = stats.chi2_contingency(both).pvalue
        else:
            found = p_value(drawn, law[:, token] / law[:, token].sum())
        assert found > REJECT
    twice = channel.log_likelihood(np.array([40, 3, 40]))
    np.testing.assert_array_equal(twice[[0, 2]], log_law[[40, 40]])
    with pytest.raises(MechanismError, match="outside"):
        channel.log_likelihood(np.array([-1]))


@pytest.mark.parametrize("name", NAMES)
def test_strength_and_guarantee(toy: PublicKnowledge, tmp_path: Path, name: str) -> None:
    spec, folder = design(name, toy, tmp_path / "a", epsilon=1.5, eta=4.0)
    mechanism = create_mechanism(spec, folder)
    assert (mechanism.reads, mechanism.additive, mechanism.learned) == ("tokens", False, False)
    assert mechanism.strength == mechanism_class(name).declared(spec)
    expected = {"santext+": (1.5, None), "rapt": (4.0, None)}.get(name, (None, 1.5))
    assert (mechanism.strength.eta, mechanism.strength.epsilon) == expected
    assert mechanism.guarantee().eta == mechanism.eta_max
    assert "float64" in mechanism.guarantee().statement
    assert MechanismSpec.from_json(spec.to_json()) == spec


def test_a_bottom_model_without_a_table_is_asked_for_single_tokens(tmp_path: Path) -> None:
    tokenizer: Any = ToyTokenizer()
    public = PublicKnowledge(
        ToyBottom(), tokenizer, skewed_texts(), tmp_path / "c", bottom_id="u", max_length=60
    )
    spec, folder = design("rapt", public, tmp_path / "a", eta=3.0)
    mechanism = create_mechanism(spec, folder, ToyBottom())
    assert isinstance(mechanism, RAPT)
    table = ToyBottom().table
    context = (table[CLS] + table + table[SEP]) / 3
    np.testing.assert_allclose(mechanism.vectors.table_VD, table + 0.1 * context, atol=5e-3)


def test_weights_that_are_zero_are_never_drawn() -> None:
    log_weights = np.array([[-np.inf, 0.0, 0.0, -np.inf]] * 2)
    edges = np.array([0.0, np.nextafter(1.0, 0)])
    assert draw_by_weight(log_weights, edges).tolist() == [1, 2]
    huge = np.array([[5e4, 5e4 + np.log(3)]])
    assert draw_by_weight(huge, np.array([0.24])).tolist() == [0]
    assert draw_by_weight(huge, np.array([0.26])).tolist() == [1]


# ---- a real model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_real_sentence_through_a_real_model(tmp_path: Path, name: str) -> None:
    kit = real(2, 150)
    tmp_path.joinpath("a").mkdir()
    text = TextSection(epsilon=14.0 if name == "santext+" else 4.0)
    mechanism: Any = kit.build(tmp_path / "a", mechanism=name, text=text, noise=12.0)
    assert 0.5 < mechanism.spec.params["unit"] < 1.5  # of wordpieces, at any cut
    mechanism.attach(kit.bottom)
    pick = int(np.argmax([len(s) for s in kit.sequences]))
    ids, clean = kit.sequences[pick].astype(np.int64), kit.clean[pick]
    rows = mechanism.perturb(clean, ids, _rng(11))
    new = mechanism.rewrite(ids, _rng(11))
    np.testing.assert_array_equal(rows, kit.bottom.encode([new.astype(np.int32)])[0])
    assert len(new) == len(ids)
    assert new[[0, -1]].tolist() == ids[[0, -1]].tolist()
    assert not np.isin(new[1:-1], kit.public.special_ids).any()
    assert (new != ids).mean() > 0.1
    assert np.abs(rows - clean).max() > 0.1
