"""What a device is told about a baseline's training: the sections that matter, and no more."""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import ValidationError

from privtune_flwr.config import ModelConfig, RunConfig, TrainConfig
from privtune_flwr.errors import Refusal
from privtune_flwr.federated_config import DP_SGD_STRATEGIES, FederatedSection
from privtune_flwr.section import Section, dashed

_MAX_JSON = 16_384


class FitSettings(Section):
    """How devices train, the same in every message of a run.

    Attributes
    ----------
    model : ModelConfig
        Head, adapters and the cut-off; the name is the cloud's and left out.
    train : TrainConfig
        Optimiser, rates, batches, strategy.
    federated : FederatedSection
        What the strategy adds.
    seed : int
        Of adapters, heads and prompts, so that all start alike. It draws no noise.
    """

    model: ModelConfig
    train: TrainConfig
    federated: FederatedSection
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Take a run's configuration down to what devices need."""
        plain = TrainConfig()
        own = ("timeout", "retries", "threads", "device")
        kept = {name: getattr(plain, name) for name in own}
        return cls(
            model=config.model.model_copy(update={"name": "minilm", "cut": 0}),
            train=config.train.model_copy(update=kept),
            federated=config.federated,
            seed=config.run.seed,
        )

    def to_json(self) -> str:
        """Write them as canonical text."""
        return json.dumps(self.model_dump(by_alias=True), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read them on a device.

        Raises
        ------
        Refusal
            Naming the setting.
        """
        if len(text) > _MAX_JSON:
            raise Refusal(f"request.settings: longer than {_MAX_JSON} characters")
        try:
            settings = cls.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(dashed(str(part)) for part in error.errors()[0]["loc"])
            raise Refusal(f"request.settings: {where or 'not a JSON object'}") from None
        if settings.epsilon is not None and settings.train.strategy not in DP_SGD_STRATEGIES:
            raise Refusal(
                f"request.settings: federated.example-privacy: {settings.train.strategy} has no "
                "DP-SGD, so that no epsilon may be claimed for it"
            )
        return settings

    @property
    def id(self) -> str:
        """Hash that names them in the ledger."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def rounds(self) -> int:
        """Rounds of the run: ``train.epochs`` passes over the text; bbt's are generations."""
        if self.train.strategy == "bbt":
            return self.federated.generations
        return -(-self.train.epochs // self.federated.local_epochs)

    @property
    def shares(self) -> str:
        """What leaves a device."""
        if self.train.strategy == "bbt":
            return "losses"
        if self.train.strategy == "distil":
            return "logits"
        if self.train.strategy == "splitfed":
            return "gradients"
        return {"full": "weights", "lora": "adapters", "prompt": "prompt"}[self.model.tuning]

    @property
    def epsilon(self) -> float | None:
        """Epsilon of an example against the cloud, over the whole run; None = no guarantee."""
        return self.federated.epsilon if self.federated.example_privacy == "dp-sgd" else None
