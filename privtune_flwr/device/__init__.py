"""What a device keeps between two messages, all of it on its own disk."""

from privtune_flwr.device.bottoms import held_bottom
from privtune_flwr.device.holdings import Chunk, Holdings, open_holdings
from privtune_flwr.device.home import DeviceHome, open_home, simulated_root

__all__ = [
    "Chunk",
    "DeviceHome",
    "Holdings",
    "held_bottom",
    "open_holdings",
    "open_home",
    "simulated_root",
]
