"""The bottom models a device holds, loaded once a process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from privtune_flwr.device.home import DeviceHome
from privtune_flwr.errors import Refusal
from privtune_flwr.models import BottomModel, load_tokenizer


def held_bottom(home: DeviceHome, bottom_id: str) -> tuple[BottomModel, Any]:
    """Load a provisioned bottom model and its tokenizer.

    Raises
    ------
    Refusal
        If the device does not hold it (yet).
    """
    if not home.bundles.holds(bottom_id):
        raise Refusal("request.bottom_id: this bottom model has not been provisioned")
    return _loaded(home.bundles.path(bottom_id))


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[BottomModel, Any]:
    # a cache only: the folder's name is the hash of its content
    return BottomModel.load(folder), load_tokenizer(folder)
