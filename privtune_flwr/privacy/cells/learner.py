"""Word-by-label counts, gathered once from the devices with noise of their own.

A device counts in how many of its sentences of a class a word occurs; a sentence counts for ``m``
words at most, chosen at random. Replacing a sentence (or its label) changes at most m entries down
and m up, each by one: the L1 sensitivity is 2m. Discrete Laplace noise, P(z) proportional to
exp(-epsilon |z| / (2m)), makes the counts epsilon-differentially private for one sentence of the
device, labels included; integers leave no trace of floating point. Ghosh, Roughgarden and
Sundararajan, STOC 2009.

Shapes: ``V`` vocabulary, ``K`` classes, ``T`` tokens of one sentence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.cells.codebook import (
    CODEBOOK,
    Tables,
    cluster,
    codebook_tables,
    word_scores,
)
from privtune_flwr.privacy.keyed import example_identity, keyed_generator
from privtune_flwr.privacy.learning import State, Update

TENSORS = "cells.safetensors"


class CellsLearner:
    """Gathers counts in one round; see :class:`privtune_flwr.privacy.learning.Learner`.

    Parameters
    ----------
    spec : MechanismSpec
        The draft's, checked.
    tables : dict
        Its artefact, see :func:`~.codebook.draft_tables`.
    num_labels : int
        K.
    """

    start_seconds = 0.0

    def __init__(self, spec: MechanismSpec, tables: Tables, num_labels: int) -> None:
        self._spec = spec
        self._tables = tables
        self._labels = num_labels
        self._cells = int(spec.params["cells"])
        self._words = int(spec.params["words"])
        self._epsilon = float(spec.params["epsilon"])

    def start(self) -> State:
        """Give empty counts."""
        shape = (len(self._tables["weights"]), self._labels)
        return {"rates": np.zeros(shape, np.float32), "inverse": np.zeros(1, np.float32)}

    def update(
        self,
        state: State,
        sequences: Sequence[NDArray[np.int32]],
        labels: Sequence[int],
        *,
        round_number: int,
        seed: int,
    ) -> Update:
        """Count words by label, with noise; only the first round has anything to say.

        ``seed`` is the device's secret, of 128 bits at least: whoever can guess it can take the
        noise off again. The same text, labels and seed give the same counts.

        Returns
        -------
        Update
            ``rates`` (V, K), noisy counts a sentence, and ``inverse``, one by the sentences: their
            means weighted by sentences are those of all devices together.

        Raises
        ------
        MechanismError
            If the state does not fit, or sentences and labels do not fit the task.
        """
        empty = self.start()
        if {n: a.shape for n, a in state.items()} != {n: a.shape for n, a in empty.items()}:
            raise MechanismError(f"{self._spec.name}: the state does not fit this task")
        if round_number > 1 or not sequences:
            return Update(empty, len(sequences))
        secret = hashlib.sha256(str(seed).encode()).digest()
        # Keyed by the text as well: were the noise of two contents the same, the difference of
        # two answers would be free of it.
        parts = [example_identity(ids_T) for ids_T in sequences]
        content = b"".join(parts) + repr([int(label) for label in labels]).encode()
        rng = keyed_generator(secret, self._spec.id, hashlib.sha256(content).digest())
        counts_VK = self._count(sequences, labels, rng)
        text_V = self._tables["weights"] > 0
        noise_NK = discrete_laplace(
            rng, (int(text_V.sum()), self._labels), self._epsilon / (2 * self._words)
        )
        counts_VK[text_V] += noise_NK
        change = {
            "rates": (counts_VK / len(sequences)).astype(np.float32),
            "inverse": np.array([1 / len(sequences)], dtype=np.float32),
        }
        return Update(change, len(sequences))

    def apply(self, state: State, mean_change: State) -> State:
        """Add the mean change."""
        return {n: (array + mean_change[n]).astype(np.float32) for n, array in state.items()}

    def finish(self, state: State, folder: Path) -> MechanismSpec:
        """Score words, put those of like score into a cell, and freeze."""
        from safetensors.numpy import save_file

        weights_V = self._tables["weights"].astype(np.float64)
        text = np.flatnonzero(weights_V > 0)
        scores_NK = word_scores(state["rates"][text], float(state["inverse"][0]))
        label_N = cluster(scores_NK, weights_V[text], self._cells - 1)
        reduced_NQ = self._tables["reduced"][text].astype(np.float64)
        rows_ND = self._tables["mean"] + reduced_NQ @ self._tables["axes"]
        tables = codebook_tables(label_N, rows_ND, weights_V[text], text, len(weights_V))
        save_file(tables, folder / TENSORS)
        params = {**self._spec.params, "codewords": len(tables[CODEBOOK]), "rounds_done": 1}
        return MechanismSpec(self._spec.name, params, Manifest.of(folder).id)

    def _count(
        self,
        sequences: Sequence[NDArray[np.int32]],
        labels: Sequence[int],
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        text_V = self._tables["weights"] > 0
        counts_VK = np.zeros((len(text_V), self._labels), dtype=np.int64)
        for ids_T, label in zip(sequences, labels, strict=True):
            if not 0 <= label < self._labels:
                raise MechanismError(f"{self._spec.name}: a label lies outside the task's classes")
            if len(ids_T) and not (ids_T.min() >= 0 and ids_T.max() < len(text_V)):
                raise MechanismError(f"{self._spec.name}: a token id lies outside the vocabulary")
            words: NDArray[Any] = np.unique(ids_T)
            words = words[text_V[words]]
            if len(words) > self._words:
                words = rng.choice(words, self._words, replace=False)
            counts_VK[words, label] += 1
        return counts_VK


def discrete_laplace(
    rng: np.random.Generator, shape: tuple[int, ...], rate: float
) -> NDArray[np.int64]:
    """Draw integers with P(z) proportional to exp(-rate |z|): a difference of two geometrics."""
    stop = -math.expm1(-rate)
    return rng.geometric(stop, shape) - rng.geometric(stop, shape)
