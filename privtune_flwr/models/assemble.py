"""Building the bottom part of a base model around tensors that exist already."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import Family, family_of


def assemble_bottom(config: Any, tensors: Mapping[str, Tensor], *, attn_implementation: str) -> Any:
    """Build the bottom part of a base model around tensors that exist already.

    Parameters
    ----------
    config : Any
        Configuration of the base model whose depth is the cut.
    tensors : Mapping[str, Tensor]
        Parameters and buffers by name; used, not copied.
    attn_implementation : str
        Hugging Face's name of the attention implementation.

    Raises
    ------
    ModelError
        If the names or shapes are not exactly those of the bottom model.
    """
    base = meta_base(config, attn_implementation)
    expected = dict(named_tensors(base))
    missing, unexpected = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    wrong = [n for n, t in expected.items() if n in tensors and tensors[n].shape != t.shape]
    if missing or unexpected or wrong:
        raise ModelError(
            f"not the tensors of this bottom model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of wrong shape {wrong[:3]}"
        )
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = base.get_submodule(owner_name)
        is_parameter = leaf in owner._parameters
        value = tensor.detach()
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return base


def meta_base(config: Any, attn_implementation: str) -> Any:
    """Build a bottom-shaped base model without memory for its weights."""
    from transformers import AutoModel

    family = family_of(config)
    # On the meta device nothing is drawn or allocated: loading happens at every message.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        base = AutoModel.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=False
        )
    if family.final_norm:
        base.set_submodule(family.final_norm, nn.Identity())
    if family.pooler_option:
        base.pooler = None
    return base


def bottom_config(config: Any, family: Family, cut: int) -> Any:
    """Derive the configuration of the bottom model from the whole model's."""
    config = copy.deepcopy(config)
    family.keep_blocks(config, 0, cut)
    config.num_labels = 2
    return config


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walk over all parameters and buffers, persistent or not."""
    yield from module.named_parameters()
    yield from module.named_buffers()
