"""The ``[compare]`` table of a scenario."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from privtune_flwr.compare.methods import METHODS, find_method
from privtune_flwr.section import Section

T = TypeVar("T")
Table = dict[str, str | int | float | bool]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Table:
    """Join nested keys by dots: TOML makes tables of ``train.learning-rate = 1e-4``."""
    found: Table = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


class CompareSection(Section):
    """What a comparison runs; every method has the same grid."""

    methods: tuple[str, ...] = Field(
        ("ours", "fedavg", "fedavg-lora", "central"), description="rows of the table, in order"
    )
    seeds: tuple[int, ...] = Field((0,), description="the first one chooses the learning rates")
    single_seed: tuple[str, ...] = Field((), description="methods that run the first seed only")
    grid: tuple[float, ...] = Field((1.0,), description="multipliers of the base learning rates")
    grid_extensions: int = Field(
        0, ge=0, le=5, description="further points, one by one, while an end is better"
    )
    rates: dict[str, Table] = Field(
        default_factory=dict, description="base learning rates of a method, by key"
    )
    settings: dict[str, Table] = Field(
        default_factory=dict, description="run configuration keys of a method"
    )

    @field_validator("methods", "single_seed")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            find_method(name)
        return _once(names)

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError(f"seeds = {list(seeds)}: at least one, each from 0 to 2147483647")
        return _once(seeds)

    @field_validator("grid")
    @classmethod
    def _positive(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if not grid or any(not 0 < point <= 1000 for point in grid):
            raise ValueError(f"grid = {list(grid)}: at least one multiplier, above 0, at most 1000")
        return _once(grid)

    @field_validator("rates", "settings", mode="before")
    @classmethod
    def _dotted(cls, tables: Any) -> Any:
        if not isinstance(tables, Mapping):
            return tables
        return {k: _flat(v) if isinstance(v, Mapping) else v for k, v in tables.items()}

    @model_validator(mode="after")
    def _tables_fit(self) -> CompareSection:
        for name in self.single_seed:
            if name not in self.methods:
                raise ValueError(f"single-seed: {name!r} is not among the methods")
        for name in (*self.rates, *self.settings):
            find_method(name)
        for name, rates in self.rates.items():
            scaled = METHODS[name].scaled
            for key, value in rates.items():
                if key not in scaled:
                    raise ValueError(f"rates.{name}.{key}: allowed: {', '.join(scaled)}")
                if isinstance(value, bool | str) or not value > 0:
                    raise ValueError(f"rates.{name}.{key} = {value!r}: must be a number above 0")
        for name, settings in self.settings.items():
            for key in settings:
                if key.startswith("run.") or key in METHODS[name].scaled:
                    raise ValueError(
                        f"settings.{name}.{key}: is the comparison's own; learning rates are in "
                        f"rates.{name}"
                    )
        return self


def _once(values: tuple[T, ...]) -> tuple[T, ...]:
    repeated = sorted({str(v) for v in values if values.count(v) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: is there twice")
    return values
