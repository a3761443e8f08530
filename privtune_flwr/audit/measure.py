"""How much text an attack recovered: definitions, figures and their sampling error.

All figures are ratios of sums over sentences. Their intervals come from a bootstrap over
*sentences*, since the tokens of one sentence are not independent.

Shapes: ``T`` tokens of one sentence, ``S`` sentences, ``F`` figures, ``k`` guesses a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.tokens import (
    RARE_BELOW,
    Kind,
    Truth,
    content_mask,
    special_mask,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESAMPLES = 1000
_NEAR = 0.9

#: What every figure means, in words for the report. The keys are those of :func:`measure`, then
#: two that speak about them.
DEFINITIONS: dict[str, str] = {
    "top1": "share of tokens whose identity the first guess gives exactly; special tokens "
    "([CLS], [SEP], ...) are not counted",
    "top5": "share of the same tokens that are among the first five guesses (or among all of "
    "them, from an attack that gives fewer)",
    "content_top1": "top1 among content tokens: letters only once a word-piece or word-start mark "
    "is taken off, at least two of them, and not one of scikit-learn's English stop words",
    "content_top5": "top5 among content tokens",
    "exact": "share of sentences of which every counted token is right at the first guess",
    "near_exact": "share of sentences of which at least 90 % of the counted tokens are right",
    "rouge_l": "mean over sentences of ROUGE-L F1 (longest common subsequence of lower-cased "
    "words, rouge-score without stemming) between the decoded true and guessed tokens; only "
    "sentences that have a word to ROUGE (Latin letters or digits) count",
    "names": "top1 among tokens of words that look like names: they begin with a capital letter in "
    "the original text and open neither a sentence nor a quotation; 'I' is none, and a text "
    "without lower-case letters has none",
    "numbers": "top1 among tokens of words that contain a digit",
    "rare": f"top1 among tokens that occur fewer than {RARE_BELOW} times in the public text",
    "asr": "attack success rate: share of non-special tokens whose identity the attacker's first "
    "guess gives exactly, the same as top1; the paper's exact definition could not be read, so "
    "this one is ours",
    "interval": "95 % percentile bootstrap over sentences; it shrinks to a point where nothing, or "
    "everything, was recovered",
}


@dataclass(frozen=True)
class Figure:
    """A share with its sampling error.

    Attributes
    ----------
    value : float or None
        In [0, 1]; None where nothing counts.
    low, high : float or None
        95 % bootstrap interval.
    n : int
        What it is a share of: tokens or sentences.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Recovery:
    """Share of tokens recovered: ``top1`` and ``content_top1`` of :data:`DEFINITIONS`.

    Attributes
    ----------
    all, content : float
        In [0, 1]; NaN where no such token occurs.
    n_all, n_content : int
        Tokens they are shares of.
    interval_all, interval_content : tuple of float
        Bootstrap intervals of 95 %.
    """

    all: float
    content: float
    n_all: int
    n_content: int
    interval_all: tuple[float, float]
    interval_content: tuple[float, float]


