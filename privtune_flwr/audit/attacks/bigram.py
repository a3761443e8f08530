"""Which word follows which: a bigram model, and what it makes of uncertain readings of a sentence.

The model is Kneser and Ney's (1995), interpolated: an absolute discount D is taken off each bigram
that was seen, what it frees goes to a unigram distribution u, and u counts in how many contexts a
token was seen rather than how often:

    P(w | v) = max(n_vw - D, 0) / n_v + (D t_v / n_v) u_w

with n_vw the occurrences of v w and t_v the number of different tokens seen after v. An attacker
who owns text of the source to be read discounts that and backs off to a mixture of u with the same
model of the other text; discount and shares are chosen on held-out text.

As a matrix that is a sparse one plus an outer product, so that forward and backward passes run
over the *whole* vocabulary at the price of the bigrams that were seen; no state is pruned. A
boundary, which is no token, precedes and follows each sentence; given the number of rows, a
sentence starts from it and ends in it.

Shapes: ``T`` tokens of a sentence, ``V`` vocabulary, ``B`` sentences at once, ``k`` guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from privtune_flwr.models.bottom import length_sorted_batches

Sequences = Sequence[NDArray[np.integer[Any]]]

_PSEUDO_COUNT = 0.5
_CELLS_AT_ONCE = 2**22  # float64 numbers of one array over tokens and vocabulary: 32 MiB
_HELD_OUT = 10  # every tenth sentence
_DISCOUNTS = (0.7, 0.8, 0.9)
_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the other text's model, where in-domain text has no answer
_WEIGHTS = (1.0, 3.0, 10.0)  # of in-domain contexts in u
_TINY = 1e-300


@dataclass(frozen=True)
class Bigram:
    """A Markov chain over tokens with P(w | v) = seen_vw + backoff_v unigram_w.

    Attributes
    ----------
    seen_VV : sparse float64 array, shape (V, V)
        The bigrams' part, row v to column w.
    backoff_V : float64 array, shape (V,)
        The weight of the unigrams after v.
    unigram_V : float64 array, shape (V,)
        Positive; with the boundary's share they sum to one.
    start_V, end_V : float64 arrays, shape (V,)
        P(first token), and P(the sentence is over | its last token).
    """

    seen_VV: sparse.csr_array
    backoff_V: NDArray[np.float64]
    unigram_V: NDArray[np.float64]
    start_V: NDArray[np.float64]
    end_V: NDArray[np.float64]

    @classmethod
    def fit(cls, sequences: Sequences, vocabulary: int, *, in_domain: Sequences = ()) -> Self:
        """Count bigrams; choose the weights of unigrams and of in-domain text on held-out text.

        Parameters
        ----------
        sequences : sequence of int arrays (T,)
            Token ids of whole sentences, special tokens included.
        vocabulary : int
            V.
        in_domain : sequence of int arrays (T,)
            Text of the source to be read, if there is any: then the held-out text is of it.

        Raises
        ------
        ValueError
            If there is no text.
        """
        general, own = list(sequences), list(in_domain)
        if not general and not own:
            raise ValueError("a bigram model needs text")
        if not general:
            general, own = own, []
        kept = [s for i, s in enumerate(own or general) if i % _HELD_OUT]
        held = _counts((own or general)[::_HELD_OUT], vocabulary)
        counts = _counts(general, vocabulary), _counts(own, vocabulary)
        rest = _counts(kept, vocabulary)
        parts = (counts[0], rest) if own else (rest, counts[1])
        grid = product(_DISCOUNTS, _SHARES, _WEIGHTS) if own else product(_DISCOUNTS, [1.0], [0.0])
        return cls._mix(*counts, *max(grid, key=lambda s: cls._mix(*parts, *s)._score(held)))

    def top(
        self,
        lengths: Sequence[int],
        log_likelihood: Callable[[int], NDArray[Any]],
        k: int = 1,
        tell: Callable[[float], None] = lambda share: None,
    ) -> list[NDArray[np.int64]]:
        """List the tokens with the largest marginals p(token | all rows of its sentence).

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each sentence.
        log_likelihood : callable
            Gives, by the sentence's index, log p(row | v) up to a constant a row, (T, V); asked
            once a sentence, in order of length, so that never all are in memory.
        k : int
            Guesses a token.
        tell : callable
            Told the share that is done.

        Returns
        -------
        list of int64 arrays (T, k)
            Likeliest first.
        """
        guesses = [np.empty((0, k), np.int64) for _ in lengths]
        done = 0
        for batch in length_sorted_batches(lengths, _CELLS_AT_ONCE // len(self.start_V)):
            posterior_TVB = self._smooth([log_likelihood(i) for i in batch])
            for row, i in enumerate(batch):
                guesses[i] = _largest(posterior_TVB[: lengths[i], :, row], k)
            done += len(batch)
            tell(done / len(lengths))
        return guesses

    def marginals(self, log_likelihoods: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
        """Give log p(v | all rows of the sentence), (T, V) each, of a few sentences.

        Parameters
        ----------
        log_likelihoods : sequence of arrays (T, V)
            log p(row | v) up to a constant a row.
        """
        lengths = [len(values) for values in log_likelihoods]
        results = [np.empty((0, len(self.start_V))) for _ in lengths]
        for batch in length_sorted_batches(lengths, _CELLS_AT_ONCE // len(self.start_V)):
            posterior_TVB = self._smooth([log_likelihoods[i] for i in batch])
            with np.errstate(divide="ignore"):
                for row, i in enumerate(batch):
                    results[i] = np.log(posterior_TVB[: lengths[i], :, row])
        return results

    def prior_guess(self, lengths: Sequence[int], k: int = 1) -> list[NDArray[np.int64]]:
        """Guess from the lengths alone, nothing else released.

        Token t of T has p(v) proportional to (start P^(t-1))_v (P^(T-t) end)_v: powers of the chain
        applied to two vectors, which all sentences share. The known answer of :meth:`top` with
        likelihoods that say nothing.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each sentence.
        k : int
            Guesses a token.

        Returns
        -------
        list of int64 arrays (T, k)
            Likeliest first.
        """
        ahead, behind = [self.start_V], [self.end_V]
        for _ in range(max(lengths, default=1) - 1):
            last_V, first_V = ahead[-1], behind[-1]
            ahead.append(last_V @ self.seen_VV + (last_V @ self.backoff_V) * self.unigram_V)
            behind.append(self.seen_VV @ first_V + self.backoff_V * (self.unigram_V @ first_V))
            # Most sentences would be over by now; only ratios matter.
            ahead[-1] /= ahead[-1].sum()
            behind[-1] /= behind[-1].sum()
        known = {
            n: _largest(np.stack([ahead[t] * behind[n - 1 - t] for t in range(n)]), k)
            for n in set(lengths)
            if n
        }
        return [known[n] if n else np.empty((0, k), np.int64) for n in lengths]

    def _smooth(self, log_likelihoods: list[NDArray[Any]]) -> NDArray[np.float64]:
        """Give marginals (T, V, B) by forward and backward passes; rows after an end are zero."""
        lengths_B = np.array([len(values) for values in log_likelihoods])
        shape = (int(lengths_B.max()), len(self.start_V), len(lengths_B))
        like_TVB, alpha_TVB = np.zeros(shape), np.empty(shape)
        for t in range(shape[0]):
            here = np.flatnonzero(lengths_B > t)
            log_BV = np.stack([log_likelihoods[row][t] for row in here]).astype(np.float64)
            log_BV -= log_BV.max(axis=1, keepdims=True)
            like_TVB[t][:, here] = np.exp(log_BV, out=log_BV).T
        expected_VB = np.repeat(self.start_V[:, None], shape[2], axis=1)
        forward_VV, ones_V = self.seen_VV.T.tocsr(), np.ones(shape[1])
        for t in range(shape[0]):
            np.multiply(expected_VB, like_TVB[t], out=alpha_TVB[t])
            alpha_TVB[t] /= np.maximum(ones_V @ alpha_TVB[t], _TINY)
            expected_VB = forward_VV @ alpha_TVB[t]
            expected_VB += np.outer(self.unigram_V, self.backoff_V @ alpha_TVB[t])
        beta_VB = np.zeros(shape[1:])
        for t in reversed(range(shape[0])):
            beta_VB[:, lengths_B == t + 1] = self.end_V[:, None]
            alpha_TVB[t] *= beta_VB
            alpha_TVB[t] /= np.maximum(ones_V @ alpha_TVB[t], _TINY)
            seen_VB = like_TVB[t] * beta_VB
            seen_VB /= np.maximum(ones_V @ seen_VB, _TINY)
            beta_VB = self.seen_VV @ seen_VB
            beta_VB += np.outer(self.backoff_V, self.unigram_V @ seen_VB)
        return alpha_TVB

    @classmethod
    def _mix(
        cls,
        general_NN: sparse.csr_array,
        own_NN: sparse.csr_array,
        discount: float,
        share: float,
        weight: float,
    ) -> Self:
        """Make the chain of two texts' counts over V tokens and, last, the boundary."""
        unigram_N = _contexts(general_NN) + weight * _contexts(own_NN) + _PSEUDO_COUNT
        unigram_N /= unigram_N.sum()
        seen_NN, freed_N = _discounted(general_NN, discount)
        # Without in-domain text all of its mass is free, and the share of the general model one.
        own_seen_NN, own_freed_N = _discounted(own_NN, discount)
        seen_NN = own_seen_NN + sparse.diags_array(share * own_freed_N) @ seen_NN
        freed_N = own_freed_N * (share * freed_N + 1 - share)
        seen_NN, edge = seen_NN.tocsr(), len(freed_N) - 1
        start_N = seen_NN[[edge]].toarray()[0] + freed_N[edge] * unigram_N
        end_N = seen_NN[:, [edge]].toarray()[:, 0] + freed_N * unigram_N[edge]
        seen_VV = sparse.csr_array(seen_NN[:edge, :edge])
        return cls(seen_VV, freed_N[:-1], unigram_N[:-1], start_N[:-1], end_N[:-1])

    def _score(self, counts_NN: sparse.csr_array) -> float:
        """Log-likelihood of held-out text, given as its counts, boundaries aside."""
        held = counts_NN[:-1, :-1].tocoo()
        rows, columns = held.coords
        seen = np.asarray(self.seen_VV[rows, columns]).ravel()
        probability = seen + self.backoff_V[rows] * self.unigram_V[columns]
        return float(held.data @ np.log(probability))


