"""Attacks and measures, by hand on toys, and on real text through a real model."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privtune_flwr.audit.adaptive import Adaptive
from privtune_flwr.audit.floors import constant_floor, constant_guess
from privtune_flwr.audit.measure import Recovery, content_mask, recovery
from privtune_flwr.audit.nearest import NearestNeighbour
from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import example_identity, keyed_generator
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class

WORDS = ["[CLS]", "[SEP]", "the", "battery", "##ing", "##s", "!", "Ġcamera", "42", "a", "▁lens"]


class WordTokenizer:
    """Only what the measures need."""

    all_special_ids = (0, 1)

    def __len__(self) -> int:
        return len(WORDS)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]


TOKENIZER: Any = WordTokenizer()


def test_content_tokens() -> None:
    mask = content_mask(TOKENIZER, 13)
    assert [w for w, m in zip(WORDS, mask, strict=False) if m] == [
        "battery",
        "##ing",
        "Ġcamera",
        "▁lens",
    ]
    assert not mask[11:].any()


def test_recovery_counts_what_it_says() -> None:
    true = [np.array([0, 2, 3, 6, 1]), np.array([0, 3, 7, 9, 1])]
    guess = [np.array([0, 2, 4, 6, 1]), np.array([5, 3, 7, 2, 0])]
    result = recovery(true, guess, TOKENIZER)
    assert (result.n_all, result.n_content) == (6, 3)
    assert result.all == pytest.approx(4 / 6)
    assert result.content == pytest.approx(2 / 3)
    assert result.interval_all[0] <= result.all <= result.interval_all[1]
    with pytest.raises(ValueError, match="differ"):
        recovery(true, guess[:1], TOKENIZER)
    with pytest.raises(ValueError, match="no sentences"):
        recovery([], [], TOKENIZER)
    nothing = recovery([np.array([0, 1])], [np.array([0, 1])], TOKENIZER)
    assert np.isnan(nothing.all)
    assert nothing.n_all == 0


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        true = [np.full(10, 3) for _ in range(80)]
        # All tokens of a sentence fall together: an interval over tokens would be far too narrow.
        guess = [np.full(10, 3 if rng.random() < 0.3 else 4) for _ in range(80)]
        low, high = recovery(true, guess, TOKENIZER, seed=trial).interval_all
        covered += low <= 0.3 <= high
    assert covered >= 50


def test_constant_guess_by_position() -> None:
    rng = np.random.default_rng(0)
    sequences = [
        np.array([0, 3 if rng.random() < 0.7 else 7, *rng.integers(2, 7, size=2), 1])
        for _ in range(100)
    ]
    sequences.append(np.array([0, 3, 3, 3, 8, 1]))  # its fifth token stands alone there
    eligible = np.ones(len(WORDS), dtype=bool)
    eligible[:2] = False
    guess = constant_guess(sequences, eligible)
    assert [len(g) for g in guess] == [len(s) for s in sequences]
    assert guess[0][1] == 3
    assert guess[-1][4] == 3  # the overall commonest, not the one it would overfit to
    everything, content = constant_floor(sequences, TOKENIZER)
    assert 0.3 < everything < 0.5
    assert content > everything


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest_neighbour_is_exact(metric: Any) -> None:
    rng = np.random.default_rng(1)
    bank, rows = rng.normal(size=(50, 4)) + 3, rng.normal(size=(20, 4)) + 3
    if metric == "l2":
        far = np.linalg.norm(rows[:, None] - bank[None], axis=2)
    else:
        cosine = (
            rows @ bank.T / np.linalg.norm(bank, axis=1) / np.linalg.norm(rows, axis=1)[:, None]
        )
        far = -cosine
    found = NearestNeighbour(bank, metric=metric).top(rows, 5)
    np.testing.assert_array_equal(found, np.argsort(far, axis=1)[:, :5])
    with pytest.raises(ValueError, match="metric"):
        NearestNeighbour(bank, metric="l1")  # type: ignore[arg-type]


# ---------------------------------------------------------------- a real model and real text


@dataclass
class Real:
    """MiniLM cut at 2, public knowledge, and private sentences seen through it."""

    public: PublicKnowledge
    sequences: list[np.ndarray]
    clean: list[np.ndarray]

    def release(self, mechanism: Mechanism) -> np.ndarray:
        secret = bytes(32)
        return np.concatenate(
            [
                mechanism.perturb(
                    h, s, keyed_generator(secret, mechanism.spec.id, example_identity(s))
                )
                for h, s in zip(self.clean, self.sequences, strict=True)
            ]
        )

    def judge(self, guesses: np.ndarray) -> Recovery:
        ends = np.cumsum([len(s) for s in self.sequences])[:-1]
        return recovery(self.sequences, np.split(guesses[:, 0], ends), self.public.tokenizer)

    def build(self, folder: Path, **changes: Any) -> Mechanism:
        config = PrivacyConfig().model_copy(update=changes)
        spec = mechanism_class(config.mechanism).design(config, self.public, folder)
        return create_mechanism(spec, folder)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    from privtune_flwr.assets import cache_root, model_folder
    from privtune_flwr.bundle import Manifest
    from privtune_flwr.data import load_public_text, load_source, tokenise
    from privtune_flwr.models import cut_model

    cut = cut_model(model_folder("minilm"), cut=2, num_labels=2, seed=0)
    bundle = tmp_path_factory.mktemp("bottom")
    cut.bottom.save(bundle)
    public = PublicKnowledge(
        cut.bottom,
        cut.tokenizer,
        load_public_text(["amazon-snippets", "nyt-snippets"]),
        cache_root(),
        bottom_id=Manifest.of(bundle).id,
    )
    texts = load_source("movie-snippets")["text"]
    chosen = np.random.default_rng(1).permutation(len(texts))[:150]
    sequences = tokenise(cut.tokenizer, [texts[int(i)] for i in chosen], 128)
    gathered = Real(public, sequences, cut.bottom.encode(sequences))
    gc.collect()
    return gathered


def test_the_unit_is_that_of_the_feasibility_study(real: Real) -> None:
    assert real.public.unit == pytest.approx(8.7, abs=0.5)


def test_weak_noise_hides_nothing(real: Real, tmp_path: Path) -> None:
    released = real.release(real.build(tmp_path, mechanism="dchi", noise=0.01))
    bank = real.public.bank
    for metric in ("l2", "cosine"):
        found = real.judge(NearestNeighbour(bank, metric=metric).top(released))  # type: ignore[arg-type]
        assert found.all > 0.97
        assert found.content > 0.97


@dataclass
class Released:
    """Private sentences released through PrivTune with its defaults."""

    rows: np.ndarray
    posterior: ShiftPosterior


@pytest.fixture(scope="session")
def released(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Released:
    mechanism = real.build(tmp_path_factory.mktemp("artefact"))
    return Released(real.release(mechanism), ShiftPosterior.fit(mechanism, real.public))


def test_privtune_hides_from_the_unaware_and_not_from_the_adaptive(
    real: Real, released: Released
) -> None:
    unaware = real.judge(NearestNeighbour(real.public.bank).top(released.rows))
    assert unaware.all < 0.10
    assert unaware.content < 0.10
    adaptive = real.judge(Adaptive(released.posterior).top(released.rows))
    assert adaptive.all > 0.80
    assert adaptive.content > 0.80


def test_unshifted_rows_are_nearer_to_the_clean_ones(real: Real, released: Released) -> None:
    clean = np.concatenate(real.clean)
    unshifted = released.posterior.unshift(released.rows)
    before = np.linalg.norm(released.rows - clean, axis=1).mean()
    after = np.linalg.norm(unshifted - clean, axis=1).mean()
    assert after < 0.3 * before
    # What is left is the random part, at most `noise` units.
    assert after < 0.25 * real.public.unit * 1.1


def test_strong_noise_brings_everyone_near_the_floor(real: Real, tmp_path: Path) -> None:
    mechanism = real.build(tmp_path, mechanism="dchi", noise=40.0)
    released = real.release(mechanism)
    floor, _ = constant_floor(real.sequences, real.public.tokenizer)
    assert 0.03 < floor < 0.10
    assert real.judge(NearestNeighbour(real.public.bank).top(released)).all < floor
    assert real.judge(Adaptive.fit(mechanism, real.public).top(released)).all < 2 * floor
