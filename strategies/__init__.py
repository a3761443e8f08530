"""Flower strategies: split tuning and its variants."""

from privtune_flwr.cloud import CloudSide
from privtune_flwr.results.run_folder import RunFolder
from strategies.split import SplitTuning
from strategies.stepwise import StepwiseSplit

__all__ = ["SplitTuning", "StepwiseSplit", "create_strategy"]

_STRATEGIES = {"split": SplitTuning, "stepwise": StepwiseSplit}


def create_strategy(cloud: CloudSide, folder: RunFolder) -> SplitTuning:
    """Build the strategy that ``train.strategy`` names."""
    return _STRATEGIES[cloud.config.train.strategy](cloud, folder)