def _counts(sequences: Sequences, vocabulary: int) -> sparse.csr_array:
    """Count the bigrams of sentences between boundaries, (V + 1, V + 1)."""
    edge = np.array([vocabulary])
    size = vocabulary + 1
    if not sequences:
        return sparse.csr_array((size, size), dtype=np.float64)
    text = np.concatenate([edge, *(part for s in sequences for part in (s, edge))]).astype(np.int64)
    ones = np.ones(len(text) - 1)
    return sparse.coo_array((ones, (text[:-1], text[1:])), shape=(size, size)).tocsr()


def _contexts(counts_NN: sparse.csr_array) -> NDArray[np.float64]:
    """Count the different tokens seen before each token."""
    return np.bincount(counts_NN.indices, minlength=counts_NN.shape[1]).astype(np.float64)


def _discounted(
    counts_NN: sparse.csr_array, discount: float
) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    """Give discounted conditional frequencies, and what they leave of each row's mass."""
    total_N = np.asarray(counts_NN.sum(axis=1), dtype=np.float64)
    types_N = np.diff(counts_NN.indptr)
    # Counts are one at least, so none falls below zero.
    lowered = np.repeat(1 / total_N[types_N > 0], types_N[types_N > 0])
    lowered *= counts_NN.data - discount
    seen_NN = sparse.csr_array((lowered, counts_NN.indices, counts_NN.indptr), counts_NN.shape)
    return seen_NN, np.where(types_N > 0, discount * types_N / np.maximum(total_N, 1), 1.0)


def _largest(weights_TV: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Give the columns of the k largest entries of each row, largest first."""
    best: NDArray[np.int64] = (
        torch.from_numpy(np.ascontiguousarray(weights_TV)).topk(k).indices.numpy()
    )
    return best
