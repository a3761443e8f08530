"""Kinds of tokens that a measure counts, and the truth an audit is judged by.

A kind is a property of the token (special, content, rare) or of the word it stands in (name,
number). Words are looked up in the original text, since a tokenizer may have dropped their case.

Shapes: ``T`` tokens of one sentence, ``V`` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["text", "content", "names", "numbers", "rare"]
Masks = list[NDArray[np.bool_]]

RARE_BELOW = 5
_MARKS = ("##", "Ġ", "▁")
_WORD = re.compile(r"[^\W_]+")
# What may stand between two words if the second opens a sentence or a quotation.
_OPENS = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*\s|[\r\n]|\s[(\[]*[\"'\u201c\u2018]")
# A full stop after these ends no sentence; so it is after a single letter (an initial).
_TITLES = frozenset({"mr", "mrs", "ms", "dr", "st"})
_SAME_SENTENCE = re.compile(r"\.\s")
_PRONOUN = "I"


@dataclass(frozen=True)
class Truth:
    """What the attacked rows really were; made by :meth:`of`.

    Attributes
    ----------
    ids : sequence of int arrays (T,)
        True token ids, special ones included.
    texts : sequence of str
        The original texts, their case kept.
    masks : dict
        For each kind a list of boolean arrays (T,): which tokens are of it.
    """

    ids: Sequence[NDArray[Any]]
    texts: Sequence[str]
    masks: dict[Kind, Masks]

    @classmethod
    def of(
        cls,
        ids: Sequence[NDArray[Any]],
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        counts_V: NDArray[Any],
    ) -> Truth:
        """Mark all tokens once.

        Parameters
        ----------
        ids, texts
            The same sentences in the same order.
        tokenizer : PreTrainedTokenizerBase
            A fast one: it maps tokens to characters.
        counts_V : int array, shape (V,)
            Occurrences in the public text; entries beyond count as never seen.

        Raises
        ------
        ValueError
            If there is no sentence, or a text does not give its ids.
        """
        if not ids or len(ids) != len(texts):
            raise ValueError(f"{len(ids)} sentences of tokens and {len(texts)} texts")
        spans = _spans(ids, texts, tokenizer)
        size = vocabulary_size(ids, tokenizer)
        text_V = ~special_mask(tokenizer, size)
        counts = np.zeros(size, dtype=np.int64)
        counts[: len(counts_V)] = np.asarray(counts_V)[:size]
        by_token: dict[Kind, NDArray[np.bool_]] = {
            "text": text_V,
            "content": content_mask(tokenizer, size),
            "rare": text_V & (counts < RARE_BELOW),
        }
        masks: dict[Kind, Masks] = {
            kind: [mask_V[np.asarray(i, dtype=np.int64)] for i in ids]
            for kind, mask_V in by_token.items()
        }
        words = [(list(names_of(text)), list(numbers_of(text))) for text in texts]
        for kind, which in (("names", 0), ("numbers", 1)):
            masks[kind] = [  # type: ignore[index]
                _covered(s, w[which]) & t
                for s, w, t in zip(spans, words, masks["text"], strict=True)
            ]
        return cls(ids, texts, masks)

    def first(self, sentences: int) -> Truth:
        """Give the truth about the first sentences alone."""
        masks: dict[Kind, Masks] = {kind: mask[:sentences] for kind, mask in self.masks.items()}
        return Truth(self.ids[:sentences], self.texts[:sentences], masks)


def vocabulary_size(ids: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Give V, at least the tokenizer's and large enough for every id."""
    largest = max((int(np.max(i, initial=0)) for i in ids), default=0)
    return max(len(tokenizer), largest + 1)


def special_mask(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.bool_]:
    """Mark the tokenizer's special tokens, shape (size,)."""
    mask = np.zeros(size, dtype=bool)
    mask[[int(i) for i in tokenizer.all_special_ids if i < size]] = True
    return mask


@lru_cache(maxsize=4)  # every attack's measures ask for it, and it walks the whole vocabulary
def content_mask(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.bool_]:
    """Mark content tokens, shape (size,); the array is shared and cannot be written to.

    They are made of letters only once a word-piece or word-start mark (``##``, ``Ġ``, ``▁``) is
    taken off, have at least two letters, and are not in scikit-learn's ``ENGLISH_STOP_WORDS``.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    mask = np.zeros(size, dtype=bool)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    for index, token in enumerate(tokens):
        word = str(token)
        for mark in _MARKS:
            word = word.removeprefix(mark)
        mask[index] = len(word) >= 2 and word.isalpha() and word.lower() not in ENGLISH_STOP_WORDS
    mask[special_mask(tokenizer, size)] = False
    mask.flags.writeable = False
    return mask


def names_of(text: str) -> Iterator[tuple[int, int]]:
    """Yield the character spans of words that look like names.

    A word is a run of letters and digits. It counts if its first letter is a capital and it opens
    neither a sentence nor a quotation; the pronoun I does not count, nor does a text without any
    lower-case letter, whose capitals say nothing.
    """
    if not any(c.islower() for c in text):
        return
    end, previous = 0, ""
    for word in _WORD.finditer(text):
        opens = end == 0 or _opens(previous, text[end : word.start()])
        end, previous = word.end(), word.group()
        if not opens and previous[0].isupper() and previous != _PRONOUN:
            yield word.span()


def numbers_of(text: str) -> Iterator[tuple[int, int]]:
    """Yield the character spans of words with a digit."""
    for word in _WORD.finditer(text):
        if any(c.isdigit() for c in word.group()):
            yield word.span()


def _opens(previous: str, gap: str) -> bool:
    short = (len(previous) == 1 and previous != _PRONOUN) or previous.lower() in _TITLES
    if short and _SAME_SENTENCE.fullmatch(gap):
        return False
    return _OPENS.search(gap) is not None


def _spans(
    ids: Sequence[NDArray[Any]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[NDArray[np.int64]]:
    """Find the characters (T, 2) each token stands for."""
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max(len(i) for i in ids),
        padding=False,
        return_offsets_mapping=True,
    )
    if any(list(e) != i.tolist() for e, i in zip(encoded["input_ids"], ids, strict=True)):
        raise ValueError("a text does not give its token ids")
    return [np.asarray(o, dtype=np.int64).reshape(-1, 2) for o in encoded["offset_mapping"]]


def _covered(spans_T2: NDArray[np.int64], words: list[tuple[int, int]]) -> NDArray[np.bool_]:
    if not words:
        return np.zeros(len(spans_T2), dtype=bool)
    word_W2 = np.array(words)
    starts_before = spans_T2[:, :1] < word_W2[:, 1]
    ends_after = spans_T2[:, 1:] > word_W2[:, 0]
    return np.asarray((starts_before & ends_after).any(axis=1))
