"""Messages out, replies in, without blocking the cloud in between.

Flower's ``send_and_receive`` waits; here a round's messages are posted, the cloud trains, and the
replies are collected afterwards. A node never has two messages outstanding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message
from flwr.serverapp import Grid

from privtune_flwr.config import RunConfig
from privtune_flwr.errors import PROCESS_DIED, RunError
from privtune_flwr.privacy.mods import in_simulation
from privtune_flwr.protocol import to_message, wire_bytes
from strategies.faults import ReplyLoss

logger = logging.getLogger("privtune.cloud")

POLL_SECONDS = 0.1
TRAINING, PROVISIONING, EVALUATION = "train", "provision", "evaluate"
# our device's own codes start here; below are Flower's, which speak of transport and crashes
_OWN_CODES = 100
# Flower's code for what is neither the client app's error nor a missing message
_UNKNOWN = 0


class Traffic:
    """Bytes and messages of each node, counted on Flower's serialised content.

    ``up``, ``down`` and ``messages`` are all of it; ``provision_up`` and the like say which part
    was for provisioning and which for evaluation: the rest is what training takes.
    """

    def __init__(self, totals: dict[str, dict[str, int]]) -> None:
        self.totals = totals

    def add(self, name: str, counts: Mapping[str, int], purpose: str = TRAINING) -> None:
        """Add to a device's account.

        Parameters
        ----------
        name : str
            The device, or the node while it is unknown.
        counts : Mapping
            ``up``, ``down``, ``messages``, or another account.
        purpose : str
            What the message was for; beside the sums, all but training is counted apart.
        """
        account = self.totals.setdefault(name, {"up": 0, "down": 0, "messages": 0})
        for key, value in counts.items():
            account[key] = account.get(key, 0) + value
            if purpose != TRAINING:
                apart = f"{purpose}_{key}"
                account[apart] = account.get(apart, 0) + value

    def training(self) -> dict[str, int]:
        """Sum what training took so far, over all devices: provisioning and tests are left out.

        Returns
        -------
        dict
            ``bytes_up``, ``bytes_down``, their sum ``bytes``, and ``messages``; cumulative, for a
            round's record.
        """
        up, down, messages = (
            sum(
                a.get(key, 0) - a.get(f"{PROVISIONING}_{key}", 0) - a.get(f"{EVALUATION}_{key}", 0)
                for a in self.totals.values()
            )
            for key in ("up", "down", "messages")
        )
        return {"bytes": up + down, "bytes_up": up, "bytes_down": down, "messages": messages}

    def since(self, earlier: Traffic, name: str) -> dict[str, int]:
        """Say what a device's account grew by since an ``earlier`` state of this count."""
        before = earlier.totals.get(name, {})
        account = self.totals.get(name, {})
        return {k: v - before.get(k, 0) for k, v in account.items() if v != before.get(k, 0)}

    def copy(self) -> Traffic:
        """Copy, so that later counts leave it as it is."""
        return Traffic({name: dict(account) for name, account in self.totals.items()})

    def include(self, accounts: Mapping[str, Mapping[str, int]]) -> None:
        """Add what an earlier start of the run counted."""
        for name, account in accounts.items():
            self.add(name, account)


