"""A bottom model and a tokenizer small enough to check by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.public import PublicKnowledge

CLS, SEP, PAD = 0, 1, 2
VOCABULARY = 60
HIDDEN = 6


class ToyTokenizer:
    """Words are ``w3`` to ``w59``; a sentence is ``[CLS] ... [SEP]``."""

    all_special_ids = (CLS, SEP, PAD)
    bos_token_id = None

    def __len__(self) -> int:
        return VOCABULARY

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{i}" for i in ids]

    def __call__(
        self, texts: str | list[str], add_special_tokens: bool = True, **options: Any
    ) -> dict[str, Any]:
        if isinstance(texts, str):
            ids = [int(w[1:]) if w[1:].isdigit() else 3 for w in texts.split()]
            limit = options.get("max_length", 10**6) - 2
            return {"input_ids": [CLS, *ids[:limit], SEP] if add_special_tokens else ids}
        return {"input_ids": [self(t, add_special_tokens, **options)["input_ids"] for t in texts]}


class ToyBottom:
    """Representation = own vector + a tenth of the sentence's mean vector."""

    hidden_size = HIDDEN
    vocab_size = VOCABULARY

    def __init__(self) -> None:
        self.table = np.random.default_rng(5).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
        self.calls = 0

    def encode(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        self.calls += 1
        return [self.table[s] + 0.1 * self.table[s].mean(axis=0) for s in sequences]


def toy_texts(sentences: int = 200) -> list[str]:
    """Sentences over the words 3 to 49; 50 to 59 never occur."""
    rng = np.random.default_rng(6)
    return [" ".join(f"w{i}" for i in rng.integers(3, 50, size=8)) for _ in range(sentences)]


def toy_public(cache: Path, bottom: ToyBottom | None = None) -> PublicKnowledge:
    """Public knowledge over the toy model."""
    tokenizer: Any = ToyTokenizer()
    return PublicKnowledge(
        bottom or ToyBottom(), tokenizer, toy_texts(), cache, bottom_id="toy", max_length=32
    )
