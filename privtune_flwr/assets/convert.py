"""Packaged models as folders that ``from_pretrained`` loads."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from privtune_flwr.assets.archives import AssetError, get_archive
from privtune_flwr.assets.cache import asset_folder, cache_root, make_once
from privtune_flwr.assets.fetch import announce, staged, write_manifest

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(name: str) -> Path:
    """Give a packaged model's folder, fetching and converting it first if need be.

    Parameters
    ----------
    name : str
        ``minilm`` or ``smollm2``. The latter is SmolLM2-135M-Instruct, dequantised from Q4_1:
        half a minute once, then kept as float16 safetensors.

    Returns
    -------
    Path
        A Hugging Face checkpoint: config, tokenizer, safetensors.

    Raises
    ------
    AssetError
        If the name is unknown, fetching fails, or ``gguf`` is not installed when it is needed.
    """
    if name == "minilm":
        return asset_folder("minilm")
    if name == "smollm2":
        sha256 = get_archive("smollm2-gguf").sha256
        return make_once(cache_root() / "models" / f"smollm2-{sha256[:12]}", _convert_smollm2)
    raise AssetError(f"no packaged model {name!r}; there are: minilm, smollm2")


def _convert_smollm2(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            "smollm2: reading the packaged 4-bit file needs gguf: "
            "pip install 'privtune-flwr[smollm2]'"
        )
    source = asset_folder("smollm2-gguf")
    with announce("Converting SmolLM2-135M-Instruct from 4 bits to float16 ..."):
        try:
            _dequantise(source, folder)
        except (OSError, ValueError, RuntimeError) as error:
            raise AssetError(
                f"smollm2: {_GGUF} could not be converted with the transformers installed: {error}"
            ) from error


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    import transformers

    # Recent versions keep GGUF weights packed, and such a model cannot be saved; older ones know
    # no such option and always unpack.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.float16, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        archive = get_archive("smollm2-gguf")
        with staged(folder) as stage:
            model.save_pretrained(os.fspath(stage))
            tokenizer.save_pretrained(os.fspath(stage))
            shutil.copy(source / "LICENSE", stage)
            write_manifest(stage, source=archive.filename, source_sha256=archive.sha256)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
