"""How much text an attack recovered: definitions, and their sampling error.

- *all*: the share of tokens guessed exactly, special tokens (``[CLS]``, ``[SEP]``, ...) excluded.
- *content*: the same among content tokens: made of letters only once a word-piece or word-start
  mark (``##``, ``Ġ``, ``▁``) is taken off, at least two letters, and not in scikit-learn's
  ``ENGLISH_STOP_WORDS``. Function words inflate the first figure, hence the second.

Intervals come from a bootstrap over *sentences*, since the tokens of one sentence are not
independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESAMPLES = 1000
_MARKS = ("##", "Ġ", "▁")


@dataclass(frozen=True)
class Recovery:
    """Share of tokens recovered; the module's docstring defines both figures.

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
    """Compare guesses with the truth.

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
    if [len(t) for t in true_ids] != [len(g) for g in guessed_ids]:
        raise ValueError("true and guessed sentences differ in number or length")
    if not true_ids:
        raise ValueError("no sentences to measure")
    largest = max((int(np.max(t, initial=0)) for t in true_ids), default=0)
    size = max(len(tokenizer), largest + 1)
    special_V = special_mask(tokenizer, size)
    content_V = content_mask(tokenizer, size)
    hits = [np.asarray(t) == np.asarray(g) for t, g in zip(true_ids, guessed_ids, strict=True)]
    rng = np.random.default_rng(seed)
    figures = [_share(true_ids, hits, eligible_V, rng) for eligible_V in (~special_V, content_V)]
    (share, count, interval), (share_c, count_c, interval_c) = figures
    return Recovery(share, share_c, count, count_c, interval, interval_c)


def special_mask(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.bool_]:
    """Mark the tokenizer's special tokens, shape (size,)."""
    mask = np.zeros(size, dtype=bool)
    mask[[int(i) for i in tokenizer.all_special_ids if i < size]] = True
    return mask


def content_mask(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.bool_]:
    """Mark content tokens as the module's docstring defines them, shape (size,)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    mask = np.zeros(size, dtype=bool)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    for index, token in enumerate(tokens):
        word = str(token)
        for mark in _MARKS:
            word = word.removeprefix(mark)
        mask[index] = len(word) >= 2 and word.isalpha() and word.lower() not in ENGLISH_STOP_WORDS
    mask[special_mask(tokenizer, size)] = False
    return mask


def _share(
    true_ids: Sequence[NDArray[Any]],
    hits: Sequence[NDArray[np.bool_]],
    eligible_V: NDArray[np.bool_],
    rng: np.random.Generator,
) -> tuple[float, int, tuple[float, float]]:
    counted = [eligible_V[np.asarray(ids, dtype=np.int64)] for ids in true_ids]
    total_S = np.array([c.sum() for c in counted], dtype=np.float64)
    right_S = np.array(
        [(c & h).sum() for c, h in zip(counted, hits, strict=True)], dtype=np.float64
    )
    total = int(total_S.sum())
    if total == 0:
        return float("nan"), 0, (float("nan"), float("nan"))
    # How often each sentence is drawn; sentences without a counted token cannot skew the ratio.
    drawn = rng.multinomial(len(total_S), np.full(len(total_S), 1 / len(total_S)), size=_RESAMPLES)
    resampled = (drawn @ right_S) / np.maximum(drawn @ total_S, 1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(right_S.sum() / total), total, (float(low), float(high))
