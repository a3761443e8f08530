"""Which token a released row was: the cloud's decoder and the defence-aware attacker in one.

One cloud, one knowledge: whatever undoes the known shift for the sake of utility also reads the
text, so both are the same class. A Gaussian model with one covariance for all tokens (linear
discriminant analysis) fitted on public text: ``mu_v = b_v + p*_v``, S the pooled covariance of
*released* public rows about mu, and

    p(v | y) proportional to prior_v exp(-(y - mu_v)' S^-1 (y - mu_v) / 2).

Because S holds the directions of the released rows, this is also the retrieval by Mahalanobis
distance that undoes shaped noise. Without a shift (``dchi``, ``none``) it is the attacker alone.
Of mechanisms that do not add noise to rows, mu and S are learned, see
:mod:`privtune_flwr.privacy.released`.

Shapes: ``N`` rows, ``d`` hidden size, ``V`` vocabulary (special tokens included).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.privacy.released import released_law

if TYPE_CHECKING:
    from privtune_flwr.privacy.base import Mechanism
    from privtune_flwr.privacy.public import PublicKnowledge

_ROWS_AT_ONCE = 4096
_SCORES_AT_ONCE = 2**27  # floats: bounds memory where the vocabulary is large
_RIDGE = 0.01
_PSEUDO_COUNT = 0.1


class ShiftPosterior:
    """Posterior over the vocabulary, given released rows.

    Parameters
    ----------
    mean_VD : array, shape (V, d)
        ``mu_v``, where the clean rows of v are expected after the shift.
    covariance_DD : array, shape (d, d)
        S, positive definite.
    prior_V : array, shape (V,)
        Positive weights; normalised here.
    shift_VD : array, shape (V, d), optional
        ``p*_v``; ``None`` for a mechanism without one.
    device : str
        Torch device that computes.

    Raises
    ------
    ValueError
        If shapes do not fit, a weight is not positive or S is not positive definite.
    """

    def __init__(
        self,
        mean_VD: NDArray[Any],
        covariance_DD: NDArray[Any],
        prior_V: NDArray[Any],
        shift_VD: NDArray[Any] | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        vocabulary, hidden = mean_VD.shape
        if covariance_DD.shape != (hidden, hidden) or prior_V.shape != (vocabulary,):
            raise ValueError("mean (V, d), covariance (d, d) and prior (V,) do not fit together")
        if shift_VD is not None and shift_VD.shape != mean_VD.shape:
            raise ValueError(f"shift must be {mean_VD.shape}, got {shift_VD.shape}")
        if not (np.isfinite(prior_V).all() and (prior_V > 0).all()):
            raise ValueError("prior weights must be positive and finite")
        try:
            factor_DD = np.linalg.cholesky(np.asarray(covariance_DD, dtype=np.float64))
        except np.linalg.LinAlgError:
            raise ValueError("the covariance is not positive definite") from None
        self._device = torch.device(device)
        # Rows times this matrix have unit covariance: S = L L', y -> L^-1 y.
        self._whiten_DD = self._tensor(np.linalg.inv(factor_DD).T)
        # Distances of whitened rows are small differences of large squares unless centred.
        centre_D = np.asarray(mean_VD, dtype=np.float64).mean(axis=0)
        self._centre_D = self._tensor(centre_D)
        means_VD = self._tensor(np.asarray(mean_VD, dtype=np.float64) - centre_D) @ self._whiten_DD
        self._means_DV = means_VD.T.contiguous()
        self._half_V = means_VD.square().sum(dim=1) / 2
        log_prior_V = np.log(prior_V) - np.log(prior_V.sum())
        self._bias_V = self._tensor(log_prior_V) - self._half_V
        self._shift_VD = None if shift_VD is None else self._tensor(shift_VD)

    @classmethod
    def fit(
        cls,
        mechanism: Mechanism,
        public: PublicKnowledge,
        *,
        rows: int = 40_000,
        device: str = "cpu",
    ) -> Self:
        """Fit on public text sent through the mechanism; cached with the public knowledge.

        Parameters
        ----------
        mechanism : Mechanism
            As the devices run it. The draws here are the fitter's own.
        public : PublicKnowledge
            Bank, counts and rows.
        rows : int
            Public tokens at most.
        device : str
            Torch device that computes later.
        """
        prior_V = public.counts + _PSEUDO_COUNT
        if not mechanism.additive:
            law = released_law(mechanism, public, rows=rows)
            return cls(law.means_VR, law.covariance_RR, prior_V, device=device)
        shift_VD = mechanism.shift()
        mean_VD = np.asarray(public.bank, dtype=np.float32)
        if shift_VD is not None:
            mean_VD = mean_VD + shift_VD
        fitted = public.cached(
            "posterior",
            {"spec": mechanism.spec.id, "rows": rows, "ridge": _RIDGE},
            lambda: {"covariance": pooled_covariance(mechanism, public, mean_VD, rows)},
        )
        return cls(mean_VD, fitted["covariance"], prior_V, shift_VD, device=device)

    def with_prior(self, prior_V: NDArray[Any]) -> Self:
        """Give the same classes with other prior weights, (V,), positive; normalised here."""
        changed = copy.copy(self)
        log_prior_V = np.log(prior_V) - np.log(prior_V.sum())
        changed._bias_V = self._tensor(log_prior_V) - self._half_V
        return changed

    @property
    def whitened_means(self) -> torch.Tensor:
        """Class means as :meth:`whitened` shows them, (V, d)."""
        return self._means_DV.T

    def whitened(self, rows_ND: NDArray[Any]) -> torch.Tensor:
        """Centre rows and give them unit covariance about their class means, (N, d)."""
        return (self._tensor(rows_ND) - self._centre_D) @ self._whiten_DD

    def unshift(self, rows_ND: NDArray[Any]) -> NDArray[np.float32]:
        """Take the expected shift off: y - sum_v p(v | y) p*_v.

        Parameters
        ----------
        rows_ND : float array, shape (N, d)
            Released rows.

        Returns
        -------
        float32 array, shape (N, d)
            Estimates of clean rows; the rows themselves for a mechanism without a shift.
        """
        if self._shift_VD is None:
            return np.array(rows_ND, dtype=np.float32)
        parts = [
            (y_BD - torch.softmax(scores_BV, dim=1) @ self._shift_VD).cpu().numpy()
            for y_BD, scores_BV in self._scored(rows_ND)
        ]
        return np.concatenate([np.empty((0, rows_ND.shape[1]), np.float32), *parts])

    def expectation(self, rows_ND: NDArray[Any], table_VK: NDArray[Any]) -> NDArray[np.float32]:
        """Average a table over the posterior: sum_v p(v | y) table_v.

        Parameters
        ----------
        rows_ND : float array, shape (N, d)
            Released rows.
        table_VK : float array, shape (V, K)
            Anything known of each token.

        Returns
        -------
        float32 array, shape (N, K)
        """
        values_VK = self._tensor(table_VK)
        parts = [
            (torch.softmax(scores_BV, dim=1) @ values_VK).cpu().numpy()
            for _, scores_BV in self._scored(rows_ND)
        ]
        return np.concatenate([np.empty((0, table_VK.shape[1]), np.float32), *parts])

    def top(self, rows_ND: NDArray[Any], k: int = 1) -> NDArray[np.int64]:
        """List the most probable tokens.

        Parameters
        ----------
        rows_ND : float array, shape (N, d)
            Released rows.
        k : int
            Guesses a row.

        Returns
        -------
        int64 array, shape (N, k)
            Token ids, most probable first.
        """
        parts = [scores.topk(k, dim=1).indices.cpu().numpy() for _, scores in self._scored(rows_ND)]
        return np.concatenate([np.empty((0, k), np.int64), *parts])

    def log_posterior(self, rows_ND: NDArray[Any]) -> NDArray[np.float32]:
        """Give log p(v | y) of each row as (N, V): large, meant for a few rows."""
        parts = [torch.log_softmax(s, dim=1).cpu().numpy() for _, s in self._scored(rows_ND)]
        return np.concatenate([np.empty((0, len(self._bias_V)), np.float32), *parts])

    def log_posterior_of(self, rows_ND: NDArray[Any], tokens_H: torch.Tensor) -> torch.Tensor:
        """Give log p(v | y, v one of these tokens), (N, H)."""
        scores_NH = torch.addmm(
            self._bias_V[tokens_H], self.whitened(rows_ND), self._means_DV[:, tokens_H]
        )
        return scores_NH.log_softmax(dim=1)

    def _scored(self, rows_ND: NDArray[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows and log p(v | y) up to a constant a row, a chunk at a time.

        The row's own square is left out: it is the same for all v, and softmax subtracts each
        row's maximum before it exponentiates.
        """
        if rows_ND.ndim != 2 or rows_ND.shape[1] != len(self._centre_D):
            raise ValueError(f"rows must be (N, {len(self._centre_D)}), got {rows_ND.shape}")
        at_once = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // len(self._bias_V)))
        for start in range(0, len(rows_ND), at_once):
            block_BD = rows_ND[start : start + at_once]
            y_BD = self._tensor(block_BD)
            yield y_BD, torch.addmm(self._bias_V, self.whitened(block_BD), self._means_DV)

    def _tensor(self, values: NDArray[Any]) -> torch.Tensor:
        # A copy: tables are memory-mapped read-only, which torch does not know.
        return torch.tensor(np.asarray(values, dtype=np.float32), device=self._device)


