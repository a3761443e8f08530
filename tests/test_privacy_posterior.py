"""The decoder's linear algebra against a float64 computation of the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from privacy_toy import toy_public

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.privtune import posterior as module
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior, pooled_covariance
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class

V, D = 7, 3
rng = np.random.default_rng(4)
BANK = rng.normal(size=(V, D))
SHIFT = rng.normal(size=(V, D))
MEAN = BANK + SHIFT
ROOT = rng.normal(size=(D, D))
COVARIANCE = ROOT @ ROOT.T + 0.1 * np.eye(D)
PRIOR = rng.uniform(0.1, 5, size=V)
ROWS = rng.normal(size=(40, D)) * 2


def _expected(rows: np.ndarray) -> np.ndarray:
    """p(v | y), written down from the formula."""
    inverse = np.linalg.inv(COVARIANCE)
    off = rows[:, None] - MEAN[None]
    weight = PRIOR * np.exp(-np.einsum("nvd,de,nve->nv", off, inverse, off) / 2)
    return weight / weight.sum(axis=1, keepdims=True)


def test_posterior_top_and_unshift_are_those_of_the_formula() -> None:
    posterior = ShiftPosterior(MEAN, COVARIANCE, PRIOR, SHIFT)
    expected = _expected(ROWS)
    np.testing.assert_allclose(np.exp(posterior.log_posterior(ROWS)), expected, atol=1e-4)
    np.testing.assert_array_equal(posterior.top(ROWS, 3), np.argsort(-expected, axis=1)[:, :3])
    unshifted = posterior.unshift(ROWS)
    assert unshifted.dtype == np.float32
    np.testing.assert_allclose(unshifted, ROWS - expected @ SHIFT, atol=1e-3)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = ShiftPosterior(MEAN, COVARIANCE, PRIOR, SHIFT)
    whole = posterior.top(ROWS, 2), posterior.unshift(ROWS)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(posterior.top(ROWS, 2), whole[0])
    np.testing.assert_allclose(posterior.unshift(ROWS), whole[1], atol=1e-5)
    assert posterior.top(ROWS[:0], 2).shape == (0, 2)
    assert posterior.unshift(ROWS[:0]).shape == (0, D)


def test_far_rows_stay_finite_and_a_large_offset_does_no_harm() -> None:
    posterior = ShiftPosterior(MEAN, COVARIANCE, PRIOR, SHIFT)
    assert np.isfinite(posterior.unshift(ROWS * 1e6)).all()
    assert np.isfinite(posterior.log_posterior(ROWS * 1e6)).all()
    far = ShiftPosterior(MEAN + 1000, COVARIANCE, PRIOR, SHIFT)
    np.testing.assert_array_equal(far.top(ROWS + 1000), posterior.top(ROWS))


def test_without_a_shift_it_only_reads() -> None:
    posterior = ShiftPosterior(MEAN, COVARIANCE, PRIOR)
    np.testing.assert_array_equal(posterior.unshift(ROWS), ROWS.astype(np.float32))
    np.testing.assert_array_equal(posterior.top(ROWS)[:, 0], _expected(ROWS).argmax(axis=1))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        ShiftPosterior(MEAN, -COVARIANCE, PRIOR)
    with pytest.raises(ValueError, match="prior"):
        ShiftPosterior(MEAN, COVARIANCE, PRIOR * 0)
    with pytest.raises(ValueError, match="fit together"):
        ShiftPosterior(MEAN, COVARIANCE, PRIOR[1:])
    with pytest.raises(ValueError, match="shift"):
        ShiftPosterior(MEAN, COVARIANCE, PRIOR, SHIFT[1:])
    with pytest.raises(ValueError, match="rows"):
        ShiftPosterior(MEAN, COVARIANCE, PRIOR).top(ROWS[:, :2])


@pytest.mark.parametrize("name", ["none", "dchi", "privtune"])
def test_fit_pools_released_public_rows(name: str, tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    folder = tmp_path / "artefact"
    folder.mkdir()
    config = PrivacyConfig(mechanism=name, noise=0.3, importance_floor=1.0)
    spec = mechanism_class(name).design(config, public, folder)
    mechanism = create_mechanism(spec, folder)
    mean = np.array(public.bank)
    if (shift := mechanism.shift()) is not None:
        mean = mean + shift
    covariance = pooled_covariance(mechanism, public, mean, 10_000)
    # Clean residuals about the bank, plus isotropic noise of E r^2 / d = (d + 1) / eta^2.
    clean = public.rows(10_000)
    residual = clean.values - np.asarray(public.bank)[clean.ids]
    expected = residual.T @ residual / len(residual)
    if name != "none":
        eta = float(spec.params["eta"])
        expected = expected + np.eye(6) * (6 + 1) / eta**2
    expected = expected + 0.01 * np.diag(expected).mean() * np.eye(6)
    np.testing.assert_allclose(covariance, expected, atol=0.1 * np.diag(expected).mean())

    posterior = ShiftPosterior.fit(mechanism, public)
    released = mechanism.perturb(clean.values, clean.ids, np.random.default_rng(7))
    right = posterior.top(released)[:, 0] == clean.ids
    # In six dimensions shifted means crowd together, so some tokens are lost for good.
    assert right.mean() > (0.6 if name == "privtune" else 0.9)
    again = ShiftPosterior.fit(mechanism, toy_public(tmp_path))  # from disk
    np.testing.assert_array_equal(again.top(released), posterior.top(released))
