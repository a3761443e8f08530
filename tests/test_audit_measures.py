"""Measures, kinds of tokens and floors: by hand, then on real text."""

from __future__ import annotations

import numpy as np
import pytest
from audit_kit import Real, real

from privtune_flwr.audit.floors import floor_figures, prior_guess_by_position
from privtune_flwr.audit.measure import DEFINITIONS, Figure, measure, ratio_figures
from privtune_flwr.audit.tokens import Truth, names_of, numbers_of

KEYS = {
    "top1",
    "top5",
    "content_top1",
    "content_top5",
    "exact",
    "near_exact",
    "rouge_l",
    "names",
    "numbers",
    "rare",
}
TEXTS = ["We saw Anna Smith in Paris at 10:30.", "the film was good"]


@pytest.fixture(scope="module")
def minilm() -> Real:
    return real()


def truth_of(known: Real, texts: list[str]) -> Truth:
    ids = [np.array(known.public.tokenizer(t)["input_ids"], dtype=np.int32) for t in texts]
    return Truth.of(ids, texts, known.public.tokenizer, known.public.counts)


def words(text: str, spans: object) -> list[str]:
    return [text[a:b] for a, b in spans]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The film by Ang Lee is one I liked.", ["Ang", "Lee"]),
        ("It ended. Then Mr. Bean left for U.S. soil.", ["Mr", "Bean", "U", "S"]),
        ('He said: "We met Bob." Nobody (The End) cared!\nNew Line', ["Bob", "The", "End", "Line"]),
        ("He read ''Moby Dick'' and O'Neill.", ["Dick", "O", "Neill"]),
        ("all lower case", []),
        ("ALL CAPS SAY NOTHING", []),
    ],
)
def test_names_by_the_stated_rule(text: str, names: list[str]) -> None:
    assert words(text, names_of(text)) == names


def test_numbers_are_words_with_a_digit() -> None:
    text = "In 1999 a 3rd of $2.5m, mp3 and five"
    assert words(text, numbers_of(text)) == ["1999", "3rd", "2", "5m", "mp3"]


def test_masks_follow_words_into_their_tokens(minilm: Real) -> None:
    truth = truth_of(minilm, ["We met Zbigniew Smith at 10:30."])
    tokens = minilm.public.tokenizer.convert_ids_to_tokens(truth.ids[0].tolist())

    def kind(name: str) -> list[str]:
        return [t for t, m in zip(tokens, truth.masks[name][0], strict=True) if m]  # type: ignore[index]

    assert kind("names") == ["z", "##bi", "##gni", "##ew", "smith"]
    assert kind("numbers") == ["10", "30"]
    assert kind("content") == ["met", "##bi", "##gni", "##ew", "smith"]  # a lone letter is none
    assert not truth.masks["text"][0][[0, -1]].any()
    counts = minilm.public.counts
    rare = truth.masks["rare"][0]
    assert rare.tolist() == [
        m and counts[i] < 5 for i, m in zip(truth.ids[0], truth.masks["text"][0], strict=True)
    ]
    assert rare.any()
    with pytest.raises(ValueError, match="does not give"):
        Truth.of(truth.ids, ["We met others."], minilm.public.tokenizer, counts)


def test_measures_by_hand(minilm: Real) -> None:
    truth = truth_of(minilm, TEXTS)
    tokens = [minilm.public.tokenizer.convert_ids_to_tokens(i.tolist()) for i in truth.ids]
    assert tokens[0][1:-1] == [
        "we",
        "saw",
        "anna",
        "smith",
        "in",
        "paris",
        "at",
        "10",
        ":",
        "30",
        ".",
    ]
    assert tokens[1][1:-1] == ["the", "film", "was", "good"]
    wrong = minilm.public.tokenizer.convert_tokens_to_ids("zebra")
    guesses = [np.full((len(i), 6), wrong, dtype=np.int64) for i in truth.ids]
    guesses[1][:, 0] = truth.ids[1]  # the second sentence wholly
    for position, rank in ((1, 0), (2, 0), (3, 0), (4, 4), (6, 5), (8, 0)):
        guesses[0][position, rank] = truth.ids[0][position]
    got = measure(truth, guesses, minilm.public.tokenizer)
    assert set(got) == KEYS
    assert KEYS | {"asr", "interval"} == set(DEFINITIONS)

    def is_share(name: str, right: float, n: int) -> None:
        assert got[name].n == n
        assert got[name].value == pytest.approx(right / n)

    is_share("top1", 4 + 4, 11 + 4)  # we saw anna 10
    is_share("top5", 5 + 4, 15)  # smith is the fifth guess, paris the sixth
    is_share("content_top1", 2 + 2, 6)  # saw anna smith paris; film good
    is_share("content_top5", 3 + 2, 6)
    is_share("exact", 1, 2)
    is_share("near_exact", 1, 2)
    is_share("names", 1, 3)
    is_share("numbers", 1, 2)
    # Ten words of truth (the colon and the full stop are none), eleven guessed, four in common.
    precision, recall = 4 / 11, 4 / 9
    f1 = 2 * precision * recall / (precision + recall)
    is_share("rouge_l", 1 + f1, 2)