class Exchange:
    """One group of messages on its way at a time, at most one a node.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    timeout : float
        Seconds to wait for a group's replies.
    traffic : Traffic
        Where bytes are counted, under the names in ``names``.
    retries : int
        How often a message that found no answer is sent again.
    loss : ReplyLoss, optional
        Which replies of known devices a simulated network loses. Those count as ``lost``: sent
        down, not received.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        timeout: float,
        traffic: Traffic,
        retries: int = 1,
        loss: ReplyLoss | None = None,
    ) -> None:
        self._grid = grid
        self._timeout = timeout
        self._retries = retries
        self._loss = loss
        self.traffic = traffic
        self._outstanding: dict[int, Message] = {}
        self._ids: set[str] = set()
        self.names: dict[int, str] = {}
        self.seconds_waited = 0.0
        self._purpose = TRAINING

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Count what is sent and received meanwhile as ``name``."""
        before, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self._purpose = before

    def post(self, messages: Iterable[Message]) -> None:
        """Send a group and return at once.

        Raises
        ------
        RuntimeError
            If the previous group has not been collected.
        """
        if self._outstanding:
            raise RuntimeError("the previous messages have not been collected")
        self._send(list(messages))

    def _send(self, messages: list[Message]) -> None:
        for message in messages:
            node = message.metadata.dst_node_id
            self._outstanding[node] = message
            down = wire_bytes(message.content)
            self.traffic.add(self._name(node), {"down": down, "messages": 1}, self._purpose)
        self._ids = {i for i in self._grid.push_messages(messages) if i}

    def identify(self, node: int, device: str) -> None:
        """Learn which device a node is; what was counted for the node so far becomes its own."""
        earlier = self.traffic.totals.pop(self._name(node), None)
        self.names[node] = device
        if earlier:
            self.traffic.add(device, earlier)

    def _name(self, node: int) -> str:
        return self.names.get(node, f"node-{node}")

    def collect(self) -> dict[int, Message | None]:
        """Wait for the group's replies; a message that found no answer is sent again.

        Returns
        -------
        dict
            Node id to its reply; None where none came in time, however often it was asked.

        Raises
        ------
        RunError
            If a process of a simulation died.
        """
        start = time.monotonic()
        asked = list(self._outstanding)
        replies = self._pull()
        _check_alive(replies)
        for _ in range(self._retries):
            missing = [node for node in asked if _lost_on_the_way(replies.get(node))]
            if not missing:
                break
            logger.warning("%d messages found no answer and are sent once more", len(missing))
            self._send([_copy(self._outstanding[node]) for node in missing])
            replies |= self._pull()
            _check_alive(replies)
        self._outstanding = {}
        self.seconds_waited += time.monotonic() - start
        return {node: replies.get(node) for node in asked}

    def _pull(self) -> dict[int, Message]:
        replies: dict[int, Message] = {}
        deadline = time.monotonic() + self._timeout
        while self._ids and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(self._ids):
                self._ids.discard(reply.metadata.reply_to_message_id)
                node = reply.metadata.src_node_id
                if self._is_lost(node):
                    self.traffic.add(self._name(node), {"lost": 1}, self._purpose)
                    continue
                replies[node] = reply
                if reply.has_content():
                    up = {"up": wire_bytes(reply.content)}
                    self.traffic.add(self._name(node), up, self._purpose)
            if self._ids:
                time.sleep(POLL_SECONDS)
        self._ids = set()
        return replies

    def _is_lost(self, node: int) -> bool:
        # who takes part, and the model they start from, are there before the network fails
        if self._loss is None or node not in self.names or self._purpose == PROVISIONING:
            return False
        return self._loss.loses(self.names[node], self._outstanding[node])

    def ask(self, messages: Iterable[Message]) -> Mapping[int, Message | None]:
        """Post a group and wait for it."""
        self.post(messages)
        return self.collect()


def open_exchange(grid: Grid, config: RunConfig, timeout: float = 0.0) -> Exchange:
    """Open a run's exchange; ``timeout`` in seconds, 0 = the configuration's."""
    return Exchange(
        grid,
        timeout=timeout or config.train.timeout,
        traffic=Traffic({}),
        retries=config.train.retries,
        loss=ReplyLoss.of(config),
    )


def _check_alive(replies: Mapping[int, Message]) -> None:
    """End a simulation in which a Ray actor died.

    Flower gives a dead actor back to its pool, where it is the first to get every further message
    and fails each at once: the run would go on with the few devices that the others answer for.
    """
    if not in_simulation():
        return
    dead = [r for r in replies.values() if r.has_error() and r.error.code == _UNKNOWN]
    if dead:
        raise RunError(
            f"{PROCESS_DIED} (out of memory?): {len(dead)} devices could not answer; the run can "
            f"be resumed. Flower says: {(failure(dead[0]) or '').splitlines()[0]}"
        )


def _lost_on_the_way(reply: Message | None) -> bool:
    return reply is None or (reply.has_error() and reply.error.code < _OWN_CODES)


def _copy(message: Message) -> Message:
    return to_message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


def failure(reply: Message | None) -> str | None:
    """Say why a reply is no answer; None if it is one."""
    if reply is None:
        return "no reply in time"
    if reply.has_error():
        return (reply.error.reason or f"error {reply.error.code}").strip()[:500]
    return None
