"""Which federations a comparison runs: grid points of the first seed, then the other seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from privtune_flwr.compare.methods import Method, find_method
from privtune_flwr.config import ConfigError, RunConfig, Scalar, flat_keys, flatten
from privtune_flwr.scenario import Scenario


@dataclass(frozen=True)
class PlannedRun:
    """One federation.

    Attributes
    ----------
    method : Method
    multiplier : float
        Of the method's base learning rates.
    seed : int
    """

    method: Method
    multiplier: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.method.name}-x{self.multiplier:g}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison's runs.

    Attributes
    ----------
    scenario : Scenario
        Federation, run configuration and ``[compare]``.
    methods : tuple of Method
        Rows of the table, in order.
    seeds : tuple of int
        Those that run; the grid's is always among them.
    runs : Path
        Where run folders are, absolute.
    """

    scenario: Scenario
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    runs: Path

    @property
    def grid(self) -> tuple[float, ...]:
        """Multipliers, the same for every method."""
        return self.scenario.compare.grid

    @property
    def grid_seed(self) -> int:
        """The seed with which learning rates are chosen."""
        return self.scenario.compare.seeds[0]

    def grid_runs(self, method: Method) -> list[PlannedRun]:
        """List a method's grid; one of these is the table's run of the grid's seed."""
        return [PlannedRun(method, point, self.grid_seed) for point in self.grid]

    def beyond(self, method: Method, end: float, inner: float) -> PlannedRun:
        """Plan the point beyond an end of a grid, as far as the end is from its neighbour."""
        return PlannedRun(method, float(f"{end * end / inner:.3g}"), self.grid_seed)

    def seed_runs(self, method: Method, multiplier: float) -> list[PlannedRun]:
        """List the runs of the other seeds, at the learning rate that was chosen."""
        if method.name in self.scenario.compare.single_seed:
            return []
        others = [seed for seed in self.seeds if seed != self.grid_seed]
        return [PlannedRun(method, multiplier, seed) for seed in others]

    def rates(self, run: PlannedRun) -> dict[str, float]:
        """Give the run's learning rates by key."""
        chosen = self._settings(run.method)
        tuning = str(chosen.get("model.tuning", RunConfig().model.tuning))
        optimizer = str(chosen.get("train.optimizer", RunConfig().train.optimizer))
        own = self.scenario.compare.rates.get(run.method.name, {})
        base = {**run.method.base_rates(tuning, optimizer), **own}
        return {key: float(value) * run.multiplier for key, value in base.items()}

    def settings(self, run: PlannedRun) -> dict[str, Scalar]:
        """Give all that the run sets beside the scenario: method, overrides, rates, seed."""
        scenario = flat_keys(self.scenario.config)
        own = {k: v for k, v in self._settings(run.method).items() if scenario.get(k) != v}
        return {**own, **self.rates(run), "run.seed": run.seed}

    def config(self, run: PlannedRun) -> RunConfig:
        """Build a run's configuration; one that was interrupted goes on inside its folder.

        Raises
        ------
        ConfigError
            Naming the key that cannot be.
        """
        return self.scenario.run_config(
            {
                **self.settings(run),
                "run.name": run.name,
                "run.folder": str(self.runs),
                "run.resume": (self.runs / run.name / "config.json").exists(),
                "run.min-devices": self.scenario.federation.num_supernodes,
            }
        )

    def _settings(self, method: Method) -> dict[str, Scalar]:
        own = self.scenario.compare.settings.get(method.name, {})
        return {**flat_keys(self.scenario.config), **method.settings, **own}


def make_plan(
    scenario: Scenario,
    runs: Path,
    *,
    methods: Sequence[str] = (),
    seeds: Iterable[int] = (),
) -> Plan:
    """Plan a comparison, and validate every configuration in it.

    Parameters
    ----------
    scenario : Scenario
    runs : Path
        Where run folders go.
    methods, seeds
        Instead of the scenario's; the scenario's first seed stays the one that chooses rates.

    Raises
    ------
    ConfigError
        If a method is unknown, a seed is none, a key cannot be set, or the scenario sets a
        learning rate, which is the comparison's to choose.
    """
    section = scenario.compare
    names = tuple(dict.fromkeys(methods)) or section.methods
    chosen = tuple(find_method(name) for name in names)
    for key in sorted({k for method in chosen for k in method.scaled}):
        if key in flat_keys(scenario.config):
            raise ConfigError(
                f"config.{key}: a comparison chooses learning rates itself; base rates are in "
                "[compare.rates.<method>]"
            )
    wanted = tuple(dict.fromkeys(seeds)) or section.seeds
    if any(seed < 0 for seed in wanted):
        raise ConfigError(f"seeds = {list(wanted)}: must not be negative")
    plan = Plan(
        scenario, chosen, tuple(dict.fromkeys((section.seeds[0], *wanted))), runs.absolute()
    )
    for method in chosen:
        for run in plan.grid_runs(method):
            plan.config(run)
    return plan


def changed_keys(config: RunConfig) -> dict[str, Scalar]:
    """Give what differs from the defaults, but for where and when it ran."""
    default = flatten(RunConfig())
    places = ("run.folder", "run.resume", "run.name", "run.min-devices")
    return {k: v for k, v in flatten(config).items() if v != default[k] and k not in places}
