"""The bottleneck's learning: deterministic, in every family, refusing what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bottleneck_kit import POSITIONS, learner_of, recipe, release, task, without
from safetensors.numpy import load_file
from tiny_models import HIDDEN, VOCAB, save_tiny
from tiny_models import TYPES as FAMILIES

from privtune_flwr.bundle import Manifest
from privtune_flwr.data import Labelled, load_public_labelled, load_source, tokenise
from privtune_flwr.models import BottomModel, CutModel, cut_model
from privtune_flwr.privacy.base import MechanismError
from privtune_flwr.privacy.bottleneck.learner import BottleneckLearner, padded
from privtune_flwr.privacy.bottleneck.mechanism import Bottleneck
from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork
from privtune_flwr.privacy.bottleneck.recipe import TENSORS
from privtune_flwr.privacy.registry import create_mechanism

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_state_makes_the_round_trip_in_every_family(
    family: str, lora_rank: int, tmp_path: Path
) -> None:
    bottom = cut_model(save_tiny(family, tmp_path / "model"), cut=2, num_labels=3, seed=0).bottom
    before = {n: t.clone() for n, t in bottom.named_parameters()}
    learner = learner_of(bottom, adversary=0.2, lora_rank=lora_rank)
    ids, labels = task(8)
    state = learner.start()
    update = learner.update(state, ids, labels, round_number=1, seed=3)
    after = learner.apply(state, update.change)
    tuned = [n for n in state if n.startswith("base.") and (after[n] != state[n]).any()]
    assert tuned
    assert all(f".{bottom.family.blocks}." in f".{n}." for n in tuned)
    assert all(("lora_" in n) == bool(lora_rank) for n in tuned)
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


def test_updates_are_deterministic_and_leave_the_generators_alone(tiny_bottom: BottomModel) -> None:
    ids, labels = task()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learner = learner_of(tiny_bottom, flip=0.2, adversary=0.1)
    state = learner.start()
    first = learner.update(state, ids, labels, round_number=1, seed=7)
    learner.update(state, ids[:5], labels[:5], round_number=2, seed=8)  # no memory between calls
    again = learner.update(state, ids, labels, round_number=1, seed=7)
    other = learner.update(state, ids, labels, round_number=1, seed=8)
    fresh = learner_of(tiny_bottom, flip=0.2, adversary=0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert all((first.change[n] == again.change[n]).all() for n in state)
    assert any((first.change[n] != other.change[n]).any() for n in state)
    assert all((fresh.start()[n] == state[n]).all() for n in state)
    assert first.examples == len(ids)
    assert first.metrics == again.metrics


def test_states_and_labels_that_do_not_fit_are_refused(tiny_bottom: BottomModel) -> None:
    learner = learner_of(tiny_bottom)
    ids, labels = task(6)
    state = learner.start()
    name = "projection.bias"
    wrong = [
        without(state, name),
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
        learner_of(tiny_bottom, warm_start="labels").start()


def test_a_warm_start_learns_the_task_from_public_labels(
    minilm: CutModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiniLM; 160 of the product reviews, as many of each class."""
    public = load_public_labelled(("amazon-snippets",))
    chosen = [i for c in (0, 1) for i in [n for n, x in enumerate(public.labels) if x == c][:80]]
    few = Labelled([public.texts[i] for i in chosen], [public.labels[i] for i in chosen])
    asked: list[object] = []
    monkeypatch.setattr(
        "privtune_flwr.privacy.bottleneck.learner.load_public_labelled",
        lambda names: asked.append(names) or few,
    )
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path))
    setting = recipe(
        hidden_size=384,
        positions=32,
        batch_size=8,
        lora_rank=8,
        learning_rate=2e-3,
        head_learning_rate=3e-3,
        rounds=0,
        warm_start="labels",
    )
    learner = BottleneckLearner(setting, minilm.bottom, 2)
    ids = tokenise(minilm.tokenizer, few.texts, 32)
    cold = BottleneckLearner(replace(setting, rounds=1, warm_start="none"), minilm.bottom, 2)
    before = learner.accuracy(cold.start(), ids, few.labels)
    started = learner.start()
    assert learner.accuracy(started, ids, few.labels) > max(0.6, before + 0.05)
    assert asked == [("amazon-snippets", "nyt-snippets")]
    # learned once for all runs that start from it, anew where anything differs
    monkeypatch.setattr(BottleneckLearner, "_fit", lambda *_: pytest.fail("learned again"))
    later = BottleneckLearner(replace(setting, rounds=3), minilm.bottom, 2)
    again = later.start()
    assert later.start_seconds == learner.start_seconds > 0
    assert again.keys() == started.keys()
    assert all((again[n] == started[n]).all() for n in started)
    with pytest.raises(pytest.fail.Exception, match="learned again"):
        BottleneckLearner(replace(setting, learning_rate=1e-3), minilm.bottom, 2).start()


def test_the_adversary_makes_tokens_harder_to_tell(tiny_bottom: BottomModel) -> None:
    """Against the same decoder, symbols learned with the adversary tell less of the tokens."""
    ids, labels = task(48)

    def recovered(weight: float) -> float:
        learner = learner_of(tiny_bottom, adversary=weight, rounds=6, epochs=2)
        state = learner.start()
        for number in range(1, 7):
            change = learner.update(state, ids, labels, round_number=number, seed=number).change
            state = learner.apply(state, change)
        network = BottleneckNetwork(tiny_bottom, learner.recipe.shape, 3)
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


@pytest.mark.parametrize(("lora_rank", "learning_rate"), [(0, 3e-4), (8, 2e-3)])
def test_a_real_federated_round_lowers_the_loss(
    lora_rank: int, learning_rate: float, minilm: CutModel
) -> None:
    """MiniLM, movie-snippets, two devices of 48 sentences, two rounds."""
    source = load_source("movie-snippets").shuffle(seed=0).select(range(96))
    ids = tokenise(minilm.tokenizer, source["text"][:], 32)
    labels = [int(label) for label in source["label"][:]]
    setting = recipe(
        hidden_size=384,
        positions=32,
        batch_size=8,
        lora_rank=lora_rank,
        learning_rate=learning_rate,
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