def test_near_exact_is_nine_of_ten(minilm: Real) -> None:
    truth = truth_of(minilm, ["one two three four five six seven eight nine ten"])
    guess = truth.ids[0].astype(np.int64)[:, None].copy()
    guess[3] = 2
    got = measure(truth, [guess], minilm.public.tokenizer)
    assert (got["exact"].value, got["near_exact"].value) == (0.0, 1.0)
    assert got["names"] == Figure(None, None, None, 0)
    guess[4] = 2
    assert measure(truth, [guess], minilm.public.tokenizer)["near_exact"].value == 0.0
    # Special tokens do not count, whatever is guessed there.
    guess[[0, -1]] = 2
    assert measure(truth, [guess], minilm.public.tokenizer)["top1"].value == 0.8
    with pytest.raises(ValueError, match="k >= 1"):
        measure(truth, [guess[:, 0]], minilm.public.tokenizer)
    with pytest.raises(ValueError, match="differ"):
        measure(truth, [guess[1:]], minilm.public.tokenizer)


def test_intervals_are_those_of_sentences() -> None:
    rng = np.random.default_rng(0)
    hit_S1 = (rng.random((400, 1)) < 0.3).astype(float)
    [few] = ratio_figures(hit_S1, np.ones_like(hit_S1))
    # Ten tokens that fall together are no more evidence than one.
    [many] = ratio_figures(10 * hit_S1, np.full_like(hit_S1, 10.0))
    assert (many.value, many.low, many.high) == (few.value, few.low, few.high)
    assert many.n == 10 * few.n
    width = 2 * 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert few.high is not None
    assert few.low is not None
    assert few.high - few.low == pytest.approx(width, rel=0.15)


def test_the_prior_knows_both_ends() -> None:
    own = [
        np.array([101, 5, *np.random.default_rng(i).integers(10, 40, size=6), 7, 102])
        for i in range(60)
    ]
    guess = prior_guess_by_position(own, [4, 12, 6], 3)
    assert [g.shape for g in guess] == [(4, 3), (12, 3), (6, 3)]
    for sentence in guess:
        assert sentence[[0, 1, -2, -1], 0].tolist() == [101, 5, 7, 102]
        assert all(len(set(row)) == 3 for row in sentence.tolist())


def test_floors_on_real_text(minilm: Real) -> None:
    tokenizer = minilm.public.tokenizer
    truth = Truth.of(minilm.sequences, minilm.texts, tokenizer, minilm.public.counts)
    assert truth.masks["names"][0].dtype == bool
    floor = floor_figures(truth, tokenizer)
    assert set(floor) == KEYS
    lengths = [len(s) for s in minilm.sequences]
    prior = measure(truth, prior_guess_by_position(minilm.public.sequences, lengths, 5), tokenizer)
    # An oracle by position is above what the attacker's own text says about positions.
    for name in ("top1", "top5", "content_top1", "content_top5", "names", "rare"):
        assert (floor[name].value or 0) >= (prior[name].value or 0)
    assert 0.05 < (prior["top1"].value or 0) < (floor["top1"].value or 0) < 0.15
    assert (floor["top1"].value or 0) < (floor["top5"].value or 0) < 0.35
    assert floor["exact"].value == 0.0
