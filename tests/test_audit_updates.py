"""What a cloud reads from federated updates: real MiniLM, real text, the devices' own code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privtune_flwr.audit.updates.base import CloudKnowledge, Reading, Update
from privtune_flwr.audit.updates.devices import held_by
from privtune_flwr.audit.updates.inputs import candidate_inputs, sentence_inputs
from privtune_flwr.audit.updates.judge import judge
from privtune_flwr.audit.updates.rows import Rows, longest_sentence, motion_of
from privtune_flwr.audit.updates.run import clipped, invert_run, sends_weights
from privtune_flwr.audit.updates.span import SpanCheck, find_span, held_tokens
from privtune_flwr.audit.updates.steps import Rehearsal, judged
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.data import load_public_text, load_source, tokenise
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.weights import WeightsMethod
from privtune_flwr.models import cut_model, load_tokenizer, resolve_model
from privtune_flwr.privacy.learned_update import norm_of

SGD: dict[str, Scalar] = {
    "train.optimizer": "sgd",
    "train.learning-rate": 0.05,
    "train.head-learning-rate": 0.05,
    "train.batch-size": 4,
}
ADAMW: dict[str, Scalar] = {"train.optimizer": "adamw", "train.batch-size": 4}


@functools.cache
def text() -> tuple[list[np.ndarray], list[int], list[np.ndarray]]:
    """Private sentences by length with their labels, and public ones."""
    tokenizer = load_tokenizer(Path(resolve_model("minilm")))
    source = load_source("movie-snippets").select(range(200))
    ids = tokenise(tokenizer, list(source["text"]), 128)
    order = sorted(range(200), key=lambda i: len(ids[i]))
    public = tokenise(tokenizer, load_public_text(["amazon-snippets"])[:600], 128)
    return [ids[i] for i in order], [int(source["label"][i]) for i in order], public


def method_of(tuning: str, keys: dict[str, Scalar], **more: Scalar) -> WeightsMethod:
    """Build the devices' method."""
    flat = flatten(RunConfig()) | {"train.strategy": "fedavg", "model.tuning": tuning}
    config = load_run_config(flat | keys | more)
    return WeightsMethod(FitSettings.of(config), Path(resolve_model("minilm")), ("no", "yes"))


def update_of(method: WeightsMethod, chosen: list[int], state: Any = None) -> Update:
    """Let a device train on some sentences."""
    ids, labels, _ = text()
    sent = state or method.model.state()
    work = Work([ids[i] for i in chosen], [labels[i] for i in chosen], 1, 1, 0.0, 3, {})
    return Update(sent, dict(method.fit(sent, work).arrays), len(chosen))


def knowledge_of(method: WeightsMethod) -> CloudKnowledge:
    """Give what the cloud knows."""
    return CloudKnowledge(method.model, text()[2])


def bag(chosen: list[int], knowledge: CloudKnowledge) -> set[int]:
    """Give the true tokens without special ones."""
    found = np.unique(np.concatenate([text()[0][i] for i in chosen]))
    return {int(t) for t in found if knowledge.is_text[t]}


def test_one_sentence_is_read_whole_from_a_plain_gradient() -> None:
    method = method_of("full", SGD)
    knowledge, chosen = knowledge_of(method), [20]
    update = update_of(method, chosen)
    true = text()[0][20]
    rows = Rows().read(update, knowledge)
    assert set(rows.tokens.tolist()) == bag(chosen, knowledge)
    motion = motion_of(update, knowledge)
    assert longest_sentence(motion) == len(true)
    read = SpanCheck().read(update, knowledge)
    assert [s.tolist() for s in read.sentences] == [true.tolist()]
    figures = judge(read, [true], knowledge)
    assert figures["exact"] == figures["positions"] == figures["token_recall"] == 1.0
    # a seventh of the vocabulary, without the embeddings' help: only true tokens are held
    span = find_span(motion, 0)
    assert span is not None
    method.model.load(update.sent)
    tried = np.union1d(np.arange(0, knowledge.vocabulary, 7), true)
    found = held_tokens(method.model, span, tried, 4)
    assert [f.tolist() for f in found] == [[int(t)] for t in true[:4]]
    # a wrong sentence is not held, neither by the first block's span nor by the second's
    second = find_span(motion, 1)
    method.model.load(update.sent)
    assert second is not None
    wrong = true.astype(np.int64).copy()
    wrong[[2, 3]] = wrong[[3, 2]]
    right_rows, wrong_rows = sentence_inputs(method.model, [true.astype(np.int64), wrong], 1)
    assert second.holds(right_rows).all()
    assert not second.holds(wrong_rows).any()


def test_adamw_and_several_steps_hide_no_row() -> None:
    method = method_of("full", ADAMW)
    knowledge, chosen = knowledge_of(method), list(range(10))
    update = update_of(method, chosen)
    rows = Rows().read(update, knowledge)
    assert set(rows.tokens.tolist()) == bag(chosen, knowledge)
    # clipped by DP-FedAvg, before the cloud's noise: scaled, and as readable
    half = 0.5 * norm_of({n: update.received[n] - update.sent[n] for n in update.sent})
    rows = Rows().read(clipped(update, half), knowledge)
    figures = judge(rows, [text()[0][i] for i in chosen], knowledge)
    assert figures["token_recall"] > 0.95
    assert figures["token_precision"] > 0.95


