"""Retrieval attack of the paper's kind: the nearest bank entry, unaware of the defence."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

_ROWS_AT_ONCE = 4096
_SCORES_AT_ONCE = 2**27


class NearestNeighbour:
    """Guess the entries of a clean bank that lie nearest to a released row.

    It knows the bottom model and public text, hence the bank, but not the mechanism; see
    :class:`privtune_flwr.audit.adaptive.Adaptive` for one that does.

    Parameters
    ----------
    bank_VD : float array, shape (V, d)
        Clean representations of the vocabulary.
    metric : {"l2", "cosine"}
        What near means.
    """

    def __init__(self, bank_VD: NDArray[Any], *, metric: Literal["l2", "cosine"] = "l2") -> None:
        if metric not in ("l2", "cosine"):
            raise ValueError(f"metric = {metric!r}: allowed: l2, cosine")
        self.name = f"nearest-{metric}"
        bank = torch.tensor(np.asarray(bank_VD, dtype=np.float32))
        # Centring leaves distances alone and keeps their float32 error small; angles need the
        # origin, and a row's own length does not change the order of its cosines.
        self._centre_D = bank.mean(dim=0) if metric == "l2" else torch.zeros(bank.shape[1])
        if metric == "l2":
            bank = bank - self._centre_D
            self._bias_V = -bank.square().sum(dim=1) / 2
        else:
            bank = torch.nn.functional.normalize(bank, dim=1)
            self._bias_V = torch.zeros(len(bank))
        self._bank_DV = bank.T.contiguous()

    def top(self, rows_ND: NDArray[Any], k: int = 1) -> NDArray[np.int64]:
        """List the nearest entries.

        Parameters
        ----------
        rows_ND : float array, shape (N, d)
            Released rows.
        k : int
            Guesses a row.

        Returns
        -------
        int64 array, shape (N, k)
            Token ids, nearest first.
        """
        at_once = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // len(self._bias_V)))
        guesses = [np.empty((0, k), np.int64)]
        for start in range(0, len(rows_ND), at_once):
            block = np.asarray(rows_ND[start : start + at_once], dtype=np.float32)
            rows_BD = torch.tensor(block) - self._centre_D
            scores_BV = torch.addmm(self._bias_V, rows_BD, self._bank_DV)
            guesses.append(scores_BV.topk(k, dim=1).indices.numpy())
        return np.concatenate(guesses)
