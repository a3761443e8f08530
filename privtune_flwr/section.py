"""What every section of a configuration is: dashed keys outside, typed, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A run configuration or device policy that cannot be used; the message names the key."""


def dashed(name: str) -> str:
    """Write a field's name as users do."""
    return name.replace("_", "-")


class Section(BaseModel):
    """Base of all sections: dashed keys outside, unknown keys refused, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=dashed, populate_by_name=True
    )
