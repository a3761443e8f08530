"""What is right by chance: an attacker that sees nothing but lengths and positions.

The best constant guess by position: at each position the commonest true token there. It is taken
from the very sentences it is judged on, so it bounds from above what any guess without content can
reach; an attack near this floor has recovered nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.measure import content_mask, recovery, special_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUPPORT = 30  # tokens a position needs; a rarer one takes the overall guess, or it would overfit


def constant_guess(
    sequences: Sequence[NDArray[Any]], eligible_V: NDArray[np.bool_]
) -> list[NDArray[np.int64]]:
    """Guess the commonest eligible token of each position.

    Parameters
    ----------
    sequences : sequence of int arrays (T,)
        The true tokens.
    eligible_V : bool array, shape (V,)
        Tokens that count, and may be guessed.

    Returns
    -------
    list of int64 arrays (T,)
        A guess for each token.
    """
    longest = max((len(s) for s in sequences), default=0)
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    positions = np.concatenate([np.arange(len(s)) for s in sequences])
    kept = eligible_V[ids]
    ids, positions = ids[kept], positions[kept]
    overall = int(np.bincount(ids).argmax()) if len(ids) else 0
    guess = np.full(longest, overall, dtype=np.int64)
    for position in range(longest):
        here = ids[positions == position]
        if len(here) >= _SUPPORT:
            guess[position] = np.bincount(here).argmax()
    return [guess[: len(s)] for s in sequences]


def constant_floor(
    sequences: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Measure the floor for all tokens and for content tokens, each with its own best guess.

    Returns
    -------
    tuple of float
        Shares in [0, 1], comparable with ``Recovery.all`` and ``Recovery.content``.
    """
    largest = max((int(np.max(s, initial=0)) for s in sequences), default=0)
    size = max(len(tokenizer), largest + 1)
    text_V, content_V = ~special_mask(tokenizer, size), content_mask(tokenizer, size)
    guess_all = recovery(sequences, constant_guess(sequences, text_V), tokenizer)
    guess_content = recovery(sequences, constant_guess(sequences, content_V), tokenizer)
    return guess_all.all, guess_content.content