def test_noise_of_the_same_norm_tells_nothing() -> None:
    method = method_of("full", SGD)
    knowledge, chosen = knowledge_of(method), [20, 21]
    update = update_of(method, chosen)
    change = {n: update.received[n] - update.sent[n] for n in update.sent}
    rng = np.random.default_rng(0)
    noise = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in change.items()}
    scale = np.float32(norm_of(change) / norm_of(noise))
    noised = {n: update.sent[n] + scale * noise[n] for n in change}
    truth = [text()[0][i] for i in chosen]
    for attack in (Rows(), SpanCheck(with_rows=False)):
        read = attack.read(Update(update.sent, noised, 2), knowledge)
        figures = judge(read, truth, knowledge)
        assert figures["token_recall"] <= figures["floor"]["token_recall"]
        assert figures["content_recall"] <= 0.1
        assert not read.sentences


@pytest.mark.parametrize("keys", [SGD, ADAMW])
def test_decay_alone_names_no_token(keys: dict[str, Scalar]) -> None:
    method = method_of("full", keys, **{"train.weight-decay": 0.1})
    knowledge = knowledge_of(method)
    sent = method.model.state()
    motion = motion_of(Update(sent, sent, 9), knowledge)
    update = Update(sent, {n: motion.decayed(n) for n in sent}, 9)
    assert not np.array_equal(update.received[motion.table], sent[motion.table])
    for attack in (Rows(), SpanCheck()):
        read = attack.read(update, knowledge)
        assert len(read.tokens) == 0
        assert not read.sentences


def test_adapters_give_away_a_sentence_that_is_shorter_than_their_rank() -> None:
    method = method_of("lora", SGD, **{"model.lora-rank": 32, "train.learning-rate": 2.0})
    knowledge, chosen = knowledge_of(method), [5]
    first = update_of(method, [100, 101, 102, 103])
    assert len(text()[0][5]) <= 32
    # fresh adapters: A has no gradient while B is zero, so the first step tells nothing
    assert not len(SpanCheck().read(first, knowledge).tokens)
    update = update_of(method, chosen, first.received)
    assert Rows().why_not(update, knowledge)
    span = find_span(motion_of(update, knowledge), 0)
    method.model.load(update.sent)
    assert span is not None
    true = text()[0][5]
    inside, outside = [], []
    others = np.arange(1000, 3000)
    for tokens, inputs in candidate_inputs(method.model, np.r_[true.astype(np.int64), others], 8):
        distance = span.outside(inputs[:, 3])[0]
        for token, value in zip(tokens, distance, strict=True):
            if token == true[3]:
                inside.append(value)
            elif token in others and token not in true:
                outside.append(value)
    assert max(inside) < 0.1 * min(outside)


def test_judge_counts_by_hand() -> None:
    method = method_of("prompt", SGD)
    knowledge = knowledge_of(method)
    truth = [np.array([101, 2023, 3185, 102]), np.array([101, 2307, 3185, 2143, 102])]
    read = Reading(np.array([3185, 2307, 2002]), [np.array([101, 2307, 3185, 9, 102])])
    figures = judge(read, truth, knowledge)
    assert figures["token_recall"] == pytest.approx(2 / 4)
    assert figures["token_precision"] == pytest.approx(2 / 3)
    assert figures["positions"] == pytest.approx(2 / 5)
    assert figures["exact"] == 0.0
    assert Rows().why_not(Update(method.model.state(), {}, 1), knowledge)
    assert SpanCheck().why_not(Update(method.model.state(), {}, 1), knowledge)


def test_rows_of_a_bottom_model_that_moves_are_read_with_the_state_that_was_sent() -> None:
    config = load_run_config(
        flatten(RunConfig())
        | {
            "train.strategy": "splitfed",
            "train.batch-size": 8,
            "train.epochs": 2,
            "train.learning-rate": 3e-3,
            "model.tuning": "lora",
            "model.cut": 1,
            "data.train-examples": 24,
            "data.eval-examples": 0,
            "data.public-text": "amazon-snippets",
            "privacy.mechanism": "none",
        }
    )
    devices = held_by(config, ["device-00000", "device-00001"], 2)
    # batches of two sentences, as of a fleet of four: six steps a round
    rehearsal = Rehearsal(config, devices, 4)
    bank = rehearsal.bank()
    frozen = cut_model(resolve_model("minilm"), cut=1, num_labels=2, seed=0).bottom
    moved = []
    for seen in (rehearsal.round(1), rehearsal.round(2)):
        for device in devices:
            sent = seen[device.name]
            assert sorted(len(i) for i in sent.ids) == sorted(len(r) for r in sent.rows)
            assert len(sent.ids) == len(device.holdings.train.texts) == 12
            # the one bank serves both rounds: a bottom model moves less than words are apart
            figures = judged(bank, sent, rehearsal.knowledge)
            assert figures["token_recall"] > 0.97 > 2 * figures["floor"]["token_recall"]
            assert figures["positions"] > 0.97
            clean = frozen.encode(sent.ids)
            moved.append([np.abs(c - r).max() for c, r in zip(clean, sent.rows, strict=True)])
    # the first batch leaves the model as it was provisioned, all later ones one that has moved
    for first in moved[:2]:
        assert max(first[:2]) < 1e-4 < min(first[2:])
    for second in moved[2:]:
        assert min(second) > max(moved[0][2:4])


def test_runs_that_cannot_be_attacked_are_named(tmp_path: Path) -> None:
    import json

    assert not sends_weights(tmp_path)
    for strategy, sends in (("split", False), ("fedprox", True), ("splitfed", True)):
        config = {"config": flatten(RunConfig()) | {"train.strategy": strategy}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert sends_weights(tmp_path) == sends
    with pytest.raises(PrivTuneError, match="not finished"):
        invert_run(tmp_path)
    for strategy in ("distil", "bbt", "local", "central"):
        config = {"config": {"train.strategy": strategy}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(PrivTuneError, match="nothing is measured"):
            sends_weights(tmp_path)
