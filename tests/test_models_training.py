"""Training a top model: the uncut model's loss curve, adapters, parameter groups, states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    DEPTH,
    TYPES,
    load_uncut,
    one_thread,
    pad_hidden,
    pad_ids,
    save_tiny,
    sentences,
)
from torch.nn.functional import cross_entropy

from privtune_flwr.config import ModelConfig
from privtune_flwr.models import (
    CutModel,
    ModelError,
    TopModel,
    apply_lora,
    cut_model,
    load_top_state,
    parameter_groups,
    top_state,
)

RATES = {"lr": 3e-3, "head_lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("models")
    with one_thread():
        yield {t: save_tiny(t, root / t, content="classifier") for t in TYPES}


def batches() -> list[tuple[list[Any], torch.Tensor]]:
    """Four batches of sentences of which class decides the words."""
    labels_B = torch.tensor([0, 1, 2, 0, 1, 2])
    return [
        (
            [
                sentences([length], seed=10 * b + i, low=5 + 15 * int(c), high=20 + 15 * int(c))[0]
                for i, (c, length) in enumerate(zip(labels_B, [9, 3, 6, 2, 7, 5], strict=True))
            ],
            labels_B,
        )
        for b in range(4)
    ]


def train(parts: CutModel, passes: int = 3) -> list[float]:
    optimiser = torch.optim.AdamW(parameter_groups(parts.top, **RATES))
    losses = []
    for ids, labels_B in batches() * passes:
        loss = cross_entropy(parts.top(*pad_hidden(parts.bottom.encode(ids))), labels_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def train_uncut(model: Any, parts: CutModel, passes: int = 3) -> list[float]:
    """Train Hugging Face's own model on token ids, with the bottom part frozen."""
    family = parts.top.family
    below = [family.embeddings, family.position_table]
    below += [f"{family.blocks}.{i}" for i in range(parts.spec.cut)]
    for name in filter(None, below):
        model.base_model.get_submodule(name).requires_grad_(False)
    new = {id(p) for h in family.heads for p in model.get_submodule(h).parameters()}
    groups = [
        {
            "params": [p],
            "lr": RATES["head_lr" if id(p) in new else "lr"],
            "weight_decay": RATES["weight_decay"] if p.ndim > 1 else 0.0,
        }
        for p in model.parameters()
        if p.requires_grad
    ]
    optimiser = torch.optim.AdamW(groups)
    losses = []
    for ids, labels_B in batches() * passes:
        ids_BT, mask_BT = pad_ids(ids, parts.config.pad_token_id)
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_B).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cut", [0, 1, DEPTH - 1])
@pytest.mark.parametrize("model_type", TYPES)
def test_cut_and_uncut_give_the_same_loss_curve(folders: Any, model_type: str, cut: int) -> None:
    parts = cut_model(folders[model_type], cut=cut, num_labels=3, seed=0)
    uncut = load_uncut(folders[model_type], parts.config.pad_token_id).train()
    parts.top.train()
    losses = train(parts)
    assert losses == pytest.approx(train_uncut(uncut, parts), abs=1e-5)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("head", ["native", "mean"])
@pytest.mark.parametrize("model_type", TYPES)
def test_lora_trains_adapters_and_head_only(folders: Any, model_type: str, head: Any) -> None:
    parts = cut_model(folders[model_type], cut=1, num_labels=3, head=head, seed=0)
    full = sum(p.numel() for p in parts.top.parameters())
    hidden = pad_hidden(parts.bottom.encode(batches()[0][0]))
    before_BC = parts.top(*hidden)
    generator = torch.get_rng_state()
    apply_lora(parts.top, ModelConfig(tuning="lora", lora_rank=2))
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(parts.top(*hidden), before_BC)  # a fresh adapter changes nothing

    start = {n: p.detach().clone() for n, p in parts.top.named_parameters()}
    trainable = {n for n, p in parts.top.named_parameters() if p.requires_grad}
    heads = parts.top.family.heads if head == "native" else ("classifier",)
    assert all("lora_" in n or any(h in n for h in heads) for n in trainable)
    assert sum(start[n].numel() for n in trainable) < full / 2
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in trainable if "lora_" in n}
    assert adapted == set(parts.top.family.lora_targets)
    assert sum("lora_A" in n for n in trainable) == len(adapted) * (DEPTH - 1)

    losses = train(parts)
    assert sum(losses[-4:]) < sum(losses[:4])
    for name, parameter in parts.top.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in trainable), name


