"""How much of a device's text a reading has, and what guessing common words would have had.

Tokens are judged as a bag, distinct and without special ones; content words are the auditor's
(:func:`privtune_flwr.audit.tokens.content_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import CloudKnowledge, Reading

Figures = dict[str, float | int | None]


def judge(
    reading: Reading, truth: Sequence[NDArray[Any]], knowledge: CloudKnowledge
) -> dict[str, Any]:
    """Hold a reading against the text.

    Parameters
    ----------
    reading : Reading
    truth : sequence of int arrays (T,)
        The device's sentences.
    knowledge : CloudKnowledge

    Returns
    -------
    dict
        ``token_recall``, ``token_precision`` (None without a guess), ``content_recall``,
        ``content_precision``, ``guesses``; ``positions`` and ``exact``, the shares of token
        positions and of whole sentences that are right (None if none was rebuilt); ``floor``,
        recall and precision of as many of the public text's commonest tokens, of each kind; where
        the attack guesses nothing, as many as that many public sentences have.
    """
    text = np.unique(np.concatenate([np.asarray(s, dtype=np.int64) for s in truth]))
    expected = knowledge.expected(len(truth))
    figures: dict[str, Any] = {"guesses": len(reading.tokens), "floor": {}}
    for kind, mask_V, usual in (
        ("token", knowledge.is_text, expected[0]),
        ("content", knowledge.is_content, expected[1]),
    ):
        true = text[mask_V[text]]
        guessed = reading.tokens[mask_V[reading.tokens]]
        common = knowledge.commonest[mask_V[knowledge.commonest]][: len(guessed) or usual]
        figures |= _bag(kind, guessed, true)
        figures["floor"] |= _bag(kind, common, true)
    positions, exact = _sentences(reading.sentences, truth, knowledge)
    return figures | {"positions": positions, "exact": exact}


def f1(figures: dict[str, Any], kind: str = "content") -> float:
    """Weigh recall and precision evenly; 0 where nothing is right."""
    recall, precision = figures[f"{kind}_recall"], figures[f"{kind}_precision"]
    if not recall or not precision:
        return 0.0
    return float(2 * recall * precision / (recall + precision))


def _bag(kind: str, guessed: NDArray[np.int64], true: NDArray[np.int64]) -> Figures:
    right = len(np.intersect1d(guessed, true))
    return {
        f"{kind}_recall": right / len(true) if len(true) else None,
        f"{kind}_precision": right / len(guessed) if len(guessed) else None,
    }


def _sentences(
    read: Sequence[NDArray[np.int64]], truth: Sequence[NDArray[Any]], knowledge: CloudKnowledge
) -> tuple[float | None, float | None]:
    """Match sentences one to one, the best pair first; give shares of positions and sentences."""
    if not read:
        return None, None
    counted = [knowledge.is_text[np.asarray(s, dtype=np.int64)] for s in truth]
    right = np.array([[_right(r, t, c) for r in read] for t, c in zip(truth, counted, strict=True)])
    total, whole = 0, 0
    free = right.copy()
    for _ in range(min(len(truth), len(read))):
        t, r = divmod(int(np.argmax(free)), len(read))
        if free[t, r] < 0:
            break
        total += int(right[t, r])
        whole += int(np.array_equal(read[r], truth[t]))
        free[t, :] = -1
        free[:, r] = -1
    tokens = sum(int(c.sum()) for c in counted)
    return total / max(1, tokens), whole / len(truth)


def _right(read: NDArray[np.int64], true: NDArray[Any], counted: NDArray[np.bool_]) -> int:
    size = min(len(read), len(true))
    return int(((read[:size] == np.asarray(true)[:size]) & counted[:size]).sum())
