"""What the page and the console both read out of an audit.

An audit is the plain dict of ``audit.json``. Its parts may be missing or ``null``, since an
interrupted audit is shown too; whatever is read here says so with ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from privtune_flwr.audit.attacks.base import LEVELS

Audit = Mapping[str, Any]

MEASURES = {
    "top1": "top-1",
    "top5": "top-5",
    "content_top1": "content top-1",
    "content_top5": "content top-5",
    "exact": "exact",
    "near_exact": "near-exact",
    "rouge_l": "ROUGE-L",
    "names": "names",
    "numbers": "numbers",
    "rare": "rare tokens",
}
FLOORS = {
    "constant": "best constant guess",
    "public-prior": "public text alone, nothing released",
    "in-domain-prior": "in-domain text alone, nothing released",
}
FAMILIES = {
    "retrieval": "Nearest neighbour",
    "gaussian": "Gaussian classes",
    "learned": "Learned inversion",
    "optimisation": "Optimisation",
    "context": "With context",
    "exact": "Tables",
}
NOT_APPLICABLE = "not applicable"


def value(figure: Any) -> float | None:
    """Take the number out of a figure, be it a dict or bare; ``None`` where not measured."""
    number = figure.get("value") if isinstance(figure, Mapping) else figure
    if number is None or isinstance(number, str) or math.isnan(number):
        return None
    return float(number)


def interval(figure: Any) -> tuple[float, float] | None:
    """Take the interval out of a figure."""
    if not isinstance(figure, Mapping):
        return None
    low, high = value(figure.get("low")), value(figure.get("high"))
    return None if low is None or high is None else (low, high)


def percent(figure: Any) -> str:
    """Write a share in [0, 1] as a percentage with one decimal."""
    number = value(figure)
    return "\N{EN DASH}" if number is None else f"{100 * number:.1f} %"


def span(figure: Any) -> str:
    """Write the interval of a share, empty where there is none."""
    ends = interval(figure)
    return "" if ends is None else f"{100 * ends[0]:.1f}\N{EN DASH}{100 * ends[1]:.1f}"


def measure(holder: Any, name: str) -> Any:
    """Take a figure out of an attack or a floor; ``None`` where it was not measured."""
    measures = holder.get("measures", holder) if isinstance(holder, Mapping) else None
    return measures.get(name) if isinstance(measures, Mapping) else None


def attacks_of(audit: Audit) -> Sequence[Mapping[str, Any]]:
    """List the attacks that ran."""
    return audit.get("attacks") or ()


def levels_of(audit: Audit) -> dict[str, str]:
    """Describe the levels of knowledge: those the audit names, and any an attack has."""
    said = {**LEVELS, **(audit.get("levels") or {})}
    used = {a["level"] for a in attacks_of(audit)} | set(audit.get("levels") or LEVELS)
    order = [*LEVELS, *sorted(used - set(LEVELS))]
    return {level: said.get(level, level) for level in order if level in used}


def strongest(audit: Audit, level: str, name: str = "top1") -> Mapping[str, Any] | None:
    """Find the attack that the audit names as a level's best.

    Parameters
    ----------
    audit : dict
        As in ``audit.json``.
    level : str
        How much the attacker knows.
    name : {"top1", "content_top1"}
        The measure: each has its own best.
    """
    chosen = (audit.get("best" if name == "top1" else "best_content") or {}).get(level)
    return next((a for a in attacks_of(audit) if a["key"] == chosen), None)


def floor_of(audit: Audit, level: str, name: str) -> float | None:
    """Take the higher of the floors an attacker of that level has with nothing released."""
    floors = audit.get("floors") or {}
    kinds = ["constant", "public-prior"] + (["in-domain-prior"] if level == "in-domain" else [])
    shares = [value(measure(floors.get(kind), name)) for kind in kinds]
    return max((s for s in shares if s is not None), default=None)


def by_family(audit: Audit) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """Arrange attacks as family title -> attack name -> level -> attack, families in order."""
    table: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    order = list(FAMILIES)
    rank = {family: order.index(family) for family in order}
    # an attack that could not be run has a row too, so that nobody takes it for forgotten
    apart = [s for s in audit.get("skipped") or () if s.get("name")]
    found = [*attacks_of(audit), *apart]
    for attack in sorted(found, key=lambda a: rank.get(a.get("family", ""), len(rank))):
        family = str(attack.get("family") or "other")
        rows = table.setdefault(FAMILIES.get(family, family.capitalize()), {})
        row = rows.setdefault(str(attack["name"]), {})
        if "why" not in attack:
            row[str(attack["level"])] = attack
    return table


def not_applicable(audit: Audit) -> dict[str, str]:
    """Give the attacks that make no sense on this release, and why."""
    skipped = audit.get("skipped") or ()
    return {str(s["key"]): str(s.get("why", "")) for s in skipped if s.get("name")}


def verdict(audit: Audit) -> Literal["valid", "invalid", "unchecked"]:
    """Say whether the audit passed its own checks; ``unchecked`` if it had none."""
    if audit.get("valid") is True:
        return "valid"
    return "unchecked" if audit.get("checked") is False else "invalid"


@dataclass
class Run:
    """Neighbouring tokens shown alike.

    Attributes
    ----------
    text : str
        As it reads.
    state : str
        ``hit-content``, ``hit-function`` or ``miss``.
    guess : str
        What the attacker took a missed token for.
    """

    text: str
    state: str
    guess: str = ""


@dataclass
class Reading:
    """A sentence, and what the attacker read."""

    attack: str
    share: float | None
    runs: list[Run] = field(default_factory=list)
    read: str = ""
    complete: bool = False


_NO_SPACE_BEFORE = frozenset(".,;:!?)]}%")
_NO_SPACE_AFTER = frozenset("([{")
_CLITICS = frozenset({"s", "t", "re", "ve", "ll", "d", "m"})


def readings(sentences: Sequence[Mapping[str, Any]]) -> list[Reading]:
    """Rebuild readable sentences from word pieces, with hits and misses kept apart."""
    pieces = [str(t["text"]) for s in sentences for t in s.get("tokens") or ()]
    starts = tuple(mark for mark in ("Ġ", "▁") if any(p.startswith(mark) for p in pieces))
    return [_reading(sentence, starts) for sentence in sentences]


def _reading(sentence: Mapping[str, Any], starts: tuple[str, ...]) -> Reading:
    tokens = [t for t in sentence.get("tokens") or () if t.get("kind") != "special"]
    true = _join([str(t["text"]) for t in tokens], starts)
    guessed = _join([str(t.get("guess") or "\N{EN DASH}") for t in tokens], starts)
    runs: list[Run] = []
    for token, text, guess in zip(tokens, true, guessed, strict=True):
        kind = "content" if token.get("kind") == "content" else "function"
        state = f"hit-{kind}" if token.get("hit") else "miss"
        if state != "miss" and runs and runs[-1].state == state:
            runs[-1].text += text
        else:  # the gap before a run is a run of its own, so that no underline starts on a space
            if text.startswith(" "):
                runs.append(Run(" ", "gap"))
            runs.append(Run(text.lstrip(" "), state, guess.strip() if state == "miss" else ""))
    return Reading(
        attack=str(sentence.get("attack", "")),
        share=value(sentence.get("share")),
        runs=runs,
        read="".join(guessed),
        complete=all(t.get("hit") for t in tokens),
    )


def _join(pieces: Sequence[str], starts: tuple[str, ...]) -> list[str]:
    """Prefix each piece with the space it needs."""
    out: list[str] = []
    before = ""
    for index, piece in enumerate(pieces):
        if starts:
            text = piece.lstrip("".join(starts))
            glued = text == piece
        else:
            text = piece.removeprefix("##")
            glued = text != piece or _sticks(before, text, pieces[index + 1 : index + 2])
        out.append(text if glued or not out else f" {text}")
        before = "'" if glued and text == "'" else text if text != "'" else ""
    return out


def _sticks(before: str, text: str, after: Sequence[str]) -> bool:
    if text == "'":
        return bool(after) and after[0] in _CLITICS
    return text in _NO_SPACE_BEFORE or before in _NO_SPACE_AFTER or before == "'"
