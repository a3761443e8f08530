"""Settings of single mechanisms: the tables ``[privacy.<name>]`` of a run configuration."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from privtune_flwr.section import Section


class PrivTuneSection(Section):
    """PrivTune beyond its closed form (*reconstruction*); see privacy/privtune/optimise.py.

    A weight or bound of 0 takes its term or constraint out of the program, for ablations.
    """

    vector: Literal["closed", "pgd"] = Field(
        "closed", description="p*: closed form, or projected gradient descent on OPT-3"
    )
    per: Literal["entry", "occurrence"] = Field(
        "entry", description="p* of a vocabulary entry, or solved on the device for each row"
    )
    steps: int = Field(20, ge=1, le=200, description="of the descent")
    temperature: float = Field(
        0.1, gt=0, le=10, description="of the mass over the bank, in squared units"
    )
    repel: float = Field(0.5, ge=0, le=100, description="a: off itself and its direct neighbours")
    far: float = Field(1.0, ge=0, le=100, description="b: unlike semantically distant entries")
    spread: float = Field(0.1, ge=0, le=100, description="c: distance inside its own cluster")
    consistency: float = Field(2.0, ge=0, le=100, description="t1: largest KL of a probe; 0 = off")
    semantic: float = Field(0.6, ge=0, lt=1, description="t2: least cos(h + p, h); 0 = off")
    validity: float = Field(
        0.99, ge=0, lt=1, description="Mahalanobis ball that holds this share of rows; 0 = off"
    )
    radius: float = Field(1.25, ge=0, le=100, description="largest norm of p, in units; 0 = off")
    importance: Literal["tfidf-entropy", "tfidf", "entropy", "none"] = Field(
        "tfidf-entropy", description="what spares a token noise, from public text; none: s = 1"
    )
    buckets: int = Field(
        0, ge=0, le=1000, description="different noise scales; 0 = one for each rank"
    )
    protect: str = Field(
        "",
        max_length=1000,
        description="regular expressions joined by commas; vocabulary entries in whose text one "
        "is found keep the full noise",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> PrivTuneSection:
        if self.per == "occurrence" and self.vector != "pgd":
            raise ValueError("per = occurrence needs vector = pgd: the closed form is an entry's")
        for pattern in self.protect_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"protect: {pattern!r} is no regular expression: {error}"
                ) from None
        return self

    @property
    def protect_patterns(self) -> tuple[str, ...]:
        """The regular expressions; none of them holds a comma."""
        return tuple(part.strip() for part in self.protect.split(",") if part.strip())


class SiblingsSection(Section):
    """Mechanisms of other authors that add noise to representations."""

    epsilon: float = Field(
        8.0, ge=1e-3, le=1e4, description="dp-forward: local DP of a released sentence"
    )
    delta: float = Field(1e-5, ge=1e-12, le=0.5, description="gaussian, dp-forward")
    clip: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="largest L2 norm of a row (gaussian; 0 = none), or of a sentence's rows in "
        "root mean square (dp-forward; 0 = that of public rows)",
    )
    contributing: float = Field(
        0.2, ge=0, le=1, description="sap: share of the known vocabulary that gets less noise"
    )
    relief: float = Field(2.0, ge=1, le=100, description="sap: factor on eta for that share")
    clusters: int = Field(
        256, ge=1, le=100_000, description="textobfuscator: word clusters; fewer = stronger"
    )


class BottleneckSection(Section):
    """Few numbers a token, from blocks that were tuned for the task."""

    width: int = Field(4, ge=1, le=1024, description="r: numbers a token")
    levels: int = Field(
        4, ge=0, le=4096, description="L: levels of each; 0 = not quantised but noised"
    )
    eta: float = Field(
        0.0, ge=0, le=1e6, description="d_chi noise on numbers in [-1, 1], for levels = 0"
    )
    flip: float = Field(0.0, ge=0, lt=1, description="randomised response on each quantised number")
    lora_rank: int = Field(
        0,
        ge=0,
        le=1024,
        description="of adapters in the tuned blocks; 0 = all weights of the blocks",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> BottleneckSection:
        if self.levels == 1:
            raise ValueError("levels must be 0, or 2 at least")
        if self.levels and self.eta > 0:
            raise ValueError("eta is for levels = 0; quantised numbers take flip")
        if not self.levels and (self.eta == 0 or self.flip > 0):
            raise ValueError("levels = 0 needs eta above 0, and no flip")
        return self


class CellsSection(Section):
    """A token is released as the cell of the vocabulary that it lies in."""

    cells: int = Field(
        32, ge=2, le=1024, description="cells at most, the one of special tokens included"
    )
    words: int = Field(
        16, ge=1, le=1000, description="cells-labels: words that a sentence counts for at most"
    )
    epsilon: float = Field(
        8.0, ge=1e-3, le=1e4, description="cells-labels: of a device's counts, for one sentence"
    )


class LearningSection(Section):
    """Federated rounds in which a mechanism's parts are learned before anything is released."""

    rounds: int = Field(
        6,
        ge=0,
        le=1000,
        description="0 = no update leaves a device: needs warm-start; cells-labels: 1",
    )
    epochs: int = Field(2, ge=1, le=100, description="passes over its text a device a round")
    batch_size: int = Field(8, ge=1, le=4096)
    learning_rate: float = Field(5e-4, gt=0, le=10, description="of the blocks, in round 1")
    head_learning_rate: float = Field(5e-3, gt=0, le=10, description="of all else, in round 1")
    clip: float = Field(0.0, ge=0, le=1e9, description="largest L2 norm of an update; 0 = no bound")
    noise: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="standard deviation of a device's own noise, in units of clip",
    )
    adversary: float = Field(
        0.0, ge=0, le=100, description="weight of the token adversary; 0 = none"
    )
    warm_start: Literal["none", "labels"] = Field(
        "none", description="first learned by the cloud on public labels of the same task"
    )

    @model_validator(mode="after")
    def _something_is_learned(self) -> LearningSection:
        if self.rounds == 0 and self.warm_start == "none":
            raise ValueError("rounds = 0 learns nothing, unless warm-start = 'labels'")
        return self


class TextSection(Section):
    """Mechanisms of other authors that replace tokens before the bottom model."""

    epsilon: float = Field(
        8.0,
        ge=1e-6,
        le=1e4,
        description="custext+, rantext: local DP of a token; santext+: of a unit of distance",
    )
    sensitive: float = Field(
        0.9, ge=1e-6, le=1, description="santext+: share of the vocabulary, rarest first"
    )
    replace: float = Field(
        0.3, ge=1e-6, le=1, description="santext+: how often another token is replaced"
    )
    candidates: int = Field(20, ge=2, le=1000, description="custext+: K, tokens an output set")
