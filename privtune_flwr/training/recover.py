"""The cloud's post-processing of received rows: un-shift or denoise, then scale.

It is computed from released rows and public things alone, so it costs the devices no privacy. One
cloud, one knowledge: the attacker can do the same.

Denoising gives the mean of the clean row h, given the released row y, under a mixture of Gaussians,
one a token (classes v, prior and p(v | y) from
:class:`~privtune_flwr.privacy.privtune.posterior.ShiftPosterior`):

    E[h | y] = sum_v p(v | y) (b_v + (y - mu_v) G_v).

b_v is the bank's entry, mu_v the mean released row. Within a token clean rows scatter with W, the
pooled covariance of public rows about b_v. For an additive mechanism with isotropic noise of power
sigma_v^2 a coordinate, G_v = W (W + sigma_v^2 I)^-1 (Wiener); for any other, one G for all tokens
is regressed on public pairs of clean and released rows.

Shapes: ``N`` rows, ``d`` hidden size, ``V`` vocabulary, ``L`` levels of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.codec import Codec, get_codec
from privtune_flwr.config import ConfigError, RunConfig
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior

if TYPE_CHECKING:
    from privtune_flwr.privacy.base import Mechanism
    from privtune_flwr.privacy.public import PublicKnowledge

Rows = NDArray[np.float32]
_LEVELS = 16  # of sigma_v: finer ones change the gains by less than public text can tell
_NOISE_DRAWS = 4
_NOISE_BLOCK = 256
_SCALE_TOKENS = 8_000
_RIDGE = 1e-3


class Denoiser(Protocol):
    """Gives estimates of clean rows."""

    def __call__(self, rows_ND: Rows) -> Rows:
        """Map released rows (N, d) to estimates of clean ones (N, d)."""


class AdditiveMean:
    """Posterior mean for a mechanism that adds a shift and isotropic noise.

    Parameters
    ----------
    posterior : ShiftPosterior
        Of the mechanism.
    bank_VD, mean_VD : arrays, shape (V, d)
        b_v and mu_v = b_v + p*_v.
    within_DD : array, shape (d, d)
        W.
    power_V : array, shape (V,)
        sigma_v^2, the noise's power in each coordinate.
    """

    def __init__(
        self,
        posterior: ShiftPosterior,
        bank_VD: NDArray[Any],
        mean_VD: NDArray[Any],
        within_DD: NDArray[Any],
        power_V: NDArray[Any],
    ) -> None:
        self._posterior = posterior
        # W and W + sigma^2 I share their axes; along them every gain is a number.
        spread_D, axes_DD = np.linalg.eigh(np.asarray(within_DD, dtype=np.float64))
        spread_D = np.maximum(spread_D, 1e-6 * spread_D.max() + 1e-12)
        self._axes_DD = axes_DD.astype(np.float32)
        edges = np.unique(np.quantile(power_V, np.linspace(0, 1, _LEVELS + 1)[1:-1]))
        level_V = np.searchsorted(edges, power_V)
        power_L = np.array(
            [
                power_V[level_V == level].mean() if (level_V == level).any() else 0.0
                for level in range(len(edges) + 1)
            ]
        )
        self._gains_LD = (spread_D / (spread_D + power_L[:, None])).astype(np.float32)
        known_VD = np.asarray(bank_VD, np.float32) @ self._axes_DD
        known_VD -= self._gains_LD[level_V] * (np.asarray(mean_VD, np.float32) @ self._axes_DD)
        # One pass over the vocabulary averages both: what is known of a token, and its level.
        self._table = np.hstack([known_VD, np.eye(len(power_L), dtype=np.float32)[level_V]])

    @classmethod
    def fit(cls, mechanism: Mechanism, public: PublicKnowledge, *, device: str = "cpu") -> Denoiser:
        """Fit on public text; W and the noise's power are cached with the public knowledge."""
        bank_VD = np.asarray(public.bank, dtype=np.float32)
        shift_VD = mechanism.shift()
        mean_VD = bank_VD if shift_VD is None else bank_VD + shift_VD.astype(np.float32)
        within = public.cached("within", {}, lambda: {"within": within_covariance(public)})
        power = public.cached(
            "noise-power",
            {"spec": mechanism.spec.id},
            lambda: {"power": noise_power(mechanism, bank_VD, mean_VD)},
        )
        posterior = ShiftPosterior.fit(mechanism, public, device=device)
        return cls(posterior, bank_VD, mean_VD, within["within"], np.array(power["power"]))

    def __call__(self, rows_ND: Rows) -> Rows:
        """Estimate clean rows."""
        hidden = rows_ND.shape[1]
        averaged = self._posterior.expectation(rows_ND, self._table)
        known_ND, level_NL = averaged[:, :hidden], averaged[:, hidden:]
        gain_ND = level_NL @ self._gains_LD
        estimate_ND: Rows = (known_ND + gain_ND * (rows_ND @ self._axes_DD)) @ self._axes_DD.T
        return estimate_ND


