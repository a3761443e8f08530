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
    """One scenario: ``[federation]``, ``[config.<section>]`` and ``[compare]``."""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    description: str = ""
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
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        text, stem = path.read_text(encoding="utf-8"), path.stem
    elif name in packaged_scenarios():
        source = resources.files("simulations") / "scenarios" / f"{name}.toml"
        text, stem = source.read_text(encoding="utf-8"), name
    else:
        raise ConfigError(
            f"scenario = {name!r}: no such file; packaged: {', '.join(packaged_scenarios())}"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario = {name!r}: {error}") from None
    scenario = validate_section(Scenario, {"name": stem} | values)
    scenario.run_config()
    return scenario
