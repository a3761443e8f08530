"""The bottom model: embeddings and the first blocks, frozen, on the device.

Legend: B sentences in a batch, T tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from privtune_flwr.models.assemble import assemble_bottom, named_tensors
from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import Family, family_of
from privtune_flwr.models.tokenizer import load_tokenizer, save_tokenizer

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
CUT_FILE = "cut.json"
# Keys that differ between machines or tasks but not between bottom models: a bundle is named by
# its hash, so the same bottom model must give the same bytes whatever it is trained for.
_VOLATILE_KEYS = (
    "_name_or_path",
    "transformers_version",
    "id2label",
    "label2id",
    "problem_type",
    "architectures",
)


class BottomModel(nn.Module):
    """Embeddings and the first ``cut`` blocks of a model, without final norm.

    Always frozen and without dropout: the representation of a sentence never changes, which is
    what lets a device release it once.

    Parameters
    ----------
    base : Any
        A Hugging Face base model reduced to the bottom part by :func:`~.assemble.assemble_bottom`.
    tokenizer : Any | None
        Its tokenizer; read from ``folder`` on first use if None.
    folder : Path | None
        The bundle that this model was loaded from.
    """

    def __init__(self, base: Any, tokenizer: Any = None, folder: Path | None = None) -> None:
        super().__init__()
        self.base = base
        self.family: Family = family_of(base.config)
        self._tokenizer = tokenizer
        self._folder = folder
        self.requires_grad_(False)
        self.eval()

    @property
    def cut(self) -> int:
        """Number of blocks on the device."""
        return self.family.depth(self.base.config)

    @property
    def hidden_size(self) -> int:
        """Hidden size D."""
        return int(self.base.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.base.config.vocab_size)

    @property
    def embedding_table(self) -> npt.NDArray[np.float32]:
        """Input embedding of each vocabulary entry, before positions: (V, E), a copy."""
        weight_VE: Tensor = self.base.get_input_embeddings().weight
        return weight_VE.detach().float().cpu().numpy().copy()

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens, None if positions are rotary."""
        return self.family.max_positions(self.base.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model."""
        if self._tokenizer is None:
            if self._folder is None:
                raise ModelError("this bottom model came without a tokenizer")
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Compute representations of a right-padded batch.

        Parameters
        ----------
        input_ids_BT : Tensor
            Token ids, shape (B, T); values at padding do not matter.
        attention_mask_BT : Tensor
            One for real tokens, zero for padding, shape (B, T).

        Returns
        -------
        Tensor
            hidden_BTD; rows at padding are meaningless.
        """
        # RoBERTa numbers positions by counting ids that are not the padding id.
        padding_id = self.base.config.pad_token_id or 0
        ids_BT = input_ids_BT.masked_fill(attention_mask_BT == 0, padding_id)
        output = self.base(input_ids=ids_BT, attention_mask=attention_mask_BT)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    @torch.inference_mode()
    def encode(
        self, sequences: Sequence[npt.NDArray[np.integer[Any]]], batch_tokens: int = 4096
    ) -> list[npt.NDArray[np.float32]]:
        """Compute representations of sentences of any lengths.

        The composition of batches depends on the lengths and on ``batch_tokens`` alone, so the
        same list gives the same bytes on the same machine.

        Parameters
        ----------
        sequences : Sequence[numpy.ndarray]
            Token ids, each of shape (T,).
        batch_tokens : int
            Tokens a batch at most, padding included; a longer sentence is a batch of its own.

        Returns
        -------
        list[numpy.ndarray]
            float32 (T, D) for each sentence, in the order given.

        Raises
        ------
        ModelError
            If a sentence is longer than the position table.
        """
        lengths = [len(sequence) for sequence in sequences]
        if self.max_positions is not None and max(lengths, default=0) > self.max_positions:
            raise ModelError(
                f"model.max-length: a sentence has {max(lengths)} tokens; "
                f"this model numbers at most {self.max_positions} positions"
            )
        device = next(self.parameters()).device
        results = [np.zeros((0, self.hidden_size), dtype=np.float32) for _ in sequences]
        for batch in length_sorted_batches(lengths, batch_tokens):
            longest = max(lengths[i] for i in batch)
            ids_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, i in enumerate(batch):
                ids_BT[row, : lengths[i]] = torch.from_numpy(sequences[i].astype(np.int64))
                mask_BT[row, : lengths[i]] = 1
            hidden_BTD = self(ids_BT.to(device), mask_BT.to(device)).float().cpu().numpy()
            for row, i in enumerate(batch):
                # A copy, or one short sentence would keep its whole batch in memory.
                results[i] = hidden_BTD[row, : lengths[i]].copy()
        return results

    def save(self, folder: Path | str) -> None:
        """Write the bundle that devices are provisioned with.

        The folder receives ``config.json`` (of the base model, with ``cut`` blocks),
        ``model.safetensors`` (embeddings, blocks and their constant tables of positions; no
        weight of the top model), ``cut.json`` and the tokenizer's files. The same model always
        gives the same bytes.

        Parameters
        ----------
        folder : Path | str
            Created if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.base.config.to_dict().items() if k not in _VOLATILE_KEYS}
        _write_json(folder / "config.json", config)
        _write_json(
            folder / CUT_FILE,
            {
                "format": FORMAT,
                "family": self.family.name,
                "cut": self.cut,
                "hidden_size": self.hidden_size,
            },
        )
        tensors = {name: t.detach().cpu().contiguous() for name, t in named_tensors(self.base)}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        save_tokenizer(self.tokenizer, folder)

    @classmethod
    def load(cls, folder: Path | str, *, attn_implementation: str = "eager") -> BottomModel:
        """Load a bundle: safetensors only, strictly, and without running any code in it.

        Parameters
        ----------
        folder : Path | str
            A folder that :meth:`save` wrote.
        attn_implementation : str
            Hugging Face's name of the attention implementation.

        Raises
        ------
        ModelError
            If a file is missing or contradicts another, or a tensor is missing or not expected.
        """
        from transformers import AutoConfig

        folder = Path(folder)
        try:
            cut = json.loads((folder / CUT_FILE).read_text(encoding="utf-8"))
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no bottom model: {error}") from error
        family = family_of(config)
        said = {"format": FORMAT, "family": family.name, "cut": family.depth(config)}
        said["hidden_size"] = int(config.hidden_size)
        if cut != said:
            raise ModelError(f"{folder}: {CUT_FILE} says {cut}, expected {said}")
        base = assemble_bottom(config, tensors, attn_implementation=attn_implementation)
        return cls(base, folder=folder)


def length_sorted_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices of similar length; empty sentences are in no batch.

    Parameters
    ----------
    lengths : Sequence[int]
        Tokens of each sentence.
    batch_tokens : int
        Tokens a batch at most, padding included; every batch has one sentence at least.

    Returns
    -------
    list[list[int]]
        Indices, ascending by length, ties in the order given.
    """
    batches: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        # The newest is the longest, so it sets the padded width of the batch.
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
