"""Federated soft prompts: what is trained, where the prompt stands, what leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated_kit import LABELS, FederatedWire, Place
from safetensors.numpy import load_file
from tiny_models import save_tiny, sentences

from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device.holdings import shared_part
from privtune_flwr.federated.local import train_locally
from privtune_flwr.federated.prompt_files import PROMPT_FILE, save_prompt
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, load_whole, pad
from privtune_flwr.models import resolve_model
from privtune_flwr.training.trainer import accuracy_and_loss

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOKENS = 3
PROMPT: dict[str, Any] = {
    "train.strategy": "fedavg",
    "model.tuning": "prompt",
    "federated.prompt-tokens": TOKENS,
    "train.learning-rate": 1e-2,
    "train.head-learning-rate": 1e-2,
    "train.batch-size": 4,
}


def settings_of(**changes: Any) -> FitSettings:
    dotted = {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
    return FitSettings.of(load_run_config(flatten(RunConfig()) | PROMPT | dotted))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompt")
    return {family: save_tiny(family, root / family) for family in ("bert", "gpt2", "llama")}


def parameters(model: WholeModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head", ["native", "mean"])
def test_only_prompt_and_head_are_trained(tiny: dict[str, Path], family: str, head: str) -> None:
    model = load_whole(tiny[family], settings_of(model__head=head), LABELS)
    before = parameters(model)
    result = train_locally(model, sentences([5, 3, 7, 4]), [0, 1, 0, 1], epochs=2, seed=1)
    assert result.steps == 2
    changed = {n for n, p in parameters(model).items() if not torch.equal(p, before[n])}
    assert changed == set(model.state())
    fresh = {f"top.model.{n}" for n in model.top.fresh_modules}
    assert "prompt_PD" in changed
    assert {n for n in changed if n != "prompt_PD"} <= {
        n for n in before if n.startswith(tuple(fresh))
    }
    # a pooler that the checkpoint did not hold counts as head
    numbers = sum(v.size for v in model.state().values())
    assert numbers < 0.2 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head", ["native", "mean"])
def test_padding_does_not_reach_the_answer(tiny: dict[str, Path], family: str, head: str) -> None:
    model = load_whole(tiny[family], settings_of(model__head=head), LABELS)
    short, long = sentences([4, 9])
    together = model.logits([short, long])
    np.testing.assert_allclose(together[:1], model.logits([short]), atol=1e-5)
    assert model.prompt_PD is not None
    before = together.copy()
    with torch.no_grad():
        model.prompt_PD.add_(3 * torch.randn(model.prompt_PD.shape))
    assert np.abs(model.logits([short, long]) - before).min() > 1e-4


@pytest.mark.parametrize(("family", "place"), [("bert", 1), ("gpt2", 0)])
def test_the_prompt_of_words_is_those_words_without_positions(
    tiny: dict[str, Path], family: str, place: int
) -> None:
    model = load_whole(tiny[family], settings_of(), LABELS)
    ids_BT, mask_BT = pad(sentences([6, 4]))
    with torch.no_grad():
        hidden_BTD, attended_BT, text_BT = model.with_prompt(model.bottom(ids_BT, mask_BT), mask_BT)
        alone_BTD = model.bottom(ids_BT, mask_BT)
    kept = [i for i in range(6 + TOKENS) if not place <= i < place + TOKENS]
    # the text has the positions that it has alone
    torch.testing.assert_close(hidden_BTD[:, kept], alone_BTD)
    torch.testing.assert_close(hidden_BTD[1, place : place + TOKENS], model.prompt_PD)
    assert attended_BT.sum(1).tolist() == [6 + TOKENS, 4 + TOKENS]
    assert text_BT.sum(1).tolist() == [6, 4]
    assert text_BT[:, place : place + TOKENS].sum() == 0


def test_the_mean_leaves_the_prompt_out(tiny: dict[str, Path]) -> None:
    model = load_whole(tiny["bert"], settings_of(model__head="mean"), LABELS)
    ids_BT, mask_BT = pad(sentences([5, 3]))
    with torch.no_grad():
        hidden_BTD, attended_BT, text_BT = model.with_prompt(model.bottom(ids_BT, mask_BT), mask_BT)
        states_BTD = model.top.last_hidden(hidden_BTD, attended_BT)
        by_hand = [states_BTD[i][text_BT[i] == 1].mean(0) for i in range(2)]
        wanted_BC = model.top.network.classifier(torch.stack(by_hand))
    np.testing.assert_allclose(model.logits(sentences([5, 3])), wanted_BC.numpy(), atol=1e-5)


def test_the_prompt_has_a_rate_of_its_own_and_no_decay(tiny: dict[str, Path]) -> None:
    settings = settings_of(
        federated__prompt_learning_rate=0.5, train__learning_rate=0.1, train__weight_decay=0.3
    )
    groups = {g["name"]: g for g in load_whole(tiny["bert"], settings, LABELS).groups()}
    assert groups["prompt"]["lr"] == 0.5
    assert groups["prompt"]["weight_decay"] == 0.0
    # nothing that the checkpoint holds is trained, so its rate is nobody's
    assert {g["lr"] for g in groups.values()} == {0.5, 1e-2}


def test_all_start_from_the_same_prompt(tiny: dict[str, Path]) -> None:
    one, same, other = (
        load_whole(tiny["bert"], settings_of(run__seed=seed), LABELS).state()["prompt_PD"]
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path, patch)


def test_a_run_learns_by_the_prompt_and_saves_it(place: Place) -> None:
    # words of two halves of the vocabulary: a prompt and a head can tell them apart
    place.cloud()
    wire = FederatedWire({1: place.device(1, 30), 2: place.device(2, 20)})
    strategy = place.run("run", wire, **{k.replace(".", "__"): v for k, v in PROMPT.items()})
    rounds = strategy.progress.rounds
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert strategy.cloud.settings.shares == "prompt"
    bytes_up = rounds[0]["bytes_up"] / 2
    weights = 4 * sum(p.numel() for p in strategy.model.parameters())
    assert bytes_up < 0.3 * weights
    save_prompt(strategy.model, strategy.folder.path)
    saved = load_file(strategy.folder.path / PROMPT_FILE)
    np.testing.assert_array_equal(saved["prompt"], strategy.state["prompt_PD"])
    assert "behind the first token" in (strategy.folder.path / "PROMPT.md").read_text()


def test_minilm_learns_movie_snippets() -> None:
    settings = settings_of(
        model__head="mean", train__batch_size=16, train__schedule="constant", train__warmup=0.0
    )
    config = load_run_config(flatten(RunConfig()) | {"data.train-examples": 96})
    part = shared_part(config.data, 0, 0, 1)
    model = load_whole(resolve_model("minilm"), settings, ("negative", "positive"))
    # the shortest sentences: time is all that the others would add
    found = sorted(
        zip(part.train["text"], part.train["label"], strict=True), key=lambda e: len(e[0])
    )
    texts, labels = [list(column) for column in zip(*found[:48], strict=True)]
    ids = tokenise(model.parts.tokenizer, texts, 32)
    before = accuracy_and_loss(model.logits(ids), labels)
    train_locally(model, ids, labels, epochs=4, seed=0)
    after = accuracy_and_loss(model.logits(ids), labels)
    majority = max(np.bincount(labels)) / len(labels)
    assert after[1] < before[1] - 0.05
    assert after[0] > majority + 0.05
