"""Replies that a simulated network loses, the same ones whenever a run is repeated."""

from __future__ import annotations

import hashlib
from collections import Counter

from flwr.app import ConfigRecord, Message

from privtune_flwr.config import RunConfig
from privtune_flwr.privacy.mods import in_simulation
from privtune_flwr.protocol.requests import REQUEST


class ReplyLoss:
    """Draws which replies are lost, keyed by seed, device, request and attempt.

    Of a request its action, its split and its numbers count (round, chunk, epoch): ids are new in
    every run, and methods or learning rates that are to be compared shall have the same luck.

    Parameters
    ----------
    share : float
        Probability that a reply is lost, each attempt anew.
    seed : int
        The run's.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._seed = seed
        self._attempts: Counter[bytes] = Counter()

    @classmethod
    def of(cls, config: RunConfig) -> ReplyLoss | None:
        """Build it as ``simulation.reply-loss`` says; None where nothing is to be lost."""
        share = config.simulation.reply_loss
        return cls(share, config.run.seed) if share > 0 else None

    def loses(self, device: str, message: Message) -> bool:
        """Draw for the reply to one message; each call is one attempt. False on a real network."""
        if not in_simulation():
            return False
        record = dict(message.content.config_records.get(REQUEST, ConfigRecord()))
        which = sorted((k, v) for k, v in record.items() if k == "split" or type(v) is int)
        asked = (self._seed, device, message.metadata.message_type, which)
        name = hashlib.sha256(repr(asked).encode()).digest()
        attempt = self._attempts[name]
        self._attempts[name] += 1
        drawn = hashlib.sha256(name + attempt.to_bytes(4, "big")).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64 < self._share
