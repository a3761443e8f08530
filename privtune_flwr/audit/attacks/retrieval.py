"""Retrieval: the nearest entry of a bank of representations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Attack, Family, Level, Released, Tell, silent

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge

Bank = Literal["embedding", "contextual", "aware"]
Metric = Literal["l2", "cosine", "mahalanobis"]
BANKS: tuple[Bank, ...] = ("embedding", "contextual", "aware")
METRICS: tuple[Metric, ...] = ("l2", "cosine", "mahalanobis")

_ROWS_AT_ONCE = 4096
_SCORES_AT_ONCE = 2**27
_RIDGE = 0.01


class Retrieval(Attack):
    """Guess the entries of a bank that lie nearest to a released row.

    Parameters
    ----------
    level : Level
        How much the attacker knows; the bank ``aware`` needs ``adaptive`` at least.
    bank : {"embedding", "contextual", "aware"}
        The model's input embeddings; the mean clean representation of each token at the cut; the
        same plus the known shift p*.
    metric : {"l2", "cosine", "mahalanobis"}
        ``mahalanobis`` whitens with the covariance of all released rows about their mean: noise
        that is shaped like the data hides from the other two and not from this one.

    Raises
    ------
    ValueError
        If bank, metric and level do not go together.
    """

    family: ClassVar[Family] = "retrieval"

    def __init__(self, level: Level, *, bank: Bank = "contextual", metric: Metric = "l2") -> None:
        super().__init__(level)
        if bank not in BANKS:
            raise ValueError(f"bank = {bank!r}: allowed: {', '.join(BANKS)}")
        if metric not in METRICS:
            raise ValueError(f"metric = {metric!r}: allowed: {', '.join(METRICS)}")
        if (bank == "aware") != (level != "unaware"):
            raise ValueError(f"bank = {bank!r}: an attacker of level {level} would not use it")
        self._bank_name, self._metric = bank, metric

    @property
    def name(self) -> str:
        """``retrieval-<bank>-<metric>``."""
        return f"retrieval-{self._bank_name}-{self._metric}"

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Choose the bank; whiten it if asked."""
        if self._bank_name == "embedding":
            bank_VD = _aligned_embeddings(knowledge, released)
        else:
            bank_VD = knowledge.means
        rows_ND = released.stacked if self._metric == "mahalanobis" else None
        self._index = NearestEntries(bank_VD, metric=self._metric, rows_ND=rows_ND)
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the nearest entries."""
        guesses = self._index.top(released.stacked, k)
        tell(1.0)
        return released.split(guesses)


def _aligned_embeddings(knowledge: Knowledge, released: Released) -> NDArray[np.float32]:
    """Move the embedding table so that its mean over common words is that of the released rows.

    Without this the blocks' common offset swamps the words' differences.
    """
    table_VD = knowledge.bottom.base.get_input_embeddings().weight.detach().cpu().numpy()
    offset_D = released.stacked.mean(axis=0) - knowledge.prior @ table_VD
    return np.asarray(table_VD + offset_D, dtype=np.float32)


class NearestEntries:
    """Exact nearest neighbours of rows in a bank.

    Parameters
    ----------
    bank_VD : float array, shape (V, d)
        One entry a token.
    metric : {"l2", "cosine", "mahalanobis"}
        What near means.
    rows_ND : float array, shape (N, d), optional
        For ``mahalanobis``: rows whose covariance whitens.
    """

    def __init__(
        self, bank_VD: NDArray[Any], *, metric: Metric = "l2", rows_ND: NDArray[Any] | None = None
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric = {metric!r}: allowed: {', '.join(METRICS)}")
        bank = torch.tensor(np.asarray(bank_VD, dtype=np.float32))
        width = bank.shape[1]
        # Centring leaves distances alone and keeps their float32 error small; angles need the
        # origin, and a row's own length does not change the order of its cosines.
        self._centre_D = torch.zeros(width) if metric == "cosine" else bank.mean(dim=0)
        self._white_DD: torch.Tensor | None = None
        if metric == "mahalanobis":
            if rows_ND is None:
                raise ValueError("metric = 'mahalanobis' needs the released rows")
            self._white_DD = _whitening(rows_ND)
        bank = self._moved(bank)
        if metric == "cosine":
            bank = torch.nn.functional.normalize(bank, dim=1)
            self._bias_V = torch.zeros(len(bank))
        else:
            self._bias_V = -bank.square().sum(dim=1) / 2
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
            scores_BV = torch.addmm(self._bias_V, self._moved(torch.tensor(block)), self._bank_DV)
            guesses.append(scores_BV.topk(k, dim=1).indices.numpy())
        return np.concatenate(guesses)

    def _moved(self, rows: torch.Tensor) -> torch.Tensor:
        moved = rows - self._centre_D
        return moved if self._white_DD is None else moved @ self._white_DD


def _whitening(rows_ND: NDArray[Any]) -> torch.Tensor:
    """Give W with unit covariance of rows @ W; a ridge keeps few rows from spoiling it."""
    covariance_DD = np.atleast_2d(np.cov(np.asarray(rows_ND, dtype=np.float64), rowvar=False))
    # rows that are all alike have no direction to whiten
    ridge = _RIDGE * np.mean(np.diag(covariance_DD)) or 1.0
    covariance_DD += ridge * np.eye(len(covariance_DD))
    factor_DD = np.linalg.cholesky(covariance_DD)
    return torch.tensor(np.linalg.inv(factor_DD).T, dtype=torch.float32)
