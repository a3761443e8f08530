"""Reading the tensors of a mechanism's artefact, which came from the cloud and is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from privtune_flwr.privacy.base import MechanismError


def read_tensors(
    name: str,
    artefact: Path | None,
    file: str,
    wanted: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
) -> dict[str, NDArray[Any]]:
    """Read a safetensors file that must hold exactly what is wanted.

    Parameters
    ----------
    name : str
        The mechanism's, for messages.
    artefact : Path or None
        Folder of the artefact.
    file : str
        The file in it.
    wanted : mapping
        Dtype and shape of each tensor.

    Raises
    ------
    MechanismError
        If the file is missing or unreadable, a tensor is missing, unknown, of another type or
        shape, or holds a value that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if artefact is None or not (artefact / file).is_file():
        raise MechanismError(f"{name}: needs its artefact, a folder with {file}")
    try:
        tensors: dict[str, NDArray[Any]] = load_file(artefact / file)
    # numpy lacks some dtypes that the format has; the loader then fails with a KeyError
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise MechanismError(f"{name}: unreadable {file}: {error}") from None
    if set(tensors) != set(wanted):
        raise MechanismError(f"{name}: {file} must hold exactly {', '.join(sorted(wanted))}")
    for key, (dtype, shape) in wanted.items():
        tensor = tensors[key]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise MechanismError(
                f"{name}: artefact tensor {key!r} must be {np.dtype(dtype)} {shape}"
            )
        if not np.isfinite(tensor).all():
            raise MechanismError(
                f"{name}: artefact tensor {key!r} holds a value that is not finite"
            )
    return tensors
