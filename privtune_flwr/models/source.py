"""From ``model.name`` to what ``from_pretrained`` takes."""

from __future__ import annotations

import re
from pathlib import Path

from privtune_flwr.config import PACKAGED_MODELS
from privtune_flwr.models.errors import ModelError

ALLOWED = (
    f"{', '.join(PACKAGED_MODELS)}, a Hugging Face hub name (owner/name), "
    "or the absolute path of a folder with config.json and model.safetensors"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name: str) -> Path | str:
    """Find the model that ``model.name`` means.

    Parameters
    ----------
    name : str
        A packaged name, the absolute path of a local folder, or a hub name.

    Returns
    -------
    Path | str
        A folder, or a hub name passed through untouched. Weights are read as safetensors only
        and code that comes with a model is never run; see :func:`~.cut.cut_model`.

    Raises
    ------
    ModelError
        If the name is none of the three, or the folder holds no model.
    """
    if name in PACKAGED_MODELS:
        from privtune_flwr.assets import model_folder

        return Path(model_folder(name))
    folder = Path(name).expanduser()
    if folder.is_absolute():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name = {name!r}: no model in this folder; allowed: {ALLOWED}")
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model.name = {name!r}: allowed: {ALLOWED}")
    return name
