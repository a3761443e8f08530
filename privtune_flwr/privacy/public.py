"""What everybody may know: public text, seen through the bottom model.

Mechanisms are designed from it, the cloud's decoder and the auditor's attackers use it too (one
cloud, one knowledge). Each part is computed when first asked for and kept on disk under the hash
of all that determines it, so that runs, resumed runs and tests share it.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary, ``N`` rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from privtune_flwr.privacy.privtune.bank import Bottom, build_bank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tables = dict[str, NDArray[Any]]

_VERSION = 1  # raise it whenever a cached table's definition changes
_NEIGHBOURS = 16  # neighbours searched at least: the unit and any smaller k share one search


class CleanRows(NamedTuple):
    """Clean representations of whole public sentences, one after the other.

    Attributes
    ----------
    values : float32 array, shape (N, d)
        A row for each token.
    ids : int32 array, shape (N,)
        Its token id.
    lengths : int64 array
        Tokens of each sentence; they sum to N.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


class PublicKnowledge:
    """Public text as token ids, counts and representations at the cut.

    Parameters
    ----------
    bottom : Bottom
        The bottom model; used only where the disk does not hold the answer yet.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    texts : sequence of str
        Public sentences.
    cache : Path
        Folder for cached tables; created on demand.
    bottom_id : str
        Hash of the bottom model's bundle (weights, cut, tokenizer): the cache believes it.
    max_length : int
        Tokens a sentence at most.

    Raises
    ------
    ValueError
        If there is no public text or no bottom id.
    """

    def __init__(
        self,
        bottom: Bottom,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        cache: Path,
        *,
        bottom_id: str,
        max_length: int = 128,
    ) -> None:
        if not texts:
            raise ValueError("public knowledge needs at least one sentence of public text")
        if not bottom_id:
            raise ValueError("public knowledge needs the bottom model's id")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._bottom = bottom
        self._texts = list(texts)
        text_hash = hashlib.sha256()
        for text in self._texts:
            raw = text.encode()
            text_hash.update(len(raw).to_bytes(8, "big") + raw)
        #: Hash of everything the tables depend on.
        self.id = _hash([_VERSION, bottom_id, text_hash.hexdigest(), max_length])
        self._folder = cache / "public" / self.id[:32]

    @property
    def hidden_size(self) -> int:
        """Hidden size d at the cut."""
        return self._bottom.hidden_size

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V of the bottom model."""
        return self._bottom.vocab_size

    @cached_property
    def sequences(self) -> list[NDArray[np.int32]]:
        """Token ids (T,) of each public sentence, special tokens included, no padding."""
        tables = self.cached("sequences", {}, self._tokenise)
        return np.split(np.array(tables["ids"]), np.cumsum(tables["lengths"])[:-1])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Occurrences of each entry in the public text, (V,)."""
        return np.bincount(np.concatenate(self.sequences), minlength=self.vocab_size)

    @cached_property
    def special_ids(self) -> NDArray[np.int64]:
        """Ids of the tokenizer's special tokens, sorted."""
        ids = {int(i) for i in self.tokenizer.all_special_ids}
        return np.array(sorted(i for i in ids if i < self.vocab_size), dtype=np.int64)

    @cached_property
    def text_ids(self) -> NDArray[np.int64]:
        """All other ids, sorted."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    @cached_property
    def bank(self) -> NDArray[np.float32]:
        """Mean representation of each entry at the cut, (V, d), memory-mapped."""

        def build() -> Tables:
            return {"bank": build_bank(self._bottom, self.tokenizer, self.sequences, self.counts)}

        return self.cached("bank", {}, build)["bank"]

    @property
    def unit(self) -> float:
        """Median distance of a text entry of the bank to its nearest neighbour."""
        return float(np.median(self.nearest(1)[0]))

    def nearest(self, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k nearest other text entries of each text entry.

        Returns
        -------
        distances, indices : arrays of shape (len(text_ids), k)
            Indices count within ``text_ids``. k is cut to what the vocabulary has.
        """
        k = min(k, len(self.text_ids) - 1)
        searched = min(max(k, _NEIGHBOURS), len(self.text_ids) - 1)

        def build() -> Tables:
            from privtune_flwr.privacy.privtune.graph import nearest

            distances, indices = nearest(np.ascontiguousarray(self.bank[self.text_ids]), searched)
            return {"distances": distances, "indices": indices}

        tables = self.cached("nearest", {"k": searched}, build)
        return tables["distances"][:, :k], tables["indices"][:, :k]

    def rows(self, limit: int = 40_000) -> CleanRows:
        """Encode a fixed random choice of whole public sentences.

        Parameters
        ----------
        limit : int
            Tokens at most, and at least one sentence.

        Returns
        -------
        CleanRows
            Values float32 (N, d), ids (N,), sentence lengths.
        """

        def build() -> Tables:
            order = np.random.default_rng(0).permutation(len(self.sequences))
            total = np.cumsum([len(self.sequences[i]) for i in order])
            chosen = order[: max(1, int(np.searchsorted(total, limit, side="right")))]
            sentences = sorted(
                (self.sequences[i] for i in chosen if len(self.sequences[i])), key=len
            )
            return {
                "values": np.concatenate(self._bottom.encode(sentences)),
                "ids": np.concatenate(sentences),
                "lengths": np.array([len(s) for s in sentences], dtype=np.int64),
            }

        tables = self.cached("rows", {"limit": limit}, build)
        return CleanRows(tables["values"], tables["ids"], tables["lengths"])

    def cached(
        self, name: str, params: Mapping[str, str | int | float], build: Callable[[], Tables]
    ) -> Tables:
        """Give named tables from disk, building them first if nobody has.

        Parameters
        ----------
        name : str
            What the tables are.
        params : mapping
            All they depend on besides this public knowledge.
        build : callable
            Computes them as a dictionary of arrays.

        Returns
        -------
        dict of arrays
            Memory-mapped and read-only.
        """
        return kept_tables(self._folder / f"{name}-{_hash([dict(params)])[:16]}", build)

    def _tokenise(self) -> Tables:
        encoded = self.tokenizer(
            self._texts, truncation=True, max_length=self.max_length, padding=False
        )["input_ids"]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return {"ids": np.concatenate([np.array(i, np.int32) for i in encoded]), "lengths": lengths}


def kept_tables(folder: Path, build: Callable[[], Tables]) -> Tables:
    """Give a folder's tables, building them first if nobody has.

    Two processes that ask at once build once; a process killed half-way leaves nothing that would
    be taken for a result.

    Parameters
    ----------
    folder : Path
        Named by all that the tables depend on.
    build : callable
        Computes them as a dictionary of arrays.

    Returns
    -------
    dict of arrays
        Memory-mapped and read-only.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _write_tables(folder, build())
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _write_tables(folder: Path, tables: Tables) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, table in tables.items():
            np.save(draft / f"{name}.npy", table, allow_pickle=False)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _hash(content: list[Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
