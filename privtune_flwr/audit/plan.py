"""Which attacks an audit runs, and how much each may cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privtune_flwr.audit.attacks.base import Attack, Level, PosteriorAttack
from privtune_flwr.audit.attacks.context import Context
from privtune_flwr.audit.attacks.exact import Exact
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.learned import Learned
from privtune_flwr.audit.attacks.optimisation import Optimisation
from privtune_flwr.audit.attacks.retrieval import METRICS, Retrieval
from privtune_flwr.audit.options import PresetName

#: Planted leaks: who looks for which.
CANARIES = ("codewords-retrieval", "codewords-gaussian", "codewords-learned", "coin")


@dataclass(frozen=True)
class Preset:
    """Sizes of an audit.

    Attributes
    ----------
    name : {"quick", "full"}
    sentences : int
        Under attack.
    in_domain : int
        Sentences of the devices' source that the attacker owns.
    optimised : int
        Of these, how many the costly optimisation is shown.
    learned : tuple of (network, level)
        Which learned attackers run.
    steps, tokens : int
        Training steps of a learned attacker at most, and tokens of its own text.
    repeats : int
        Sentences that are released again and again, and linked.
    attribute_sentences : int
        The attacker's own sentences from which it learns an attribute.
    canaries : tuple of str
        Out of :data:`CANARIES`.
    """

    name: PresetName
    sentences: int
    in_domain: int
    optimised: int
    learned: tuple[tuple[Literal["mlp", "sequence"], Level], ...]
    steps: int
    tokens: int
    repeats: int
    attribute_sentences: int
    canaries: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Give all sizes as JSON values."""
        return {**asdict(self), "learned": [f"{n}@{level}" for n, level in self.learned]}


QUICK = Preset(
    "quick",
    sentences=200,
    in_domain=1500,
    optimised=16,
    learned=(("mlp", "unaware"), ("sequence", "adaptive")),
    steps=20,
    tokens=20_000,
    repeats=60,
    attribute_sentences=600,
    canaries=("codewords-retrieval", "codewords-gaussian", "coin"),
)
FULL = Preset(
    "full",
    sentences=600,
    in_domain=3000,
    optimised=48,
    learned=tuple(
        (network, level)
        for level in ("unaware", "adaptive", "in-domain")
        for network in ("mlp", "sequence")
    ),
    steps=120,
    tokens=200_000,
    repeats=200,
    attribute_sentences=2000,
    canaries=CANARIES,
)
PRESETS: dict[PresetName, Preset] = {"quick": QUICK, "full": FULL}


def attacks_on_tokens(
    preset: Preset, *, discrete: bool, in_domain: bool, seed: int
) -> Iterator[Attack]:
    """List an audit's attacks on tokens, cheap and telling ones first.

    Parameters
    ----------
    preset : Preset
        Sizes.
    discrete : bool
        Whether the mechanism releases finitely many rows, whose table can be inverted.
    in_domain : bool
        Whether there is text for the level ``in-domain``.
    seed : int
        Of learned attackers.
    """
    levels: list[Level] = ["unaware", "adaptive", *(["in-domain"] if in_domain else [])]  # type: ignore[list-item]
    for metric in METRICS:
        yield Retrieval("unaware", bank="embedding", metric=metric)
        yield Retrieval("unaware", bank="contextual", metric=metric)
    for metric in METRICS:
        yield Retrieval("adaptive", bank="aware", metric=metric)
    gaussian = {level: Gaussian(level) for level in levels}
    exact = {level: Exact(level) for level in levels[1:]} if discrete else {}
    yield from gaussian.values()
    yield from exact.values()
    for level in levels if preset.name == "full" else levels[-1:]:
        inner: PosteriorAttack = exact.get(level, gaussian[level])
        yield Context(inner)
    for network, level in preset.learned:
        if level in levels:
            yield Learned(
                level, network=network, steps=preset.steps, tokens=preset.tokens, seed=seed
            )
    for level in levels[:2]:
        yield Optimisation(level, sentences=preset.optimised)
