"""Cutting: every family at every cut equals the uncut model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from tiny_models import (
    DEPTH,
    HIDDEN,
    TYPES,
    load_uncut,
    one_thread,
    pad_hidden,
    pad_ids,
    save_tiny,
    sentences,
)
from transformers import AutoModel, T5Config

from privtune_flwr.models import (
    BottomModel,
    ModelError,
    cut_model,
    resolve_model,
    supported_types,
)
from privtune_flwr.models.bottom import length_sorted_batches

LENGTHS = [9, 1, 14, 6, 6, 2]
CASES = [(t, cut) for t in TYPES for cut in range(DEPTH)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Path]]:
    root = tmp_path_factory.mktemp("models")
    with one_thread():
        yield {
            (t, content): save_tiny(t, root / t / content, content=content)
            for t in TYPES
            for content in ("classifier", "pretrained")
        }


def test_every_supported_type_is_tested() -> None:
    assert set(TYPES) == set(supported_types())


@pytest.mark.parametrize(("model_type", "cut"), CASES)
def test_cut_equals_uncut(folders: Any, model_type: str, cut: int) -> None:
    folder = folders[model_type, "classifier"]
    parts = cut_model(folder, cut=cut, num_labels=3, seed=0)
    padding_id = parts.config.pad_token_id
    uncut = load_uncut(folder, padding_id).eval()
    ids = sentences(LENGTHS)
    ids_BT, mask_BT = pad_ids(ids, padding_id)
    with torch.no_grad():
        wanted_BC = uncut(input_ids=ids_BT, attention_mask=mask_BT).logits
        logits_BC = parts.top(parts.bottom(ids_BT, mask_BT), mask_BT)
        ragged_BC = parts.top(*pad_hidden(parts.bottom.encode(ids)))
        # Whatever stands at padding, infinities included, is of no consequence.
        spoilt_BC = parts.top(*pad_hidden(parts.bottom.encode(ids), fill=float("inf")))
    torch.testing.assert_close(logits_BC, wanted_BC, atol=1e-5, rtol=0)
    torch.testing.assert_close(ragged_BC, wanted_BC, atol=1e-5, rtol=0)
    assert torch.equal(ragged_BC, spoilt_BC)
    assert wanted_BC.std(0).min() > 1e-3  # sentences differ, or the comparison shows nothing


@pytest.mark.parametrize("model_type", TYPES)
def test_fused_attention_gives_the_same(folders: Any, model_type: str) -> None:
    logits = []
    for attention in ("eager", "sdpa"):
        parts = cut_model(
            folders[model_type, "classifier"],
            cut=1,
            num_labels=3,
            seed=0,
            attn_implementation=attention,
        )
        assert parts.top.network.config._attn_implementation == attention
        with torch.no_grad():
            logits.append(parts.top(*pad_hidden(parts.bottom.encode(sentences(LENGTHS)))))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "cut"), CASES)
def test_encode_equals_uncut_hidden_states(folders: Any, model_type: str, cut: int) -> None:
    folder = folders[model_type, "pretrained"]
    bottom = cut_model(folder, cut=cut, num_labels=2, seed=0).bottom
    base = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = sentences(LENGTHS, seed=1)
    encoded = bottom.encode(ids, batch_tokens=20)
    for sequence, hidden_TD in zip(ids, encoded, strict=True):
        assert hidden_TD.dtype == np.float32
        assert hidden_TD.shape == (len(sequence), HIDDEN)
        with torch.no_grad():
            states = base(torch.from_numpy(sequence[None]).long(), output_hidden_states=True)
        np.testing.assert_allclose(hidden_TD, states.hidden_states[cut][0].numpy(), atol=1e-5)


def test_encode_of_unusual_lists(folders: Any) -> None:
    bottom = cut_model(folders["gpt2", "pretrained"], cut=1, num_labels=2, seed=0).bottom
    assert bottom.encode([]) == []
    empty, one = bottom.encode([np.zeros(0, np.int32), np.array([7], np.int64)])
    assert empty.shape == (0, HIDDEN)
    assert one.shape == (1, HIDDEN)
    ids = sentences([5, 3, 8])
    for first, again in zip(bottom.encode(ids), bottom.encode(ids), strict=True):
        assert np.array_equal(first, again)
    with pytest.raises(ModelError, match=r"model\.max-length.*41 tokens.*at most 40"):
        bottom.encode(sentences([41]))


def test_roberta_counts_positions_after_padding(folders: Any) -> None:
    bottom = cut_model(folders["roberta", "pretrained"], cut=1, num_labels=2, seed=0).bottom
    assert bottom.max_positions == 38
    assert bottom.encode(sentences([38]))[0].shape == (38, HIDDEN)
    with pytest.raises(ModelError, match="at most 38"):
        bottom.encode(sentences([39]))
    # Ids at padding do not matter, although RoBERTa derives positions from ids.
    ids_BT, mask_BT = pad_ids(sentences([4, 7]), padding_id=1)
    other_BT = ids_BT.masked_fill(mask_BT == 0, 9)
    assert torch.equal(bottom(ids_BT, mask_BT)[0, :4], bottom(other_BT, mask_BT)[0, :4])


def test_batches_are_of_similar_length_and_bounded() -> None:
    assert length_sorted_batches([9, 0, 1, 4, 4, 30], batch_tokens=12) == [[2, 3, 4], [0], [5]]
    assert length_sorted_batches([], batch_tokens=12) == []


@pytest.mark.parametrize("model_type", TYPES)
def test_parts_share_nothing(folders: Any, model_type: str) -> None:
    parts = cut_model(folders[model_type, "pretrained"], cut=2, num_labels=2, seed=0)
    below, above = list(parts.bottom.parameters()), list(parts.top.parameters())
    assert not any(p.requires_grad for p in below)
    assert all(p.requires_grad for p in above)
    assert not {p.data_ptr() for p in below} & {p.data_ptr() for p in above}
    vocabulary = [p for p in above if parts.bottom.vocab_size in p.shape]
    assert vocabulary == []
    base = AutoModel.from_pretrained(folders[model_type, "pretrained"])
    blocks = sum(p.numel() for b in parts.top.family.block_list(base) for p in b.parameters())
    own = parts.top.family.block_list(parts.top.network.base_model)
    assert sum(p.numel() for b in own for p in b.parameters()) == blocks // DEPTH
    assert (parts.bottom.cut, parts.bottom.hidden_size, parts.top.num_blocks) == (2, HIDDEN, 1)


@pytest.mark.parametrize(("model_type", "cut"), [(t, c) for t in TYPES for c in (0, 2)])
def test_bundle_round_trip(folders: Any, tmp_path: Path, model_type: str, cut: int) -> None:
    folder = folders[model_type, "pretrained"]
    parts = cut_model(folder, cut=cut, num_labels=2, seed=0)
    parts.bottom.save(tmp_path / "one")
    # Neither the task nor the seed, nor earlier use of the tokenizer, is in the bundle.
    again = cut_model(folder, cut=cut, num_labels=3, seed=5, labels=["a", "b", "c"])
    again.tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=3)
    again.bottom.save(tmp_path / "two")
    loaded = BottomModel.load(tmp_path / "one")
    loaded.save(tmp_path / "three")
    files = {p.name: p.read_bytes() for p in sorted((tmp_path / "one").iterdir())}
    for copy_name in ("two", "three"):
        assert files == {p.name: p.read_bytes() for p in sorted((tmp_path / copy_name).iterdir())}

    assert json.loads(files["cut.json"])["cut"] == cut
    assert (loaded.cut, loaded.hidden_size) == (cut, HIDDEN)
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = sentences(LENGTHS)
    for mine, theirs in zip(parts.bottom.encode(ids), loaded.encode(ids), strict=True):
        assert np.array_equal(mine, theirs)
    text = "w1 w2 nothing w3"
    assert loaded.tokenizer(text)["input_ids"] == parts.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.pad_token_id == parts.tokenizer.pad_token_id
    family = parts.bottom.family
    names = set(load(files["model.safetensors"]))
    blocks = {n for n in names if n.startswith(f"{family.blocks}.")}
    indices = {int(n.removeprefix(f"{family.blocks}.").split(".")[0]) for n in blocks}
    assert indices == set(range(cut))
    # Nothing else but embeddings, and the constants that rotary positions are made of.
    others = tuple(filter(None, (family.embeddings, family.position_table, "rotary_emb")))
    assert {n.split(".")[0] for n in names - blocks} <= set(others)


def test_bundle_is_loaded_strictly(folders: Any, tmp_path: Path) -> None:
    cut_model(folders["bert", "pretrained"], cut=1, num_labels=2, seed=0).bottom.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    for wrong in (
        {n: t for n, t in weights.items() if n != name},
        weights | {"pooler.dense.weight": torch.zeros(2)},
        weights | {name: weights[name].T.contiguous()},
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match="not the tensors of this bottom model"):
            BottomModel.load(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    cut = json.loads((tmp_path / "cut.json").read_text())
    (tmp_path / "cut.json").write_text(json.dumps(cut | {"cut": 2}))
    with pytest.raises(ModelError, match=r"cut\.json says"):
        BottomModel.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="holds no bottom model"):
        BottomModel.load(tmp_path)
    with pytest.raises(ModelError, match="holds no bottom model"):
        BottomModel.load(tmp_path / "nowhere")


@pytest.mark.parametrize("head", ["native", "mean"])
def test_seed_decides_the_fresh_head_alone(folders: Any, head: Any) -> None:
    folder = folders["distilbert", "pretrained"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = cut_model(folder, cut=1, num_labels=2, head=head, seed=0).top.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    same = cut_model(folder, cut=1, num_labels=2, head=head, seed=0).top.state_dict()
    other = cut_model(folder, cut=1, num_labels=2, head=head, seed=1).top.state_dict()
    assert all(torch.equal(one[n], same[n]) for n in one)
    differing = {n for n in one if not torch.equal(one[n], other[n])}
    assert differing
    assert all("classifier.weight" in n for n in differing)


def test_checkpoint_head_is_kept_if_it_fits(folders: Any) -> None:
    folder = folders["bert", "classifier"]
    wanted = load_uncut(folder, 0).classifier.weight
    three = cut_model(folder, cut=1, num_labels=3, seed=0).top.network.classifier.weight
    assert torch.equal(wanted, three)
    assert cut_model(folder, cut=1, num_labels=2, seed=0).top.network.classifier.out_features == 2


@pytest.mark.parametrize("cut", [-1, DEPTH, 99])
def test_cut_out_of_range(folders: Any, cut: int) -> None:
    with pytest.raises(ModelError, match=rf"model\.cut = {cut}: allowed: 0 to {DEPTH - 1}"):
        cut_model(folders["bert", "pretrained"], cut=cut, num_labels=2, seed=0)


def test_models_that_cannot_be_used(folders: Any, tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"'t5' cannot be cut; supported: bert, .*gpt2, llama"):
        cut_model(tmp_path / "t5", cut=0, num_labels=2, seed=0)
    with pytest.raises(ModelError, match=r"model\.name = .*allowed: minilm"):
        cut_model(tmp_path / "nothing", cut=0, num_labels=2, seed=0)
    with pytest.raises(ModelError, match="one name for each"):
        cut_model(folders["bert", "pretrained"], cut=0, num_labels=2, seed=0, labels=["a"])
    with pytest.raises(ModelError, match=r"model\.head = 'max'"):
        cut_model(
            folders["bert", "pretrained"],
            cut=0,
            num_labels=2,
            seed=0,
            head="max",  # type: ignore[arg-type]
        )


def test_pickled_weights_are_refused(folders: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folders["bert", "pretrained"])
    folder = save_tiny("bert", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="weights as safetensors"):
        cut_model(folder, cut=1, num_labels=2, seed=0)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"model\.name = .*cannot be loaded"):
        cut_model(folder, cut=1, num_labels=2, seed=0)


def test_incomplete_checkpoints_are_refused(folders: Any, tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": DEPTH + 1}))
    with pytest.raises(ModelError, match=r"lacks \d+ tensors, among them .*layer\.3"):
        cut_model(folder, cut=1, num_labels=2, seed=0)


def test_resolve_model(folders: Any, tmp_path: Path) -> None:
    folder = folders["bert", "pretrained"]
    assert resolve_model(str(folder)) == folder
    assert resolve_model("owner/some-model") == "owner/some-model"
    for name in (str(tmp_path), "/no/such/folder", "./here", "a b", "../up", "a/b/c"):
        with pytest.raises(ModelError, match=r"model\.name = .*allowed: minilm, smollm2"):
            resolve_model(name)


def test_real_minilm() -> None:
    folder = resolve_model("minilm")
    text = ["a gripping, quietly moving film", "dull", "the plot wanders and never comes back"]
    uncut = load_uncut(folder, 0).eval()
    for cut in range(6):
        parts = cut_model(folder, cut=cut, num_labels=2, seed=0)
        parts.top.network.classifier.load_state_dict(copy.deepcopy(uncut.classifier.state_dict()))
        batch = parts.tokenizer(text, padding=True, return_tensors="pt")
        ids = [np.array(x) for x in parts.tokenizer(text)["input_ids"]]
        with torch.no_grad():
            wanted_BC = uncut(**batch).logits
            logits_BC = parts.top(*pad_hidden(parts.bottom.encode(ids)))
        torch.testing.assert_close(logits_BC, wanted_BC, atol=1e-5, rtol=0)
