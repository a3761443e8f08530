"""Reads the run configuration, prepares the cloud, runs the strategy, saves what came of it."""

from __future__ import annotations

import logging
import shutil
import sys

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privtune_flwr.assets import AssetError
from privtune_flwr.cloud import prepare_cloud
from privtune_flwr.config import ConfigError, RunConfig, load_run_config
from privtune_flwr.data import DataError
from privtune_flwr.device import simulated_root
from privtune_flwr.errors import CANNOT_START, ENDED, PrivTuneError, RunError
from privtune_flwr.models import ModelError, export
from privtune_flwr.results.figure import draw_learning_curve
from privtune_flwr.results.report import build_results
from privtune_flwr.results.run_folder import open_run_folder
from privtune_flwr.results.table import print_results
from strategies import SplitTuning, create_strategy

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
        _write_tensorboard(strategy)
    folder.write_json("results.json", results)
    # homes of simulated devices served this run only; a real device's home is its own
    shutil.rmtree(simulated_root(folder.run_id), ignore_errors=True)
    print_results([results])
    for device, reason in {**results["devices"]["quarantined"]}.items():
        logger.warning("left out: %s: %s", device, reason)
    for device, reason in {**results["devices"]["refused"]}.items():
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


def _write_tensorboard(strategy: SplitTuning) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(strategy.folder.path / "tensorboard")) as writer:
        for step, loss, rate in strategy.progress.steps:
            writer.add_scalar("train/loss", loss, int(step))
            writer.add_scalar("train/learning_rate", rate, int(step))
        for record in strategy.progress.rounds:
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
