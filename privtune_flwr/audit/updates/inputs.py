"""What enters a block's attention projections: the vectors whose span a gradient gives away.

Legend: B sentences, T tokens, D hidden size, V vocabulary, C candidates, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.federated.whole import WholeModel, pad

#: Last parts of the names of linear layers that read a block's attention input.
_READERS = ("query", "key", "value", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj")
_FUSED = "c_attn"
_CHUNK = 4096  # vectors at a time


class _Seen(Exception):  # noqa: N818  (no error: it ends a forward pass that has done its work)
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def reading_weights(model: WholeModel, level: int) -> list[str]:
    """Name the trained matrices whose rows' movement lies in the span of a block's inputs.

    The projections' own weights with full tuning, LoRA's A of them with adapters; none with a
    soft prompt.
    """
    block = model.top.family.block_list(model.top.network.base_model)[level]
    owned = {
        id(p)
        for name, module in block.named_modules()
        if name.rsplit(".", 1)[-1] in (*_READERS, _FUSED)
        for inner, p in module.named_parameters()
        if inner == "weight" or "lora_A" in inner
    }
    return [n for n, p in model.trainable().items() if id(p) in owned]


def as_rows(model: WholeModel, name: str, value: NDArray[Any]) -> NDArray[Any]:
    """Turn a matrix so that its columns are the inputs' dimensions, (M, D)."""
    turned = model.top.family.conv1d and "lora_A" not in name
    return value.T if turned else value


@torch.inference_mode()
def block_inputs(model: WholeModel, ids_BT: Tensor, mask_BT: Tensor, level: int) -> Tensor:
    """Give what the attention projections of block ``level`` read, (B, T, D)."""
    block = model.top.family.block_list(model.top.network.base_model)[level]
    reader = next(
        m for n, m in block.named_modules() if n.rsplit(".", 1)[-1] in (*_READERS, _FUSED)
    )

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Seen(args[0])

    handle = reader.register_forward_pre_hook(stop)
    try:
        model.top(model.bottom(ids_BT, mask_BT), mask_BT)
    except _Seen as seen:
        return seen.value
    finally:
        handle.remove()
    raise RuntimeError("the block was not reached")


def candidate_inputs(
    model: WholeModel, vocabulary: NDArray[np.int64], length: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Give the first block's input of each token at each position, in parts of the vocabulary.

    Below the first block a vector depends on its own token and position alone, so that a row of
    one token repeated shows it at every position.

    Yields
    ------
    tokens, inputs
        Int array (C,), float32 array (C, P, D) for positions 0 to ``length - 1``.
    """
    size = max(1, _CHUNK // length)
    for start in range(0, len(vocabulary), size):
        tokens_C = vocabulary[start : start + size]
        ids_CP = torch.from_numpy(tokens_C)[:, None].expand(-1, length)
        yield tokens_C, block_inputs(model, ids_CP, torch.ones_like(ids_CP), 0).numpy()


def sentence_inputs(
    model: WholeModel, sentences: Sequence[NDArray[np.int64]], level: int
) -> list[NDArray[np.float32]]:
    """Give a block's inputs of whole sentences, (T, D) each."""
    ids_BT, mask_BT = pad([s.astype(np.int32) for s in sentences])
    seen = block_inputs(model, ids_BT, mask_BT, level).numpy()
    return [row[: len(s)] for row, s in zip(seen, sentences, strict=True)]
