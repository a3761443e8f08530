"""The device owner's bounds on what any run may ask.

Run configuration and app code come from the cloud, the party the device defends against. What
stands here comes from the device's own disk or its SuperNode's node config, and wins.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from privtune_flwr.config import ConfigError, Section, validate_section
from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.registry import mechanism_names

# node-config keys that carry a bound directly, without a policy file
NODE_CONFIG_PREFIX = "policy-"


class DevicePolicy(Section):
    """What a device lets out at most.

    The defaults are those of a real device: some mechanism, no labels, each example once.
    """

    mechanisms: tuple[str, ...] = Field(
        default_factory=lambda: tuple(n for n in mechanism_names() if n != "none"),
        description="mechanisms a run may use",
    )
    max_eta: float = Field(math.inf, gt=0, description="largest effective eta (per L2 distance)")
    share_labels: bool = Field(False, description="may labels leave")
    releases_per_example: int = Field(1, ge=0, description="0 = no bound")
    bottom_models: tuple[str, ...] = Field((), description="allowed bundle ids; empty = any")
    max_bundle_bytes: int = Field(4 * 2**30, gt=0, description="largest bundle accepted")
    min_metric_examples: int = Field(5, ge=1, description="fewest examples a metric may cover")

    def public_json(self) -> str:
        """Say the bounds to the cloud, without the list of bottom models."""
        return self.model_dump_json(by_alias=True, exclude={"bottom_models"})

    def check_mechanism(self, name: str, eta_max: float | None) -> None:
        """Refuse a mechanism or strength beyond the bounds.

        Raises
        ------
        Refusal
            Naming ``mechanisms`` or ``max-eta``.
        """
        if name not in self.mechanisms:
            raise Refusal(
                f"policy.mechanisms: {name!r} is not allowed here; "
                f"allowed: {', '.join(self.mechanisms) or 'none at all'}"
            )
        eta = math.inf if eta_max is None else eta_max
        # written so that a strength that is not a number is refused
        if not eta <= self.max_eta:
            raise Refusal(f"policy.max-eta: the run needs {eta:.6g}, allowed: {self.max_eta:.6g}")

    def check_labels(self, wanted: bool) -> None:
        """Refuse a run whose labels would leave against the owner's word."""
        if wanted and not self.share_labels:
            raise Refusal("policy.share-labels: the run needs labels, allowed: false")

    def check_releases(self, total: int) -> None:
        """Refuse a release that would make ``total`` of one example."""
        if self.releases_per_example and total > self.releases_per_example:
            raise Refusal(
                f"policy.releases-per-example: the run needs {total}, "
                f"allowed: {self.releases_per_example}"
            )

    def check_bottom(self, bundle_id: str) -> None:
        """Refuse a bottom model that the owner did not list."""
        if self.bottom_models and bundle_id not in self.bottom_models:
            raise Refusal(
                f"policy.bottom-models: {bundle_id[:16]} is not listed "
                f"({len(self.bottom_models)} allowed)"
            )


SIMULATION_POLICY = {
    "mechanisms": ["*"],
    "share-labels": True,
    "releases-per-example": 0,
    "min-metric-examples": 1,
}


class PolicyError(ConfigError):
    """The owner's policy cannot be used. Its text is the owner's and stays on the device."""


def load_policy(node_config: Mapping[str, Any], *, simulated: bool) -> DevicePolicy:
    """Read the device's policy.

    Parameters
    ----------
    node_config : Mapping
        ``policy`` names a TOML file; ``policy-max-eta`` and the like set single bounds and win
        over the file. Lists are joined by commas there.
    simulated : bool
        In a simulation the operator holds all text, so that nothing is bounded by default.

    Raises
    ------
    PolicyError
        If the policy cannot be read. Callers must then release nothing.
    """
    try:
        return _read_policy(node_config, simulated=simulated)
    except ConfigError as error:
        raise PolicyError(str(error)) from None


def _read_policy(node_config: Mapping[str, Any], *, simulated: bool) -> DevicePolicy:
    values: dict[str, Any] = dict(SIMULATION_POLICY) if simulated else {}
    path = node_config.get("policy")
    if path:
        try:
            values |= tomllib.loads(Path(str(path)).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy = {str(path)!r}: {type(error).__name__}") from None
    for key, value in node_config.items():
        if key.startswith(NODE_CONFIG_PREFIX):
            name = key.removeprefix(NODE_CONFIG_PREFIX)
            is_list = name in ("mechanisms", "bottom-models")
            values[name] = [p for p in str(value).split(",") if p] if is_list else value
    if values.get("mechanisms") == ["*"]:
        values["mechanisms"] = list(mechanism_names())
    policy = validate_section(DevicePolicy, values)
    unknown = [name for name in policy.mechanisms if name not in mechanism_names()]
    if unknown:
        raise ConfigError(
            f"policy.mechanisms = {unknown[0]!r}: allowed: *, {', '.join(mechanism_names())}"
        )
    return policy
