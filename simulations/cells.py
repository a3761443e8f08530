"""A mechanism with finitely many outputs, for attacks whose right answer can be computed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.base import Channel, Guarantee, Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.public import PublicKnowledge

CELLS, FLIP = 64, 0.2


class Cells(Mechanism):
    """Each token's cell of the vocabulary, exchanged for a random one with probability FLIP.

    Tokens of similar public frequency share a cell, which hides the common ones from each other.
    Nobody should train on it: it is in no registry, and devices refuse it.

    Parameters
    ----------
    public : PublicKnowledge
        Its counts order the vocabulary.
    """

    name: ClassVar[str] = "cells-for-tests"

    def __init__(self, public: PublicKnowledge) -> None:
        super().__init__(MechanismSpec(self.name, {"cells": CELLS, "flip": FLIP}))
        vocabulary = public.vocab_size
        self.cell_v = np.empty(vocabulary, dtype=np.int64)
        self.cell_v[np.argsort(-public.counts, kind="stable")] = np.minimum(
            np.arange(vocabulary) // 32, CELLS - 1
        )
        self.codebook_cd = np.random.default_rng(3).normal(size=(CELLS, public.hidden_size))

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> NoReturn:
        """Refuse: it is built from public knowledge directly."""
        raise MechanismError(f"{cls.name}: is attacked, never designed")

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Refuse: no device runs it."""
        raise MechanismError(f"{cls.name}: no device runs it")

    @property
    def eta_max(self) -> None:
        """Nothing is promised in terms of eta."""

    def guarantee(self) -> Guarantee:
        """State k-ary randomised response over cells."""
        epsilon = float(np.log(1 + CELLS * (1 - FLIP) / FLIP))
        return Guarantee(
            metric="cells: equal or not",
            adversary="knows everything but the device's secret",
            eta=None,
            statement=f"Each token's cell is {epsilon:.3g}-locally differentially private.",
        )

    def channel(self) -> Channel:
        """Give the codebook and P(cell | token)."""
        table_vc = np.full((len(self.cell_v), CELLS), FLIP / CELLS)
        table_vc[np.arange(len(self.cell_v)), self.cell_v] += 1 - FLIP
        return Channel(self.codebook_cd, table_vc)

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        random_T = rng.integers(CELLS, size=len(ids_T))
        flipped_T = rng.random(len(ids_T)) < FLIP
        return self.codebook_cd[np.where(flipped_T, random_T, self.cell_v[ids_T])]
