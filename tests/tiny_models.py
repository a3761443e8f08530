"""Tiny, randomly initialised models of every family, saved as ordinary checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCAB, HIDDEN, DEPTH = 60, 32, 3
WORDS = [f"w{i}" for i in range(VOCAB - 5)]
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
# Grouped-query attention: four heads share two keys and values.
_ROTARY = _ENCODER | {
    "num_key_value_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "attention_dropout": 0.1,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_ENCODER, pad_token_id=0),
    "roberta": lambda: RobertaConfig(**_ENCODER, pad_token_id=1, bos_token_id=2, eos_token_id=3),
    "xlm-roberta": lambda: XLMRobertaConfig(
        **_ENCODER, pad_token_id=1, bos_token_id=2, eos_token_id=3
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=48,
        n_layers=DEPTH,
        n_heads=4,
        max_position_embeddings=40,
        initializer_range=0.2,
    ),
    # Scaling by the block's index notices when a block above the cut is renumbered.
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=DEPTH,
        n_head=4,
        n_positions=40,
        bos_token_id=3,
        eos_token_id=3,
        initializer_range=0.2,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "llama": lambda: LlamaConfig(**_ROTARY, tie_word_embeddings=True),
    # The first block attends to everything, the others to a window shorter than the sentences.
    "qwen2": lambda: Qwen2Config(
        **_ROTARY, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_ROTARY, head_dim=8),
    "mistral": lambda: MistralConfig(**_ROTARY, sliding_window=4),
}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
TYPES = tuple(CONFIGS)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: for tiny models on a busy machine, waiting for others is all cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_tokenizer(model_type: str) -> Any:
    """A word-level tokenizer; encoders get a first and a last token, decoders no padding token."""
    roberta = "roberta" in model_type
    special = ["<s>", "<pad>", "[CLS]", "[SEP]"] if roberta else ["<pad>", "<s>", "[CLS]", "[SEP]"]
    vocab = {word: i for i, word in enumerate([*special, "[UNK]", *WORDS])}
    backend = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    if model_type not in DECODERS:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_tiny(model_type: str, folder: Path, *, content: str = "pretrained") -> Path:
    """Save a checkpoint: ``pretrained`` (no classifier) or ``classifier`` (three classes)."""
    config = CONFIGS[model_type]()
    if content == "classifier":
        config.num_labels = 3
        auto: Any = AutoModelForSequenceClassification
    else:
        auto = AutoModelForCausalLM if model_type == "llama" else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms too must differ from their defaults
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer(model_type).save_pretrained(folder)
    return folder


def load_uncut(folder: Path | str, padding_id: int) -> Any:
    """The whole classifier as Hugging Face loads it, without dropout."""
    config = AutoConfig.from_pretrained(folder)
    for key in config.to_dict():
        if key.endswith(("dropout", "dropout_prob", "pdrop")) and getattr(config, key) is not None:
            setattr(config, key, 0.0)
    config.pad_token_id = padding_id
    return AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, attn_implementation="eager", dtype=torch.float32
    )


def sentences(lengths: list[int], seed: int = 0, low: int = 5, high: int = VOCAB) -> list[Any]:
    """Random token ids of the given lengths, special tokens excluded."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, size=n).astype(np.int32) for n in lengths]


def pad_ids(ids: list[Any], padding_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, both (B, T)."""
    longest = max(map(len, ids))
    ids_BT = torch.full((len(ids), longest), padding_id)
    mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
    for row, sequence in enumerate(ids):
        ids_BT[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        mask_BT[row, : len(sequence)] = 1
    return ids_BT, mask_BT


def pad_hidden(hidden: list[Any], fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded representations (B, T, D) and mask (B, T)."""
    longest = max(map(len, hidden))
    hidden_BTD = torch.full((len(hidden), longest, hidden[0].shape[1]), fill)
    mask_BT = torch.zeros((len(hidden), longest), dtype=torch.long)
    for row, values in enumerate(hidden):
        hidden_BTD[row, : len(values)] = torch.from_numpy(values)
        mask_BT[row, : len(values)] = 1
    return hidden_BTD, mask_BT
