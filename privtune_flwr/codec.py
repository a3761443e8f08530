"""Smashed data to arrays on the wire and back.

A codec turns the rows of a chunk, concatenated without padding, into named arrays. Encoding comes
after the mechanism, so it is post-processing and costs no privacy. Shape legend: B sentences,
N tokens of all of them, T tokens of the longest, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from privtune_flwr.errors import PrivTuneError

Rows = npt.NDArray[np.float32]
Lengths = npt.NDArray[np.uint16]
Arrays = dict[str, npt.NDArray[Any]]


class CodecError(PrivTuneError):
    """Rows that a wire format cannot carry."""


class Codec(ABC):
    """One wire format."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, rows_ND: Rows, lengths_B: Lengths) -> Arrays:
        """Turn rows into arrays for the wire.

        Parameters
        ----------
        rows_ND : float32 array (N, D)
            All tokens of a chunk, sentence after sentence.
        lengths_B : uint16 array (B,)
            Tokens of each sentence; they sum to N.

        Returns
        -------
        dict of arrays
            As :meth:`schema` says.

        Raises
        ------
        CodecError
            If a value cannot be represented.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, npt.NDArray[Any]], lengths_B: Lengths) -> Rows:
        """Turn arrays that satisfy :meth:`schema` back into rows, float32 (N, D)."""

    @abstractmethod
    def schema(self, lengths_B: Lengths, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, dtype and shape of every array that a chunk of these lengths must have."""


class _Plain(Codec):
    dtype: ClassVar[type[np.floating[Any]]]

    def encode(self, rows_ND: Rows, lengths_B: Lengths) -> Arrays:
        limit = float(np.finfo(self.dtype).max)
        if rows_ND.size and float(np.abs(rows_ND).max()) > limit:
            raise CodecError(
                f"privacy.wire = {self.name!r}: a value exceeds {limit:.0f}; "
                "use 'float32' or 'int8'"
            )
        return {"values": rows_ND.astype(self.dtype)}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]], lengths_B: Lengths) -> Rows:
        return arrays["values"].astype(np.float32)

    def schema(self, lengths_B: Lengths, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows = int(lengths_B.sum(dtype=np.int64))
        return {"values": (np.dtype(self.dtype).name, (rows, hidden))}


class Float16Codec(_Plain):
    """Half precision, 2 bytes a value."""

    name = "float16"
    dtype = np.float16


class Float32Codec(_Plain):
    """Single precision, exact: for proofs of equality."""

    name = "float32"
    dtype = np.float32


class Int8Codec(Codec):
    """One byte a value and one float32 scale a token (largest magnitude over 127)."""

    name = "int8"

    def encode(self, rows_ND: Rows, lengths_B: Lengths) -> Arrays:
        peak_N = np.abs(rows_ND).max(axis=1, initial=0.0)
        scale_N = np.where(peak_N > 0, peak_N / 127.0, 1.0).astype(np.float32)
        values_ND = np.rint(rows_ND / scale_N[:, None]).clip(-127, 127).astype(np.int8)
        return {"values": values_ND, "scale": scale_N}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]], lengths_B: Lengths) -> Rows:
        with np.errstate(over="ignore"):  # whoever decodes untrusted arrays looks for Inf
            rows_ND: Rows = arrays["values"].astype(np.float32) * arrays["scale"][:, None]
        return rows_ND

    def schema(self, lengths_B: Lengths, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows = int(lengths_B.sum(dtype=np.int64))
        return {"values": ("int8", (rows, hidden)), "scale": ("float32", (rows,))}


class PaddedFloat32Codec(Codec):
    """Single precision padded to the chunk's longest sentence: what plain split learning sends."""

    name = "float32-padded"

    def encode(self, rows_ND: Rows, lengths_B: Lengths) -> Arrays:
        values_BTD = np.zeros(
            self.schema(lengths_B, rows_ND.shape[1])["values"][1], dtype=np.float32
        )
        values_BTD[_token_mask(lengths_B)] = rows_ND
        return {"values": values_BTD}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]], lengths_B: Lengths) -> Rows:
        rows_ND: Rows = arrays["values"][_token_mask(lengths_B)]
        return rows_ND

    def schema(self, lengths_B: Lengths, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        longest = int(lengths_B.max(initial=0))
        return {"values": ("float32", (len(lengths_B), longest, hidden))}


def _token_mask(lengths_B: Lengths) -> npt.NDArray[np.bool_]:
    mask_BT: npt.NDArray[np.bool_] = (
        np.arange(int(lengths_B.max(initial=0)))[None, :] < lengths_B[:, None]
    )
    return mask_BT


_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (Float16Codec(), Int8Codec(), Float32Codec(), PaddedFloat32Codec())
}


def get_codec(name: str) -> Codec:
    """Look a codec up by its name in ``privacy.wire``.

    Raises
    ------
    CodecError
        If there is none; the message lists those there are.
    """
    if name not in _CODECS:
        raise CodecError(f"privacy.wire = {name!r}: allowed: {', '.join(_CODECS)}")
    return _CODECS[name]
