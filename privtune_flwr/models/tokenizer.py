"""Saving and loading the tokenizer that belongs to a bottom model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from privtune_flwr.models.errors import ModelError

# How the tokenizer happened to be loaded, which Hugging Face saves with it.
_LOADING_KEYS = ("is_local", "local_files_only", "name_or_path", "trust_remote_code", "token")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer's files without traces of how it was used so far."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # A call with truncation or padding leaves its settings in the file to be saved.
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in _LOADING_KEYS:
        config.pop(key, None)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def load_tokenizer(folder: Path | str) -> Any:
    """Load a bundle's tokenizer, without running any code that comes with it.

    Raises
    ------
    ModelError
        If the folder holds none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no tokenizer: {error}") from error
    tokenizer.padding_side = "right"
    return tokenizer
