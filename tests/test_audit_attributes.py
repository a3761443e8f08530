"""Attribute inference on real text through a real model and real mechanisms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from audit_kit import real

from privtune_flwr.audit.attributes import (
    AttributeResult,
    infer_attribute,
    shuffled_within_classes,
)

TRAIN, TEST = 400, 240


@pytest.fixture(scope="module")
def topics() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """BBC news: tokens, clean rows, topic."""
    from privtune_flwr.data import load_source, tokenise

    news = load_source("bbc-news")
    order = np.random.default_rng(0).permutation(len(news))[: TRAIN + TEST]
    ids = tokenise(real().public.tokenizer, [news["text"][int(i)] for i in order], 32)
    return ids, real().bottom.encode(ids), np.array(news["label"])[order]


def attack(
    topics: tuple[list[np.ndarray], list[np.ndarray], np.ndarray], folder: Path, **changes: object
) -> list[AttributeResult]:
    ids, clean, labels = topics
    mechanism = real().build(folder, **changes)
    rows = [
        mechanism.perturb(c, i, np.random.default_rng([3, n]))
        for n, (c, i) in enumerate(zip(clean, ids, strict=True))
    ]
    return infer_attribute(
        rows[:TRAIN], labels[:TRAIN], rows[TRAIN:], labels[TRAIN:], seed=1, quick=True
    )


def error(share: float) -> float:
    return float(np.sqrt(share * (1 - share) / TEST))


def test_topics_are_plain_in_clean_rows(topics, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    results = attack(topics, tmp_path, mechanism="none")
    assert len({r.attack for r in results}) == 4
    labels = topics[2][TRAIN:]
    majority = np.bincount(labels).max() / TEST
    for result in results:
        assert (result.n_train, result.n_test, result.accuracy.n) == (TRAIN, TEST, TEST)
        assert result.majority == pytest.approx(majority)
        assert result.accuracy.value is not None
        assert result.accuracy.value > 0.80
        assert abs(result.balanced_accuracy - result.accuracy.value) < 0.05
        # Five topics of nearly equal size: a control that learned nothing is between a fifth
        # (guesses at random) and the majority rate.
        assert result.shuffled.value is not None
        low, high = 0.2 - 3 * error(0.2), majority + 3 * error(majority)
        assert low < result.shuffled.value < high
    assert max(r.accuracy.value or 0 for r in results) > 0.90


def test_overwhelming_noise_leaves_the_majority(topics, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for result in attack(topics, tmp_path, mechanism="dchi", noise=400.0):
        assert result.accuracy.value is not None
        assert result.accuracy.value < result.majority + 3 * error(result.majority)
        assert result.balanced_accuracy < 0.2 + 4 * error(0.2)


def test_what_noise_spares_is_found(topics, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """At a strength that hides a good part of the words, the topic still shows."""
    results = attack(topics, tmp_path, mechanism="dchi", noise=4.0)
    assert max(r.accuracy.value or 0 for r in results) > 0.60


def test_the_control_is_free_of_the_truth() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=301, p=[0.6, 0.3, 0.1])
    fake = shuffled_within_classes(labels, rng)
    assert np.bincount(fake).tolist() == np.bincount(labels).tolist()
    for label in range(3):
        share = np.bincount(labels, minlength=3) / len(labels)
        mix = np.bincount(fake[labels == label], minlength=3) / (labels == label).sum()
        np.testing.assert_allclose(mix, share, atol=0.05)
    assert not np.array_equal(fake, shuffled_within_classes(labels, rng))


def test_what_cannot_be_learned_from_is_refused() -> None:
    rows = [np.ones((3, 4), dtype=np.float32)] * 10
    with pytest.raises(ValueError, match="two classes"):
        infer_attribute(rows, [0] * 10, rows, [0] * 10)
    with pytest.raises(ValueError, match="differ in number"):
        infer_attribute(rows, [0] * 9, rows, [0] * 10)
