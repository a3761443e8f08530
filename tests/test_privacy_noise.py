"""The sampler of d_chi noise: checks that accept ours and reject the usual wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from law_kit import check_dchi, check_gamma_radius, norms_of
from numpy.typing import NDArray

from privtune_flwr.privacy.dchi import sample_dchi
from privtune_flwr.privacy.keyed import keyed_generator

Sampler = Callable[[np.random.Generator, int, int, float], NDArray[np.float64]]
TOKENS = 6000


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
        check_dchi(sample_dchi(keyed_generator(bytes(32), "law", seed), TOKENS, d, eta), eta)


@pytest.mark.parametrize("d", [3, 24, 384])
@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (_gamma_each_coordinate, "radius is not Gamma"),
        (_one_radius_a_batch, "share one radius"),
        (_direction_from_a_cube, "directions"),
        (_positive_directions, "directions"),
        (_gaussian, "radius is not Gamma"),
    ],
)
def test_wrong_samplers_are_rejected(broken: Sampler, why: str, d: int) -> None:
    noise = broken(np.random.default_rng(1), TOKENS, d, 2.0)
    with pytest.raises(AssertionError, match=why):
        check_dchi(noise, 2.0)


@pytest.mark.parametrize("d", [3, 24])
def test_wrong_shape_of_the_radius_is_rejected(d: int) -> None:
    noise = _radius_off_by_one_shape(np.random.default_rng(1), TOKENS, d, 2.0)
    with pytest.raises(AssertionError, match="radius is not Gamma"):
        check_gamma_radius(norms_of(noise), d, 2.0)
