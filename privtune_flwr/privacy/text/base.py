"""What mechanisms that replace tokens by tokens share.

A sentence's tokens are replaced one by one, then the bottom model encodes the new sentence: what
leaves the device is a representation of text, only not of the text it holds. The number of tokens
and the special tokens stay as they are.

Shapes: ``T`` tokens of one sentence, ``N`` tokens, ``U`` different tokens, ``d`` width of a vector,
``V`` vocabulary, ``S`` special entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.artefact import read_tensors
from privtune_flwr.privacy.base import (
    Mechanism,
    MechanismError,
    MechanismSpec,
    Param,
    ParamReader,
    TokenChannel,
)
from privtune_flwr.privacy.dchi import DIMENSION_RANGE, UNIT_RANGE
from privtune_flwr.privacy.text.vectors import Vectors

if TYPE_CHECKING:
    from privtune_flwr.privacy.privtune.bank import Bottom
    from privtune_flwr.privacy.public import PublicKnowledge

TENSORS = "text.safetensors"
#: Parameters that every specification of this family has.
COMMON = ("unit", "vocabulary", "special")
#: Log-probability of what cannot be: finite, so that sums of it stay numbers.
IMPOSSIBLE = -1e4
EPSILON_RANGE = (1e-6, 1e4)
VOCABULARY_RANGE = (4, 10_000_000)
_AT_ONCE = 64
_CHANNEL_ROWS = 256


class TokenRewrite(Mechanism):
    """Replace each token of text by one drawn for it alone; encode the new sentence.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    special_S : int64 array, shape (S,)
        Entries that are no text: never replaced, never drawn.
    vocabulary : int
        V.
    """

    reads: ClassVar[Literal["rows", "tokens"]] = "tokens"
    additive: ClassVar[bool] = False

    def __init__(
        self, spec: MechanismSpec, *, special_S: NDArray[np.int64], vocabulary: int
    ) -> None:
        super().__init__(spec)
        self.vocabulary = vocabulary
        self.special_S = special_S
        self.text_V = np.ones(vocabulary, dtype=np.bool_)
        self.text_V[special_S] = False
        self._channel: TokenChannel | None = None

    @abstractmethod
    def _draw(self, ids_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw a token for each of some text tokens."""

    @abstractmethod
    def _new_channel(self) -> TokenChannel:
        """Build the law that :meth:`token_channel` keeps."""

    def rewrite(self, ids_T: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Replace the text tokens of a sentence; special tokens stay.

        Raises
        ------
        MechanismError
            If an id lies outside the vocabulary.
        """
        if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= self.vocabulary):
            raise MechanismError(
                f"{self.name}.vocabulary = {self.vocabulary}: a token id lies outside it"
            )
        new_T = ids_T.astype(np.int64)
        place = np.flatnonzero(self.text_V[ids_T])
        new_T[place] = self._draw(new_T[place], rng)
        return new_T

    def attach(self, bottom: Bottom) -> Self:
        """Take the bottom model, and hold the artefact against it.

        The cloud made the artefact: one that calls every token special, or spreads the vectors so
        far that nothing is ever replaced, would switch the mechanism off.

        Raises
        ------
        MechanismError
            If vocabulary, special tokens or vectors are not those of the device's own model.
        """
        if bottom.vocab_size != self.vocabulary:
            raise MechanismError(
                f"{self.name}.vocabulary = {self.vocabulary}: the bottom model has "
                f"{bottom.vocab_size}"
            )
        tokenizer = getattr(bottom, "tokenizer", None)
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        return super().attach(bottom)

    def token_channel(self) -> TokenChannel:
        """Give the law of one token's replacement; built once."""
        if self._channel is None:
            self._channel = self._new_channel()
        return self._channel

    def _check_tokenizer(self, tokenizer: Any) -> None:
        special = {int(i) for i in tokenizer.all_special_ids if i < self.vocabulary}
        if special != set(self.special_S.tolist()):
            raise MechanismError(
                f"{self.name}: the artefact's special tokens are not those of the device's model"
            )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        bottom = self.bottom
        new_T = self.rewrite(ids_T, rng).astype(np.int32)
        return bottom.encode([new_T])[0].astype(np.float64)


class VectorRewrite(TokenRewrite):
    """A rewriting by distances between vectors, which the artefact holds.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    special_S : int64 array, shape (S,)
        Entries that are no text.
    table_VD : float16 array, shape (V, d)
        A vector for each entry.
    """

    def __init__(
        self, spec: MechanismSpec, *, special_S: NDArray[np.int64], table_VD: NDArray[np.float16]
    ) -> None:
        super().__init__(spec, special_S=special_S, vocabulary=len(table_VD))
        self.vectors = Vectors(table_VD, special_S)

    def attach(self, bottom: Bottom) -> Self:
        """Hold also the vectors against the device's own; see :meth:`TokenRewrite.attach`."""
        own_VD = getattr(bottom, "embedding_table", None)
        if own_VD is not None:
            own_VD = np.asarray(own_VD).astype(np.float16)
            if not np.array_equal(own_VD, self.vectors.table_VD):
                raise MechanismError(
                    f"{self.name}: the artefact's vectors are not those of the device's model"
                )
        return super().attach(bottom)


def write_vectors(
    name: str,
    folder: Path,
    params: dict[str, Param],
    *,
    public: PublicKnowledge,
    vectors: Vectors,
    unit: float,
    **more: NDArray[Any],
) -> MechanismSpec:
    """Write the vectors and ``more`` tensors, and give the specification of a rewriting by them."""
    common: dict[str, Param] = {
        "unit": unit,
        "vocabulary": len(vectors),
        "special": len(public.special_ids),
        "dimension": vectors.dimension,
    }
    tensors: dict[str, NDArray[Any]] = {
        "special": public.special_ids,
        "vectors": vectors.table_VD,
        **more,
    }
    return write_artefact(name, folder, {**params, **common}, tensors)


class RowChannel:
    """The law of a rewriting, row by row of released tokens.

    Parameters
    ----------
    text_V : bool array, shape (V,)
        Which entries are text; all others stay as they are.
    """

    def __init__(self, text_V: NDArray[np.bool_]) -> None:
        self.text_V = text_V

    def log_likelihood(self, outputs_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Give log P(output | v), (N, V); :data:`IMPOSSIBLE` for probability zero.

        Raises
        ------
        MechanismError
            If an output lies outside the vocabulary.
        """
        vocabulary = len(self.text_V)
        distinct_U, where_N = np.unique(np.asarray(outputs_N), return_inverse=True)
        if len(distinct_U) and (distinct_U[0] < 0 or distinct_U[-1] >= vocabulary):
            raise MechanismError(f"token channel: an output lies outside 0 to {vocabulary - 1}")
        table_UV = np.full((len(distinct_U), vocabulary), IMPOSSIBLE, dtype=np.float32)
        text_U = self.text_V[distinct_U]
        kept = np.flatnonzero(~text_U)
        table_UV[kept, distinct_U[kept]] = 0.0
        drawn = np.flatnonzero(text_U)
        for start in range(0, len(drawn), _CHANNEL_ROWS):
            part = drawn[start : start + _CHANNEL_ROWS]
            rows = np.maximum(self._rows(distinct_U[part]), IMPOSSIBLE)
            rows[:, ~self.text_V] = IMPOSSIBLE
            table_UV[part] = rows
        return table_UV[where_N]

    def _rows(self, outputs_U: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Give log P(y | v) of text outputs y, (U, V); what v is no text does not matter."""
        raise NotImplementedError


def channel_blocks(vocabulary: int) -> Iterator[NDArray[np.int64]]:
    """Split the vocabulary into blocks whose distances to all entries fit in memory."""
    for start in range(0, vocabulary, _CHANNEL_ROWS):
        yield np.arange(start, min(start + _CHANNEL_ROWS, vocabulary))


def token_blocks(ids_N: NDArray[np.int64]) -> Iterator[slice]:
    """Split a sentence's tokens likewise."""
    for start in range(0, len(ids_N), _AT_ONCE):
        yield slice(start, start + _AT_ONCE)


def draw_by_weight(
    log_weights_NC: NDArray[np.floating[Any]], uniform_N: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Draw a column for each row with probability proportional to exp(log weight).

    Parameters
    ----------
    log_weights_NC : float64 array, shape (N, C)
        -inf for columns that must not be drawn; at least one of each row is finite.
    uniform_N : float64 array, shape (N,)
        Uniform in [0, 1): the inverse of the distribution function is taken there.
    """
    weights_NC = np.exp(log_weights_NC - log_weights_NC.max(axis=1, keepdims=True))
    summed_NC = np.cumsum(weights_NC, axis=1)
    target_N = uniform_N * summed_NC[:, -1]
    # a product that rounds up to the whole sum would otherwise fall behind the last column
    target_N = np.minimum(target_N, np.nextafter(summed_NC[:, -1], 0))
    found = [
        np.searchsorted(row, target, side="right")
        for row, target in zip(summed_NC, target_N, strict=True)
    ]
    return np.array(found, dtype=np.int64)


def write_artefact(
    name: str, folder: Path, params: dict[str, Param], tensors: dict[str, NDArray[Any]]
) -> MechanismSpec:
    """Write the tensors and give the specification that names them."""
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(t) for key, t in tensors.items()}, folder / TENSORS)
    return MechanismSpec(name, params, Manifest.of(folder).id)


def read_artefact(
    reader: ParamReader,
    name: str,
    artefact: Path | None,
    more: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
) -> dict[str, NDArray[Any]]:
    """Check the common parameters, read the tensors and check the special ids.

    Parameters
    ----------
    reader : ParamReader
        Over a specification that has :data:`COMMON`.
    name : str
        The mechanism's.
    artefact : Path or None
        As received.
    more : mapping
        Dtype and shape of each tensor besides ``special``; V is ``vocabulary``.

    Raises
    ------
    MechanismError
        Naming what is wrong.
    """
    reader.real("unit", *UNIT_RANGE)
    vocabulary = reader.integer("vocabulary", *VOCABULARY_RANGE)
    count = reader.integer("special", 0, vocabulary - 2)
    tensors = read_tensors(name, artefact, TENSORS, {"special": (np.int64, (count,)), **more})
    special_S = tensors["special"]
    if count and (
        special_S[0] < 0 or special_S[-1] >= vocabulary or (np.diff(special_S) <= 0).any()
    ):
        raise MechanismError(f"{name}: artefact tensor 'special' must hold rising token ids")
    return tensors


def read_vectors(
    reader: ParamReader,
    name: str,
    artefact: Path | None,
    more: Mapping[str, tuple[DTypeLike, tuple[int, ...]]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Read an artefact that also has ``vectors``; its specification has ``dimension``."""
    shape = (
        reader.integer("vocabulary", *VOCABULARY_RANGE),
        reader.integer("dimension", *DIMENSION_RANGE),
    )
    return read_artefact(reader, name, artefact, {"vectors": (np.float16, shape), **(more or {})})