class RegressedMean:
    """Posterior mean for any other mechanism: the gain within a token is learned.

    Parameters
    ----------
    posterior : ShiftPosterior
        Of the mechanism, its means and covariance learned from releases.
    bank_VD : array, shape (V, d)
        b_v.
    gain_DD : array, shape (d, d)
        From released rows, whitened and less their token's mean, to clean rows less b_v.
    """

    def __init__(
        self, posterior: ShiftPosterior, bank_VD: NDArray[Any], gain_DD: NDArray[Any]
    ) -> None:
        self._posterior = posterior
        self._gain_DD = np.asarray(gain_DD, np.float32)
        means_VD = posterior.whitened_means.cpu().numpy()
        self._table_VD = np.asarray(bank_VD, np.float32) - means_VD @ self._gain_DD

    @classmethod
    def fit(cls, mechanism: Mechanism, public: PublicKnowledge, *, device: str = "cpu") -> Denoiser:
        """Fit on public pairs; the gain is cached with the public knowledge."""
        posterior = ShiftPosterior.fit(mechanism, public, device=device)
        fitted = public.cached(
            "regressed-gain",
            {"spec": mechanism.spec.id, "ridge": _RIDGE},
            lambda: {"gain": _regress_gain(posterior, mechanism, public)},
        )
        return cls(posterior, public.bank, fitted["gain"])

    def __call__(self, rows_ND: Rows) -> Rows:
        """Estimate clean rows."""
        white_ND = self._posterior.whitened(rows_ND).cpu().numpy()
        known_ND = self._posterior.expectation(rows_ND, self._table_VD)
        estimate_ND: Rows = (known_ND + white_ND @ self._gain_DD).astype(np.float32)
        return estimate_ND


def fit_denoiser(mechanism: Mechanism, public: PublicKnowledge, *, device: str = "cpu") -> Denoiser:
    """Fit the posterior mean of clean rows for a mechanism.

    Parameters
    ----------
    mechanism : Mechanism
        As the devices run it; its rows must be as wide as clean ones.
    public : PublicKnowledge
        Bank, counts and rows.
    device : str
        Torch device that weighs the vocabulary.
    """
    kind = AdditiveMean if mechanism.additive else RegressedMean
    return kind.fit(mechanism, public, device=device)


def build_recovery(
    config: RunConfig, mechanism: Mechanism, public: PublicKnowledge, *, device: str = "cpu"
) -> Callable[[Rows], Rows] | None:
    """Compose what the configuration asks for into one function of received rows.

    ``recovery.denoise`` takes the shift off as well, so it replaces ``privacy.decoder``.

    Returns
    -------
    callable or None
        Rows (N, d) to rows (N, d); None where nothing is to be done.

    Raises
    ------
    ConfigError
        If denoising or scaling is asked of rows narrower than the model's: there are no clean rows
        of that width to recover.
    """
    recovery = config.recovery
    if mechanism.width(public.hidden_size) != public.hidden_size:
        for key, value in (("denoise", recovery.denoise), ("scale", recovery.scale)):
            if value != "none":
                raise ConfigError(
                    f"recovery.{key} = {value!r}: allowed with privacy.mechanism = "
                    f"{mechanism.name!r}: none; its rows are narrower than the model's, and the "
                    "top model learns to lift them"
                )
        return None
    step: Callable[[Rows], Rows] | None = None
    if recovery.denoise == "posterior-mean":
        step = fit_denoiser(mechanism, public, device=device)
    elif config.privacy.decoder and mechanism.shift() is not None:
        step = ShiftPosterior.fit(mechanism, public).unshift
    if recovery.scale == "none":
        return step
    codec = get_codec(config.privacy.wire)
    return _scaled(step, clean_norm_factor(step, mechanism, public, codec))


def clean_norm_factor(
    step: Callable[[Rows], Rows] | None,
    mechanism: Mechanism,
    public: PublicKnowledge,
    codec: Codec,
) -> float:
    """Give the factor that brings processed public rows to the mean norm of clean ones.

    Parameters
    ----------
    step : callable or None
        What is done to received rows before.
    mechanism, public, codec
        What public text goes through.

    Raises
    ------
    ConfigError
        If the processed rows are all zero.
    """
    clean_norm = processed_norm = 0.0
    for clean_TD, _, released_TD in public_pairs(mechanism, public, _SCALE_TOKENS, codec=codec):
        processed_TD = released_TD if step is None else step(released_TD)
        clean_norm += float(np.linalg.norm(clean_TD, axis=1).sum())
        processed_norm += float(np.linalg.norm(processed_TD, axis=1).sum())
    if not processed_norm > 0:
        raise ConfigError(
            "recovery.scale = 'clean-norm': released public rows are zero; allowed: none"
        )
    return clean_norm / processed_norm


