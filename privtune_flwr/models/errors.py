"""The error that everything about models raises."""

from __future__ import annotations

from privtune_flwr.errors import PrivTuneError


class ModelError(PrivTuneError, ValueError):
    """A model that cannot be used as asked; the message names the key and what is allowed."""
