"""What repeated releases give away, and what crosses beside the rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from audit_kit import Real, real

from privtune_flwr.audit.knowledge import Pair
from privtune_flwr.audit.linkage import linkage
from privtune_flwr.audit.repeats import (
    Averaged,
    average_releases,
    averaging_curve,
    gaussian_guess,
    store_repeats,
)
from privtune_flwr.audit.side_channels import SideChannel, side_channels
from privtune_flwr.training.store import SmashedStore


@pytest.fixture(scope="module")
def minilm() -> Real:
    return real()


# ------------------------------------------------------------------------- the same, again


def test_averaging_undoes_independent_noise(minilm: Real, tmp_path: Path) -> None:
    mechanism = minilm.build(tmp_path, mechanism="dchi", noise=4.0)
    pairs = [Pair(c, i) for c, i in zip(minilm.clean[:60], minilm.sequences[:60], strict=True)]
    told: list[float] = []
    once, sixteen = averaging_curve(
        mechanism,
        pairs,
        minilm.public.tokenizer,
        gaussian_guess(minilm.public),
        releases=(1, 16),
        tell=told.append,
    )
    assert (once.releases, sixteen.releases) == (1, 16)
    assert told == [0.5, 1.0]
    assert 0.7 < (once.top1.value or 0) < 0.9
    assert (sixteen.top1.value or 0) > 0.98
    assert (sixteen.content_top1.low or 0) > (once.content_top1.high or 1) + 0.1


def test_averaged_noise_has_a_sixteenth_of_the_variance(minilm: Real, tmp_path: Path) -> None:
    mechanism = minilm.build(tmp_path, mechanism="dchi", noise=4.0)
    averaged = Averaged(mechanism, 16)
    rng = np.random.default_rng(0)
    clean, ids = np.concatenate(minilm.clean[:10]), np.concatenate(minilm.sequences[:10])
    one = (mechanism.perturb(clean, ids, rng) - clean).var()
    many = (averaged.perturb(clean, ids, rng) - clean).var()
    assert many == pytest.approx(one / 16, rel=0.05)
    assert averaged.eta_max == pytest.approx(16 * (mechanism.eta_max or 0))
    assert averaged.spec.id != Averaged(mechanism, 8).spec.id != mechanism.spec.id
    with pytest.raises(ValueError, match="at least one"):
        Averaged(mechanism, 0)


def test_two_devices_with_the_same_text(minilm: Real, tmp_path: Path) -> None:
    chance = len({len(s) for s in minilm.sequences}) / len(minilm.sequences)

    error = np.sqrt(chance * (1 - chance) / 150)

    def link(**changes: object) -> float:
        mechanism = minilm.build(tmp_path, **changes)
        found = linkage(mechanism, minilm.clean, minilm.sequences, public=minilm.public, seed=2)
        assert found.share.n == 150
        assert found.chance == pytest.approx(1 / 150)
        assert found.by_length == pytest.approx(chance)
        return found.share.value or 0

    assert link(mechanism="none") == 1.0
    assert link(mechanism="dchi", noise=4.0) > 0.95
    assert link(mechanism="dchi", noise=16.0) > chance + 3 * error
    assert abs(link(mechanism="dchi", noise=400.0) - chance) < 3 * error


def test_a_twin_is_no_wrong_link(minilm: Real, tmp_path: Path) -> None:
    mechanism = minilm.build(tmp_path, mechanism="none")
    twice_rows, twice_ids = minilm.clean[:5] * 2, minilm.sequences[:5] * 2
    found = linkage(mechanism, twice_rows, twice_ids, public=minilm.public)
    assert (found.share.n, found.share.value) == (5, 1.0)


# --------------------------------------------------------------------------- a cloud's store


@pytest.fixture
def store(tmp_path: Path) -> SmashedStore:
    """Two devices, two chunks each; a-0 releases three times, its second example unchanged."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "run" / "store"
    store = SmashedStore(folder, hidden=4, dtype="float32")
    store.append(("cloud", "test", 0, 0), rng.normal(size=(5, 4)), [5], [0])
    fixed = rng.normal(size=(2, 4))
    for epoch in range(3):
        rows = np.concatenate([np.full((3, 4), float(epoch)), fixed])
        store.append(("a", "train", epoch, 0), rows, [3, 2], [0, 1])
    store.append(("a", "train", 0, 1), fixed, [2], [1])  # twin of a-0's second example
    for chunk in range(2):
        rows = np.concatenate([rng.normal(size=(7, 4)), fixed])
        store.append(("b", "train", 0, chunk), rows, [4, 3, 2], [0, 0, 1])
    write_run(folder.parent)
    return store


