"""Public text: what the cloud may know, and therefore what an attacker knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import pyarrow as pa

from privtune_flwr.config import PUBLIC_CORPORA
from privtune_flwr.data.columns import DataError, to_dataset
from privtune_flwr.data.snippets import SNIPPET_CLASSES, read_polar_snippets, read_snippets


class Labelled(NamedTuple):
    """Texts with a sentiment: 0 negative, 1 positive, the order of ``movie-snippets``."""

    texts: list[str]
    labels: list[int]


def load_public_text(names: Sequence[str]) -> list[str]:
    """Load public corpora, one after the other.

    Parameters
    ----------
    names : Sequence[str]
        Out of ``amazon-snippets`` (3,708 texts), ``nyt-snippets`` (5,190), ``tweets`` (4,200).

    Returns
    -------
    list[str]
        The texts in a fixed order, neutral ones included.

    Raises
    ------
    DataError
        If a name is unknown, given twice, or there is none.
    """
    return [text for name in _checked(names) for _, text in read_snippets(name)]


def load_public_labelled(corpora: Sequence[str]) -> Labelled:
    """Load public corpora with a sentiment, by the thresholds of ``movie-snippets``.

    Parameters
    ----------
    corpora : Sequence[str]
        As for :func:`load_public_text`.

    Returns
    -------
    Labelled
        Without the neutral texts, in a fixed order: one corpus after the other.

    Raises
    ------
    DataError
        As :func:`load_public_text`.
    """
    table = load_public_dataset(corpora)
    return Labelled(list(table["text"]), [int(label) for label in table["label"]])


def load_public_dataset(names: Sequence[str]) -> datasets.Dataset:
    """Load public corpora with a sentiment, by the thresholds of ``movie-snippets``.

    Parameters
    ----------
    names : Sequence[str]
        As for :func:`load_public_text`.

    Returns
    -------
    datasets.Dataset
        ``text``, ``label`` (negative, positive) and ``corpus``, the name it came from.

    Raises
    ------
    DataError
        As :func:`load_public_text`.
    """
    tables = []
    for name in _checked(names):
        text, label = read_polar_snippets(name)
        tables.append(pa.table({"text": text, "label": label, "corpus": [name] * len(text)}))
    return to_dataset(pa.concat_tables(tables), source=", ".join(names), labels=SNIPPET_CLASSES)


def _checked(names: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in names if name not in PUBLIC_CORPORA]
    if unknown or not names:
        raise DataError(
            f"public corpora {', '.join(map(repr, unknown)) or '(none)'}: "
            f"there are: {', '.join(PUBLIC_CORPORA)}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"public corpora are given twice: {', '.join(names)}")
    return names
