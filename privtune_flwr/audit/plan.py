"""Which attacks an audit runs on which kind of release, and how much each may cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from privtune_flwr.audit.attacks.base import Attack, Level, PosteriorAttack
from privtune_flwr.audit.attacks.context import Context
from privtune_flwr.audit.attacks.counts import MOST_SYMBOLS, Counts
from privtune_flwr.audit.attacks.exact import Exact
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.learned import Learned
from privtune_flwr.audit.attacks.levels import Levels
from privtune_flwr.audit.attacks.optimisation import Optimisation
from privtune_flwr.audit.attacks.retrieval import METRICS, Retrieval
from privtune_flwr.audit.attacks.scratch import FromScratch
from privtune_flwr.audit.attacks.table import Table
from privtune_flwr.audit.options import PresetName

if TYPE_CHECKING:
    from privtune_flwr.audit.attacks.base import Released
    from privtune_flwr.privacy.base import Mechanism

#: Planted leaks: who looks for which.
CANARIES = ("codewords-retrieval", "codewords-gaussian", "codewords-learned", "coin")


class Kind(NamedTuple):
    """What decides which attacks can be run on a release.

    Attributes
    ----------
    additive : bool
        Rows are clean ones plus a known shift and noise.
    narrow : bool
        Rows have another width than representations: nothing clean to compare them with.
    discrete : bool
        One of finitely many rows a token, by a table.
    replaced : bool
        Rows of other tokens, by a table.
    countable : bool
        Few different rows in all, with or without a table.
    """

    additive: bool = True
    narrow: bool = False
    discrete: bool = False
    replaced: bool = False
    countable: bool = False

    @classmethod
    def of(cls, mechanism: Mechanism, hidden_size: int, released: Released) -> Kind:
        """Read it off the mechanism; whether rows are countable off the rows."""
        levels = Levels.of(released.stacked)
        return cls(
            additive=mechanism.additive,
            narrow=mechanism.width(hidden_size) != hidden_size,
            discrete=mechanism.channel() is not None,
            replaced=mechanism.token_channel() is not None,
            countable=levels is not None and levels.symbols <= MOST_SYMBOLS,
        )


class Skipped(NamedTuple):
    """An attack that cannot be run on a release, and why."""

    attack: Attack
    why: str


@dataclass(frozen=True)
class Preset:
    """Sizes of an audit.

    Attributes
    ----------
    name : {"quick", "full", "frontier"}
    sentences : int
        Under attack.
    in_domain : int
        Sentences of the devices' source that the attacker owns.
    optimised : int
        Of these, how many the costly optimisation is shown; 0 leaves it out.
    learned : tuple of (network, level)
        Which learned attackers run.
    steps, tokens : int
        Training steps of a learned attacker at most, and tokens of its own text; 0 steps leave it
        out.
    scratch_steps, scratch_tokens : int
        The same for one that has no Gaussian to start from.
    repeats : int
        Sentences that are released again and again, and linked; 0 leaves that out.
    attribute_sentences : int
        The attacker's own sentences from which it learns an attribute.
    canaries : tuple of str
        Out of :data:`CANARIES`; without any, nothing shows that the audit would see a leak.
    """

    name: PresetName
    sentences: int
    in_domain: int
    optimised: int
    learned: tuple[tuple[Literal["mlp", "sequence"], Level], ...]
    steps: int
    tokens: int
    scratch_steps: int
    scratch_tokens: int
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
    scratch_steps=150,
    scratch_tokens=40_000,
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
    scratch_steps=2000,
    scratch_tokens=200_000,
    repeats=200,
    attribute_sentences=2000,
    canaries=CANARIES,
)
#: For studies of many runs: the attackers that lead, no checks of the auditor itself. Where noise
#: is added the Gaussian with context leads (docs/results.md, by family): no network there.
FRONTIER = Preset(
    "frontier",
    sentences=120,
    in_domain=1000,
    optimised=0,
    learned=(("sequence", "in-domain"),),
    steps=0,
    tokens=20_000,
    scratch_steps=300,
    scratch_tokens=80_000,
    repeats=0,
    attribute_sentences=600,
    canaries=(),
)
PRESETS: dict[PresetName, Preset] = {"quick": QUICK, "full": FULL, "frontier": FRONTIER}

_NARROW = (
    "not applicable: released rows are narrower or wider than representations, so there is "
    "nothing clean to compare them with"
)
_NOT_ADDITIVE = (
    "not applicable: this mechanism does not add noise to representations, so there is no "
    "sentence whose representations should be the released rows"
)


def attacks_on_tokens(
    preset: Preset, kind: Kind, *, in_domain: bool, seed: int
) -> tuple[list[Attack], list[Skipped]]:
    """List an audit's attacks on tokens, cheap and telling ones first.

    Parameters
    ----------
    preset : Preset
        Sizes.
    kind : Kind
        Of release.
    in_domain : bool
        Whether there is text for the level ``in-domain``.
    seed : int
        Of learned attackers.

    Returns
    -------
    attacks : list of Attack
        To be run.
    skipped : list of Skipped
        Those of other releases' audits that make no sense on this one.
    """
    planned = list(_planned(preset, kind, in_domain=in_domain, seed=seed))
    judged = [(attack, _why_not(attack, kind)) for attack in planned]
    return [a for a, why in judged if not why], [Skipped(a, why) for a, why in judged if why]


def _why_not(attack: Attack, kind: Kind) -> str:
    inner = attack.inner if isinstance(attack, Context) else attack
    if kind.narrow and inner.level == "unaware":
        return _NARROW
    if not kind.additive and inner.level != "unaware" and isinstance(inner, Optimisation):
        return _NOT_ADDITIVE
    return ""


def _planned(preset: Preset, kind: Kind, *, in_domain: bool, seed: int) -> Iterator[Attack]:
    levels: list[Level] = ["unaware", "adaptive", *(["in-domain"] if in_domain else [])]  # type: ignore[list-item]
    for metric in METRICS:
        yield Retrieval("unaware", bank="embedding", metric=metric)
        yield Retrieval("unaware", bank="contextual", metric=metric)
    for metric in METRICS:
        yield Retrieval("adaptive", bank="aware", metric=metric)
    gaussian = {level: Gaussian(level) for level in levels}
    tables = {level: list(_tables(level, preset, kind)) for level in levels[1:]}
    yield from gaussian.values()
    for found in tables.values():
        yield from found
    scratch = {
        level: FromScratch(
            level, steps=preset.scratch_steps, tokens=preset.scratch_tokens, seed=seed
        )
        for network, level in preset.learned
        if network == "sequence" and level in levels[1:] and _learns_from_scratch(preset, kind)
    }
    yield from scratch.values()
    for level in levels if preset.name == "full" else levels[-1:]:
        inners: list[PosteriorAttack] = [*tables.get(level, ()), *_one(scratch.get(level))]
        # on symbols and replaced tokens the Gaussian is what tables put right
        for inner in inners if tables.get(level) else [gaussian[level], *inners]:
            yield Context(inner)
    for network, level in preset.learned:
        if preset.steps and level in levels and (kind.additive or level == "unaware"):
            yield Learned(
                level, network=network, steps=preset.steps, tokens=preset.tokens, seed=seed
            )
    if preset.optimised:
        for level in levels[:2]:
            yield Optimisation(level, sentences=preset.optimised)


def _tables(level: Level, preset: Preset, kind: Kind) -> Iterator[PosteriorAttack]:
    if kind.discrete:
        yield Exact(level)
    elif kind.replaced:
        yield Table(level)
    elif kind.countable and not kind.additive:
        yield Counts(level, tokens=preset.scratch_tokens)


def _learns_from_scratch(preset: Preset, kind: Kind) -> bool:
    """Whether a network is worth its price: on narrow rows always, little else reads their context.

    On rows as wide as representations the Gaussian with learned means is a good start, and each
    release of replaced tokens costs a pass: there it is left to full audits.
    """
    return (
        not kind.additive
        and (preset.name != "frontier" or kind.narrow)
        and (preset.name == "full" or not kind.replaced)
    )


def _one(attack: PosteriorAttack | None) -> list[PosteriorAttack]:
    return [] if attack is None else [attack]
