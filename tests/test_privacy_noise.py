"""The law of the noise: checks that accept ours and reject the usual wrong samplers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from privacy_toy import toy_public
from scipy import stats

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.dchi import sample_dchi
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class

Sampler = Callable[[np.random.Generator, int, int, float], NDArray[np.float64]]
TOKENS = 6000
REJECT = 1e-4


def norm_p_value(noise_TD: NDArray[np.floating], eta: float) -> float:
    """Kolmogorov-Smirnov: norms against Gamma(d, 1/eta)."""
    norms = np.linalg.norm(noise_TD.astype(np.float64), axis=1)
    law = stats.gamma(noise_TD.shape[1], scale=1 / eta)
    return float(stats.kstest(norms, law.cdf).pvalue)


def direction_p_value(noise_TD: NDArray[np.floating]) -> float:
    """Smallest p-value, Bonferroni-corrected, over projections of the unit vectors.

    The projection x of a uniform direction on any fixed axis has (x + 1) / 2 ~ Beta(a, a) with
    a = (d - 1) / 2. Axes: coordinates, the diagonal and random ones.
    """
    d = noise_TD.shape[1]
    noise = noise_TD.astype(np.float64)
    units = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    axes = [np.eye(d)[i] for i in (0, d // 2, d - 1)]
    axes.append(np.ones(d) / np.sqrt(d))
    axes += [a / np.linalg.norm(a) for a in np.random.default_rng(9).normal(size=(3, d))]
    law = stats.beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)
    return min(1.0, len(axes) * min(stats.kstest(units @ a, law.cdf).pvalue for a in axes))


def independence_p_value(noise_TD: NDArray[np.floating]) -> float:
    """Norms of consecutive tokens, and norm against direction, are uncorrelated."""
    norms = np.linalg.norm(noise_TD.astype(np.float64), axis=1)
    if np.ptp(norms) < 1e-9 * norms.mean():
        return 0.0
    towards = noise_TD[:, 0] / norms
    serial = stats.spearmanr(norms[:-1], norms[1:]).pvalue
    return float(2 * min(serial, stats.spearmanr(norms, towards).pvalue))


def law_p_value(noise_TD: NDArray[np.floating], eta: float) -> float:
    """The whole law."""
    return min(
        norm_p_value(noise_TD, eta), direction_p_value(noise_TD), independence_p_value(noise_TD)
    )


def _gamma_each_coordinate(
    rng: np.random.Generator, tokens: int, d: int, eta: float
) -> NDArray[np.float64]:
    """Gamma x uniform per coordinate: the norm comes out sqrt(d / 3) too large."""
    return rng.gamma(d, 1 / eta, size=(tokens, d)) * rng.uniform(-1, 1, size=(tokens, d))


def _one_radius_a_batch(
    rng: np.random.Generator, tokens: int, d: int, eta: float
) -> NDArray[np.float64]:
    noise = sample_dchi(rng, tokens, d, eta)
    return noise / np.linalg.norm(noise, axis=1, keepdims=True) * rng.gamma(d, 1 / eta)


def _direction_from_a_cube(
    rng: np.random.Generator, tokens: int, d: int, eta: float
) -> NDArray[np.float64]:
    cube = rng.uniform(-1, 1, size=(tokens, d))
    radius = rng.gamma(d, 1 / eta, size=(tokens, 1))
    return cube / np.linalg.norm(cube, axis=1, keepdims=True) * radius


def _positive_directions(
    rng: np.random.Generator, tokens: int, d: int, eta: float
) -> NDArray[np.float64]:
    return np.abs(sample_dchi(rng, tokens, d, eta))


def _gaussian(rng: np.random.Generator, tokens: int, d: int, eta: float) -> NDArray[np.float64]:
    """Right mean norm, wrong tail."""
    return rng.normal(scale=np.sqrt(d) / eta, size=(tokens, d))


def _radius_off_by_one_shape(
    rng: np.random.Generator, tokens: int, d: int, eta: float
) -> NDArray[np.float64]:
    noise = sample_dchi(rng, tokens, d, eta)
    radius = rng.gamma(d - 1, 1 / eta, size=(tokens, 1))
    return noise / np.linalg.norm(noise, axis=1, keepdims=True) * radius


@pytest.mark.parametrize(("d", "eta"), [(2, 0.5), (3, 7.0), (24, 1.0), (384, 176.0)])
def test_our_sampler_follows_the_law(d: int, eta: float) -> None:
    for seed in range(2):
        noise = sample_dchi(keyed_generator(bytes(32), "law", seed), TOKENS, d, eta)
        assert law_p_value(noise, eta) > REJECT


@pytest.mark.parametrize("d", [3, 24, 384])
@pytest.mark.parametrize(
    "broken",
    [
        _gamma_each_coordinate,
        _one_radius_a_batch,
        _direction_from_a_cube,
        _positive_directions,
        _gaussian,
    ],
)
def test_wrong_samplers_are_rejected(broken: Sampler, d: int) -> None:
    noise = broken(np.random.default_rng(1), TOKENS, d, 2.0)
    assert law_p_value(noise, 2.0) < REJECT


@pytest.mark.parametrize("d", [3, 24])
def test_wrong_shape_of_the_radius_is_rejected(d: int) -> None:
    noise = _radius_off_by_one_shape(np.random.default_rng(1), TOKENS, d, 2.0)
    assert norm_p_value(noise, 2.0) < REJECT


@pytest.mark.parametrize("name", ["dchi", "privtune"])
def test_what_mechanisms_release_follows_the_law(name: str, tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    folder = tmp_path / "artefact"
    folder.mkdir()
    spec = mechanism_class(name).design(PrivacyConfig(mechanism=name, noise=2.0), public, folder)
    mechanism = create_mechanism(spec, folder)
    eta = float(spec.params["eta"])
    ids = np.random.default_rng(2).integers(0, public.vocab_size, size=TOKENS)
    hidden = public.bank[ids]
    noise = mechanism.perturb(hidden, ids, keyed_generator(bytes(32), spec.id)) - hidden
    if name == "privtune":
        shift = mechanism.shift()
        assert shift is not None
        scale = mechanism._scale_V[ids]  # type: ignore[attr-defined]
        assert scale.min() < 0.6
        assert scale.max() == 1
        noise = (noise - shift[ids].astype(np.float32)) / scale[:, None]
    assert law_p_value(noise, eta) > REJECT
    # E||r u|| = d / eta = `noise` units
    norm = np.linalg.norm(noise, axis=1).mean()
    assert norm == pytest.approx(2.0 * public.unit, rel=0.02)
