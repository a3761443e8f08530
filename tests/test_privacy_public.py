"""Public knowledge: bank by definition, unit, cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from privacy_toy import (
    CLS,
    HIDDEN,
    PAD,
    SEP,
    VOCABULARY,
    ToyBottom,
    ToyTokenizer,
    toy_public,
    toy_texts,
)

from privtune_flwr.privacy.privtune.bank import context_free
from privtune_flwr.privacy.public import PublicKnowledge


def test_bank_is_the_mean_over_public_text(tmp_path: Path) -> None:
    bottom = ToyBottom()
    public = toy_public(tmp_path, bottom)
    rows: dict[int, list[np.ndarray]] = {}
    for ids in public.sequences:
        for token, row in zip(ids, bottom.encode([ids])[0], strict=True):
            rows.setdefault(int(token), []).append(row)
    for token, seen in rows.items():
        np.testing.assert_allclose(public.bank[token], np.mean(seen, axis=0), atol=1e-5)
        assert public.counts[token] == len(seen)
    for token in (PAD, 50, 59):
        alone = bottom.encode([np.array([CLS, token, SEP])])[0][1]
        np.testing.assert_allclose(public.bank[token], alone, atol=1e-6)
        assert public.counts[token] == 0
    assert public.bank.shape == (VOCABULARY, HIDDEN)
    assert public.bank.dtype == np.float32


def test_decoders_get_a_first_token_before_the_entry() -> None:
    class Decoder(ToyTokenizer):
        bos_token_id = CLS  # type: ignore[assignment]

        def __call__(self, texts: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            return super().__call__(texts, False, **options)

    bottom = ToyBottom()
    tokenizer: Any = Decoder()
    row = context_free(bottom, tokenizer, np.array([7]))[0]
    np.testing.assert_allclose(row, bottom.encode([np.array([CLS, 7])])[0][1])
    Decoder.bos_token_id = None
    row = context_free(bottom, tokenizer, np.array([7]))[0]
    np.testing.assert_allclose(row, bottom.encode([np.array([7])])[0][0])


def test_sequences_are_the_texts(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    texts = toy_texts()
    assert len(public.sequences) == len(texts)
    assert public.sequences[3].tolist() == [CLS, *(int(w[1:]) for w in texts[3].split()), SEP]
    assert public.sequences[3].dtype == np.int32


def test_unit_is_the_median_nearest_distance_of_text_entries(tmp_path: Path) -> None:
    public = toy_public(tmp_path)
    bank = np.asarray(public.bank)[3:]
    assert public.text_ids.tolist() == list(range(3, VOCABULARY))
    full = np.linalg.norm(bank[:, None] - bank[None], axis=2)
    np.fill_diagonal(full, np.inf)
    assert public.unit == pytest.approx(np.median(full.min(axis=1)), rel=1e-5)
    distances, indices = public.nearest(20)
    assert distances.shape == indices.shape == (VOCABULARY - 3, 20)
    assert public.nearest(1000)[0].shape[1] == VOCABULARY - 4


def test_rows_are_whole_sentences_with_their_ids(tmp_path: Path) -> None:
    bottom = ToyBottom()
    rows = toy_public(tmp_path, bottom).rows(95)
    assert rows.lengths.tolist() == [10] * 9
    start = 20
    again = bottom.encode([np.array(rows.ids[start : start + 10])])[0]
    np.testing.assert_array_equal(rows.values[start : start + 10], again)
    assert len(toy_public(tmp_path).rows(1).lengths) == 1


def test_disk_answers_a_second_time(tmp_path: Path) -> None:
    first = toy_public(tmp_path)
    expected = np.array(first.bank), first.unit, np.array(first.rows(50).values)
    bottom = ToyBottom()
    second = toy_public(tmp_path, bottom)
    np.testing.assert_array_equal(second.bank, expected[0])
    assert second.unit == expected[1]
    np.testing.assert_array_equal(second.rows(50).values, expected[2])
    assert bottom.calls == 0
    assert isinstance(second.bank, np.memmap)
    assert not second.bank.flags.writeable


def test_id_covers_text_model_and_length(tmp_path: Path) -> None:
    tokenizer: Any = ToyTokenizer()

    def identity(texts: list[str], bottom_id: str = "b", max_length: int = 32) -> str:
        return PublicKnowledge(
            ToyBottom(), tokenizer, texts, tmp_path, bottom_id=bottom_id, max_length=max_length
        ).id

    ids = [
        identity(["w3 w4"]),
        identity(["w3", "w4"]),
        identity(["w3w4"]),
        identity(["w3 w4"], bottom_id="c"),
        identity(["w3 w4"], max_length=16),
    ]
    assert len(set(ids)) == len(ids)
    assert identity(["w3 w4"]) == ids[0]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    public = toy_public(tmp_path)

    def broken() -> dict[str, np.ndarray]:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        public.cached("thing", {"a": 1}, broken)
    good = public.cached("thing", {"a": 1}, lambda: {"x": np.arange(3)})
    assert good["x"].tolist() == [0, 1, 2]
    kept = public.cached("thing", {"a": 1}, broken)
    assert kept["x"].tolist() == [0, 1, 2]
    assert not [p for p in tmp_path.rglob(".*") if p.is_dir()]


def test_empty_public_knowledge_is_refused(tmp_path: Path) -> None:
    tokenizer: Any = ToyTokenizer()
    with pytest.raises(ValueError, match="at least one sentence"):
        PublicKnowledge(ToyBottom(), tokenizer, [], tmp_path, bottom_id="b")
    with pytest.raises(ValueError, match="id"):
        PublicKnowledge(ToyBottom(), tokenizer, ["w3"], tmp_path, bottom_id="")
