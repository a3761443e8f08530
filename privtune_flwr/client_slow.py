"""A mod that makes some devices of a simulation slow; on a real device it does nothing."""

from __future__ import annotations

import time

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from privtune_flwr.config import load_run_config
from privtune_flwr.privacy.mods import in_simulation
from privtune_flwr.protocol import METRICS


def slow_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Sleep as long as a device that is ``simulation.slow-factor`` times slower would still work.

    The seconds that the reply tells are the slow device's too.
    """
    if not in_simulation():
        return call_next(message, context)
    config = load_run_config(context.run_config)
    node, factor = context.node_config, config.simulation.slow_factor
    partition, partitions = int(node["partition-id"]), int(node["num-partitions"])
    if not config.simulation.is_slow(partition, partitions, config.run.seed):
        return call_next(message, context)
    start = time.perf_counter()
    reply = call_next(message, context)
    time.sleep((factor - 1) * (time.perf_counter() - start))
    if reply.has_content() and METRICS in reply.content.metric_records:
        metrics = reply.content.metric_records[METRICS]
        for name in [n for n in metrics if n.startswith("seconds_")]:
            metrics[name] = float(str(metrics[name])) * factor
    return reply
