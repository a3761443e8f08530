"""Text to token ids, ragged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[NDArray[np.int32]]:
    """Tokenise without padding, special tokens included.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The bottom model's.
    texts : Sequence[str]
        Any number of texts.
    max_length : int
        Tokens a text at most, special ones counted; the rest is cut off.

    Returns
    -------
    list[NDArray[np.int32]]
        One array of shape (T,) for each text, 1 <= T <= ``max_length``.

    Raises
    ------
    ValueError
        If a text has no tokens at all; the message counts them.
    """
    if not texts:
        return []
    # Padding is named because a tokenizer file may bring its own (MiniLM's pads to 128).
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    sequences = [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    empty = sum(len(ids) == 0 for ids in sequences)
    if empty:
        raise ValueError(f"{empty} of {len(texts)} texts have no tokens")
    return sequences
