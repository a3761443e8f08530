"""The run configuration: every key a user can set, typed and validated in one place.

``[tool.flwr.app.config]`` holds the same keys, dashed (``privacy.release-policy``). Flower hands
them over as one flat dictionary of scalars; :func:`load_run_config` turns that into
:class:`RunConfig`, or raises :class:`ConfigError` with the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from privtune_flwr.federated_config import (
    DP_SGD_STRATEGIES,
    WHOLE_STRATEGIES,
    FederatedSection,
    Strategy,
)
from privtune_flwr.mechanism_config import (
    BottleneckSection,
    CellsSection,
    LearningSection,
    PrivTuneSection,
    SiblingsSection,
    TextSection,
)
from privtune_flwr.section import ConfigError as ConfigError
from privtune_flwr.section import Section as Section
from privtune_flwr.section import dashed
from privtune_flwr.simulation_config import SimulationSection

PACKAGED_MODELS = ("minilm", "smollm2")
PACKAGED_SOURCES = ("movie-snippets", "bbc-news", "20newsgroups", "election-tweets")
PUBLIC_CORPORA = ("amazon-snippets", "nyt-snippets", "tweets")

Scalar = str | int | float | bool
T = TypeVar("T", bound=BaseModel)


class ModelConfig(Section):
    """Which model, where it is cut, what of its top part is trained."""

    name: str = Field("minilm", min_length=1, description="minilm, smollm2, a hub name or a folder")
    cut: int = Field(2, ge=0, le=200, description="blocks on the device; 0 = embeddings only")
    head: Literal["native", "mean"] = Field("native", description="the HF class's own, or mean")
    max_length: int = Field(128, ge=4, le=8192, description="tokens a sentence at most")
    tuning: Literal["full", "lora", "prompt"] = Field(
        "full", description="prompt: a soft prompt and the head, with a federated strategy"
    )
    lora_rank: int = Field(8, ge=1, le=1024)
    lora_alpha: float = Field(16.0, gt=0)
    lora_targets: str = Field("auto", description="auto, or module names joined by commas")


class DataConfig(Section):
    """The private text, how it is split and who holds which part (simulation)."""

    source: str = Field(
        "movie-snippets",
        min_length=1,
        description="a packaged name, hub:NAME[:CONFIG], or file:/absolute/path.csv|jsonl|parquet",
    )
    text_column: str = "text"
    label_column: str = "label"
    labels: str = Field("", description="class names in order, joined by commas; empty = from data")
    train_examples: int = Field(3200, ge=0, description="over all devices; 0 = all that are left")
    eval_examples: int = Field(400, ge=0, description="kept on the devices for evaluation")
    test_examples: int = Field(2000, ge=0, description="size of the held-out public test set")
    test_source: str = Field(
        "held-out", description="held-out, none, or a source as in data.source, for the cloud"
    )
    partitioner: Literal["iid", "dirichlet", "column", "size"] = "iid"
    dirichlet_alpha: float = Field(0.5, gt=0)
    partition_column: str = Field("", description="for partitioner = column")
    size_skew: Literal["linear", "square", "exponential"] = "linear"
    public_text: str = Field(
        "amazon-snippets,nyt-snippets",
        min_length=1,
        description="public corpora for bank and importance, joined by commas",
    )

    @model_validator(mode="after")
    def _column_needs_a_name(self) -> DataConfig:
        if self.partitioner == "column" and not self.partition_column:
            raise ValueError("partition-column must be named when partitioner = column")
        unknown = [c for c in self.public_corpora if c not in PUBLIC_CORPORA]
        if unknown:
            raise ValueError(
                f"public-text has no corpus {unknown[0]!r}; allowed: {', '.join(PUBLIC_CORPORA)}"
            )
        return self

    @property
    def public_corpora(self) -> tuple[str, ...]:
        """Names of the public corpora."""
        return tuple(part.strip() for part in self.public_text.split(",") if part.strip())


class PrivacyConfig(Section):
    """What happens to a representation before it leaves the device.

    ``noise`` is E||r u|| in units (median distance of a bank entry to its nearest neighbour);
    ``eta`` overrides it when positive. The parameters from ``hops`` to ``decoder`` are PrivTune's
    (*reconstruction*, see privtune_flwr/privacy/privtune/mechanism.py). What belongs to another
    mechanism or family has a section of its own.
    """

    mechanism: str = Field("bottleneck", min_length=1)
    noise: float = Field(0.25, gt=0, le=1000)
    eta: float = Field(0.0, ge=0)
    hops: int = Field(2, ge=1, le=4)
    neighbours: int = Field(10, ge=2, le=100)
    targets: int = Field(5, ge=1, le=100)
    shift: float = Field(1.0, ge=0, le=4, description="alpha: how far towards the target")
    importance_floor: float = Field(0.5, gt=0, le=1, description="s_min of the noise scale")
    decoder: bool = Field(True, description="the cloud undoes the known shift (post-processing)")
    release_policy: Literal["once", "per-epoch"] = "once"
    wire: Literal["float16", "int8", "float32", "float32-padded"] = "float16"
    chunk_size: int = Field(64, ge=1, le=4096, description="examples a message")
    labels: Literal["shared"] = Field("shared", description="labels travel with the smashed data")
    privtune: PrivTuneSection = PrivTuneSection()
    siblings: SiblingsSection = SiblingsSection()
    bottleneck: BottleneckSection = BottleneckSection()
    cells: CellsSection = CellsSection()
    text: TextSection = TextSection()
    learning: LearningSection = LearningSection()


class TrainConfig(Section):
    """How the cloud trains the top model, and how devices are drawn."""

    fraction: float = Field(1.0, gt=0, le=1, description="devices drawn a round")
    rounds: int = Field(0, ge=0, description="release rounds at most; 0 = until all is released")
    epochs: int = Field(3, ge=1, le=1000, description="passes over every released example")
    strategy: Strategy = Field("split", description="who trains what, where")
    batch_size: int = Field(32, ge=1, le=4096)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-5, gt=0, le=10)
    head_learning_rate: float = Field(1e-3, gt=0, le=10)
    weight_decay: float = Field(0.01, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps")
    clip_norm: float = Field(1.0, gt=0)
    test_every: int = Field(0, ge=0, description="rounds between public tests; 0 = at the end")
    evaluate_every: int = Field(0, ge=0, description="rounds between device evaluations; 0 = end")
    timeout: float = Field(600.0, gt=0, description="seconds a round waits for replies")
    retries: int = Field(
        1, ge=0, le=100, description="how often a message that found no answer is sent again"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the cloud; 0 = all")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")


class RecoveryConfig(Section):
    """How the cloud makes up for the noise: post-processing, which costs the devices no privacy.

    One cloud, one knowledge: what is used here the attacker has as well.
    """

    denoise: Literal["none", "posterior-mean"] = Field(
        "none", description="replace a row by its posterior mean under the known noise law"
    )
    scale: Literal["none", "clean-norm"] = Field(
        "none", description="scale rows to the norm that clean public rows have"
    )
    adapt: Literal["none", "distil", "labels", "reconstruct"] = Field(
        "none",
        description="first train the top model on public text sent through the mechanism: to give "
        "the clean model's states (distil), on public labels of the same task (labels), or to name "
        "the true tokens (reconstruct)",
    )
    adapt_epochs: int = Field(2, ge=1, le=100)
    adapt_examples: int = Field(4000, ge=1, description="public sentences at most")
    adapt_learning_rate: float = Field(5e-5, gt=0, le=10)


class RunSection(Section):
    """Where results go, and the seed."""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="empty = time and mechanism")
    folder: str = Field("runs", min_length=1, description="absolute, or under the SuperLink's cwd")
    resume: bool = False
    seed: int = Field(0, ge=0, le=2**31 - 1)
    tensorboard: bool = False
    min_devices: int = Field(1, ge=1, description="devices to wait for")
    wait: float = Field(120.0, ge=0, description="seconds to wait for them")


class RunConfig(Section):
    """The whole run configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    train: TrainConfig = TrainConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    federated: FederatedSection = FederatedSection()
    simulation: SimulationSection = SimulationSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _prompts_need_a_whole_model(self) -> RunConfig:
        if self.model.tuning == "prompt" and self.train.strategy not in WHOLE_STRATEGIES:
            raise ValueError(
                f"model.tuning = 'prompt' needs train.strategy = {', '.join(WHOLE_STRATEGIES)}; "
                f"it is {self.train.strategy!r}"
            )
        return self

    @model_validator(mode="after")
    def _scaffold_and_bounds_work_so(self) -> RunConfig:
        strategy = self.train.strategy
        if strategy == "scaffold" and self.train.optimizer != "sgd":
            raise ValueError(
                "train.strategy = 'scaffold' needs train.optimizer = 'sgd': control variates are "
                f"mean gradients, and a step of {self.train.optimizer!r} is none"
            )
        private = self.federated.example_privacy
        if private != "none" and strategy not in DP_SGD_STRATEGIES:
            raise ValueError(
                f"federated.example-privacy = {private!r}: train.strategy = {strategy!r} "
                "does not protect examples; allowed: none, or train.strategy = "
                f"{', '.join(DP_SGD_STRATEGIES)}"
            )
        return self

    @model_validator(mode="after")
    def _splitfed_releases_clean_rows(self) -> RunConfig:
        if self.train.strategy != "splitfed":
            return self
        if self.privacy.mechanism != "none":
            raise ValueError(
                f"privacy.mechanism = {self.privacy.mechanism!r}: train.strategy = 'splitfed' "
                "trains the bottom model, so each example would be released anew in every epoch "
                "and its noise averaged away; set privacy.mechanism = 'none' (nothing protects "
                "the text), or train.strategy = 'split'"
            )
        return self


