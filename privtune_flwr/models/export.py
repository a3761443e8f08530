"""Joining bottom and top again, as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from privtune_flwr.models.cut import CutModel
from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.heads import HEAD_FILE, pooler_options
from privtune_flwr.models.lift import save_lift
from privtune_flwr.models.tokenizer import save_tokenizer
from privtune_flwr.models.top import TopModel

_README = """# {model_type} with a mean-pooling classifier

`model.safetensors` is an ordinary Hugging Face base model. `head.safetensors` holds the classifier
on top of it: `weight` ({num_labels}, {hidden_size}) and `bias` ({num_labels},). Load both with

```python
from transformers import AutoTokenizer
from privtune_flwr.models import load_mean_pooled

tokenizer = AutoTokenizer.from_pretrained(folder)
model = load_mean_pooled(folder)
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
logits = model(batch["input_ids"], batch["attention_mask"])
```

or load the base model with `AutoModel.from_pretrained(folder{options})`, average the last hidden
states of the real tokens and apply the linear layer.

Classes: {labels}
"""


def export(cut_model: CutModel, folder: Path | str) -> None:
    """Save the whole, tuned model; the live one is not altered.

    With ``head = "native"`` the folder is what
    ``AutoModelForSequenceClassification.from_pretrained`` loads; with ``"mean"`` it holds the
    base model, ``head.safetensors`` and a README, for :func:`~.heads.load_mean_pooled`. LoRA
    adapters are merged, dropout is the original checkpoint's. A lift is no part of the joined
    model: it is saved beside it, and the README says that the model takes clean input only.

    Parameters
    ----------
    cut_model : CutModel
        Both parts, at any time during training.
    folder : Path | str
        Created if it does not exist.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    top, family = cut_model.top, cut_model.top.family
    mean = top.head == "mean"
    prefix = "base" if mean else family.base
    state = joined_state(cut_model, prefix)
    if mean:
        head = {leaf: state.pop(f"classifier.{leaf}") for leaf in ("weight", "bias")}
        save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
        state = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}
    auto: Any = AutoModel if mean else AutoModelForSequenceClassification
    options = pooler_options(family) if mean else {}
    # On the meta device the skeleton takes no memory: it lends its class and its tensors' names.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole = auto.from_config(
            copy.deepcopy(cut_model.config),
            dtype=torch.float32,
            trust_remote_code=False,
            **options,
        )
    differing = whole.state_dict().keys() ^ state.keys()
    if differing:
        raise ModelError(f"the parts do not make one model: {sorted(differing)[:3]}")
    whole.load_state_dict(state, strict=True, assign=True)
    whole.save_pretrained(folder)
    save_tokenizer(cut_model.tokenizer, folder)
    if mean:
        _write_readme(cut_model, folder, options)
    if top.lift is not None:
        save_lift(top, folder)


def joined_state(cut_model: CutModel, prefix: str) -> dict[str, Tensor]:
    """Name all tensors of both parts as in the uncut model.

    Parameters
    ----------
    cut_model : CutModel
        Both parts.
    prefix : str
        Attribute of the classification model that holds the base model.

    Returns
    -------
    dict[str, Tensor]
        On the CPU. Without adapters the tensors share memory with the live model.
    """
    bottom, top = cut_model.bottom, cut_model.top
    blocks = f"{prefix}.{top.family.blocks}."
    state = {f"{prefix}.{name}": tensor for name, tensor in bottom.base.state_dict().items()}
    for name, tensor in _merged_network(top).state_dict().items():
        full_name = name
        if name.startswith(blocks):
            index, _, rest = name.removeprefix(blocks).partition(".")
            full_name = f"{blocks}{int(index) + top.cut}.{rest}"
        state[full_name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _merged_network(top: TopModel) -> Any:
    if not top.adapted:
        return top.network
    # Merging in place and undoing it would change the live weights by rounding.
    return copy.deepcopy(top.model).merge_and_unload()


def _write_readme(cut_model: CutModel, folder: Path, options: dict[str, Any]) -> None:
    spec = cut_model.spec
    said = "".join(f", {key}={value}" for key, value in options.items())
    text = _README.format(
        model_type=spec.model_type,
        num_labels=spec.num_labels,
        hidden_size=spec.hidden_size,
        options=said,
        labels=", ".join(spec.labels),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
