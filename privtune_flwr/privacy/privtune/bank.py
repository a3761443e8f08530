"""The bank: one representation at the cut for each vocabulary entry (*reconstruction*).

``b_v`` is the mean of v's contextual representations over public text; an entry that the text
lacks is passed through the bottom model alone, between the special tokens of a sentence.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCES_AT_ONCE = 1024
_ENTRIES_AT_ONCE = 8192


class Bottom(Protocol):
    """What is needed of a bottom model: ``privtune_flwr.models`` has the real one."""

    def encode(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Give (T, d) for each sentence of token ids."""

    @property
    def hidden_size(self) -> int:
        """Give d."""

    @property
    def vocab_size(self) -> int:
        """Give V."""


def build_bank(
    bottom: Bottom,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[NDArray[np.int32]],
    counts_V: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Build the bank.

    Parameters
    ----------
    bottom : Bottom
        The frozen lower part of the model.
    tokenizer : PreTrainedTokenizerBase
        Tells which special tokens surround a sentence.
    sequences : sequence of int32 arrays (T,)
        Public sentences.
    counts_V : int64 array, shape (V,)
        How often each entry occurs in them.

    Returns
    -------
    float32 array, shape (V, d)
        ``b_v``, special tokens included.
    """
    bank = np.zeros((bottom.vocab_size, bottom.hidden_size), dtype=np.float64)
    for ids_N, rows_ND in encoded_rows(bottom, sequences):
        order = np.argsort(ids_N, kind="stable")
        present, starts = np.unique(ids_N[order], return_index=True)
        bank[present] += np.add.reduceat(rows_ND[order].astype(np.float64), starts, axis=0)
    seen = counts_V > 0
    bank[seen] /= counts_V[seen, None]
    unseen = np.flatnonzero(~seen)
    bank[unseen] = context_free(bottom, tokenizer, unseen)
    return bank.astype(np.float32)


def encoded_rows(
    bottom: Bottom, sequences: Sequence[NDArray[np.int32]]
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Encode sentences a bundle at a time: memory stays small however long the text is.

    Sentences of similar length go together, so that little padding is computed.

    Yields
    ------
    tuple of int32 array (N,) and float32 array (N, d)
        Token ids and representations of all tokens of a bundle, sentence after sentence.
    """
    by_length = sorted((s for s in sequences if len(s)), key=len)
    for start in range(0, len(by_length), _SENTENCES_AT_ONCE):
        bundle = by_length[start : start + _SENTENCES_AT_ONCE]
        yield np.concatenate(bundle), np.concatenate(bottom.encode(bundle))


def context_free(
    bottom: Bottom, tokenizer: PreTrainedTokenizerBase, entries: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Represent entries without context: ``[CLS] v [SEP]``, or ``[bos] v`` for decoders.

    Returns
    -------
    float32 array, shape (len(entries), d)
        In the order given.
    """
    prefix, suffix = _surroundings(tokenizer)
    rows = np.empty((len(entries), bottom.hidden_size), dtype=np.float32)
    for start in range(0, len(entries), _ENTRIES_AT_ONCE):
        part = entries[start : start + _ENTRIES_AT_ONCE]
        sentences = [np.array([*prefix, v, *suffix], dtype=np.int32) for v in part]
        encoded = bottom.encode(sentences)
        rows[start : start + len(part)] = np.stack([e[len(prefix)] for e in encoded])
    return rows


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            prefix, suffix = whole[:start], whole[start + len(bare) :]
            break
    else:
        prefix, suffix = [], []
    if not prefix and tokenizer.bos_token_id is not None:
        # A decoder's first position collects attention and looks like no other; step past it.
        prefix = [int(tokenizer.bos_token_id)]
    return prefix, suffix
