"""What a user of the auditor may choose; light to import, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: What a command that audits on the side offers.
SideAudit = Literal["no", "quick", "full"]
PresetName = Literal["quick", "full", "frontier"]


@dataclass(frozen=True)
class AuditOptions:
    """What a user may choose.

    Attributes
    ----------
    preset : {"quick", "full", "frontier"}
    seed : int
        Of the draw of sentences.
    only : sequence of str
        Patterns of attack keys; empty for all.
    show_text : bool
        Whether a simulation's sentences may stand in the report.
    fresh : bool
        Do finished parts again.
    """

    preset: PresetName = "full"
    seed: int = 0
    only: Sequence[str] = ()
    show_text: bool = True
    fresh: bool = False
