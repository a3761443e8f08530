"""Sentences from tokens at positions, by the second block's span.

The input of the second block's attention depends on the whole sentence, so a sentence that was in
the batch has all its rows in that block's span, and a mixture of two has not. With one candidate a
position there is nothing to search. Otherwise sentences are searched by coordinate: from a random
choice, at one position after the other the token that brings the rows nearest to the span, with
restarts from tokens that no sentence has explained yet. DAGER (arXiv 2405.15586) enumerates for
encoders; this search is ours, and gives up when its time is over.

Legend: T tokens, P positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import CloudKnowledge
from privtune_flwr.audit.updates.inputs import sentence_inputs
from privtune_flwr.audit.updates.span import Span

_SWEEPS = 4
_MOST = 64  # sentences a forward pass
_TRUE = 0.98  # share of rows inside from which a sentence counts as found
_TOO_MANY = 4  # sentences: beyond, the search is hopeless in its time


def assemble(
    knowledge: CloudKnowledge,
    found: Sequence[NDArray[np.int64]],
    span: Span | None,
    *,
    sentences: int,
    seconds: float,
) -> list[NDArray[np.int64]]:
    """Put sentences together.

    Parameters
    ----------
    found : sequence of int arrays
        Tokens that may stand at each position.
    span : Span or None
        Of the second block's inputs; the sent state must be in the model.
    sentences : int
        How many there are.
    seconds : float
        Of computing, after which the search ends; what was found by then is given.
    """
    ends = _ends(found, knowledge)
    if sentences == 1 and ends:
        # one sentence ends once, and its tokens stand nearest to the span
        return [np.array([place[0] for place in found[: ends[-1] + 1]], dtype=np.int64)]
    if sentences > _TOO_MANY or span is None or span.full or not ends:
        return []
    return _Search(knowledge, found, span, ends).run(sentences, time.process_time() + seconds)


def _ends(found: Sequence[NDArray[np.int64]], knowledge: CloudKnowledge) -> list[int]:
    """List the positions at which a sentence may end."""
    last = knowledge.tokenizer.sep_token_id or knowledge.tokenizer.eos_token_id
    return [p for p, tokens in enumerate(found) if p > 0 and last in tokens]


class _Search:
    def __init__(
        self,
        knowledge: CloudKnowledge,
        found: Sequence[NDArray[np.int64]],
        span: Span,
        ends: Sequence[int],
    ) -> None:
        self.model = knowledge.model
        self.span = span
        self.ends = ends
        self.last = knowledge.tokenizer.sep_token_id or knowledge.tokenizer.eos_token_id
        # inside a sentence there is no end
        self.found = [f[f != self.last] if (f != self.last).any() else f for f in found]
        self.rng = np.random.default_rng(0)

    def run(self, sentences: int, deadline: float) -> list[NDArray[np.int64]]:
        """Look for sentences until all are found or the time is over."""
        done: list[NDArray[np.int64]] = []
        while len(done) < sentences and time.process_time() < deadline:
            left = [e for e in self.ends if e + 1 not in {len(d) for d in done}] or self.ends
            end = int(self.rng.choice(left))
            sentence, share = self._climb(self._start(end, done), deadline)
            if share >= _TRUE and not any(np.array_equal(sentence, d) for d in done):
                done.append(sentence)
        return done

    def _start(self, end: int, done: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Draw a token a position, one that is not explained if there is any."""
        chosen = []
        for place, tokens in enumerate(self.found[:end]):
            used = {int(d[place]) for d in done if place < len(d)}
            fresh = [int(t) for t in tokens if int(t) not in used] or [int(t) for t in tokens]
            chosen.append(int(self.rng.choice(fresh)))
        return np.array([*chosen, self.last], dtype=np.int64)

    def _climb(
        self, sentence: NDArray[np.int64], deadline: float
    ) -> tuple[NDArray[np.int64], float]:
        best, share = self._score([sentence])
        value = best[0]
        for _ in range(_SWEEPS):
            before = value
            for place in self.rng.permutation(len(sentence) - 1):
                others = [t for t in self.found[place] if t != sentence[place]][:_MOST]
                if not others:
                    continue
                tried = []
                for token in others:
                    changed = sentence.copy()
                    changed[place] = token
                    tried.append(changed)
                values, shares = self._score(tried)
                nearest = int(np.argmin(values))
                if values[nearest] < value:
                    sentence, value = tried[nearest], values[nearest]
                    share = shares[nearest : nearest + 1]
                if time.process_time() > deadline:
                    return sentence, float(share[0])
            if share[0] >= _TRUE or value == before:
                break
        return sentence, float(share[0])

    def _score(
        self, sentences: Sequence[NDArray[np.int64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the mean distance of each sentence's rows, and the share of rows inside."""
        values, shares = [], []
        for rows_TD in sentence_inputs(self.model, sentences, 1):
            distance, _ = self.span.outside(rows_TD)
            values.append(distance.mean())
            shares.append(self.span.holds(rows_TD).mean())
        return np.array(values), np.array(shares)
