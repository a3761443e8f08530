"""Reads the run configuration, prepares the cloud, runs the strategy, saves what came of it."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privtune_flwr.assets import AssetError
from privtune_flwr.cloud import prepare_cloud
from privtune_flwr.config import ConfigError, RunConfig, load_run_config
from privtune_flwr.data import DataError
from privtune_flwr.device import simulated_root
from privtune_flwr.errors import CANNOT_START, ENDED, PrivTuneError, RunError
from privtune_flwr.federated.cloud import prepare_federated
from privtune_flwr.federated.prompt_files import save_prompt
from privtune_flwr.federated_config import HARNESS_STRATEGIES
from privtune_flwr.models import ModelError, export
from privtune_flwr.results.federated import build_federated_results
from privtune_flwr.results.figure import draw_learning_curve
from privtune_flwr.results.report import build_results
from privtune_flwr.results.run_folder import RunFolder, open_run_folder
from privtune_flwr.results.table import print_results
from strategies import FederatedTuning, SplitTuning, create_federated, create_strategy

app = ServerApp()
logger = logging.getLogger("privtune.cloud")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation.

    Raises
    ------
    RunError
        With one clear message, whatever is wrong with configuration, data, model or devices.
    """
    _log_to_console()
    try:
        config = load_run_config(context.run_config)
        _check_extras(config)
        folder = open_run_folder(config)
    except (ConfigError, RunError) as error:
        logger.error("%s%s", CANNOT_START, error)
        raise
    try:
        logger.info("run folder: %s", folder.path)
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        if config.train.strategy in HARNESS_STRATEGIES:
            baseline = create_federated(prepare_federated(config), folder)
            baseline.start(grid)
            finish_federated(baseline)
        else:
            strategy = create_strategy(prepare_cloud(config), folder)
            strategy.start(grid)
            finish(strategy)
    except (PrivTuneError, ConfigError, ModelError, DataError, AssetError) as error:
        folder.write_json("error.json", {"error": str(error)})
        logger.error("%s%s", ENDED, error)
        raise RunError(str(error)) from None
    finally:
        folder.lock.release()


def finish(strategy: SplitTuning) -> None:
    """Save results, figure and the joined model, and print the closing table."""
    folder = strategy.folder
    results = build_results(strategy)
    export(strategy.model, folder.path / "model")
    draw_learning_curve(
        folder.path / "learning_curve.png",
        folder.name,
        strategy.progress.rounds,
        strategy.progress.steps,
    )
    if strategy.config.run.tensorboard:
        _write_tensorboard(folder, strategy.progress.rounds, strategy.progress.steps)
    _close(folder, results)


def finish_federated(strategy: FederatedTuning) -> None:
    """Save results, figure and the model of a baseline, and print the closing table."""
    folder = strategy.folder
    results = build_federated_results(strategy)
    export(strategy.model.parts, folder.path / "model")
    save_prompt(strategy.model, folder.path / "model")
    draw_learning_curve(
        folder.path / "learning_curve.png", folder.name, strategy.progress.rounds, ()
    )
    if strategy.config.run.tensorboard:
        _write_tensorboard(folder, strategy.progress.rounds, ())
    _close(folder, results)


def _close(folder: RunFolder, results: dict[str, Any]) -> None:
    folder.write_json("results.json", results)
    # homes of simulated devices served this run only; a real device's home is its own
    shutil.rmtree(simulated_root(folder.run_id), ignore_errors=True)
    print_results([results])
    for device, reason in results["devices"]["quarantined"].items():
        logger.warning("left out: %s: %s", device, reason)
    for device, reason in results["devices"]["refused"].items():
        logger.warning("refused: %s: %s", device, reason)
    logger.info("results: %s", folder.results)


def _check_extras(config: RunConfig) -> None:
    if config.run.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401  (only whether it can be had)
        except ImportError:
            raise ConfigError(
                "run.tensorboard = True: needs pip install 'privtune-flwr[tensorboard]'"
            ) from None
    if config.train.strategy == "bbt" and importlib.util.find_spec("cma") is None:
        raise ConfigError("train.strategy = 'bbt': needs pip install 'privtune-flwr[blackbox]'")
    if config.train.strategy == "dp-fedavg" and importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            "train.strategy = 'dp-fedavg': its accountant needs pip install 'privtune-flwr[dp]'"
        )


def _write_tensorboard(
    folder: RunFolder, rounds: Sequence[dict[str, Any]], steps: Sequence[Sequence[float]]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder.path / "tensorboard")) as writer:
        for step, loss, rate in steps:
            writer.add_scalar("train/loss", loss, int(step))
            writer.add_scalar("train/learning_rate", rate, int(step))
        for record in rounds:
            for key in ("test_accuracy", "eval_accuracy"):
                if key in record:
                    writer.add_scalar(key, record[key], record["round"])


def _log_to_console() -> None:
    root = logging.getLogger("privtune")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