def pooled_covariance(
    mechanism: Mechanism, public: PublicKnowledge, mean_VD: NDArray[np.float32], rows: int
) -> NDArray[np.float64]:
    """Covariance of released public rows about their tokens' means, plus a ridge.

    Parameters
    ----------
    mechanism : Mechanism
        Perturbs the public rows.
    public : PublicKnowledge
        Gives them.
    mean_VD : float array, shape (V, d)
        ``mu_v``.
    rows : int
        Tokens at most.

    Returns
    -------
    float64 array, shape (d, d)
        S + 0.01 mean(diag S) I.
    """
    clean = public.rows(rows)
    # Not secret: this is the cloud's (or an attacker's) own simulation of the devices' noise.
    rng = np.random.default_rng(0)
    hidden = public.hidden_size
    total_DD = np.zeros((hidden, hidden))
    start = 0
    for length in clean.lengths.tolist():
        ids_T = np.asarray(clean.ids[start : start + length])
        released_TD = mechanism.perturb(clean.values[start : start + length], ids_T, rng)
        residual_TD = released_TD.astype(np.float64) - mean_VD[ids_T]
        total_DD += residual_TD.T @ residual_TD
        start += length
    covariance_DD = total_DD / max(1, start)
    covariance_DD += _RIDGE * np.mean(np.diag(covariance_DD)) * np.eye(hidden)
    return covariance_DD
