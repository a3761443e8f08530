"""What is right by chance: attackers that see nothing but lengths and positions.

- The best constant guess by position: at each position the commonest true token there. It is
  taken from the very sentences it is judged on, so it bounds from above what any guess by that
  position alone can reach; an attack near this floor has recovered nothing.
  :func:`constant_floor` counts positions from the start, :func:`floor_figures` from the nearer end
  of the sentence, which finds full stops too and is the higher of the two.
- The prior by position: the same from the attacker's own text alone, which a real attacker has.

Shapes: ``T`` tokens of one sentence, ``N`` tokens of all, ``P`` positions, ``V`` vocabulary, ``k``
guesses a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.measure import Figure, measure, recovery
from privtune_flwr.audit.tokens import Kind, Truth, content_mask, special_mask, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUPPORT = 30  # tokens a position needs; a rarer one takes the overall guess, or it would overfit
# The kind of token each figure is about, where that is not all text.
_KINDS: dict[str, Kind] = {
    "content_top1": "content",
    "content_top5": "content",
    "names": "names",
    "numbers": "numbers",
    "rare": "rare",
}


def constant_guess(
    sequences: Sequence[NDArray[Any]], eligible_V: NDArray[np.bool_], k: int = 1
) -> list[NDArray[np.int64]]:
    """Guess the commonest eligible tokens of each position.

    Parameters
    ----------
    sequences : sequence of int arrays (T,)
        The true tokens.
    eligible_V : bool array, shape (V,)
        Tokens that count, and may be guessed.
    k : int
        Guesses a token.

    Returns
    -------
    list of int64 arrays (T, k)
        Commonest first.
    """
    longest = max((len(s) for s in sequences), default=0)
    counted = [eligible_V[np.asarray(s)] for s in sequences]
    guess_Pk = _commonest(sequences, [np.arange(len(s)) for s in sequences], counted, longest, k)
    return [guess_Pk[: len(s)] for s in sequences]


def prior_guess_by_position(
    sequences: Sequence[NDArray[Any]], lengths: Sequence[int], k: int = 1
) -> list[NDArray[np.int64]]:
    """Guess the attacker's own commonest tokens of each position.

    Positions are counted from the nearer end of a sentence, as openings and endings are what is
    alike between sentences.

    Parameters
    ----------
    sequences : sequence of int arrays (T,)
        The attacker's text (public, or of the same source), never the victims'.
    lengths : sequence of int
        T of each sentence to be guessed.
    k : int
        Guesses a token.

    Returns
    -------
    list of int64 arrays (T, k)
        Commonest first.
    """
    longest = max([*(len(s) for s in sequences), *lengths])
    places = [_from_nearer_end(len(s), longest) for s in sequences]
    counted = [np.ones(len(s), dtype=bool) for s in sequences]
    guess_Pk = _commonest(sequences, places, counted, 2 * longest, k)
    return [guess_Pk[_from_nearer_end(n, longest)] for n in lengths]


def constant_floor(
    sequences: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Measure the floor for all tokens and for content tokens, each with its own best guess.

    Returns
    -------
    tuple of float
        Shares in [0, 1], comparable with ``Recovery.all`` and ``Recovery.content``.
    """
    size = vocabulary_size(sequences, tokenizer)
    text_V, content_V = ~special_mask(tokenizer, size), content_mask(tokenizer, size)
    judged = []
    for mask_V in (text_V, content_V):
        guess = constant_guess(sequences, mask_V)
        judged.append(recovery(sequences, [g[:, 0] for g in guess], tokenizer))
    return judged[0].all, judged[1].content


def floor_figures(
    truth: Truth, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> dict[str, Figure]:
    """Judge the best constant guess as :func:`~privtune_flwr.audit.measure.measure` judges attacks.

    Figures about one kind of tokens have that kind's own best guess.
    """
    longest = max(len(i) for i in truth.ids)
    places = [_from_nearer_end(len(i), longest) for i in truth.ids]
    kinds: set[Kind] = {"text", *_KINDS.values()}
    by_kind = {}
    for kind in kinds:
        guess_Pk = _commonest(truth.ids, places, truth.masks[kind], 2 * longest, 5)
        by_kind[kind] = measure(truth, [guess_Pk[p] for p in places], tokenizer, seed=seed)
    return {name: by_kind[_KINDS.get(name, "text")][name] for name in by_kind["text"]}


def _from_nearer_end(length: int, longest: int) -> NDArray[np.int64]:
    """Count positions from the start in the first half, from ``longest`` on in the second."""
    start_T = np.arange(length)
    end_T = start_T[::-1]
    return np.where(start_T <= end_T, start_T, longest + end_T)


def _commonest(
    sequences: Sequence[NDArray[Any]],
    places: Sequence[NDArray[np.int64]],
    counted: Sequence[NDArray[np.bool_]],
    number: int,
    k: int,
) -> NDArray[np.int64]:
    """Rank the counted tokens of each place by their number there, then overall: (number, k)."""
    kept_N = np.concatenate(list(counted))
    ids_N = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])[kept_N]
    places_N = np.concatenate(list(places))[kept_N]
    size = max(int(ids_N.max(initial=0)) + 1, k)
    overall_V = np.bincount(ids_N, minlength=size)
    guess_Pk = np.tile(_top(overall_V, k), (number, 1))
    for place in np.flatnonzero(np.bincount(places_N, minlength=number) >= _SUPPORT):
        here_V = np.bincount(ids_N[places_N == place], minlength=size)
        guess_Pk[place] = _top(here_V * (len(ids_N) + 1) + overall_V, k)
    return guess_Pk


def _top(score_V: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return np.argsort(-score_V, kind="stable")[:k].astype(np.int64)