def load_run_config(flat: Mapping[str, Scalar]) -> RunConfig:
    """Validate Flower's flat run configuration.

    Parameters
    ----------
    flat : Mapping[str, Scalar]
        Dotted, dashed keys, for example ``{"model.cut": 2}``. Missing keys take their default.

    Returns
    -------
    RunConfig
        The typed configuration.

    Raises
    ------
    ConfigError
        With one line for each wrong key: the key, the value given, what is allowed.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        if not sections:
            raise ConfigError(
                f"{key} = {value!r}: unknown key; allowed: "
                f"{', '.join(f'{s}.*' for s in RunConfig.model_fields)}"
            )
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key} = {value!r}: unknown key; {section} is no section")
        place[name] = value
    config = validate_section(RunConfig, nested)
    _check_mechanism(config.privacy.mechanism)
    return config


def _check_mechanism(name: str) -> None:
    from privtune_flwr.privacy.registry import mechanism_names

    if name not in mechanism_names():
        raise ConfigError(f"privacy.mechanism = {name!r}: allowed: {', '.join(mechanism_names())}")


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Give a configuration back as Flower's flat, dashed dictionary."""
    return flat_keys(config.model_dump(by_alias=True))


def flat_keys(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Join the keys of nested tables by dots."""
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def validate_section(model: type[T], values: Mapping[str, Any]) -> T:
    """Build ``model`` from nested values, or raise :class:`ConfigError` naming every wrong key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(model, e) for e in error.errors())) from None


def _describe(model: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or model.__name__
    owner, field = _find_field(model, path)
    if error["type"] == "extra_forbidden":
        names = [dashed(name) for name in owner.model_fields] if owner else []
        return f"{key} = {error['input']!r}: unknown key; allowed: {', '.join(names)}"
    if error["type"] in ("value_error",):
        return f"{key}: {error['ctx']['error']}"
    allowed = _allowed(field) if field is not None else ""
    said = error["msg"].replace("Input should", "should")
    return f"{key} = {error['input']!r}: {said}" + (f" (allowed: {allowed})" if allowed else "")


def _find_field(model: type[BaseModel], path: list[str]) -> tuple[type[BaseModel] | None, Any]:
    owner: type[BaseModel] | None = model
    field: Any = None
    for part in path:
        if owner is None:
            return None, None
        field = owner.model_fields.get(part.replace("-", "_"))
        if field is None:
            return owner, None
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            owner = kind
    return owner, field


def _allowed(field: Any) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(json.dumps(v) for v in get_args(field.annotation))
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "pattern": "like"}
    bounds = [
        f"{word} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, word in words.items()
        if getattr(constraint, name, None) is not None
    ]
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    return "; ".join([kind, *bounds, *([field.description] if field.description else [])])
