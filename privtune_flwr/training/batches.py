"""Batches mixed across devices, of sentences of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from privtune_flwr.training.store import Example

# sentences are sorted by length inside windows of this many batches, then batches are shuffled
WINDOW = 50


def batch_order(lengths: Sequence[int], batch_size: int, seed: Sequence[int]) -> list[list[int]]:
    """Draw the batches of one pass.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each sentence.
    batch_size : int
        Sentences a batch; the last may be smaller.
    seed : sequence of int
        For example ``[run seed, round]``: the same seed gives the same batches, whatever was
        drawn before.

    Returns
    -------
    list of list of int
        Every index exactly once.
    """
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(lengths))
    window = batch_size * WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window].tolist(), key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(
    rows_ND: npt.NDArray[Any], examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad sentences on the right.

    Returns
    -------
    hidden_BTD : float32 tensor (B, T, D)
    mask_BT : int64 tensor (B, T), 1 at tokens
    labels_B : int64 tensor (B,)
    """
    longest = max(e.length for e in examples)
    hidden_BTD = torch.zeros(len(examples), longest, rows_ND.shape[1])
    mask_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    for i, example in enumerate(examples):
        rows = np.array(rows_ND[example.offset : example.offset + example.length], np.float32)
        hidden_BTD[i, : example.length] = torch.from_numpy(rows)
        mask_BT[i, : example.length] = 1
    return hidden_BTD, mask_BT, torch.tensor([e.label for e in examples])
