"""Adding up what devices say of their evaluation examples; the same for every strategy."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import Message, MetricRecord

from privtune_flwr.errors import InvalidReplyError
from privtune_flwr.protocol import read_evaluation
from strategies.exchange import Exchange, failure
from strategies.fleet import Fleet

logger = logging.getLogger("privtune.cloud")


def sum_evaluations(
    replies: Iterable[Message], exchange: Exchange, fleet: Fleet
) -> MetricRecord | None:
    """Add up the devices' sums; a device that fails here is reported, not dropped.

    Returns
    -------
    MetricRecord or None
        ``eval_examples``, ``eval_accuracy`` and ``eval_loss``; None where nobody evaluated.
    """
    totals = {"examples": 0.0, "correct": 0.0, "loss_sum": 0.0}
    for reply in replies:
        device = exchange.names.get(reply.metadata.src_node_id, "unknown")
        if why := failure(reply):
            logger.warning("device %s did not evaluate: %s", device, why)
            continue
        try:
            metrics = read_evaluation(reply.content, fleet.evaluation.get(device, 0))
        except InvalidReplyError as error:
            logger.warning("device %s: evaluation ignored: %s", device, error)
            continue
        for key in totals:
            totals[key] += metrics[key]
    if not totals["examples"]:
        return None
    return MetricRecord(
        {
            "eval_examples": int(totals["examples"]),
            "eval_accuracy": totals["correct"] / totals["examples"],
            "eval_loss": totals["loss_sum"] / totals["examples"],
        }
    )
