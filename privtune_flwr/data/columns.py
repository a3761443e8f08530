"""The one shape every source is brought to: a text column, a class label, whatever else it has."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MAX_DERIVED_CLASSES = 1000


class DataError(ValueError):
    """Text that cannot be used. The message names columns and counts, never a row's content."""


def to_dataset(
    table: pa.Table,
    *,
    source: str,
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] = (),
) -> datasets.Dataset:
    """Clean a table and give it as a dataset with ``text`` and ``label``.

    Texts are stripped and rows without text dropped. Other columns are kept, except one that is
    itself called ``text`` or ``label`` but was not chosen.

    Parameters
    ----------
    table : pa.Table
        The rows.
    source : str
        How messages call it.
    text_column, label_column : str
        Which columns to take.
    labels : Sequence[str]
        Class names in order. Empty takes them from the data: by value where all are whole
        numbers, else by name. Where no value is one of the names given, whole numbers count as
        positions in them.

    Returns
    -------
    datasets.Dataset
        In memory: features ``text`` (string), ``label`` (ClassLabel), then the others.

    Raises
    ------
    DataError
        If a column is missing or of the wrong type, nothing is left, or a row has no label or
        one that is not among ``labels``.
    """
    for column in (text_column, label_column):
        if column not in table.column_names:
            raise DataError(
                f"{source}: no column {column!r}; there are: {', '.join(table.column_names)}"
            )
    table = table.filter(_has_text(table[text_column], f"{source}: column {text_column!r}"))
    if table.num_rows == 0:
        raise DataError(f"{source}: column {text_column!r} holds no text in any row")
    names, label = _classes(table[label_column], f"{source}: column {label_column!r}", labels)
    columns = {
        "text": pc.utf8_trim_whitespace(_plain(table[text_column]).cast(pa.string())),
        "label": pa.array(label, pa.int64()),
    }
    for column in table.column_names:
        if column not in {"text", "label", text_column, label_column}:
            columns[column] = _plain(table[column])
    clean = pa.table(columns)
    features = datasets.Features.from_arrow_schema(clean.schema)
    features["label"] = datasets.ClassLabel(names=names)
    # Straight from memory. datasets' own readers and map() copy rows into a cache folder that
    # all of a machine's users and runs share; private text must not be left there.
    return datasets.Dataset(clean, info=datasets.DatasetInfo(features=features))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column


def _has_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    column = _plain(column)
    if pa.types.is_null(column.type):
        raise DataError(f"{where} holds no text in any row")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{where} is of type {column.type}; it must hold text")
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.fill_null(pc.greater(pc.utf8_length(trimmed), 0), False)


def _classes(
    column: pa.ChunkedArray, where: str, labels: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Give class names in order, and each row's position in them."""
    values = _as_strings(_plain(column), where)
    distinct = sorted(set(values))
    numeric = all(_is_whole(value) for value in distinct)
    names = list(labels)
    if not names:
        if len(distinct) > _MAX_DERIVED_CLASSES:
            raise DataError(
                f"{where} holds {len(distinct)} different values: too many to be classes "
                f"(at most {_MAX_DERIVED_CLASSES}); is it the label column?"
            )
        names = sorted(distinct, key=int) if numeric else distinct
    if len(set(names)) < len(names):
        raise DataError(f"{where}: the class names given repeat: {', '.join(names)}")
    if len(names) < 2:
        raise DataError(f"{where} holds one class only; give the class names (data.labels)")
    position = {name: index for index, name in enumerate(names)}
    if labels and numeric and not position.keys() & set(distinct):
        position = {str(index): index for index in range(len(names))}
    unknown = sum(value not in position for value in values)
    if unknown:
        raise DataError(
            f"{where}: {unknown} of {len(values)} rows have a label that is not among the class "
            f"names given: {', '.join(names)}"
        )
    return names, np.array([position[value] for value in values], dtype=np.int64)


def _as_strings(column: pa.ChunkedArray, where: str) -> list[str]:
    kind = column.type
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(
            f"{where} is of type {kind}; labels must be text, whole numbers or true/false"
        )
    values = [(value or "").strip() for value in column.cast(pa.string()).to_pylist()]
    missing = sum(not value for value in values)
    if missing:
        raise DataError(f"{where}: {missing} of {len(values)} rows have no label")
    return values


def _is_whole(value: str) -> bool:
    # The canonical form only: "01" and "1" would otherwise be one class by number, two by name.
    return value.removeprefix("-").isdecimal() and str(int(value)) == value
