"""Errors that cross a module's border, and which of them may leave a device."""

from __future__ import annotations

# How the server app announces its end in the log; Flower's exit code says nothing of the cause.
CANNOT_START = "the run cannot start: "
ENDED = "the run ended: "
# How a run's end begins that the machine brought about: the same again, resumed, may well work.
PROCESS_DIED = "a process of the simulation died"


class PrivTuneError(Exception):
    """Base of this project's errors. Its message stays on the machine it was raised on."""


class Refusal(PrivTuneError):  # noqa: N818  (a decision of the device, not a fault)
    """The device declines what a run asks; the message names the bound and may leave the device.

    It is built from the request and the policy only, never from text, tokens or labels.
    """


class GuardError(PrivTuneError):
    """A reply holds something that must not leave; the message names the rule, not the content."""


class InvalidReplyError(PrivTuneError):
    """A device's reply that the cloud cannot use; the message is the quarantine's reason."""


class RunError(PrivTuneError):
    """A run that cannot start or go on; the message says what the operator can do."""
