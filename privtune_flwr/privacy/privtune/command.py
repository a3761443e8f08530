"""``privtune bank``: build a run's bank and graph before the run, and show what they are.

They come from the model and public text alone. They are built once: the cache knows them by the
hash of bottom model, text and sentence length, and gives them memory-mapped.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from privtune_flwr.assets import cache_root
from privtune_flwr.bundle import Manifest
from privtune_flwr.data import load_public_text
from privtune_flwr.models import cut_model, resolve_model
from privtune_flwr.privacy.privtune.graph import hop_sizes, symmetric_graph
from privtune_flwr.privacy.public import PublicKnowledge, Tables

if TYPE_CHECKING:
    from privtune_flwr.config import RunConfig
    from privtune_flwr.privacy.privtune.bank import Bottom

HOPS = 4


class _Watched:
    """A bottom model that tells how many tokens it has encoded."""

    def __init__(self, bottom: Bottom, tell: Callable[[int], None]) -> None:
        self._bottom = bottom
        self._tell = tell

    def encode(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        rows = []
        for start in range(0, len(sequences), 256):  # more often than the bank's own bundles
            part = sequences[start : start + 256]
            rows += self._bottom.encode(part)
            self._tell(sum(len(s) for s in part))
        return rows

    @property
    def hidden_size(self) -> int:
        return self._bottom.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._bottom.vocab_size


class _Noted(PublicKnowledge):
    """Public knowledge that notes which tables had to be built, and how large tables are."""

    built: dict[str, bool]
    bytes: dict[str, int]

    def cached(
        self, name: str, params: Mapping[str, str | int | float], build: Callable[[], Tables]
    ) -> Tables:
        self.__dict__.setdefault("built", {}).setdefault(name, False)

        def noted() -> Tables:
            self.built[name] = True
            return build()

        tables = super().cached(name, params, noted)
        self.__dict__.setdefault("bytes", {})[name] = sum(t.nbytes for t in tables.values())
        return tables


def describe_bank(
    config: RunConfig, cache: Path | None = None, watch: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """Build bank and graph of a run's model and cut, or find them, and measure them.

    Parameters
    ----------
    config : RunConfig
        Its model, its public text and its number of neighbours are used; its private text is not.
    cache : Path, optional
        Where tables are kept; default: where runs look for them.
    watch : callable, optional
        Told what is done now and the share of it that is done.

    Returns
    -------
    dict
        ``bank`` and ``graph`` with ``seconds``, ``bytes`` and whether they were ``built`` now;
        ``unit``, ``mean_norm``, ``hops`` (mean, median, largest) and ``unseen`` (share).
    """
    tell = watch or (lambda _name, _share: None)
    tell("model", 0.0)
    total = 0

    def count(encoded: int) -> None:
        tell("bank", min(1.0, encoded / max(1, total)))

    public = _open_public(config, cache or cache_root(), count)
    tell("bank", 0.0)
    start = time.perf_counter()
    unseen_V = public.counts == 0
    total = int(public.counts.sum() + 3 * unseen_V.sum())
    bank_VD = public.bank
    seconds = {"bank": time.perf_counter() - start}
    tell("graph", 0.0)
    start = time.perf_counter()
    unit = public.unit
    graph = symmetric_graph(public.nearest(config.privacy.neighbours)[1])
    seconds["graph"] = time.perf_counter() - start
    tell("hops", 0.5)
    sizes = _sizes(public, config.privacy.neighbours, lambda: hop_sizes(graph, HOPS))
    tell("done", 1.0)
    return {
        "model": Path(config.model.name).name,
        "cut": config.model.cut,
        "public_text": list(config.data.public_corpora),
        "id": public.id,
        "vocabulary": public.vocab_size,
        "hidden_size": public.hidden_size,
        "bank": _part(public, "bank", seconds["bank"]),
        "graph": {
            **_part(public, "nearest", seconds["graph"]),
            "neighbours": config.privacy.neighbours,
            "edges": int(graph.nnz // 2),
            "memory_bytes": int(graph.data.nbytes + graph.indices.nbytes + graph.indptr.nbytes),
        },
        "unit": unit,
        "mean_norm": float(np.linalg.norm(bank_VD, axis=1).mean()),
        "hops": [_hop(n, sizes_V) for n, sizes_V in enumerate(sizes, start=1)],
        "unseen": float(unseen_V.mean()),
    }


def _open_public(config: RunConfig, cache: Path, count: Callable[[int], None]) -> _Noted:
    """Open the run's public knowledge; ``count`` is told how many tokens were encoded so far."""
    cut = cut_model(
        resolve_model(config.model.name), cut=config.model.cut, num_labels=2, seed=config.run.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        cut.bottom.save(folder)
        bottom_id = Manifest.of(Path(folder)).id
    encoded = 0

    def add(tokens: int) -> None:
        nonlocal encoded
        encoded += tokens
        count(encoded)

    return _Noted(
        _Watched(cut.bottom, add),
        cut.tokenizer,
        load_public_text(config.data.public_corpora),
        cache,
        bottom_id=bottom_id,
        max_length=config.model.max_length,
    )


def _hop(n: int, sizes_V: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "n": n,
        "mean": float(sizes_V.mean()),
        "median": float(np.median(sizes_V)),
        "max": int(sizes_V.max()),
    }


def show_bank(config: RunConfig, *, console: Console) -> dict[str, Any]:
    """Do the same with a progress bar, and print a table.

    Returns
    -------
    dict
        As :func:`describe_bank`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("model", total=1.0)
        found = describe_bank(
            config,
            watch=lambda name, share: progress.update(task, description=name, completed=share),
        )
    table = Table("bank", "", title=f"{found['model']}, cut {found['cut']}", show_header=False)
    table.add_row("vocabulary", f"{found['vocabulary']:,}")
    table.add_row("hidden size", f"{found['hidden_size']:,}")
    for part in ("bank", "graph"):
        entry = found[part]
        done = "built" if entry["built"] else "found in the cache"
        size = f"{entry['bytes'] / 1e6:.1f} MB"
        table.add_row(part, f"{size}, {done}, {entry['seconds']:.1f} s")
    table.add_row("median distance to the nearest (unit)", f"{found['unit']:.3f}")
    table.add_row("mean norm", f"{found['mean_norm']:.3f}")
    for hop in found["hops"]:
        figures = f"mean {hop['mean']:,.0f}, median {hop['median']:,.0f}, max {hop['max']:,}"
        table.add_row(f"entries {hop['n']} hops away", figures)
    table.add_row("entries that public text lacks", f"{found['unseen']:.1%}")
    console.print(table)
    return found


def _sizes(
    public: PublicKnowledge, neighbours: int, count: Callable[[], NDArray[np.int64]]
) -> NDArray[np.int64]:
    key = {"neighbours": neighbours, "hops": HOPS}
    return public.cached("hop-sizes", key, lambda: {"sizes": count()})["sizes"]


def _part(public: _Noted, name: str, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "bytes": public.bytes[name], "built": public.built[name]}
