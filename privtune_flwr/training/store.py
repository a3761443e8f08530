"""Smashed store: what the cloud received, on its own disk.

Rows of all chunks lie one after the other in a file that is memory-mapped for reading, so that the
driver's memory grows neither with devices nor with examples. A chunk is committed by one line in
``index.jsonl``, written after its rows are on disk: a run killed in between finds the file longer
than its index and cuts it back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privtune_flwr.errors import RunError

Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class StoredChunk:
    """Index entry of one chunk: who sent it, where its rows lie, its lengths and labels.

    ``metrics`` and ``traffic`` are what the device said beside the rows and what it took to get
    them: a run that is killed before its next checkpoint counts the chunk from here.
    """

    device: str
    split: str
    epoch: int
    chunk: int
    offset: int
    lengths: list[int]
    labels: list[int] | None
    metrics: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What identifies the chunk."""
        return (self.device, self.split, self.epoch, self.chunk)


@dataclass(frozen=True)
class Example:
    """One sentence in the store."""

    offset: int
    length: int
    label: int


class SmashedStore:
    """Append-only rows with an index.

    Parameters
    ----------
    folder : Path
        Where the files are.
    hidden : int
        Hidden size D.
    dtype : {"float16", "float32"}
        float32 for the float32 wire formats, else float16 (int8 rows are dequantised; the float16
        step is finer than theirs).
    decoder : callable, optional
        Rows (N, D) to rows (N, D): the cloud's post-processing. Its result is kept in a second
        file, once, and is what training reads; the received rows stay as they came.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hidden: int,
        dtype: str,
        decoder: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self.folder = folder
        self._hidden = hidden
        self._dtype = np.dtype(dtype)
        self._decoder = decoder
        self._chunks: dict[Key, StoredChunk] = {}
        self._rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._recover()

    @property
    def _files(self) -> list[Path]:
        names = ["rows.bin"] + (["decoded.bin"] if self._decoder else [])
        return [self.folder / name for name in names]

    @property
    def _row_bytes(self) -> int:
        return self._hidden * self._dtype.itemsize

    def _recover(self) -> None:
        index = self.folder / "index.jsonl"
        whole = 0
        if index.exists():
            for line in index.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                entry = StoredChunk(**json.loads(line))
                self._chunks[entry.key] = entry
                self._rows = entry.offset + sum(entry.lengths)
                whole += len(line)
            os.truncate(index, whole)
        for path in self._files:
            with path.open("ab") as file:
                if file.tell() < self._rows * self._row_bytes:
                    raise RunError(f"{path} is shorter than its index says; the store is damaged")
            os.truncate(path, self._rows * self._row_bytes)

    def __contains__(self, key: Key) -> bool:
        return key in self._chunks

    def __getitem__(self, key: Key) -> StoredChunk:
        return self._chunks[key]

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(self._chunks.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the received rows."""
        return self._rows * self._row_bytes

    def append(
        self,
        key: Key,
        rows_ND: npt.NDArray[np.float32],
        lengths: Sequence[int],
        labels: Sequence[int] | None,
        *,
        metrics: Mapping[str, float] | None = None,
        traffic: Mapping[str, int] | None = None,
    ) -> None:
        """Keep one chunk; it is committed when this returns.

        Parameters
        ----------
        key : tuple
            Device, split, epoch and number of the chunk.
        rows_ND : array (N, D)
        lengths : sequence of int
            Tokens of each sentence; their sum is N.
        labels : sequence of int, optional
        metrics, traffic : Mapping, optional
            Kept in the index entry, see :class:`StoredChunk`.

        Raises
        ------
        ValueError
            If the chunk is already there.
        """
        if key in self._chunks:
            raise ValueError(f"chunk {key} is already in the store")
        decoded = [self._decoder(rows_ND)] if self._decoder else []
        for path, rows in zip(self._files, [rows_ND, *decoded], strict=True):
            with path.open("ab") as file:
                file.write(rows.astype(self._dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
        device, split, epoch, chunk = key
        entry = StoredChunk(
            device,
            split,
            epoch,
            chunk,
            self._rows,
            [int(n) for n in lengths],
            None if labels is None else [int(v) for v in labels],
            dict(metrics or {}),
            dict(traffic or {}),
        )
        with (self.folder / "index.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry), separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._chunks[key] = entry
        self._rows += len(rows_ND)

    def examples(self, key: Key) -> list[Example]:
        """Sentences of a chunk in their order; the label is -1 where none came."""
        entry = self._chunks[key]
        starts = entry.offset + np.cumsum([0, *entry.lengths[:-1]])
        labels = entry.labels or [-1] * len(entry.lengths)
        return [
            Example(int(s), n, v) for s, n, v in zip(starts, entry.lengths, labels, strict=True)
        ]

    def received(self) -> npt.NDArray[Any]:
        """Map the received rows, (N, D)."""
        return self._map(self._files[0])

    def training_rows(self) -> npt.NDArray[Any]:
        """Map the rows that training reads: decoded where there is a decoder, (N, D)."""
        return self._map(self._files[-1])

    def _map(self, path: Path) -> npt.NDArray[Any]:
        if self._rows == 0:
            return np.empty((0, self._hidden), dtype=self._dtype)
        shape = (self._rows, self._hidden)
        return np.memmap(path, dtype=self._dtype, mode="r", shape=shape)
