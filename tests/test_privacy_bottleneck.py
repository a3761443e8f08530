"""The bottleneck's release: exact levels, bounds that hold whatever was learned, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bottleneck_kit import POSITIONS, frozen, learner_of, recipe, release, task, without
from numpy.typing import NDArray
from privacy_toy import toy_public
from safetensors.numpy import load_file, save_file
from scipy import stats
from tiny_models import HIDDEN, VOCAB

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.mechanism_config import BottleneckSection, LearningSection
from privtune_flwr.models import BottomModel
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.bottleneck.learner import padded
from privtune_flwr.privacy.bottleneck.mechanism import Bottleneck, quantise, randomise
from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork, straight_through
from privtune_flwr.privacy.bottleneck.recipe import TENSORS
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.registry import create_mechanism

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REJECT = 1e-4


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 4096])
def test_levels_are_exact_and_the_nearest(levels: int) -> None:
    grid = np.linspace(-1, 1, levels)
    assert (quantise(grid, levels) == np.arange(levels)).all()
    inside = np.random.default_rng(0).uniform(-1, 1, 5000)
    chosen = grid[quantise(inside, levels)]
    assert np.abs(chosen - inside).max() <= 1 / (levels - 1) + 1e-12
    rounded = straight_through(torch.from_numpy(inside), levels).numpy()
    np.testing.assert_allclose(rounded, chosen, atol=1e-12)


def test_the_gradient_passes_straight_through() -> None:
    values = torch.linspace(-0.9, 0.9, 7, requires_grad=True)
    weight = torch.arange(7.0)
    (straight_through(values, 4) * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight)


def test_released_rows_are_levels_of_what_the_network_says(
    tiny_bottom: BottomModel, tmp_path: Path
) -> None:
    mechanism = frozen(tiny_bottom, tmp_path)
    ids = task()[0][5]
    rows = release(mechanism, ids)
    assert rows.shape == (len(ids), 2) == (len(ids), mechanism.width(HIDDEN))
    learner = learner_of(tiny_bottom)
    network = BottleneckNetwork(tiny_bottom, learner.recipe.shape)
    network.put(load_file(tmp_path / TENSORS))
    squashed = network.squash(*padded([ids]))[0].detach().numpy()
    grid = np.linspace(-1, 1, 4)
    nearest = grid[np.abs(squashed[..., None] - grid).argmin(-1)]
    np.testing.assert_allclose(rows, nearest, atol=1e-6)
    assert len(np.unique(rows)) > 1


def test_a_hostile_artefact_cannot_widen_the_channel(
    tiny_bottom: BottomModel, tmp_path: Path
) -> None:
    """Weights of a million, or anything else: a row is one of L^R, as strength says."""
    learner = learner_of(tiny_bottom)
    rng = np.random.default_rng(1)
    for number, scale in enumerate([1e-3, 1.0, 1e3, 1e6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        start = learner.start()
        hostile = {
            name: (scale * rng.normal(size=array.shape)).astype(np.float32)
            if name.startswith("projection")
            else array
            for name, array in start.items()
        }
        mechanism = create_mechanism(learner.finish(hostile, folder), folder, tiny_bottom)
        assert isinstance(mechanism, Bottleneck)
        rows = np.concatenate([release(mechanism, ids) for ids in task(60)[0]])
        kinds = np.unique(rows, axis=0)
        assert mechanism.strength.bits == 4.0
        assert len(kinds) <= 2**mechanism.strength.bits
        thirds = rows * 3
        np.testing.assert_allclose(thirds, 2 * np.rint((thirds - 1) / 2) + 1, atol=1e-5)
        assert (kinds.shape[0] > 1) or scale == 1e-3


def flips(kind: Callable[..., NDArray[np.int64]], levels: int = 5, flip: float = 0.4) -> float:
    """p-value of outputs against k-ary randomised response, over all true levels."""
    rng = keyed_generator(bytes(32), "flips")
    worst = 1.0
    for true in range(levels):
        out = kind(np.full((4000, 3), true), levels, flip, rng)
        counts = np.bincount(out.ravel(), minlength=levels)
        expected = np.full(levels, flip / levels)
        expected[true] += 1 - flip
        worst = min(worst, float(stats.chisquare(counts, expected * out.size).pvalue))
        # numbers of a row are flipped independently of one another
        moved = out != true
        table = np.array(
            [[(moved[:, 0] == a)[moved[:, 1] == b].sum() for a in (0, 1)] for b in (0, 1)]
        )
        together = float(stats.chi2_contingency(table).pvalue) if table.min() > 0 else 0.0
        worst = min(worst, together)
    return worst


def _never_itself(
    level: NDArray[np.int64], levels: int, flip: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    other = (level + rng.integers(1, levels, size=level.shape)) % levels
    return np.where(rng.random(level.shape) < flip, other, level)


def _row_at_once(
    level: NDArray[np.int64], levels: int, flip: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    anything = rng.integers(levels, size=level.shape)
    return np.where(rng.random((len(level), 1)) < flip, anything, level)


def _neighbour(
    level: NDArray[np.int64], levels: int, flip: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    step = rng.integers(-1, 2, size=level.shape)
    return np.where(rng.random(level.shape) < flip, np.clip(level + step, 0, levels - 1), level)


def test_randomised_response_follows_its_law() -> None:
    assert flips(randomise) > REJECT


@pytest.mark.parametrize("broken", [_never_itself, _row_at_once, _neighbour])
def test_broken_randomised_response_is_rejected(
    broken: Callable[..., NDArray[np.int64]],
) -> None:
    assert flips(broken) < REJECT


def test_epsilon_is_the_largest_ratio_of_two_probabilities() -> None:
    strength = recipe(width=3, levels=5, flip=0.4).strength
    same, other = 1 - 0.4 + 0.4 / 5, 0.4 / 5
    assert strength.epsilon == pytest.approx(3 * math.log(same / other))
    assert strength.bits == pytest.approx(3 * math.log2(5))
    assert recipe().strength.epsilon is None


def test_release_is_flipped_as_promised(tiny_bottom: BottomModel, tmp_path: Path) -> None:
    plain_folder, flip_folder = tmp_path / "plain", tmp_path / "flip"
    plain_folder.mkdir()
    flip_folder.mkdir()
    plain = frozen(tiny_bottom, plain_folder)
    noisy = frozen(tiny_bottom, flip_folder, flip=0.4)
    ids = task()[0][5]
    clean = release(plain, ids)
    draws = np.stack([release(noisy, ids, seed) for seed in range(300)])
    kept = int((np.abs(draws - clean) < 1e-6).sum())
    assert stats.binomtest(kept, draws.size, 1 - 0.4 + 0.4 / 4).pvalue > REJECT
    assert (release(noisy, ids, 3) == release(noisy, ids, 3)).all()


def test_dchi_noise_has_its_law_in_few_dimensions(tiny_bottom: BottomModel, tmp_path: Path) -> None:
    eta = 2.5
    mechanism = frozen(tiny_bottom, tmp_path, levels=0, eta=eta)
    ids = task()[0][5]
    network = BottleneckNetwork(tiny_bottom, mechanism.recipe.shape)
    network.put(load_file(tmp_path / TENSORS))
    squashed = network.squash(*padded([ids]))[0].detach().numpy()
    noise = np.concatenate([release(mechanism, ids, seed) - squashed for seed in range(300)])
    norms = np.linalg.norm(noise.astype(np.float64), axis=1)
    assert stats.kstest(norms, stats.gamma(2, scale=1 / eta).cdf).pvalue > REJECT
    angle = np.arctan2(noise[:, 1], noise[:, 0])
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > REJECT
    # a radius in all D dimensions would be the classical mistake
    assert stats.kstest(norms, stats.gamma(HIDDEN, scale=1 / eta).cdf).pvalue < REJECT
    assert mechanism.eta_max == eta
    assert mechanism.strength.epsilon == pytest.approx(2 * eta * math.sqrt(2))
    assert mechanism.strength.bits is None


def test_a_draft_releases_nothing_and_says_its_strength(
    tiny_bottom: BottomModel, tmp_path: Path
) -> None:
    config = PrivacyConfig().model_copy(
        update={
            "mechanism": "bottleneck",
            "bottleneck": BottleneckSection(width=3, levels=8, flip=0.25),
            "learning": LearningSection(rounds=3, adversary=0.5),
        }
    )
    spec = Bottleneck.design(config, toy_public(tmp_path), tmp_path)
    assert Bottleneck.declared(spec).bits == 9.0
    assert (
        Bottleneck.declared(MechanismSpec.from_json(spec.to_json()))
        == recipe(hidden_size=6, width=3, levels=8, flip=0.25).strength
    )
    draft = recipe()
    mechanism = create_mechanism(MechanismSpec("bottleneck", draft.params()), None, tiny_bottom)
    with pytest.raises(MechanismError, match="not been learned"):
        release(mechanism, task()[0][0])  # type: ignore[arg-type]
    with pytest.raises(MechanismError, match="not been learned"):
        mechanism.lift_start()  # type: ignore[attr-defined]


def test_one_that_was_learned_on_public_labels_alone_is_frozen_after_no_round(
    tiny_bottom: BottomModel, tmp_path: Path
) -> None:
    public = recipe(rounds=0, warm_start="labels")
    learner = learner_of(tiny_bottom, rounds=0, warm_start="labels")
    spec = learner.finish(learner_of(tiny_bottom).start(), tmp_path)
    assert (spec.params["rounds"], spec.params["rounds_done"]) == (0, 0)
    mechanism = create_mechanism(spec, tmp_path, tiny_bottom)
    assert isinstance(mechanism, Bottleneck)
    ids = task()[0][0]
    assert (release(mechanism, ids) == release(frozen(tiny_bottom, tmp_path), ids)).all()
    statement = mechanism.guarantee().statement
    assert "No device's update went into the weights" in statement
    assert "not bounded here" not in statement
    with pytest.raises(MechanismError, match="frozen"):
        Bottleneck.learner(spec, tmp_path, tiny_bottom, 3)
    # its draft has the same parameters, and no artefact
    draft = create_mechanism(MechanismSpec("bottleneck", public.params()), None, tiny_bottom)
    with pytest.raises(MechanismError, match="not been learned"):
        release(draft, ids)  # type: ignore[arg-type]
    with pytest.raises(MechanismError):
        create_mechanism(spec, None, tiny_bottom)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": 1},
        {"eta": 0.0, "levels": 0},
        {"levels": 0, "eta": 1.0, "flip": 0.1},
        {"eta": 1.0},
        {"width": HIDDEN + 1},
        {"warm_start": "all"},
        {"rounds": 0},
        {"flip": 1.0},
        {"rounds_done": -1},
        {"levels": 2.0},
        {"levels": 10**6},
    ],
)
def test_wrong_specifications_are_refused(wrong: dict[str, Any]) -> None:
    spec = MechanismSpec("bottleneck", recipe().params(**wrong))
    with pytest.raises(MechanismError, match=next(iter(wrong))):
        Bottleneck.load(spec, None)
    with pytest.raises(MechanismError):
        Bottleneck.declared(spec)


def test_hostile_artefacts_are_refused(tiny_bottom: BottomModel, tmp_path: Path) -> None:
    spec = frozen(tiny_bottom, tmp_path).spec
    good = load_file(tmp_path / TENSORS)
    block = next(n for n in good if n.startswith("base."))
    nan = good[block].copy()
    nan.flat[0] = np.nan
    cases = {
        "missing": without(good, block),
        "unexpected": good | {"base.more": np.zeros(2, np.float32)},
        f"{block} must": good | {block: np.zeros((2, 2), np.float32)},
        "finite": good | {block: nan},
        "projection.weight": good | {"projection.weight": np.zeros((3, HIDDEN), np.float32)},
        "float32": good | {block: good[block].astype(np.float64)},
        "lift.positions": without(good, "lift.positions"),
    }
    for number, (message, state) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(state, folder / TENSORS)
        with pytest.raises(MechanismError, match=message):
            create_mechanism(spec, folder, tiny_bottom)
    (tmp_path / TENSORS).write_bytes(b"no tensors")
    for folder in (tmp_path, tmp_path / "nowhere", None):
        with pytest.raises(MechanismError, match=r"artefact|unreadable"):
            create_mechanism(spec, folder, tiny_bottom)


def test_overflow_in_hostile_weights_releases_nothing(
    tiny_bottom: BottomModel, tmp_path: Path
) -> None:
    learner = learner_of(tiny_bottom)
    huge = {n: np.full_like(a, 3e38) for n, a in learner.start().items()}
    mechanism = create_mechanism(learner.finish(huge, tmp_path), tmp_path, tiny_bottom)
    with pytest.raises(MechanismError, match="not finite"):
        release(mechanism, task()[0][0])  # type: ignore[arg-type]


def test_what_does_not_fit_the_model_is_refused(tiny_bottom: BottomModel, tmp_path: Path) -> None:
    mechanism = frozen(tiny_bottom, tmp_path)
    with pytest.raises(MechanismError, match="positions"):
        release(mechanism, np.full(POSITIONS + 1, 7, np.int32))
    with pytest.raises(MechanismError, match="vocabulary"):
        release(mechanism, np.array([5, VOCAB], np.int32))
    unattached = create_mechanism(mechanism.spec, tmp_path)
    with pytest.raises(MechanismError, match="needs the bottom model"):
        release(unattached, task()[0][0])  # type: ignore[arg-type]
    no_model: Any = toy_public(tmp_path)._bottom
    with pytest.raises(MechanismError, match=r"hidden_size|BottomModel"):
        create_mechanism(mechanism.spec, tmp_path, no_model)
