"""Where text comes from: a packaged name, a hub, or a device's own file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from privtune_flwr.data.columns import DataError, to_dataset
from privtune_flwr.data.files import read_file
from privtune_flwr.data.packaged import PACKAGED


def load_source(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] = (),
) -> datasets.Dataset:
    """Load labelled text.

    Parameters
    ----------
    source : str
        ``movie-snippets`` (negative, positive), ``bbc-news`` (five topics; extra column
        ``headline``), ``20newsgroups`` (extra column ``split``: its official train and test),
        ``election-tweets`` (Clinton, Trump; without links, @names and retweets);
        ``hub:NAME[:CONFIG]``, the train split; or ``file:/absolute/path.csv|jsonl|parquet``.
    text_column, label_column : str
        Which columns to take; they come out as ``text`` and ``label``.
    labels : Sequence[str]
        Class names in order. Empty takes the source's own, else those found in the data. Where
        each device holds a file of its own, give them: devices may hold different classes.

    Returns
    -------
    datasets.Dataset
        Features ``text`` (string) and ``label`` (ClassLabel), then the source's other columns.
        Rows without text are dropped.

    Raises
    ------
    DataError
        If the source is unknown or unreadable, a column is missing or of the wrong type, nothing
        is left, or labels are missing or not among ``labels``.
    """
    kind, _, name = source.partition(":")
    if kind == "file" and name:
        table = read_file(name, text_column=text_column, label_column=label_column)
    elif kind == "hub" and name:
        table, declared = _read_hub(name, label_column)
        labels = labels or declared
    elif source in PACKAGED:
        read, declared = PACKAGED[source]
        table = read()
        labels = labels or (declared if label_column == "label" else ())
    else:
        raise DataError(
            f"{source}: unknown source; there are: {', '.join(PACKAGED)}, hub:NAME[:CONFIG], "
            "file:/absolute/path.csv|jsonl|parquet"
        )
    return to_dataset(
        table, source=source, text_column=text_column, label_column=label_column, labels=labels
    )


def _read_hub(name: str, label_column: str) -> tuple[pa.Table, tuple[str, ...]]:
    """Give the train split's rows and the class names it declares, if any."""
    path, _, config = name.partition(":")
    try:
        with _quiet_bars():
            dataset = datasets.load_dataset(path, config or None, split="train")
    # A hub fails in many ways: no network, no such name, no such split, a gate, a script. All
    # of them mean one thing here, and what they say is about a public name, not about rows.
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"hub:{name}: cannot load its train split: {said[0]}") from error
    feature = dataset.features.get(label_column)
    table: pa.Table = dataset.with_format("arrow")[:]
    if not isinstance(feature, datasets.ClassLabel):
        return table, ()
    names = tuple(feature.names)
    index = table[label_column]
    known = pc.and_(pc.greater_equal(index, 0), pc.less(index, len(names)))
    index = pc.if_else(known, index, pa.scalar(None, index.type))  # -1 means "no label"
    named = pc.take(pa.array(names), index)
    return table.set_column(table.column_names.index(label_column), label_column, named), names


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keep datasets' progress bars out of logs; on a terminal they stay."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