def test_lora_targets(folders: Any) -> None:
    def adapt(targets: str) -> TopModel:
        top = cut_model(folders["bert"], cut=1, num_labels=3, seed=0).top
        apply_lora(top, ModelConfig(tuning="lora", lora_targets=targets))
        return top

    # BERT's pooler has a layer called dense too; a name means the blocks' layers.
    names = [n for n, _ in adapt("key, attention.output.dense").named_parameters() if "lora_A" in n]
    assert len(names) == 2 * (DEPTH - 1)
    assert not [n for n in names if "pooler" in n or ".intermediate." in n]
    assert not [n for n, _ in adapt("dense").named_parameters() if "pooler" in n and "lora" in n]
    with pytest.raises(ModelError, match=r"model\.lora-targets: .*'q_proj'; allowed: auto.*query"):
        adapt("query,q_proj")
    with pytest.raises(ModelError, match=r"model\.lora-targets = ' ,'"):
        adapt(" ,")
    top = adapt("auto")
    with pytest.raises(ModelError, match="already"):
        apply_lora(top, ModelConfig(tuning="lora"))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_parameter_groups(folders: Any, model_type: str, adapted: bool) -> None:
    top = cut_model(folders[model_type], cut=1, num_labels=3, seed=0).top
    if adapted:
        apply_lora(top, ModelConfig(tuning="lora"))
    groups = parameter_groups(top, lr=1e-4, head_lr=1e-2, weight_decay=0.1)
    names = {id(p): n for n, p in top.named_parameters()}
    seen = [id(p) for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in top.parameters() if p.requires_grad)
    for group in groups:
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            in_head = any(h in name for h in top.family.heads)  # a pretrained pooler is not
            assert group["lr"] == (1e-2 if in_head else 1e-4), name
            plain = name.endswith("bias") or "norm" in name.lower() or ".ln_" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    torch.optim.AdamW(groups)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_as_new(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("bert", tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "pooler" not in n}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    top = cut_model(folder, cut=1, num_labels=2, seed=0).top
    assert top.fresh_modules == ("classifier", "bert.pooler")
    apply_lora(top, ModelConfig(tuning="lora"))
    assert any("pooler" in name for name in top_state(top))


@pytest.mark.parametrize("adapted", [False, True])
def test_state_restores_training(folders: Any, adapted: bool) -> None:
    def fresh() -> CutModel:
        parts = cut_model(folders["llama"], cut=1, num_labels=3, seed=0)
        if adapted:
            apply_lora(parts.top, ModelConfig(tuning="lora"))
        return parts

    parts, other = fresh(), fresh()
    train(parts, passes=1)
    state = top_state(parts.top)
    load_top_state(other.top, state)
    hidden = pad_hidden(parts.bottom.encode(batches()[0][0]))
    assert torch.equal(parts.top(*hidden), other.top(*hidden))
    train(parts, passes=1)  # a state is a copy
    load_top_state(other.top, state)
    assert not torch.equal(parts.top(*hidden), other.top(*hidden))
    assert all(("lora_" in n or "score" in n) for n in state) == adapted

    name = next(iter(state))
    for wrong in (
        {n: t for n, t in state.items() if n != name},
        state | {"more": torch.zeros(1)},
        state | {name: torch.zeros(1)},
    ):
        with pytest.raises(ModelError, match="another top model"):
            load_top_state(other.top, wrong)
