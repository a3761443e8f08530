"""The bottleneck: exact levels, bounds that hold whatever was learned, laws, and its learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from privacy_toy import toy_public
from safetensors.numpy import load_file, save_file
from scipy import stats
from tiny_models import HIDDEN, VOCAB, save_tiny, sentences
from tiny_models import TYPES as FAMILIES

from privtune_flwr.bundle import Manifest
from privtune_flwr.config import PrivacyConfig
from privtune_flwr.data import load_source, tokenise
from privtune_flwr.mechanism_config import BottleneckSection, LearningSection
from privtune_flwr.models import BottomModel, CutModel, cut_model
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.bottleneck.learner import BottleneckLearner, padded
from privtune_flwr.privacy.bottleneck.mechanism import Bottleneck, quantise, randomise
from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork, straight_through
from privtune_flwr.privacy.bottleneck.recipe import TENSORS, Recipe
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.registry import create_mechanism

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REJECT = 1e-4
POSITIONS = 16


def recipe(**changes: Any) -> Recipe:
    """A small one for the tiny models."""
    values: dict[str, Any] = {
        "width": 2,
        "levels": 4,
        "eta": 0.0,
        "flip": 0.0,
        "hidden_size": HIDDEN,
        "positions": POSITIONS,
        "rounds": 2,
        "epochs": 1,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "adversary": 0.0,
        "warm_start": "none",
        "clip": 0.0,
        "noise": 0.0,
    }
    return Recipe(**values | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BottomModel:
    """A tiny BERT's two lowest blocks."""
    folder = save_tiny("bert", tmp_path_factory.mktemp("bert"))
    return cut_model(folder, cut=2, num_labels=3, seed=0).bottom


def learner_of(bottom: BottomModel, num_labels: int = 3, **changes: Any) -> BottleneckLearner:
    return BottleneckLearner(recipe(**changes), bottom, num_labels)


def frozen(bottom: BottomModel, folder: Path, **changes: Any) -> Bottleneck:
    """Freeze the start, attached."""
    learner = learner_of(bottom, **changes)
    mechanism = create_mechanism(learner.finish(learner.start(), folder), folder, bottom)
    assert isinstance(mechanism, Bottleneck)
    return mechanism


