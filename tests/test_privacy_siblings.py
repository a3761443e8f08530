"""Siblings that noise representations: what they do beside their law, say, and refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import real
from law_kit import exact_delta, norms_of
from privacy_toy import CLS, HIDDEN, PAD, SEP, VOCABULARY, toy_public
from safetensors.numpy import load_file, save_file

from privtune_flwr.config import ConfigError, PrivacyConfig, load_run_config
from privtune_flwr.mechanism_config import SiblingsSection
from privtune_flwr.privacy.artefact import read_tensors
from privtune_flwr.privacy.base import Mechanism, MechanismError, MechanismSpec, Strength
from privtune_flwr.privacy.dp_forward import DPForward
from privtune_flwr.privacy.gaussian import Gaussian, mean_norm
from privtune_flwr.privacy.privtune.importance import importance
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.privacy.sap import SAP
from privtune_flwr.privacy.textobfuscator import TextObfuscator

NAMES = ("gaussian", "dp-forward", "sap", "textobfuscator")


def _config(name: str, noise: float = 2.0, **siblings: Any) -> PrivacyConfig:
    return PrivacyConfig(mechanism=name, noise=noise, siblings=SiblingsSection(**siblings))


def _spec(
    name: str, public: PublicKnowledge, folder: Path, noise: float = 2.0, **siblings: Any
) -> MechanismSpec:
    folder.mkdir(parents=True, exist_ok=True)
    return mechanism_class(name).design(_config(name, noise, **siblings), public, folder)


def _build(name: str, public: PublicKnowledge, folder: Path, **siblings: Any) -> Mechanism:
    return create_mechanism(_spec(name, public, folder, **siblings), folder)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
def test_design_repeats_and_declares_what_is_loaded(name: str, tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    spec = _spec(name, public, tmp_path / "a", clip=1.5, clusters=6)
    again = _spec(name, toy_public(tmp_path), tmp_path / "b", clip=1.5, clusters=6)
    assert spec.id == again.id
    mechanism = create_mechanism(spec, tmp_path / "a")
    assert type(mechanism).declared(spec) == mechanism.strength
    assert mechanism.guarantee().eta == mechanism.eta_max
    assert mechanism.reads == "rows"
    assert mechanism.shift() is None
    ids = np.empty(0, dtype=np.int64)
    empty = mechanism.perturb(np.empty((0, HIDDEN), np.float32), ids, _rng())
    assert empty.shape == (0, HIDDEN)


@pytest.mark.parametrize("name", NAMES)
def test_malformed_specifications_are_refused(name: str, tmp_path: Path) -> None:
    spec = _spec(name, toy_public(tmp_path), tmp_path / "a", clip=1.5, clusters=6)
    for key, value in spec.params.items():
        wrong: list[Any] = ["1", -1, 10**12]
        for bad in wrong:
            with pytest.raises(MechanismError, match=key):
                create_mechanism(
                    MechanismSpec(name, {**spec.params, key: bad}, spec.artefact), tmp_path / "a"
                )
        less = {k: v for k, v in spec.params.items() if k != key}
        with pytest.raises(MechanismError, match=f"{key}: missing"):
            create_mechanism(MechanismSpec(name, less, spec.artefact), tmp_path / "a")
        assert value != -1
    with pytest.raises(MechanismError, match="more: unknown"):
        create_mechanism(MechanismSpec(name, {**spec.params, "more": 1}), tmp_path / "a")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_sentences_are_refused(name: str, tmp_path: Path) -> None:
    mechanism = _build(name, toy_public(tmp_path), tmp_path / "a", clusters=6)
    ids = np.array([CLS, 5, SEP])
    with pytest.raises(MechanismError):
        mechanism.perturb(np.zeros((3, HIDDEN + 1)), ids, _rng())
    if name in ("sap", "textobfuscator"):
        for bad in (-1, VOCABULARY):
            with pytest.raises(MechanismError, match="vocabulary"):
                mechanism.perturb(np.zeros((3, HIDDEN)), np.array([CLS, bad, SEP]), _rng())


@pytest.mark.parametrize("name", ["gaussian", "dp-forward", "textobfuscator"])
def test_an_eta_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    config = _config(name).model_copy(update={"eta": 3.0})
    with pytest.raises(MechanismError, match="has no eta"):
        mechanism_class(name).design(config, toy_public(tmp_path), tmp_path)


def test_settings_are_bounded() -> None:
    given = load_run_config({"privacy.siblings.clip": 2.5, "privacy.siblings.clusters": 4})
    assert given.privacy.siblings.clip == 2.5
    for key, value in {"epsilon": 0.0, "delta": 0.9, "relief": 0.5, "clusters": 0}.items():
        with pytest.raises(ConfigError, match=f"siblings.{key}"):
            load_run_config({f"privacy.siblings.{key}": value})


# ---------------------------------------------------------------------------------------- gaussian


def test_gaussian_is_locally_private_only_when_clipped(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    free = _build("gaussian", public, tmp_path / "a")
    bound = _build("gaussian", public, tmp_path / "b", clip=1.5, delta=1e-6)
    assert isinstance(bound, Gaussian)
    assert free.strength == Strength()
    assert free.additive
    assert not bound.additive
    assert Gaussian.additive
    epsilon = bound.strength.epsilon
    assert epsilon is not None
    assert bound.strength.per == "token"
    assert exact_delta(epsilon, 3.0 / bound.sigma) == pytest.approx(1e-6, rel=1e-4)
    # long rows are cut to the clip, short ones stay; the noise is the same
    rows = np.array([np.full(HIDDEN, 9.0), np.full(HIDDEN, 0.1)])
    ids = np.array([4, 5])
    moved = bound.perturb(rows, ids, _rng()) - bound.perturb(0 * rows, ids, _rng())
    np.testing.assert_allclose(norms_of(moved), [1.5, 0.1 * math.sqrt(HIDDEN)], rtol=1e-5)
    np.testing.assert_allclose(moved / norms_of(moved)[:, None], HIDDEN**-0.5, rtol=1e-5)
    assert f"({epsilon:.6g}, 1e-06)" in bound.guarantee().statement


def test_gaussian_says_epsilon_at_one_unit(tmp_path: Path) -> None:
    mechanism = _build("gaussian", toy_public(tmp_path), tmp_path / "a")
    statement = mechanism.guarantee().statement
    said = float(statement.split("this is epsilon = ")[1].split(". ")[0])
    unit = float(mechanism.spec.params["unit"])
    assert isinstance(mechanism, Gaussian)
    assert exact_delta(said, unit / mechanism.sigma) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("d", [1, 2, 7, 384])
def test_mean_norm(d: int) -> None:
    drawn = norms_of(np.random.default_rng(1).normal(size=(20_000, d)))
    assert mean_norm(d) == pytest.approx(drawn.mean(), abs=5 * drawn.std() / math.sqrt(20_000))


# -------------------------------------------------------------------------------------- dp-forward


def test_dp_forward_bounds_whole_sentences(tmp_path: Path) -> None:
    mechanism = _build("dp-forward", toy_public(tmp_path), tmp_path / "a", clip=2.0, epsilon=4.0)
    assert isinstance(mechanism, DPForward)
    assert mechanism.strength == Strength(epsilon=4.0, delta=1e-5, per="sentence")
    assert not mechanism.additive
    ids = np.array([CLS, 5, 6, SEP])
    rng = np.random.default_rng(3)
    for scale, cut in ((0.01, False), (10.0, True)):
        rows = scale * rng.normal(size=(4, HIDDEN))
        moved = mechanism.perturb(rows, ids, _rng()) - mechanism.perturb(0 * rows, ids, _rng())
        clean = moved / mechanism.gain(4)
        bound = 2.0 * math.sqrt(4)
        expected = rows * (bound / np.linalg.norm(rows)) if cut else rows
        np.testing.assert_allclose(clean, expected, atol=1e-5 * mechanism.sigma(4))


def test_dp_forward_takes_its_clip_from_public_rows(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    spec = _spec("dp-forward", public, tmp_path / "a")
    rows = public.rows().values
    assert spec.params["clip"] == pytest.approx(np.sqrt((norms_of(rows) ** 2).mean()))
    assert spec.params["unit"] == 0


def test_dp_forward_depends_on_epsilon_and_on_nothing_the_cloud_computed(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    weak, strong = (
        _build("dp-forward", public, tmp_path / str(e), epsilon=e, clip=1.0) for e in (100.0, 1.0)
    )
    assert isinstance(weak, DPForward)
    assert isinstance(strong, DPForward)
    assert strong.sigma(9) > 10 * weak.sigma(9)
    assert set(weak.spec.params) == {"epsilon", "delta", "clip", "dimension", "unit"}


# --------------------------------------------------------------------------------------------- sap


def test_sap_relieves_the_most_important_tokens(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    mechanism = _build("sap", public, tmp_path / "a", contributing=0.25, relief=4.0)
    assert isinstance(mechanism, SAP)
    score_V = importance(public.sequences, public.bank)
    known = np.setdiff1d(np.flatnonzero(np.isfinite(score_V)), [CLS, SEP, PAD])
    chosen = np.flatnonzero(mechanism.etas() > mechanism.eta)
    assert len(chosen) == round(0.25 * len(known))
    assert score_V[chosen].min() >= score_V[np.setdiff1d(known, chosen)].max()
    # words that public text lacks, and special tokens, keep the full noise
    assert not np.isin(chosen, [CLS, SEP, PAD, *range(50, 60)]).any()
    assert mechanism.eta_max == 4 * mechanism.eta
    assert mechanism.additive
    assert "no pure d_chi" in mechanism.guarantee().statement


def test_sap_without_contributing_tokens_is_dchi(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    sap = _build("sap", public, tmp_path / "a", contributing=0.0)
    dchi = _build("dchi", public, tmp_path / "b")
    ids = np.arange(3, 40)
    rows = public.bank[ids]
    np.testing.assert_array_equal(sap.perturb(rows, ids, _rng()), dchi.perturb(rows, ids, _rng()))
    assert sap.eta_max == dchi.eta_max
    # declared without the artefact, so the bound must cover what one could hold
    assert SAP.declared_eta(sap.spec) == 2 * sap.eta_max


# ---------------------------------------------------------------------------------- textobfuscator


def test_obfuscator_forgets_all_but_the_cluster(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    mechanism = _build("textobfuscator", public, tmp_path / "a", clusters=6)
    assert isinstance(mechanism, TextObfuscator)
    cluster_V = mechanism.cluster_V
    sizes = np.bincount(cluster_V)
    assert len(sizes) == 9  # six of text, three special tokens
    assert mechanism.strength == Strength(bits=math.log2(9))
    members = np.flatnonzero(cluster_V == np.argmax(sizes))
    one, other = members[:2]
    rows = np.random.default_rng(1).normal(size=(2, HIDDEN))
    first = mechanism.perturb(rows[:1], np.array([one]), _rng())
    second = mechanism.perturb(rows[1:], np.array([other]), _rng())
    np.testing.assert_array_equal(first, second)
    # special tokens: no shift, told apart
    for special in (CLS, SEP, PAD):
        row = mechanism.perturb(rows[:1], np.array([special]), _rng())
        np.testing.assert_array_equal(row[0], public.bank[special])
        assert sizes[cluster_V[special]] == 1
    assert not mechanism.additive


def test_obfuscator_prototypes_are_weighted_means_of_nearby_entries(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    mechanism = _build("textobfuscator", public, tmp_path / "a", clusters=6)
    assert isinstance(mechanism, TextObfuscator)
    weight_V = 1 + np.log1p(public.counts)
    text = public.text_ids
    for cluster in np.unique(mechanism.cluster_V[text]):
        members = np.flatnonzero(mechanism.cluster_V == cluster)
        mean = np.average(public.bank[members], axis=0, weights=weight_V[members])
        np.testing.assert_allclose(mechanism.prototype_PD[cluster], mean, atol=1e-5)
        far = norms_of(public.bank[members] - mean).mean()
        assert mechanism.radius_P[cluster] == pytest.approx(far, abs=1e-5)
    own = norms_of(public.bank[text] - mechanism.prototype_PD[mechanism.cluster_V[text]])
    assert own.mean() < 0.9 * norms_of(public.bank[text] - public.bank[text].mean(axis=0)).mean()


def test_more_clusters_than_words_leave_each_word_alone(tmp_path: Path) -> None:
    mechanism = _build("textobfuscator", toy_public(tmp_path), tmp_path / "a", clusters=500)
    assert isinstance(mechanism, TextObfuscator)
    assert len(mechanism.prototype_PD) == VOCABULARY
    assert not mechanism.radius_P.any()
    assert f"{VOCABULARY} of them hold a single token" in mechanism.guarantee().statement


# --------------------------------------------------------------------------------------- artefacts


@pytest.mark.parametrize(
    ("name", "file", "tensor", "values"),
    [
        ("sap", "sap.safetensors", "contributing", {7: 2}),
        ("textobfuscator", "textobfuscator.safetensors", "cluster", {7: -1}),
        ("textobfuscator", "textobfuscator.safetensors", "cluster", {7: 9}),
        ("textobfuscator", "textobfuscator.safetensors", "radius", {0: -1.0}),
        ("textobfuscator", "textobfuscator.safetensors", "radius", {0: np.nan}),
        ("textobfuscator", "textobfuscator.safetensors", "prototype", {0: np.inf}),
    ],
)
def test_bad_artefacts_are_refused(
    name: str, file: str, tensor: str, values: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    spec = _spec(name, toy_public(tmp_path), folder, clusters=6)
    tensors = load_file(folder / file)
    for index, value in values.items():
        tensors[tensor][index] = value
    save_file(tensors, folder / file)
    with pytest.raises(MechanismError):
        create_mechanism(spec, folder)


def test_reading_tensors_refuses_all_else(tmp_path: Path) -> None:
    wanted = {"x": (np.float32, (2,))}
    right = {"x": np.ones(2, np.float32)}
    save_file(right, tmp_path / "f.safetensors")
    assert read_tensors("m", tmp_path, "f.safetensors", wanted)["x"].tolist() == [1, 1]
    for wrong, why in (
        ({"x": np.ones(2)}, "must be float32"),
        ({"x": np.ones(3, np.float32)}, "must be float32"),
        ({"y": np.ones(2, np.float32)}, "must hold exactly x"),
        ({**right, "y": np.ones(2, np.float32)}, "must hold exactly x"),
    ):
        save_file(wrong, tmp_path / "f.safetensors")
        with pytest.raises(MechanismError, match=why):
            read_tensors("m", tmp_path, "f.safetensors", wanted)
    (tmp_path / "f.safetensors").write_bytes(b"no such format")
    with pytest.raises(MechanismError, match="unreadable"):
        read_tensors("m", tmp_path, "f.safetensors", wanted)
    for missing in (None, tmp_path / "nowhere"):
        with pytest.raises(MechanismError, match="needs its artefact"):
            read_tensors("m", missing, "f.safetensors", wanted)


# -------------------------------------------------------------------------------------- real text


def _nearest(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    scores = rows @ points.T
    return np.argmax(scores - (points.astype(np.float64) ** 2).sum(axis=1) / 2, axis=1)


@pytest.mark.usefixtures("one_torch_thread")
def test_on_real_text_strengths_are_what_they_say(tmp_path: Path) -> None:
    given = real(cut=2)
    public, bank = given.public, np.asarray(given.public.bank)
    ids = np.concatenate(given.sequences)
    clean = np.concatenate(given.clean)
    built = {
        name: create_mechanism(_spec(name, public, tmp_path / name, noise=1.0), tmp_path / name)
        for name in NAMES
    }
    rows = {name: np.concatenate(given.release(m).rows) for name, m in built.items()}
    units = {n: norms_of(r - clean).mean() / public.unit for n, r in rows.items()}
    assert units["gaussian"] == pytest.approx(1.0, rel=0.01)
    # contributing tokens have half the noise; in running text they are neither none nor all
    assert 0.5 < units["sap"] < 0.99
    clip = float(built["dp-forward"].spec.params["clip"])
    assert norms_of(clean).mean() == pytest.approx(clip, rel=0.1)
    assert np.sqrt((norms_of(rows["dp-forward"]) ** 2).mean()) == pytest.approx(clip, rel=0.1)
    # the whole of a sentence's words is gone at epsilon = 8
    assert (_nearest(rows["dp-forward"], bank) == ids).mean() < 0.05
    obfuscator = built["textobfuscator"]
    assert isinstance(obfuscator, TextObfuscator)
    # the adversary of the guarantee: the cluster is read off a row
    read = _nearest(rows["textobfuscator"], obfuscator.prototype_PD)
    assert (read == obfuscator.cluster_V[ids]).mean() > 0.95
    assert obfuscator.strength.bits == pytest.approx(8, abs=0.1)
