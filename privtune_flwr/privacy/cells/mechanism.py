"""The mechanisms ``cells`` and ``cells-labels``: a token is released as its cell of the vocabulary.

Our own design, the second-best kind of release against an attacker who knows everything, and a
baseline for the ``bottleneck``. ``cells`` are made from public text alone; ``cells-labels`` put
words of like class scores together, and the scores come from word-label counts that devices send
with noise, once.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary, ``C`` cells.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.artefact import read_tensors
from privtune_flwr.privacy.base import (
    Channel,
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    Param,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.cells.codebook import (
    CELL,
    CODEBOOK,
    Tables,
    axes_of,
    draft_tables,
    public_tables,
)
from privtune_flwr.privacy.cells.learner import TENSORS, CellsLearner
from privtune_flwr.privacy.dchi import DIMENSION_RANGE

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.privtune.bank import Bottom
    from privtune_flwr.privacy.public import PublicKnowledge

MAX_CELLS = 1024
_VOCABULARY_RANGE = (2, 10_000_000)


class Cells(Mechanism):
    """Replace each row by the row of its token's cell.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    tables : dict
        ``cell`` (V,) and ``codebook`` (C, d); empty for a draft that is not learned yet.
    """

    name: ClassVar[str] = "cells"
    additive: ClassVar[bool] = False

    _NAMES: ClassVar[tuple[str, ...]] = ("cells", "codewords", "dimension", "vocabulary")
    _LEAST: ClassVar[int] = 1

    def __init__(self, spec: MechanismSpec, tables: Tables) -> None:
        super().__init__(spec)
        self._tables = tables

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Cluster the bank and write cells and codebook as the artefact."""
        cells = config.cells.cells
        tables = public.cached("cells", {"cells": cells}, lambda: public_tables(public, cells))
        params: dict[str, Param] = {
            "cells": cells,
            "codewords": len(tables[CODEBOOK]),
            "dimension": public.hidden_size,
            "vocabulary": public.vocab_size,
        }
        return MechanismSpec(cls.name, params, _save(tables, folder))

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from what the cloud sent."""
        codewords, dimension, vocabulary = cls._read(spec)
        if codewords == 0:
            return cls(spec, {})
        wanted = {
            CELL: (np.int32, (vocabulary,)),
            CODEBOOK: (np.float32, (codewords, dimension)),
        }
        tables = read_tensors(cls.name, artefact, TENSORS, wanted)
        if tables[CELL].min() < 0 or tables[CELL].max() >= codewords:
            raise MechanismError(f"{cls.name}.codewords = {codewords}: a cell lies outside")
        if len(np.unique(tables[CODEBOOK], axis=0)) < codewords:
            raise MechanismError(f"{cls.name}: two rows of the codebook are the same")
        return cls(spec, tables)

    @classmethod
    def _read(cls, spec: MechanismSpec) -> tuple[int, int, int]:
        """Check the parameters; give codewords, dimension and vocabulary."""
        reader = ParamReader(spec, cls._NAMES)
        cells = reader.integer("cells", 2, MAX_CELLS)
        return (
            reader.integer("codewords", cls._LEAST, cells),
            reader.integer("dimension", *DIMENSION_RANGE),
            reader.integer("vocabulary", *_VOCABULARY_RANGE),
        )

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Bound the bits by the number of cells that was asked for: no artefact has more."""
        cls._read(spec)
        return Strength(bits=math.log2(int(spec.params["cells"])))

    @property
    def eta_max(self) -> None:
        """None: two tokens of different cells are simply told apart."""
        return None

    @property
    def strength(self) -> Strength:
        """Bits: log2 of the number of cells."""
        codewords = int(self.spec.params["codewords"])
        return Strength(bits=math.log2(codewords)) if codewords else self.declared(self.spec)

    def channel(self) -> Channel | None:
        """Give the codebook and, for each token, certainty of its cell; None for a draft."""
        if not self._tables:
            return None
        cell_V, codebook_CD = self._tables[CELL], self._tables[CODEBOOK]
        table_VC = np.zeros((len(cell_V), len(codebook_CD)), dtype=np.float32)
        table_VC[np.arange(len(cell_V)), cell_V] = 1
        return Channel(codebook_CD, table_VC)

    def guarantee(self) -> Guarantee:
        """Say what a cell tells."""
        return Guarantee(
            metric="none: tokens of one cell, or not",
            adversary="knows everything but the device's secret; there is no chance in a release, "
            "so knowing the secret would not help him either",
            eta=None,
            statement=f"A token's row is that of its cell, whatever its context: one of at most "
            f"{int(self.spec.params['cells'])}, hence {self.strength.bits:.6g} bits at most, "
            "special tokens included. Words of one cell cannot be told apart by their own row. A "
            "word that has a cell of its own is told outright, and sequences of cells tell more "
            "than single ones, since text is redundant: an attacker with text of the same domain "
            "gains much from bigrams. The cloud supplies the cells; the device checks their "
            f"number, not how they were made.{self._learning_statement()}",
        )

    def _learning_statement(self) -> str:
        return ""

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        if not self._tables:
            raise MechanismError(f"{self.name}: has not been learned yet; nothing released")
        cell_V, codebook_CD = self._tables[CELL], self._tables[CODEBOOK]
        if hidden_TD.shape[1] != codebook_CD.shape[1]:
            raise MechanismError(
                f"{self.name}.dimension = {codebook_CD.shape[1]}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= len(cell_V)):
            raise MechanismError(
                f"{self.name}.vocabulary = {len(cell_V)}: a token id lies outside it"
            )
        return codebook_CD[cell_V[ids_T]].astype(np.float64)


class LabelCells(Cells):
    """Cells of words with like class scores, learned from noisy word-label counts."""

    name: ClassVar[str] = "cells-labels"
    learned: ClassVar[bool] = True

    _NAMES: ClassVar[tuple[str, ...]] = (*Cells._NAMES, "words", "epsilon", "rounds_done")
    _LEAST: ClassVar[int] = 0

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Write a draft: what the learning needs of the bank. Nothing can be released with it.

        Raises
        ------
        MechanismError
            If the learning has several rounds, or clipping and noise besides the counts' own.
        """
        learning = config.learning
        if learning.rounds != 1:
            raise MechanismError(
                f"privacy.learning.rounds = {learning.rounds}: {cls.name} learns in 1 round"
            )
        if learning.clip > 0 or learning.noise > 0:
            raise MechanismError(
                f"privacy.learning.clip and noise must be 0: {cls.name} clips and noises its "
                "counts itself, see privacy.cells.epsilon"
            )
        tables = public.cached("cells-draft", {}, lambda: draft_tables(public))
        params: dict[str, Param] = {
            "cells": config.cells.cells,
            "words": config.cells.words,
            "epsilon": config.cells.epsilon,
            "codewords": 0,
            "dimension": public.hidden_size,
            "vocabulary": public.vocab_size,
            "rounds_done": 0,
        }
        return MechanismSpec(cls.name, params, _save(tables, folder))

    @classmethod
    def _read(cls, spec: MechanismSpec) -> tuple[int, int, int]:
        read = super()._read(spec)
        reader = ParamReader(spec, cls._NAMES)
        reader.integer("words", 1, 1000)
        reader.real("epsilon", 1e-3, 1e4)
        if (reader.integer("rounds_done", 0, 1) == 0) != (read[0] == 0):
            raise MechanismError(f"{cls.name}.codewords: 0 before the learning, and only then")
        return read

    @classmethod
    def learner(
        cls, spec: MechanismSpec, artefact: Path | None, bottom: Bottom, num_labels: int
    ) -> CellsLearner:
        """Build what gathers the counts; ``artefact`` is the draft's."""
        codewords, dimension, vocabulary = cls._read(spec)
        if codewords:
            raise MechanismError(f"{cls.name}: is frozen and cannot be learned again")
        if (dimension, vocabulary) != (bottom.hidden_size, bottom.vocab_size):
            raise MechanismError(f"{cls.name}: dimension or vocabulary is not the bottom model's")
        axes = axes_of(dimension)
        wanted = {
            "reduced": (np.float16, (vocabulary, axes)),
            "axes": (np.float32, (axes, dimension)),
            "mean": (np.float32, (dimension,)),
            "weights": (np.float32, (vocabulary,)),
        }
        tables = read_tensors(cls.name, artefact, TENSORS, wanted)
        if tables["weights"].min() < 0 or tables["weights"].max() <= 0:
            raise MechanismError(f"{cls.name}: weights of the artefact must not be negative")
        return CellsLearner(spec, tables, num_labels)

    def _learning_statement(self) -> str:
        words, epsilon = self.spec.params["words"], float(self.spec.params["epsilon"])
        return (
            f" The cells were made from word-label counts, in which a sentence counts for {words} "
            f"words at most, with discrete Laplace noise of each device: {epsilon:.6g}-"
            "differentially private for one sentence of a device and its label, against everybody "
            "but itself. Repeating the question repeats the answer; learning under another "
            "specification draws other noise, and that composes."
        )


def _save(tables: Tables, folder: Path) -> str:
    from safetensors.numpy import save_file

    # Plain copies: cached tables are memory-mapped.
    save_file({name: np.array(table) for name, table in tables.items()}, folder / TENSORS)
    return Manifest.of(folder).id
