"""The device owner's bounds on what any run may ask.

Run configuration and app code come from the cloud, the party the device defends against. What
stands here comes from the device's own disk or its SuperNode's node config, and wins.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from privtune_flwr.config import ConfigError, Section, validate_section
from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.accounting import CURRENCIES, Charge, Currency
from privtune_flwr.privacy.base import Strength
from privtune_flwr.privacy.registry import mechanism_names

# node-config keys that carry a bound directly, without a policy file
NODE_CONFIG_PREFIX = "policy-"
#: What answers of federated baselines are made of.
FIT_SHARES = ("weights", "adapters", "prompt", "losses", "logits", "gradients")
# rounding in a sum of many charges must not refuse what the owner meant to allow
_ROUNDING = 1e-9


class DevicePolicy(Section):
    """What a device lets out at most.

    The defaults are those of a real device: some mechanism, no labels, each example once, no
    learning, no weights. ``max-*`` bound one release, ``budget-*`` one example over its tokens and
    all its releases. A bound holds for every mechanism that declares its currency; a mechanism
    that declares none of the currencies that the owner bounded is refused.
    """

    mechanisms: tuple[str, ...] = Field(
        default_factory=lambda: tuple(n for n in mechanism_names() if n != "none"),
        description="mechanisms a run may use",
    )
    max_eta: float = Field(math.inf, gt=0, description="largest effective eta (per L2 distance)")
    max_epsilon: float = Field(math.inf, gt=0, description="largest epsilon a token or sentence")
    max_delta: float = Field(
        1e-4, ge=0, lt=1, description="an epsilon with a larger delta counts as none"
    )
    max_bits: float = Field(math.inf, gt=0, description="most bits that a token's row may carry")
    budget_eta: float = Field(math.inf, gt=0, description="largest sum of eta an example")
    budget_epsilon: float = Field(math.inf, gt=0, description="largest sum of epsilon an example")
    budget_bits: float = Field(math.inf, gt=0, description="most bits an example")
    share_labels: bool = Field(False, description="may labels leave")
    releases_per_example: int = Field(1, ge=0, description="0 = no bound")
    learning_rounds: int = Field(0, ge=0, description="learned updates that ever leave; 0 = none")
    min_learning_noise: float = Field(0.0, ge=0, description="least noise, in units of the clip")
    max_update_norm: float = Field(math.inf, gt=0, description="largest clip of an update")
    fit_rounds: int = Field(
        0, ge=0, description="answers of federated baselines that ever leave; 0 = none"
    )
    fit_shares: tuple[str, ...] = Field(
        FIT_SHARES, description="what may leave in them: weights, adapters, prompt, ..."
    )
    max_fit_epsilon: float = Field(
        math.inf, gt=0, description="largest epsilon an example a run; finite = no run without one"
    )
    bottom_models: tuple[str, ...] = Field((), description="allowed bundle ids; empty = any")
    max_bundle_bytes: int = Field(4 * 2**30, gt=0, description="largest bundle accepted")
    min_metric_examples: int = Field(5, ge=1, description="fewest examples a metric may cover")

    def public_json(self) -> str:
        """Say the bounds to the cloud, without the list of bottom models."""
        return self.model_dump_json(by_alias=True, exclude={"bottom_models"})

    def bound(self, currency: Currency) -> float:
        """Give the bound on one release."""
        found = {"eta": self.max_eta, "epsilon": self.max_epsilon, "bits": self.max_bits}
        return found[currency]

    def budget(self, currency: Currency) -> float:
        """Give the bound on one example's sum."""
        found = {"eta": self.budget_eta, "epsilon": self.budget_epsilon, "bits": self.budget_bits}
        return found[currency]

    def _set(self) -> dict[Currency, tuple[str, float]]:
        """List the currencies in which the owner set a bound, with its name and value."""
        found: dict[Currency, tuple[str, float]] = {}
        for currency in CURRENCIES:
            if math.isfinite(self.bound(currency)):
                found[currency] = f"max-{currency}", self.bound(currency)
            elif math.isfinite(self.budget(currency)):
                found[currency] = f"budget-{currency}", self.budget(currency)
        return found

    def check_mechanism(self, name: str, strength: Strength) -> None:
        """Refuse a mechanism or strength beyond the bounds.

        Raises
        ------
        Refusal
            Naming ``mechanisms``, ``max-eta``, ``max-epsilon`` or ``max-bits``.
        """
        if name not in self.mechanisms:
            raise Refusal(
                f"policy.mechanisms: {name!r} is not allowed here; "
                f"allowed: {', '.join(self.mechanisms) or 'none at all'}"
            )
        means_something = strength.delta <= self.max_delta
        declared = {
            "eta": strength.eta,
            "epsilon": strength.epsilon if means_something else None,
            "bits": strength.bits,
        }
        bounds = self._set()
        if bounds and all(declared[currency] is None for currency in bounds):
            names = ", ".join(key for key, _ in bounds.values())
            allowed = ", ".join(f"{value:.6g}" for _, value in bounds.values())
            raise Refusal(f"policy.{names}: the run needs inf, allowed: {allowed}")
        for currency in CURRENCIES:
            value = declared[currency]
            # written so that a strength that is not a number is refused
            if value is not None and not value <= self.bound(currency):
                raise Refusal(
                    f"policy.max-{currency}: the run needs {value:.6g}, "
                    f"allowed: {self.bound(currency):.6g}"
                )

    def check_budget(self, charges: Sequence[Charge]) -> None:
        """Refuse a release with which one example's charges would pass a budget.

        Parameters
        ----------
        charges : sequence of Charge
            One for each of its releases, the new one included.

        Raises
        ------
        Refusal
            Naming ``budget-eta``, ``budget-epsilon`` or ``budget-bits``.
        """
        finite = [c for c in CURRENCIES if math.isfinite(self.budget(c))]
        bounded = list(self._set())
        for currency in finite:
            spent = 0.0
            for charge in charges:
                value = charge.of(currency)
                if value is not None:
                    spent += value
                elif all(charge.of(other) is None for other in bounded):
                    # an earlier release, under another policy, that nothing bounds
                    spent = math.inf
            if not spent <= self.budget(currency) * (1 + _ROUNDING):
                raise Refusal(
                    f"policy.budget-{currency}: the run needs {spent:.6g} of an example, "
                    f"allowed: {self.budget(currency):.6g}"
                )

    def check_learning(self, rounds: int, clip: float, noise: float) -> None:
        """Refuse a learning phase beyond the bounds.

        Parameters
        ----------
        rounds : int
            Updates that would have left in the end.
        clip : float
            Largest norm of an update; 0 = no bound.
        noise : float
            Standard deviation of the device's noise, in units of ``clip``.

        Raises
        ------
        Refusal
            Naming ``learning-rounds``, ``max-update-norm`` or ``min-learning-noise``.
        """
        if not rounds <= self.learning_rounds:
            raise Refusal(
                f"policy.learning-rounds: the run needs {rounds}, allowed: {self.learning_rounds}"
            )
        norm = clip if clip > 0 else math.inf
        if not norm <= self.max_update_norm:
            raise Refusal(
                f"policy.max-update-norm: the run needs {norm:.6g}, "
                f"allowed: {self.max_update_norm:.6g}"
            )
        added = noise if clip > 0 else 0.0
        if not added >= self.min_learning_noise:
            raise Refusal(
                f"policy.min-learning-noise: the run has {added:.6g}, "
                f"at least: {self.min_learning_noise:.6g}"
            )

    def check_fit(self, shares: str, rounds: int, epsilon: float | None) -> None:
        """Refuse a federated baseline beyond the bounds.

        Parameters
        ----------
        shares : str
            What leaves: one of :data:`FIT_SHARES`.
        rounds : int
            Answers that would have left in the end.
        epsilon : float or None
            What protects an example against the cloud over the whole run; None = nothing.

        Raises
        ------
        Refusal
            Naming ``fit-shares``, ``fit-rounds`` or ``max-fit-epsilon``.
        """
        if shares not in self.fit_shares:
            raise Refusal(
                f"policy.fit-shares: {shares!r} is not allowed here; "
                f"allowed: {', '.join(self.fit_shares) or 'none at all'}"
            )
        if not rounds <= self.fit_rounds:
            raise Refusal(f"policy.fit-rounds: the run needs {rounds}, allowed: {self.fit_rounds}")
        needed = math.inf if epsilon is None else epsilon
        if not needed <= self.max_fit_epsilon:
            raise Refusal(
                f"policy.max-fit-epsilon: the run needs {needed:.6g}, "
                f"allowed: {self.max_fit_epsilon:.6g}"
            )

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
    "learning-rounds": 10**9,
    "fit-rounds": 10**9,
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
            is_list = name in ("mechanisms", "bottom-models", "fit-shares")
            values[name] = [p for p in str(value).split(",") if p] if is_list else value
    if values.get("mechanisms") == ["*"]:
        values["mechanisms"] = list(mechanism_names())
    policy = validate_section(DevicePolicy, values)
    for key, given, known in (
        ("mechanisms", policy.mechanisms, ("*", *mechanism_names())),
        ("fit-shares", policy.fit_shares, FIT_SHARES),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"policy.{key} = {unknown[0]!r}: allowed: {', '.join(known)}")
    return policy
