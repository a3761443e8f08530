"""Export: bottom and top joined again are an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEPTH, HIDDEN, TYPES, one_thread, pad_hidden, pad_ids, save_tiny, sentences
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from privtune_flwr.config import ModelConfig
from privtune_flwr.models import (
    CutModel,
    ModelError,
    apply_lora,
    cut_model,
    export,
    load_mean_pooled,
    parameter_groups,
    top_state,
)

LABELS = ("sports", "politics", "science")
LENGTHS = [8, 3, 5, 12]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("models")
    with one_thread():
        yield {t: save_tiny(t, root / t) for t in TYPES}


def tuned(folder: Path, *, cut: int = 1, head: Any = "native", lora: bool = False) -> CutModel:
    parts = cut_model(folder, cut=cut, num_labels=3, head=head, seed=0, labels=LABELS)
    if lora:
        apply_lora(parts.top, ModelConfig(tuning="lora"))
    groups = parameter_groups(parts.top, lr=1e-2, head_lr=1e-1, weight_decay=0.0)
    optimiser = torch.optim.AdamW(groups)
    hidden = pad_hidden(parts.bottom.encode(sentences(LENGTHS, seed=4)))
    for _ in range(3):
        optimiser.zero_grad()
        cross_entropy(parts.top(*hidden), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
    return parts


def live_logits(parts: CutModel) -> torch.Tensor:
    with torch.no_grad():
        return parts.top(*pad_hidden(parts.bottom.encode(sentences(LENGTHS))))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_from_pretrained_loads_the_export(
    folders: Any, tmp_path: Path, model_type: str, lora: bool
) -> None:
    parts = tuned(folders[model_type], lora=lora)
    wanted_BC, before = live_logits(parts), top_state(parts.top)
    export(parts, tmp_path)
    after = top_state(parts.top)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(live_logits(parts), wanted_BC)

    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    ids_BT, mask_BT = pad_ids(sentences(LENGTHS), model.config.pad_token_id)
    with torch.no_grad():
        logits_BC = model.eval()(input_ids=ids_BT, attention_mask=mask_BT).logits
    torch.testing.assert_close(logits_BC, wanted_BC, atol=1e-4, rtol=0)
    assert wanted_BC.abs().max() > 0.1
    assert model.config.id2label == dict(enumerate(LABELS))
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((folders[model_type] / "config.json").read_text())
    for key in (*parts.top.family.dropout_keys, parts.top.family.depth_key, "layer_types"):
        assert config.get(key) == original.get(key), key
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == parts.config.pad_token_id


def test_export_can_be_cut_again(folders: Any, tmp_path: Path) -> None:
    parts = tuned(folders["gpt2"], cut=0)
    export(parts, tmp_path)
    again = cut_model(tmp_path, cut=DEPTH - 1, num_labels=3, seed=9)
    torch.testing.assert_close(live_logits(again), live_logits(parts), atol=1e-5, rtol=0)
    assert again.spec.labels == LABELS


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_mean_head_round_trip(folders: Any, tmp_path: Path, model_type: str, lora: bool) -> None:
    parts = tuned(folders[model_type], head="mean", lora=lora)
    wanted_BC = live_logits(parts)
    export(parts, tmp_path)
    assert torch.equal(live_logits(parts), wanted_BC)
    model = load_mean_pooled(tmp_path)
    ids_BT, mask_BT = pad_ids(sentences(LENGTHS), model.config.pad_token_id)
    with torch.no_grad():
        logits_BC = model(ids_BT, mask_BT)
        states = AutoModel.from_pretrained(tmp_path).eval()(ids_BT, attention_mask=mask_BT)
    torch.testing.assert_close(logits_BC, wanted_BC, atol=1e-4, rtol=0)
    # As the README says: average the real tokens of the plain base model, then the linear layer.
    mean_D = states.last_hidden_state[1, : LENGTHS[1]].mean(0)
    torch.testing.assert_close(model.classifier(mean_D), wanted_BC[1], atol=1e-4, rtol=0)
    readme = (tmp_path / "README.md").read_text()
    assert "load_mean_pooled(folder)" in readme
    assert f"(3, {HIDDEN})" in readme
    assert ", ".join(LABELS) in readme


def test_mean_head_needs_its_file(folders: Any) -> None:
    with pytest.raises(ModelError, match="holds no model with a mean head"):
        load_mean_pooled(folders["bert"])