def public_pairs(
    mechanism: Mechanism, public: PublicKnowledge, tokens: int, *, codec: Codec | None = None
) -> Iterator[tuple[Rows, NDArray[np.int64], Rows]]:
    """Yield clean rows, token ids and released rows of public text.

    Blocks of sentences together, so that what follows works on many rows at once.

    Parameters
    ----------
    tokens : int
        Public tokens at most.
    codec : Codec, optional
        The wire that released rows pass; None leaves them exact.
    """
    clean = public.rows(tokens)
    # Not secret: this is the cloud's own simulation of the devices' noise.
    rng = np.random.default_rng(1)
    ends = np.cumsum(clean.lengths)
    for first in range(0, len(ends), _NOISE_BLOCK):
        stop = ends[first : first + _NOISE_BLOCK]
        start = int(ends[first] - clean.lengths[first])
        values_ND = np.array(clean.values[start : stop[-1]])
        ids_N = np.array(clean.ids[start : stop[-1]], dtype=np.int64)
        cuts = stop[:-1] - start
        released = [
            mechanism.perturb(hidden_TD, ids_T, rng)
            for hidden_TD, ids_T in zip(
                np.split(values_ND, cuts), np.split(ids_N, cuts), strict=True
            )
        ]
        released_ND = np.concatenate(released)
        if codec is not None:
            lengths_B = clean.lengths[first : first + _NOISE_BLOCK].astype(np.uint16)
            released_ND = codec.decode(codec.encode(released_ND, lengths_B), lengths_B)
        yield values_ND, ids_N, released_ND


def within_covariance(public: PublicKnowledge, tokens: int = 40_000) -> NDArray[np.float64]:
    """Pooled covariance of clean public rows about their tokens' bank entries, (d, d).

    A token's bank entry contains its rows: their scatter is too small by 1 - 1/n and is corrected;
    tokens seen once say nothing.
    """
    clean = public.rows(tokens)
    ids_N = np.asarray(clean.ids)
    residual_ND = clean.values - np.asarray(public.bank, np.float32)[ids_N]
    number_N = public.counts[ids_N]
    use_N = number_N > 1
    weight_N = number_N[use_N] / (number_N[use_N] - 1)
    scaled_ND = (residual_ND[use_N] * np.sqrt(weight_N)[:, None]).astype(np.float64)
    return scaled_ND.T @ scaled_ND / max(1, int(use_N.sum()))


def noise_power(
    mechanism: Mechanism, bank_VD: NDArray[Any], mean_VD: NDArray[Any]
) -> NDArray[np.float64]:
    """Power a coordinate of each token's noise, (V,), from draws of the mechanism itself."""
    # Not secret: this is the cloud's own simulation of the devices' noise.
    rng = np.random.default_rng(2)
    vocabulary, hidden = bank_VD.shape
    square_V = np.zeros(vocabulary)
    for start in range(0, vocabulary, _NOISE_BLOCK):
        ids_B = np.arange(start, min(start + _NOISE_BLOCK, vocabulary))
        for _ in range(_NOISE_DRAWS):
            noise_BD = mechanism.perturb(bank_VD[ids_B], ids_B, rng) - mean_VD[ids_B]
            square_V[ids_B] += np.square(noise_BD, dtype=np.float64).sum(axis=1)
    power_V: NDArray[np.float64] = square_V / (_NOISE_DRAWS * hidden)
    return power_V


def _regress_gain(
    posterior: ShiftPosterior, mechanism: Mechanism, public: PublicKnowledge
) -> NDArray[np.float64]:
    bank_VD, means_VD = public.bank, posterior.whitened_means.cpu().numpy()
    hidden = public.hidden_size
    square_DD, cross_DD = np.zeros((hidden, hidden)), np.zeros((hidden, hidden))
    for clean_ND, ids_N, released_ND in public_pairs(mechanism, public, 40_000):
        white_ND: NDArray[np.float64] = posterior.whitened(released_ND).cpu().numpy().astype(float)
        seen_ND = white_ND - means_VD[ids_N]
        square_DD += seen_ND.T @ seen_ND
        cross_DD += seen_ND.T @ (clean_ND - bank_VD[ids_N]).astype(float)
    ridge = _RIDGE * float(np.mean(np.diag(square_DD))) + 1e-12
    solved_DD = np.linalg.solve(square_DD + ridge * np.eye(hidden), cross_DD)
    return np.asarray(solved_DD, dtype=np.float64)


def _scaled(step: Callable[[Rows], Rows] | None, factor: float) -> Callable[[Rows], Rows]:
    def scale(rows_ND: Rows) -> Rows:
        processed = rows_ND if step is None else step(rows_ND)
        return np.asarray(processed * np.float32(factor), dtype=np.float32)

    return scale
