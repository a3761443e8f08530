"""Flower strategies: split tuning, its variants, and the federated baselines."""

from importlib import import_module

from privtune_flwr.cloud import CloudSide
from privtune_flwr.federated.cloud import FederatedCloud
from privtune_flwr.results.run_folder import RunFolder
from strategies.federated import FederatedTuning
from strategies.sequential import SequentialSplit
from strategies.split import SplitTuning
from strategies.stepwise import StepwiseSplit

__all__ = [
    "FederatedTuning",
    "SequentialSplit",
    "SplitTuning",
    "StepwiseSplit",
    "create_federated",
    "create_strategy",
]

_SPLIT = {"split": SplitTuning, "sequential": SequentialSplit, "stepwise": StepwiseSplit}


def create_strategy(cloud: CloudSide, folder: RunFolder) -> SplitTuning:
    """Build the strategy that ``train.strategy`` names, of those that release representations."""
    return _SPLIT[cloud.config.train.strategy](cloud, folder)


# modules by strategy, loaded when they are asked for: each imports what it alone needs
_WHOLE = {
    "scaffold": ("scaffold", "ScaffoldTuning"),
    "bbt": ("blackbox", "BlackBoxTuning"),
    "distil": ("distil", "DistilTuning"),
    "splitfed": ("splitfed", "SplitFedTuning"),
    "central": ("bounds", "CentralTuning"),
    "local": ("bounds", "LocalTuning"),
}


def create_federated(cloud: FederatedCloud, folder: RunFolder) -> FederatedTuning:
    """Build the strategy that ``train.strategy`` names, of those that leave the model whole."""
    module, name = _WHOLE.get(cloud.config.train.strategy, ("federated", "FederatedTuning"))
    kind: type[FederatedTuning] = getattr(import_module(f"strategies.{module}"), name)
    return kind(cloud, folder)
