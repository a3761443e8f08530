"""PrivTune's parts against their definitions, by brute force on a small graph."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from privacy_toy import CLS, PAD, SEP, VOCABULARY, ToyBottom, toy_public
from safetensors.numpy import load_file, save_file

from privtune_flwr.bundle import Manifest
from privtune_flwr.config import ConfigError, PrivacyConfig, load_run_config
from privtune_flwr.mechanism_config import PrivTuneSection
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.privtune.graph import hop_sets, hop_sizes, nearest, symmetric_graph
from privtune_flwr.privacy.privtune.importance import importance, noise_scale, protected_entries
from privtune_flwr.privacy.privtune.mechanism import TENSORS, PrivTune
from privtune_flwr.privacy.privtune.targets import target_points
from privtune_flwr.privacy.registry import create_mechanism

K = 3


def _bank(n: int = 80, d: int = 3) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(n, d)).astype(np.float32)


def _brute_neighbours(bank: np.ndarray) -> list[set[int]]:
    distance = np.linalg.norm(bank[:, None].astype(float) - bank[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    joined: list[set[int]] = [set() for _ in bank]
    for v, row in enumerate(np.argsort(distance, axis=1)[:, :K]):
        for w in row:
            joined[v].add(int(w))
            joined[int(w)].add(v)
    return joined


def _distances_from(v: int, joined: list[set[int]]) -> dict[int, int]:
    seen = {v: 0}
    queue = deque([v])
    while queue:
        here = queue.popleft()
        for w in joined[here] - seen.keys():
            seen[w] = seen[here] + 1
            queue.append(w)
    return seen


def test_nearest_is_exact_and_never_the_row_itself() -> None:
    bank = np.concatenate([_bank(), _bank()[:2]])  # two rows coincide with two others
    distances, indices = nearest(bank, K)
    full = np.linalg.norm(bank[:, None] - bank[None], axis=2)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_allclose(distances, np.sort(full, axis=1)[:, :K], atol=1e-5)
    assert (indices != np.arange(len(bank))[:, None]).all()


def test_graph_is_symmetric_without_a_diagonal() -> None:
    graph = symmetric_graph(nearest(_bank(), K)[1]).toarray()
    assert (graph == graph.T).all()
    assert not graph.diagonal().any()
    assert [set(np.flatnonzero(row)) for row in graph] == _brute_neighbours(_bank())


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_hop_sets_are_exact(hops: int) -> None:
    bank = _bank()
    joined = _brute_neighbours(bank)
    graph = symmetric_graph(nearest(bank, K)[1])
    sets = hop_sets(graph, 10, 60, hops)
    assert len(sets) == hops
    for v, n in itertools.product(range(10, 60), range(1, hops + 1)):
        expected = {w for w, far in _distances_from(v, joined).items() if far == n}
        row = sets[n - 1][[v - 10]]
        assert set(row.indices[row.data.astype(bool)]) == expected
        assert row.nnz == len(expected)


def test_hop_sizes_count_all_exact_sets() -> None:
    graph = symmetric_graph(nearest(_bank(150), K)[1])
    sets = hop_sets(graph, 0, 150, 4)
    expected = [np.diff(members.indptr) for members in sets]
    np.testing.assert_array_equal(hop_sizes(graph, 4), expected)
    assert hop_sizes(graph, 4)[3].max() > 10


@pytest.mark.parametrize(("hops", "targets"), [(1, 2), (2, 5), (3, 4)])
def test_targets_follow_the_definition(hops: int, targets: int) -> None:
    bank, unit = _bank(), 0.4
    joined = _brute_neighbours(bank)
    graph = symmetric_graph(nearest(bank, K)[1])
    points = target_points(bank, graph, hops=hops, targets=targets, unit=unit)
    for v in range(len(bank)):
        reach = _distances_from(v, joined)
        members = [w for w, far in reach.items() if far == hops]
        assert members, "the small graph must not need the fallback here"
        away = {w: float(np.linalg.norm(bank[w].astype(float) - bank[v])) for w in members}
        best = sorted(members, key=away.__getitem__)[:targets]
        weights = np.exp([-away[w] / unit for w in best])
        expected = (weights / weights.sum()) @ bank[best]
        np.testing.assert_allclose(points[v], expected, atol=1e-4)


def test_an_empty_hop_set_falls_back_to_the_next_nearer() -> None:
    cluster = np.array([[0, 0], [0, 1], [1, 0]], dtype=np.float32)  # complete: no distance 2
    far = np.array([[90, 0], [93, 0], [96, 0], [99, 0], [102, 0]], dtype=np.float32)
    bank = np.concatenate([cluster, far])
    graph = symmetric_graph(nearest(bank, 2)[1])
    points = target_points(bank, graph, hops=2, targets=1, unit=1.0)
    np.testing.assert_allclose(points[0], cluster[1])  # from N_1
    np.testing.assert_allclose(points[3], far[3])  # from N_2: 99 is two steps from 90


def test_importance_prefers_topical_words_and_spares_the_rare(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bank = np.zeros((12, 2), dtype=np.float32)
    bank[2:4], bank[4:6] = (10, 0), (0, 10)
    sequences = []
    for topic in rng.integers(2, size=400):
        words = rng.integers(2, 4, size=6) + 2 * topic
        sequences.append(np.array([0, *words, 1, *([6] if rng.random() < 0.5 else [])], np.int32))
    sequences[0] = np.append(sequences[0], 7).astype(np.int32)  # seen once
    score = importance(sequences, bank, topics=2)
    assert np.isnan(score[8:]).all()
    assert min(score[2:6]) > 5 * score[6]  # in every topic alike
    assert score[7] < min(score[2:6])  # one occurrence proves no topic
    assert score[0] == pytest.approx(0, abs=1e-9)


def test_scales_follow_the_rank() -> None:
    score = np.array([0.3, np.nan, 0.1, 0.2, 9.0, 0.2])
    scale = noise_scale(score, np.array([4]), floor=0.5)
    np.testing.assert_allclose(scale, [0.5, 1, 1, 0.75, 1, 0.75], atol=1e-6)
    assert scale.dtype == np.float32
    assert (noise_scale(score, np.array([4]), floor=1.0) == 1).all()
    for floor in (0.1, 0.3, 0.7):
        assert noise_scale(score, np.array([], int), floor=floor).min() >= floor


@pytest.mark.parametrize("buckets", [1, 2, 3, 7])
def test_buckets_are_few_scales_of_equal_size_from_one_to_the_floor(buckets: int) -> None:
    score = np.random.default_rng(1).permutation(210).astype(float)
    scale = noise_scale(score, np.array([], int), floor=0.4, buckets=buckets)
    values, entries = np.unique(scale, return_counts=True)
    expected = np.linspace(0.4, 1, buckets) if buckets > 1 else [1.0]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert (entries == 210 // buckets).all()
    # more important never gets more noise
    assert (np.diff(scale[np.argsort(score)]) <= 0).all()


def test_each_factor_of_importance_can_be_taken_out() -> None:
    public_bank = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 10, size=6).astype(np.int32) for _ in range(200)]
    both, tfidf, entropy, none = (
        importance(sequences, public_bank, kind=kind)
        for kind in ("tfidf-entropy", "tfidf", "entropy", "none")
    )
    np.testing.assert_allclose(both, tfidf * entropy)
    assert not np.allclose(both[:10], tfidf[:10])
    assert not np.allclose(both[:10], entropy[:10])
    assert np.isnan(none).all()
    assert (noise_scale(none, np.array([], int), floor=0.5) == 1).all()


def _designed(folder: Path, **changes: Any) -> tuple[MechanismSpec, Path]:
    artefact = folder / "artefact"
    artefact.mkdir(exist_ok=True)
    config = PrivacyConfig(neighbours=4, targets=3).model_copy(update=changes)
    return PrivTune.design(config, toy_public(folder / "cache"), artefact), artefact


def test_shift_is_alpha_times_the_way_to_the_target(tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path, shift=0.5)
    public = toy_public(tmp_path / "cache")
    shift = create_mechanism(spec, artefact).shift()
    assert shift is not None
    text = public.text_ids
    bank = np.asarray(public.bank)[text]
    graph = symmetric_graph(public.nearest(4)[1])
    points = target_points(bank, graph, hops=2, targets=3, unit=public.unit)
    np.testing.assert_allclose(shift[text].astype(float), 0.5 * (points - bank), atol=2e-3)
    assert (shift[[CLS, SEP, PAD]] == 0).all()
    assert (np.linalg.norm(shift[text].astype(float), axis=1) > 0).all()


def test_special_and_unseen_tokens_keep_the_full_noise(tmp_path: Path) -> None:
    _, artefact = _designed(tmp_path)
    scale = load_file(artefact / TENSORS)["scale"]
    assert (scale[[CLS, SEP, PAD]] == 1).all()
    assert (scale[50:] == 1).all()
    assert scale.min() == pytest.approx(0.5)


def test_a_protected_entry_keeps_the_full_noise(tmp_path: Path) -> None:
    free, artefact = _designed(tmp_path)
    before = load_file(artefact / TENSORS)["scale"]
    listed = PrivTuneSection(protect="^w1[0-9]$, W2")  # an exact one, and one found anywhere
    spec, artefact = _designed(tmp_path, privtune=listed)
    scale = load_file(artefact / TENSORS)["scale"]
    named = [*range(10, 20), 2, *range(20, 30)]
    assert before[named].min() < 0.9
    assert (scale[named] == 1).all()
    others = [v for v in range(3, 50) if v not in named]
    assert scale[others].min() < 0.6
    assert spec.id != free.id
    assert spec.params["protect"] == "^w1[0-9]$, W2"


def test_protect_sees_through_the_marks_of_tokenizers() -> None:
    pieces = ["john", "##john", "\u0120john", "\u2581john", "john</w>", "johnson", "mary", None]

    class Pieces:
        def __len__(self) -> int:
            return len(pieces)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
            return [pieces[i] for i in ids]

    tokenizer: Any = Pieces()
    assert protected_entries(tokenizer, 99, ["^john$"]).tolist() == [0, 1, 2, 3, 4]
    assert protected_entries(tokenizer, 99, ["john", "ary"]).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert len(protected_entries(tokenizer, 99, [])) == 0


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="protect"):
        load_run_config({"privacy.privtune.protect": "fine,(open"})
    with pytest.raises(ConfigError, match="needs vector = pgd"):
        load_run_config({"privacy.privtune.per": "occurrence"})


def test_the_guarantee_counts_scales_and_names_each_buckets_eta(tmp_path: Path) -> None:
    said = {}
    for name, section, floor in (
        ("ranks", PrivTuneSection(), 0.5),
        ("three", PrivTuneSection(buckets=3), 0.5),
        ("one", PrivTuneSection(buckets=1), 0.5),
        ("none", PrivTuneSection(importance="none"), 0.5),
        ("floor", PrivTuneSection(), 1.0),
    ):
        spec, artefact = _designed(tmp_path, privtune=section, importance_floor=floor)
        mechanism = create_mechanism(spec, artefact)
        said[name] = mechanism.guarantee().statement
        if name == "three":
            values, entries = np.unique(mechanism._scale_V, return_counts=True)  # type: ignore[attr-defined]
            assert len(values) == 3
            for value, count in zip(values, entries, strict=True):
                eta = float(spec.params["eta"]) / value
                assert f"eta = {eta:.6g} (s = {value:.4g}, {count} entries)" in said[name]
            wrong = MechanismSpec(spec.name, {**spec.params, "buckets": 2}, spec.artefact)
            with pytest.raises(MechanismError, match="buckets"):
                create_mechanism(wrong, artefact)
    assert "3 scale buckets" in said["three"]
    assert "different scales" in said["ranks"]
    for name in ("ranks", "three"):
        assert "no pure d_chi" in said[name]
    for name in ("one", "none", "floor"):
        assert "no pure d_chi" not in said[name]
        assert f"between any two of its {VOCABULARY} entries" in said[name]


def test_artefact_is_a_bundle_and_the_design_repeats(tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path)
    assert spec.artefact == Manifest.of(artefact).id
    (tmp_path / "other").mkdir()
    other, _ = _designed(tmp_path / "other")
    assert other == spec  # computed anew, from another cache
    stronger, _ = _designed(tmp_path, noise=1.0)
    assert stronger.id != spec.id


def test_eta_max_is_that_of_the_least_noise(tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path)
    mechanism = create_mechanism(spec, artefact)
    scale = load_file(artefact / TENSORS)["scale"]
    assert mechanism.eta_max == pytest.approx(float(spec.params["eta"]) / scale.min())
    assert mechanism.eta_max is not None
    assert mechanism.eta_max <= float(spec.params["eta"]) / 0.5
    guarantee = mechanism.guarantee()
    assert guarantee.eta == mechanism.eta_max
    for word in ("shifted metric", "composes", "no pure d_chi", "sequences", "p* is public"):
        assert word in guarantee.statement


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eta": 0.0}, "eta"),
        ({"hops": 9}, "hops"),
        ({"neighbours": 1}, "neighbours"),
        ({"targets": 0}, "targets"),
        ({"shift": 5.0}, "shift"),
        ({"importance_floor": 0.0}, "importance_floor"),
        ({"vector": "guess"}, "vector"),
        ({"per": "occurrence"}, "per"),
        ({"importance": "private"}, "importance"),
        ({"protect": 3}, "protect"),
        ({"buckets": -1}, "buckets"),
        ({"importance_floor": 0.9}, "importance_floor"),  # the table goes below
        ({"vocabulary": 61}, "artefact"),
        ({"dimension": 7}, "artefact"),
    ],
)
def test_wrong_parameters_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path)
    wrong = MechanismSpec(spec.name, {**spec.params, **change}, spec.artefact)
    with pytest.raises(MechanismError, match=named):
        create_mechanism(wrong, artefact)


def test_wrong_artefacts_are_refused(tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path)
    tables = load_file(artefact / TENSORS)
    with pytest.raises(MechanismError, match="artefact"):
        create_mechanism(spec, None)
    for bad in (0.0, -1.0, 2.0, np.nan):
        scale = tables["scale"].copy()
        scale[5] = bad
        save_file({**tables, "scale": scale}, artefact / TENSORS)
        with pytest.raises(MechanismError, match="scale"):
            create_mechanism(spec, artefact)
    save_file({"scale": tables["scale"]}, artefact / TENSORS)
    with pytest.raises(MechanismError, match="shift"):
        create_mechanism(spec, artefact)
    (artefact / TENSORS).write_bytes(b"nonsense")
    with pytest.raises(MechanismError, match="unreadable"):
        create_mechanism(spec, artefact)


def test_a_non_finite_shift_or_a_foreign_token_is_refused(tmp_path: Path) -> None:
    spec, artefact = _designed(tmp_path)
    rng = np.random.default_rng(0)
    hidden = np.zeros((1, ToyBottom.hidden_size), dtype=np.float32)
    mechanism = create_mechanism(spec, artefact)
    for token in (-1, VOCABULARY):
        with pytest.raises(MechanismError, match="vocabulary"):
            mechanism.perturb(hidden, np.array([token]), rng)
    tables = load_file(artefact / TENSORS)
    shift = tables["shift"].copy()
    shift[5, 0] = np.inf
    save_file({**tables, "shift": shift}, artefact / TENSORS)
    with pytest.raises(MechanismError, match="not finite"):
        create_mechanism(spec, artefact).perturb(hidden, np.array([5]), rng)