def task(count: int = 24, seed: int = 0) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Sentences whose class is that of their first word."""
    found = sentences([3 + i % 6 for i in range(count)], seed=seed)
    return found, [int(s[0]) % 3 for s in found]


def release(mechanism: Bottleneck, ids_T: NDArray[np.int32], seed: int = 0) -> NDArray[np.float32]:
    hidden = np.zeros((len(ids_T), HIDDEN), dtype=np.float32)
    return mechanism.perturb(hidden, ids_T, keyed_generator(bytes(32), "test", seed))


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
    tiny: BottomModel, tmp_path: Path
) -> None:
    mechanism = frozen(tiny, tmp_path)
    ids = task()[0][5]
    rows = release(mechanism, ids)
    assert rows.shape == (len(ids), 2) == (len(ids), mechanism.width(HIDDEN))
    learner = learner_of(tiny)
    network = BottleneckNetwork(tiny, learner.recipe.shape)
    network.put(load_file(tmp_path / TENSORS))
    squashed = network.squash(*padded([ids]))[0].detach().numpy()
    grid = np.linspace(-1, 1, 4)
    nearest = grid[np.abs(squashed[..., None] - grid).argmin(-1)]
    np.testing.assert_allclose(rows, nearest, atol=1e-6)
    assert len(np.unique(rows)) > 1


def test_a_hostile_artefact_cannot_widen_the_channel(tiny: BottomModel, tmp_path: Path) -> None:
    """Weights of a million, or anything else: a row is one of L^R, as strength says."""
    learner = learner_of(tiny)
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
        mechanism = create_mechanism(learner.finish(hostile, folder), folder, tiny)
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


def test_release_is_flipped_as_promised(tiny: BottomModel, tmp_path: Path) -> None:
    plain_folder, flip_folder = tmp_path / "plain", tmp_path / "flip"
    plain_folder.mkdir()
    flip_folder.mkdir()
    plain = frozen(tiny, plain_folder)
    noisy = frozen(tiny, flip_folder, flip=0.4)
    ids = task()[0][5]
    clean = release(plain, ids)
    draws = np.stack([release(noisy, ids, seed) for seed in range(300)])
    kept = int((np.abs(draws - clean) < 1e-6).sum())
    assert stats.binomtest(kept, draws.size, 1 - 0.4 + 0.4 / 4).pvalue > REJECT
    assert (release(noisy, ids, 3) == release(noisy, ids, 3)).all()


def test_dchi_noise_has_its_law_in_few_dimensions(tiny: BottomModel, tmp_path: Path) -> None:
    eta = 2.5
    mechanism = frozen(tiny, tmp_path, levels=0, eta=eta)
    ids = task()[0][5]
    network = BottleneckNetwork(tiny, mechanism.recipe.shape)
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


def test_a_draft_releases_nothing_and_says_its_strength(tiny: BottomModel, tmp_path: Path) -> None:
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
    mechanism = create_mechanism(MechanismSpec("bottleneck", draft.params()), None, tiny)
    with pytest.raises(MechanismError, match="not been learned"):
        release(mechanism, task()[0][0])  # type: ignore[arg-type]
    with pytest.raises(MechanismError, match="not been learned"):
        mechanism.lift_start()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": 1},
        {"eta": 0.0, "levels": 0},
        {"levels": 0, "eta": 1.0, "flip": 0.1},
        {"eta": 1.0},
        {"width": HIDDEN + 1},
        {"warm_start": "all"},
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


def _without(state: State, name: str) -> State:
    return {n: a for n, a in state.items() if n != name}


def test_hostile_artefacts_are_refused(tiny: BottomModel, tmp_path: Path) -> None:
    spec = frozen(tiny, tmp_path).spec
    good = load_file(tmp_path / TENSORS)
    block = next(n for n in good if n.startswith("base."))
    nan = good[block].copy()
    nan.flat[0] = np.nan
    cases = {
        "missing": _without(good, block),
        "unexpected": good | {"base.more": np.zeros(2, np.float32)},
        f"{block} must": good | {block: np.zeros((2, 2), np.float32)},
        "finite": good | {block: nan},
        "projection.weight": good | {"projection.weight": np.zeros((3, HIDDEN), np.float32)},
        "float32": good | {block: good[block].astype(np.float64)},
        "lift.positions": _without(good, "lift.positions"),
    }
    for number, (message, state) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(state, folder / TENSORS)
        with pytest.raises(MechanismError, match=message):
            create_mechanism(spec, folder, tiny)
    (tmp_path / TENSORS).write_bytes(b"no tensors")
    for folder in (tmp_path, tmp_path / "nowhere", None):
        with pytest.raises(MechanismError, match=r"artefact|unreadable"):
            create_mechanism(spec, folder, tiny)


def test_overflow_in_hostile_weights_releases_nothing(tiny: BottomModel, tmp_path: Path) -> None:
    learner = learner_of(tiny)
    huge = {n: np.full_like(a, 3e38) for n, a in learner.start().items()}
    mechanism = create_mechanism(learner.finish(huge, tmp_path), tmp_path, tiny)
    with pytest.raises(MechanismError, match="not finite"):
        release(mechanism, task()[0][0])  # type: ignore[arg-type]


def test_what_does_not_fit_the_model_is_refused(tiny: BottomModel, tmp_path: Path) -> None:
    mechanism = frozen(tiny, tmp_path)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_state_makes_the_round_trip_in_every_family(family: str, tmp_path: Path) -> None:
    bottom = cut_model(save_tiny(family, tmp_path / "model"), cut=2, num_labels=3, seed=0).bottom
    before = {n: t.clone() for n, t in bottom.named_parameters()}
    learner = learner_of(bottom, adversary=0.2)
    ids, labels = task(8)
    state = learner.start()
    update = learner.update(state, ids, labels, round_number=1, seed=3)
    after = learner.apply(state, update.change)
    tuned = [n for n in state if n.startswith("base.") and (after[n] != state[n]).any()]
    assert tuned
    assert all(f".{bottom.family.blocks}." in f".{n}." for n in tuned)
    (tmp_path / "done").mkdir()
    spec = learner.finish(after, tmp_path / "done")
    assert spec.artefact == Manifest.of(tmp_path / "done").id
    kept = load_file(tmp_path / "done" / TENSORS)
    assert all((kept[n] == after[n]).all() for n in kept)
    assert not any(n.startswith(("readout", "adversary")) for n in kept)
    mechanism = create_mechanism(spec, tmp_path / "done", bottom)
    assert isinstance(mechanism, Bottleneck)
    assert release(mechanism, ids[0]).shape == (len(ids[0]), 2)
    lift = mechanism.lift_start()
    assert lift["projection"].shape == (2, HIDDEN)
    assert lift["positions"].shape == (POSITIONS, HIDDEN)
    # the shared, frozen model is as it was
    assert all(torch.equal(before[n], t) for n, t in bottom.named_parameters())
    assert not any(t.requires_grad for t in bottom.parameters())


def test_updates_are_deterministic_and_leave_the_generators_alone(tiny: BottomModel) -> None:
    ids, labels = task()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learner = learner_of(tiny, flip=0.2, adversary=0.1)
    state = learner.start()
    first = learner.update(state, ids, labels, round_number=1, seed=7)
    learner.update(state, ids[:5], labels[:5], round_number=2, seed=8)  # no memory between calls
    again = learner.update(state, ids, labels, round_number=1, seed=7)
    other = learner.update(state, ids, labels, round_number=1, seed=8)
    fresh = learner_of(tiny, flip=0.2, adversary=0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert all((first.change[n] == again.change[n]).all() for n in state)
    assert any((first.change[n] != other.change[n]).any() for n in state)
    assert all((fresh.start()[n] == state[n]).all() for n in state)
    assert first.examples == len(ids)
    assert first.metrics == again.metrics


def test_states_and_labels_that_do_not_fit_are_refused(tiny: BottomModel) -> None:
    learner = learner_of(tiny)
    ids, labels = task(6)
    state = learner.start()
    name = "projection.bias"
    wrong = [
        _without(state, name),
        state | {name: np.zeros(3, np.float32)},
        state | {name: np.full(2, np.inf, np.float32)},
        state | {name: np.zeros(2, np.float64)},  # type: ignore[dict-item]
    ]
    for bad in wrong:
        with pytest.raises(MechanismError, match="state"):
            learner.update(bad, ids, labels, round_number=1, seed=0)
    for texts, classes in [(ids, labels[:3]), (ids, [3] * 6), ([*ids[:5], ids[0][:0]], labels)]:
        with pytest.raises(MechanismError, match=r"label|empty"):
            learner.update(state, texts, classes, round_number=1, seed=0)
    with pytest.raises(MechanismError, match="warm_start"):
        learner_of(tiny, warm_start="labels").start()


def test_the_adversary_makes_tokens_harder_to_tell(tiny: BottomModel) -> None:
    """Against the same decoder, symbols learned with the adversary tell less of the tokens."""
    ids, labels = task(48)

    def recovered(weight: float) -> float:
        learner = learner_of(tiny, adversary=weight, rounds=6, epochs=2)
        state = learner.start()
        for number in range(1, 7):
            change = learner.update(state, ids, labels, round_number=number, seed=number).change
            state = learner.apply(state, change)
        network = BottleneckNetwork(tiny, learner.recipe.shape, 3)
        network.put(state)
        with torch.no_grad():
            rows = np.concatenate([network.symbols(*padded([s]))[0].numpy().round(3) for s in ids])
        # mutual information of symbol and token, in nats
        _, symbol = np.unique(rows, axis=0, return_inverse=True)
        joint = np.zeros((symbol.max() + 1, VOCAB))
        np.add.at(joint, (symbol, np.concatenate(ids)), 1)
        joint /= joint.sum()
        product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        seen = joint > 0
        return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())

    assert recovered(3.0) < 0.8 * recovered(1e-9)


def test_a_real_federated_round_lowers_the_loss(minilm: CutModel) -> None:
    """MiniLM, movie-snippets, two devices of 48 sentences, two rounds."""
    source = load_source("movie-snippets").shuffle(seed=0).select(range(96))
    ids = tokenise(minilm.tokenizer, source["text"][:], 32)
    labels = [int(label) for label in source["label"][:]]
    setting = recipe(
        hidden_size=384,
        positions=32,
        batch_size=8,
        learning_rate=3e-4,
        head_learning_rate=3e-3,
        rounds=2,
        epochs=2,
    )
    learner = BottleneckLearner(setting, minilm.bottom, 2)
    state = learner.start()
    start_accuracy = learner.accuracy(state, ids, labels)
    losses = []
    for number in (1, 2, 3):
        updates = [
            learner.update(state, ids[i::2], labels[i::2], round_number=number, seed=i)
            for i in range(2)
        ]
        losses.append(sum(u.metrics["loss_sum"] for u in updates) / 96)
        mean = {n: (updates[0].change[n] + updates[1].change[n]) / 2 for n in state}
        state = learner.apply(state, mean)
    assert losses[-1] < losses[0] - 0.02
    assert learner.accuracy(state, ids, labels) > max(0.6, start_accuracy)
