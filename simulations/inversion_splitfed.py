"""What a cloud reads from SplitFed, at the settings of the comparison's row."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from privtune_flwr.audit.updates.devices import held_by
from privtune_flwr.audit.updates.steps import splitfed_rounds
from privtune_flwr.compare.methods import find_method
from privtune_flwr.compare.plan import PlannedRun, make_plan
from privtune_flwr.config import RunConfig
from privtune_flwr.scenario import load_scenario

SCENARIO = "comparison"
METHOD = "splitfed"


@cache
def compared() -> tuple[RunConfig, int]:
    """Give the configuration of the comparison's SplitFed run, and its number of devices.

    At its base learning rate, which is the one that the comparison chose.
    """
    plan = make_plan(load_scenario(SCENARIO), Path("unused"), methods=[METHOD])
    config = plan.config(PlannedRun(find_method(METHOD), 1.0, plan.grid_seed))
    return config, plan.scenario.federation.num_supernodes


@cache
def read_rounds(devices: int) -> dict[str, list[dict[str, Any]]]:
    """Attack the rows of the run's first devices, in the first round and in the second."""
    config, fleet = compared()
    names = [f"device-{number:05d}" for number in range(fleet)]
    return splitfed_rounds(config, held_by(config, names, devices), fleet)
