"""Scenario files: a federation's size, the run configuration and a comparison, in one TOML."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from privtune_flwr.compare.section import CompareSection
from privtune_flwr.config import (
    ConfigError,
    RunConfig,
    Scalar,
    Section,
    flat_keys,
    flatten,
    load_run_config,
    validate_section,
)


class Federation(Section):
    """How many virtual devices, and what each may use."""

    num_supernodes: int = Field(10, ge=1, le=100_000)
    client_cpus: int = Field(1, ge=1, le=1024, description="CPU cores a device's process takes")
    client_gpus: float = Field(0.0, ge=0, le=64)


class Scenario(Section):
    """One scenario: ``[federation]``, ``[config.<section>]`` and ``[compare]``.

    One that ``extends`` another, by packaged name or file beside it, states what differs.
    """

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    description: str = ""
    extends: str = ""
    federation: Federation = Federation()
    config: dict[str, Any] = Field(default_factory=dict)
    compare: CompareSection = CompareSection()

    def run_config(self, overrides: dict[str, Scalar] | None = None) -> RunConfig:
        """Validate the run configuration, with single keys overridden."""
        flat = flat_keys(self.config)
        return load_run_config(flatten(RunConfig()) | flat | (overrides or {}))


def packaged_scenarios() -> dict[str, str]:
    """Names and descriptions of the scenarios that come with the package."""
    folder = resources.files("simulations") / "scenarios"
    found = {
        Path(entry.name).stem: tomllib.loads(entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }
    return {name: str(found[name].get("description", "")) for name in sorted(found)}


def load_scenario(name: str) -> Scenario:
    """Load a scenario file, or a packaged one by its name.

    Raises
    ------
    ConfigError
        If there is none, or naming the wrong key and what is allowed.
    """
    values = _read(name, Path(), ())
    scenario = validate_section(Scenario, {"name": Path(name).stem} | values)
    scenario.run_config()
    return scenario


def _read(name: str, beside: Path, below: tuple[str, ...]) -> dict[str, Any]:
    """Read a scenario's tables, on top of those of the one that it extends."""
    path = beside / name
    if path.suffix == ".toml" and path.is_file():
        text, identity, beside = path.read_text(encoding="utf-8"), str(path.resolve()), path.parent
    elif name in packaged_scenarios():
        source = resources.files("simulations") / "scenarios" / f"{name}.toml"
        text, identity = source.read_text(encoding="utf-8"), name
    else:
        raise ConfigError(
            f"scenario = {name!r}: no such file; packaged: {', '.join(packaged_scenarios())}"
        )
    if identity in below:
        raise ConfigError(f"scenario = {name!r}: extends itself")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario = {name!r}: {error}") from None
    base = values.get("extends", "")
    if not isinstance(base, str):
        raise ConfigError(f"extends = {base!r}: must be a scenario's name or file")
    if not base:
        return values
    under = _read(base, beside, (*below, identity))
    under.pop("name", None)  # run folders are called by it: everyone has an own one
    return _merged(under, values)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Lay tables over tables; what is no table is replaced."""
    merged = dict(base)
    for key, value in own.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            value = _merged(under, value)
        merged[key] = value
    return merged