def write_run(folder: Path) -> None:
    up = {"a": 340, "b": 360}
    traffic = {"devices": {d: {"up": n, "down": 0, "messages": 1} for d, n in up.items()}}
    (folder / "results.json").write_text(json.dumps({"traffic": traffic}))
    devices = {
        "train": {"a": 3, "b": 6},
        "evaluation": {"a": 0, "b": 40},
        "labels": ["no", "yes"],
    }
    (folder / "devices.json").write_text(json.dumps(devices))
    rounds = [
        {"kind": "release", "tokens": t, "seconds_bottom": 2.0 * t + 1, "noise_norm_sum": 0.0}
        for t in (10, 20, 15)
    ]
    lines = [*rounds, {"kind": "train", "tokens": 7, "seconds_bottom": -90, "eval_examples": 40}]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_repeats_in_a_store(store: SmashedStore) -> None:
    found = store_repeats(store)
    assert (found.examples, found.fewest, found.most) == (9, 1, 3)
    assert found.mean == pytest.approx((3 + 3 + 7) / 9)
    assert (found.repeated, found.differing) == (2, 1)
    keys, released = average_releases(store)
    rows = dict(zip(keys, released.rows, strict=True))
    assert len(rows) == 9
    np.testing.assert_array_equal(rows["a", 0, 0], np.full((3, 4), 1.0))
    np.testing.assert_allclose(rows["a", 0, 1], rows["a", 1, 0], rtol=1e-6)
    assert rows["b", 1, 1].shape == (3, 4)
    with pytest.raises(ValueError, match="no example"):
        store_repeats(store, split="eval")
    store.append(("b", "train", 1, 0), np.zeros((9, 4)), [3, 4, 2], [0, 0, 1])
    with pytest.raises(ValueError, match="length"):
        average_releases(store)


def test_side_channels_by_hand(store: SmashedStore) -> None:
    found = {c.name: c for c in side_channels(store)}
    # lengths of nine sentences: a 3 2 2, b 4 3 2 4 3 2
    share = np.array([4, 3, 2]) / 9
    assert found["lengths"].value == pytest.approx(-(share * np.log2(share)).sum())
    assert "11.1 %" in found["lengths"].figure  # a's only sentence of length 3
    assert found["labels"].value == 1.0
    assert found["twins"].figure.startswith("4 of 9")
    assert found["metric seconds_bottom"].value == pytest.approx(1.0)
    assert found["metric noise_norm_sum"].value is None
    assert found["metrics in replies"].value == 3
    assert found["device's description"].value == 2
    assert found["gradients"].value is None
    # one evaluation of 40 answers: 41 counts, and losses up to 40 times 40 + ln 2 in hundredths
    bits = np.log2(41) + np.log2(40 * (40 + np.log(2)) * 100 + 1)
    assert found["evaluation sums"].value == pytest.approx(bits)
    assert "hold up to 40" in found["evaluation sums"].figure
    # a 3 + 2, three times, and 2 more; b twice 9
    assert "20 bytes a token" in found["message sizes"].figure


def big(folder: Path, *, leaky: bool) -> dict[str, SideChannel]:
    """Describe a run whose lengths and order do, or do not, follow the label."""
    rng = np.random.default_rng(1)
    store = SmashedStore(folder / "store", hidden=1, dtype="float32")
    for device in "ab":
        labels = rng.integers(2, size=300)
        lengths = rng.integers(3, 9, size=300)
        if leaky:
            labels = np.sort(labels)
            lengths = lengths + 4 * labels
        rows = rng.normal(size=(lengths.sum(), 1))
        store.append((device, "train", 0, 0), rows, lengths.tolist(), labels.tolist())
    write_run(folder)
    return {c.name: c for c in side_channels(store)}


def test_leaks_in_length_and_order_are_found(tmp_path: Path) -> None:
    leaky = big(tmp_path / "leaky", leaky=True)
    # Lengths 3..8 against 7..12: a third of each class is ambiguous.
    assert leaky["label from length"].value == pytest.approx(1 - 1 / 6, abs=0.05)
    assert (leaky["order and label"].value or 0) < 1e-6
    assert (leaky["order and length"].value or 0) > 0.5
    tight = big(tmp_path / "tight", leaky=False)
    assert tight["label from length"].value == pytest.approx(0.5, abs=0.07)
    assert (tight["order and label"].value or 0) > 0.001
    assert abs(tight["order and length"].value or 1) < 0.13


def test_labels_that_stay_on_the_device(tmp_path: Path) -> None:
    store = SmashedStore(tmp_path / "store", hidden=1, dtype="float32")
    store.append(("a", "train", 0, 0), np.zeros((4, 1)), [1, 3], None)
    write_run(tmp_path)
    found = {c.name: c for c in side_channels(store)}
    assert (found["labels"].seen, found["labels"].value) == ("none", 0.0)
    assert found["label from length"].value is None
    assert found["order and label"].value is None
