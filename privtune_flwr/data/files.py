"""A device's own file: CSV, JSON lines or Parquet, read into memory and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from privtune_flwr.data.columns import DataError

EXTENSIONS = (".csv", ".jsonl", ".parquet")


def read_file(name: str, *, text_column: str, label_column: str) -> pa.Table:
    """Read a file of private text.

    Parameters
    ----------
    name : str
        Absolute path; its extension names the format.
    text_column, label_column : str
        Read as text from a CSV file, whatever they look like (``007`` stays ``007``).

    Returns
    -------
    pa.Table
        All columns, in memory.

    Raises
    ------
    DataError
        If the file is missing, of an unknown kind, or cannot be parsed; the message says where,
        not what was there.
    """
    path = Path(name)
    if not path.is_absolute():
        raise DataError(f"file:{name}: the path must be absolute")
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(
            f"file:{name}: unknown extension {path.suffix!r}; allowed: {', '.join(EXTENSIONS)}"
        )
    if not path.is_file():
        raise DataError(f"file:{name}: there is no such file")
    try:
        return _read(path, (text_column, label_column))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        # The reader's message quotes the offending row: take the place from it, drop the rest
        # ("from None", so that no traceback shows it either).
        raise DataError(f"file:{name}: {_reason(error, path)}") from None


def _read(path: Path, as_text: tuple[str, ...]) -> pa.Table:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"file:{path}: the file is empty")
    if path.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_table(path)
    # One block for the whole file: a row longer than a block is an error otherwise.
    block = min(size + 1, 2**31 - 1)
    if path.suffix.lower() == ".jsonl":
        return pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=block))
    return pyarrow.csv.read_csv(
        path,
        # one block anyway, and only a single thread knows the number of a bad row
        pyarrow.csv.ReadOptions(block_size=block, use_threads=False),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(as_text, pa.string())),
    )


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, PermissionError):
        return "you may not read it"
    said = str(error)
    row = re.search(r"row #?(\d+)", said, re.IGNORECASE)
    widths = re.search(r"Expected (\d+) columns, got (\d+)", said)
    reason = f"it cannot be parsed as {path.suffix.lower().removeprefix('.')}"
    if row:
        reason += f", at row {row[1]}"
    if widths:
        reason += f": expected {widths[1]} columns, found {widths[2]}"
    elif "changed from" in said:
        reason += ": a column's values are not all of one type"
    elif "UTF8" in said or isinstance(error, UnicodeError):
        reason += ": it is not UTF-8"
    return reason
