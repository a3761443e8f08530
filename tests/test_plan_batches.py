"""Who releases what when, and in which order the cloud trains on it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from privtune_flwr.config import RunConfig, load_run_config
from privtune_flwr.errors import RunError
from privtune_flwr.training.batches import batch_order, collate
from privtune_flwr.training.plan import Ask, Plan, make_plan, split_chunks
from privtune_flwr.training.store import Example

TRAIN = {"d0": 100, "d1": 30, "d2": 0, "d3": 65}
EVAL = {"d0": 40, "d1": 0, "d2": 3, "d3": 32}


def config(**values: Any) -> RunConfig:
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
    return load_run_config({"privacy.chunk-size": 32} | flat)


def plan(**values: Any) -> Plan:
    return make_plan(TRAIN, EVAL, config(**values))


def per_device(asks: list[Ask]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for ask in asks:
        counts[ask.device] += ask.examples
    return dict(counts)


HELD = {device: n for device, n in TRAIN.items() if n}


def test_chunks_cover_a_split_once() -> None:
    asks = split_chunks("d0", "train", 100, 32)
    assert [(a.chunk, a.examples) for a in asks] == [(0, 32), (1, 32), (2, 32), (3, 4)]
    assert asks[0].key == ("d0", "train", 0, 0)
    assert split_chunks("d2", "train", 0, 32) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train__fraction": 0.3},
        {"train__strategy": "stepwise"},
        {"privacy__release_policy": "per-epoch"},
        {"privacy__release_policy": "per-epoch", "train__fraction": 0.5, "train__epochs": 5},
    ],
)
def test_every_example_is_trained_on_once_an_epoch(values: dict[str, Any]) -> None:
    made = plan(**values)
    epochs = config(**values).train.epochs
    trained = [ask for r in made.rounds for ask in made.train_asks(r.number)]
    assert per_device(trained) == {device: n * epochs for device, n in HELD.items()}
    assert [r.number for r in made.rounds] == list(range(1, len(made.rounds) + 1))
    # a node never has two messages at once
    for current in made.rounds:
        assert len({a.device for a in current.asks}) == len(current.asks)


def test_released_once_then_only_trained_on() -> None:
    made = plan(train__epochs=4)
    asked = [ask for r in made.rounds for ask in r.asks]
    assert per_device(asked) == HELD
    assert len({a.key for a in asked}) == len(asked)
    assert [r.releases for r in made.rounds] == [True] * 4 + [False] * 3
    assert made.train_asks(5) == asked
    assert made.train_asks(7) == asked


def test_per_epoch_asks_for_every_chunk_anew() -> None:
    made = plan(privacy__release_policy="per-epoch", train__epochs=3)
    assert all(r.releases for r in made.rounds)
    for epoch in range(3):
        asked = [a for r in made.rounds for a in r.asks if a.epoch == epoch]
        assert per_device(asked) == HELD


def test_chunks_of_a_device_are_asked_for_in_order() -> None:
    made = plan(train__fraction=0.4)
    order = [a.chunk for r in made.rounds for a in r.asks if a.device == "d0"]
    assert order == [0, 1, 2, 3]


def test_fraction_draws_that_share_of_all_devices() -> None:
    many = {f"d{n:02d}": 96 for n in range(20)}
    made = make_plan(many, {}, config(train__fraction=0.25))
    sizes = [len(r.asks) for r in made.rounds if r.releases]
    assert sizes[:8] == [5] * 8
    drawn = [frozenset(a.device for a in r.asks) for r in made.rounds if r.releases]
    assert len(set(drawn)) > 4


def test_rounds_cap_what_is_released() -> None:
    made = plan(train__rounds=2, train__epochs=3)
    assert [r.releases for r in made.rounds] == [True, True, False, False]
    assert per_device(made.train_asks(4)) == {"d0": 64, "d1": 30, "d3": 64}
    per_epoch = plan(train__rounds=2, train__epochs=3, privacy__release_policy="per-epoch")
    assert len(per_epoch.rounds) == 6


def test_stepwise_asks_one_device_a_round() -> None:
    made = plan(train__strategy="stepwise", train__epochs=1)
    assert [len(r.asks) for r in made.rounds] == [1] * 8
    assert len({r.asks[0].device for r in made.rounds[:4]}) > 1


def test_a_plan_is_a_function_of_counts_configuration_and_seed() -> None:
    values = {"train__fraction": 0.4}
    assert plan(**values) == plan(**values)
    backwards = make_plan(dict(reversed(TRAIN.items())), EVAL, config(**values))
    assert backwards == plan(**values)
    assert plan(**values, run__seed=1) != plan(**values)


def test_evaluation_examples_come_in_waves_without_empty_devices() -> None:
    waves = plan().evaluation
    assert [[(a.device, a.chunk, a.examples) for a in wave] for wave in waves] == [
        [("d0", 0, 32), ("d2", 0, 3), ("d3", 0, 32)],
        [("d0", 1, 8)],
    ]
    assert {a.split for wave in waves for a in wave} == {"eval"}


@pytest.mark.parametrize("train", [{}, {"d0": 0}])
def test_nobody_with_an_example_is_an_error(train: dict[str, int]) -> None:
    with pytest.raises(RunError, match="no usable device"):
        make_plan(train, EVAL, config())


# ----------------------------------------------------------------------------------------- batches

LENGTHS = np.random.default_rng(0).integers(4, 128, size=1003).tolist()


@pytest.mark.parametrize("count", [0, 1, 32, 33, 1003])
def test_batches_cover_each_index_once(count: int) -> None:
    batches = batch_order(LENGTHS[:count], 32, [0, 2, 1])
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == -(-count // 32)
    assert max(map(len, batches), default=0) <= 32


def test_batches_hold_sentences_of_similar_length() -> None:
    def padding(batches: list[list[int]]) -> float:
        padded = sum(max(LENGTHS[i] for i in b) * len(b) for b in batches)
        return padded / sum(LENGTHS) - 1

    at_random = np.random.default_rng(0).permutation(1003).tolist()
    assert padding([at_random[i : i + 32] for i in range(0, 1003, 32)]) > 0.5
    batches = batch_order(LENGTHS, 32, [0, 2, 1])
    assert padding(batches) < 0.1
    # and not from short to long
    means = [np.mean([LENGTHS[i] for i in b]) for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.7


def test_the_order_depends_on_seed_and_round_only() -> None:
    one = batch_order(LENGTHS, 32, [0, 2, 1])
    np.random.default_rng().random(10)
    assert batch_order(LENGTHS, 32, [0, 2, 1]) == one
    assert batch_order(LENGTHS, 32, [1, 2, 1]) != one
    assert batch_order(LENGTHS, 32, [0, 2, 2]) != one


def test_collating_pads_on_the_right() -> None:
    rows = np.arange(12, dtype=np.float16).reshape(6, 2)
    hidden, mask, labels = collate(rows, [Example(3, 1, 1), Example(0, 3, 0)])
    assert (hidden.dtype, mask.dtype, labels.dtype) == (torch.float32, torch.int64, torch.int64)
    assert hidden.tolist() == [
        [[6.0, 7.0], [0.0, 0.0], [0.0, 0.0]],
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    ]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert labels.tolist() == [1, 0]
