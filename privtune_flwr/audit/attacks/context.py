"""Context: a sentence is read as a whole, by a bigram model over a memoryless attack's readings.

Rows as observations, tokens as hidden states: forward and backward passes give the posterior of
each token given *all* rows of its sentence (Rabiner, 1989). Cells that a memoryless attacker reads
to 10 % this one reads to 42 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import (
    Attack,
    Family,
    PosteriorAttack,
    Released,
    Tell,
    silent,
)
from privtune_flwr.audit.attacks.bigram import Bigram

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair

_TRIED_TOKENS = 600
_TRIED_SENTENCES_SEED = 1
_EXPONENTS = (0.5, 0.7, 1.0, 1.4)


class Context(Attack):
    """Forward-backward with bigrams of the attacker's own text over another attack's posterior.

    The other attack's posterior without its prior serves as likelihood of a row, raised to a power
    that reads the attacker's own releases best: an attack that treats rows as if nothing but the
    token made them is over-confident. Nothing is pruned, see
    :mod:`privtune_flwr.audit.attacks.bigram`.

    Parameters
    ----------
    inner : PosteriorAttack
        Reads single rows; its level is this attack's. It is fitted with this attack unless it has
        been prepared already, so that an audit may share it.
    """

    family: ClassVar[Family] = "context"

    def __init__(self, inner: PosteriorAttack) -> None:
        super().__init__(inner.level)
        self._inner = inner

    @property
    def inner(self) -> PosteriorAttack:
        """The attack that reads rows."""
        return self._inner

    @property
    def name(self) -> str:
        """``context-bigram+<inner>``."""
        return f"context-bigram+{self._inner.name}"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Those of the inner attack."""
        return self._inner.settings

    @property
    def sentences(self) -> int | None:
        """As many as the inner attack is shown."""
        return self._inner.sentences

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Count bigrams, and choose how far the inner attack is to be believed."""
        self._inner.prepare(knowledge, released, lambda share: tell(0.5 * share))
        self._exponent = self._choose(knowledge, lambda share: tell(0.5 + 0.5 * share))
        public, vocabulary = knowledge.public.sequences, len(knowledge.counts)
        self._bigram = Bigram.fit(public, vocabulary, in_domain=knowledge.in_domain)
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the tokens with the largest marginals."""
        rows = released.rows
        return self._bigram.top(
            released.lengths, lambda i: self._exponent * self._likelihood(rows[i]), k, tell
        )

    def _likelihood(self, rows_TD: NDArray[np.float32]) -> NDArray[Any]:
        """Give log p(row | v) up to a constant a row, (T, V)."""
        prior_V = self._inner.log_prior().astype(np.float32)
        return self._inner.log_posterior(rows_TD) - prior_V

    def _choose(self, knowledge: Knowledge, tell: Tell) -> float:
        """Try exponents on own releases, with bigrams that have not seen those sentences."""
        pairs = self._inner.held_out(knowledge)
        if pairs is None:
            pairs = knowledge.pairs(_TRIED_TOKENS, seed=_TRIED_SENTENCES_SEED)
        tried = {pair.ids.tobytes() for pair in pairs}
        general, own = (
            [s for s in text if np.asarray(s).tobytes() not in tried]
            for text in (knowledge.public.sequences, knowledge.in_domain)
        )
        bigram = Bigram.fit(general, len(knowledge.counts), in_domain=own)
        score_E = np.zeros(len(_EXPONENTS))
        for done, pair in enumerate(pairs):
            score_E += _scores(bigram, self._likelihood(pair.rows), pair)
            tell((done + 1) / len(pairs))
        return _EXPONENTS[int(score_E.argmax())]


def _scores(bigram: Bigram, likelihood_TV: NDArray[Any], pair: Pair) -> NDArray[np.float64]:
    """Give the log-probability of a sentence's true tokens for each exponent."""
    read = bigram.marginals([exponent * likelihood_TV for exponent in _EXPONENTS])
    floor = np.log(1e-12)  # one token that is out of reach must not decide
    at = np.arange(len(pair.ids)), pair.ids
    return np.array([np.maximum(log_TV[at], floor).sum() for log_TV in read])
