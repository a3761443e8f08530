"""Cutting a Hugging Face model into a bottom and a top model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from privtune_flwr.models.assemble import (
    assemble_bottom,
    bottom_config,
    meta_base,
    named_tensors,
)
from privtune_flwr.models.bottom import BottomModel
from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import Family, family_of, supported_types
from privtune_flwr.models.heads import MeanPooledClassifier, pooler_options
from privtune_flwr.models.source import ALLOWED
from privtune_flwr.models.top import TopModel

Head = Literal["native", "mean"]


@dataclass(frozen=True)
class CutSpec:
    """What was cut, and where.

    Attributes
    ----------
    model_type : str
        Hugging Face's ``config.model_type``.
    cut, depth : int
        Blocks on the device, blocks in all.
    hidden_size, num_labels : int
        Hidden size D, number of classes C.
    labels : tuple[str, ...]
        Names of the classes, in order.
    head : {"native", "mean"}
        Which head the top model has.
    seed : int
        Seed of the fresh parameters.
    """

    model_type: str
    cut: int
    depth: int
    hidden_size: int
    num_labels: int
    labels: tuple[str, ...]
    head: Head
    seed: int


@dataclass
class CutModel:
    """Both parts of one model, with what is needed to join them again.

    Attributes
    ----------
    bottom : BottomModel
        The device's part, frozen.
    top : TopModel
        The cloud's part, every parameter trainable.
    tokenizer : Any
        The tokenizer; pads on the right.
    spec : CutSpec
        What was cut, and where.
    config : Any
        Configuration of the whole model as it will be exported: the checkpoint's own dropout,
        this task's labels.
    """

    bottom: BottomModel
    top: TopModel
    tokenizer: Any
    spec: CutSpec
    config: Any


def cut_model(
    source: Path | str,
    *,
    cut: int,
    num_labels: int,
    head: Head = "native",
    seed: int,
    labels: Sequence[str] | None = None,
    attn_implementation: str = "eager",
) -> CutModel:
    """Load a model and cut it below block ``cut``.

    Parameters
    ----------
    source : Path | str
        A folder or hub name, see :func:`~.source.resolve_model`. Weights are read as safetensors
        only; code that comes with a model is never run.
    cut : int
        Blocks in the bottom model; 0 leaves it the embeddings. At least one block stays in the
        top model.
    num_labels : int
        Number of classes C.
    head : {"native", "mean"}
        The head of Hugging Face's sequence-classification class, or the mean over tokens and
        one linear layer.
    seed : int
        Seed of the parameters that the checkpoint does not hold. A native head that it does hold,
        for the same number of classes, is kept. The global generator is left as it was.
    labels : Sequence[str] | None
        Names of the classes, in order, for the exported checkpoint.
    attn_implementation : str
        Hugging Face's name of the attention implementation.

    Returns
    -------
    CutModel
        Both parts in float32, without dropout.

    Raises
    ------
    ModelError
        If the model cannot be found, is of no supported family, lacks weights, or cannot be cut
        there.
    """
    from transformers import AutoConfig

    with _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    family = family_of(config)
    depth = family.depth(config)
    if not 0 <= cut < depth:
        raise ModelError(
            f"model.cut = {cut}: allowed: 0 to {depth - 1} "
            f"(this model has {depth} blocks; at least one stays in the cloud)"
        )
    if head not in ("native", "mean"):
        raise ModelError(f"model.head = {head!r}: allowed: native, mean")
    tokenizer = _load_tokenizer(source, config)
    _set_task(config, family, tokenizer, num_labels, labels)
    exported = copy.deepcopy(config)
    for key in family.dropout_keys:
        if getattr(config, key, None) is not None:
            setattr(config, key, 0.0)
    if hasattr(config, "use_cache"):
        config.use_cache = False

    network, fresh = _load_network(source, config, family, head, seed, attn_implementation)
    bottom = _take_bottom(network.base_model, family, cut, tokenizer, attn_implementation)
    top = TopModel(network, family, cut=cut, head=head, fresh_modules=fresh, seed=seed)
    spec = CutSpec(
        model_type=config.model_type,
        cut=cut,
        depth=depth,
        hidden_size=bottom.hidden_size,
        num_labels=num_labels,
        labels=tuple(exported.id2label[i] for i in range(num_labels)),
        head=head,
        seed=seed,
    )
    return CutModel(bottom=bottom, top=top, tokenizer=tokenizer, spec=spec, config=exported)


def _set_task(
    config: Any, family: Family, tokenizer: Any, num_labels: int, labels: Sequence[str] | None
) -> None:
    if num_labels < 1 or (labels is not None and len(labels) != num_labels):
        named = "" if labels is None else f" with {len(labels)} names ({', '.join(labels)})"
        raise ModelError(f"{num_labels} classes{named}: one name for each of one or more classes")
    config.num_labels = num_labels
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    # A decoder's classifier finds the last token by looking for this id, so it must be the one
    # that the tokenizer pads with.
    if config.pad_token_id is None or family.kind == "decoder":
        config.pad_token_id = tokenizer.pad_token_id


def _load_tokenizer(source: Path | str, config: Any) -> Any:
    from transformers import AutoTokenizer

    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.padding_side = "right"
    # A padding token that was added without an embedding for it is as good as none.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= config.vocab_size:
        token = tokenizer.eos_token
        if config.pad_token_id is not None and config.pad_token_id < config.vocab_size:
            token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        if token is None:
            raise ModelError(f"model.name = {str(source)!r}: its tokenizer has no padding token")
        tokenizer.pad_token = token
    return tokenizer


def _load_network(
    source: Path | str, config: Any, family: Family, head: Head, seed: int, attention: str
) -> tuple[Any, tuple[str, ...]]:
    """Load the whole network; return it and the modules that are to be trained as new."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    auto = AutoModel if head == "mean" else AutoModelForSequenceClassification
    with _explained(source), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(pooler_options(family) if head == "mean" else {}),
        )
    heads = family.heads if head == "native" else ()
    pooler = f"{family.base}.pooler" if family.pooler and head == "native" else ""
    missing = [*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])]
    lost = [n for n in missing if not n.startswith(tuple(f"{p}." for p in (*heads, pooler) if p))]
    if lost:
        # Hugging Face would fill these with random values and go on.
        raise ModelError(
            f"model.name = {str(source)!r}: the checkpoint lacks {len(lost)} tensors, "
            f"among them {lost[0]}"
        )
    if head == "mean":
        return MeanPooledClassifier(model, config.num_labels, seed), ("classifier",)
    fresh_pooler = (pooler,) if pooler and any(n.startswith(pooler) for n in missing) else ()
    return model, (*heads, *fresh_pooler)


def _take_bottom(
    base: Any, family: Family, cut: int, tokenizer: Any, attention: str
) -> BottomModel:
    config = bottom_config(base.config, family, cut)
    names = {name for name, _ in named_tensors(meta_base(config, attention))}
    tensors = {name: tensor for name, tensor in named_tensors(base) if name in names}
    return BottomModel(
        assemble_bottom(config, tensors, attn_implementation=attention), tokenizer=tokenizer
    )


@contextlib.contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """Turn Hugging Face's failures to find or read a model into one that names the key."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"model.name = {str(source)!r}: cannot be loaded; allowed: {ALLOWED}; "
            f"weights as safetensors, no code of its own, "
            f"model type one of {', '.join(supported_types())} ({error})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Hugging Face's progress bar and its report on the fresh head off the terminal."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