def recovery(
    true_ids: Sequence[NDArray[Any]],
    guessed_ids: Sequence[NDArray[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
) -> Recovery:
    """Compare guesses with the truth where only tokens are at hand.

    Parameters
    ----------
    true_ids, guessed_ids : sequences of int arrays (T,)
        The same sentences in the same order.
    tokenizer : PreTrainedTokenizerBase
        Tells special and content tokens.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ValueError
        If the sentences do not line up.
    """
    _check(true_ids, guessed_ids)
    size = vocabulary_size(true_ids, tokenizer)
    hits = [np.asarray(t) == np.asarray(g) for t, g in zip(true_ids, guessed_ids, strict=True)]
    parts = []
    for eligible_V in (~special_mask(tokenizer, size), content_mask(tokenizer, size)):
        counted = [eligible_V[np.asarray(ids, dtype=np.int64)] for ids in true_ids]
        parts.append(_sums(counted, hits))
    total, content = ratio_figures(*_columns(parts), seed=seed)
    nan = float("nan")
    return Recovery(
        all=nan if total.value is None else total.value,
        content=nan if content.value is None else content.value,
        n_all=total.n,
        n_content=content.n,
        interval_all=_interval(total),
        interval_content=_interval(content),
    )


def measure(
    truth: Truth,
    guesses: Sequence[NDArray[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """Judge an attack's guesses by every figure of :data:`DEFINITIONS`.

    Parameters
    ----------
    truth : Truth
        What the rows were.
    guesses : sequence of int arrays (T, k)
        Likeliest first, the same sentences in the same order.
    tokenizer : PreTrainedTokenizerBase
        Decodes for ROUGE.
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict of Figure
        ``top1``, ``top5``, ``content_top1``, ``content_top5``, ``exact``, ``near_exact``,
        ``rouge_l``, ``names``, ``numbers``, ``rare``.

    Raises
    ------
    ValueError
        If the sentences do not line up, or guesses are not (T, k).
    """
    _check(truth.ids, guesses)
    if any(g.ndim != 2 or g.shape[1] == 0 for g in guesses):
        raise ValueError("guesses must be (T, k) with k >= 1")
    right = [g == np.asarray(t)[:, None] for t, g in zip(truth.ids, guesses, strict=True)]
    first = [r[:, 0] for r in right]
    five = [r[:, :5].any(axis=1) for r in right]
    by_kind: dict[str, tuple[Kind, list[NDArray[np.bool_]]]] = {
        "top1": ("text", first),
        "top5": ("text", five),
        "content_top1": ("content", first),
        "content_top5": ("content", five),
        "names": ("names", first),
        "numbers": ("numbers", first),
        "rare": ("rare", first),
    }
    parts = {name: _sums(truth.masks[kind], hits) for name, (kind, hits) in by_kind.items()}
    right_S, total_S = parts["top1"]
    some_S = (total_S > 0).astype(np.float64)
    parts["exact"] = (some_S * (right_S == total_S), some_S)
    # a hair below, or 9 of 10 could fail to be 90 %
    parts["near_exact"] = (some_S * (right_S >= _NEAR * total_S - 1e-9), some_S)
    parts["rouge_l"] = _rouge(truth, guesses, tokenizer)
    order = [name for name in DEFINITIONS if name in parts]
    figures = ratio_figures(*_columns([parts[name] for name in order]), seed=seed)
    return dict(zip(order, figures, strict=True))


def ratio_figures(
    right_SF: NDArray[np.float64], total_SF: NDArray[np.float64], *, seed: int = 0
) -> list[Figure]:
    """Give sum(right) / sum(total) of each column with its bootstrap interval over rows.

    Parameters
    ----------
    right_SF, total_SF : float arrays, shape (S, F)
        Numerators and denominators of each sentence.
    seed : int
        Of the resampling.
    """
    sentences = len(total_SF)
    rng = np.random.default_rng(seed)
    # How often each sentence is drawn; sentences without a counted token cannot skew the ratio.
    even_S = np.full(sentences, 1 / sentences)
    drawn = rng.multinomial(sentences, even_S, size=_RESAMPLES).astype(np.float64)
    below = drawn @ total_SF
    # A draw without any counted token says nothing about the share among them.
    resampled = np.divide(drawn @ right_SF, below, out=np.full_like(below, np.nan), where=below > 0)
    figures = []
    for column, (right, total) in enumerate(zip(right_SF.sum(0), total_SF.sum(0), strict=True)):
        if total == 0:
            figures.append(Figure(None, None, None, 0))
            continue
        low, high = np.nanquantile(resampled[:, column], (0.025, 0.975))
        figures.append(Figure(float(right / total), float(low), float(high), int(total)))
    return figures


def _check(true_ids: Sequence[NDArray[Any]], guesses: Sequence[NDArray[Any]]) -> None:
    if [len(t) for t in true_ids] != [len(g) for g in guesses]:
        raise ValueError("true and guessed sentences differ in number or length")
    if not true_ids:
        raise ValueError("no sentences to measure")


def _sums(
    counted: Sequence[NDArray[np.bool_]], hits: Sequence[NDArray[np.bool_]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give right_S and total_S of the counted tokens."""
    right_S = [float((c & h).sum()) for c, h in zip(counted, hits, strict=True)]
    return np.array(right_S), np.array([float(c.sum()) for c in counted])


def _columns(
    parts: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.stack([r for r, _ in parts], axis=1), np.stack([t for _, t in parts], axis=1)


def _interval(figure: Figure) -> tuple[float, float]:
    if figure.low is None or figure.high is None:
        return float("nan"), float("nan")
    return figure.low, figure.high


def _rouge(
    truth: Truth, guesses: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False)
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    score_S, counts_S = np.zeros(len(truth.ids)), np.zeros(len(truth.ids))
    for index, (ids, guess, kept) in enumerate(
        zip(truth.ids, guesses, truth.masks["text"], strict=True)
    ):
        said = str(tokenizer.decode(np.asarray(ids)[kept].tolist()))
        if words.tokenize(said):
            # a special token that was guessed for a word says no word
            read = tokenizer.decode(guess[kept, 0].tolist(), skip_special_tokens=True)
            counts_S[index] = 1
            score_S[index] = scorer.score(said, str(read))["rougeL"].fmeasure
    return score_S, counts_S
