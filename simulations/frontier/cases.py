"""The cases of the frontier study, by group; a case may be in several and is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

from privtune_flwr.config import Scalar
from simulations.audited import SOURCES
from simulations.frontier.rows import Case, Row

Settings = Mapping[str, Scalar]
#: What tables call a release: its strength in words, and its settings.
Variants = dict[str, tuple[str, Settings]]

MAIN, OTHER = "movie-snippets", "bbc-news"
DEVICES = 10
SIZES: dict[str, Settings] = {
    MAIN: {
        "data.source": MAIN,
        "data.train-examples": 1600,
        "data.eval-examples": 400,
        "data.test-examples": 1000,
        "train.epochs": 2,
    },
    # enough evaluation examples for a search to choose by
    OTHER: {**SOURCES[OTHER], "data.eval-examples": 200},
}
#: Points that PrivTune's paper loses, and the looser of the two budgets of the search.
BUDGETS = (3.33, 6.0)


def _of(mechanism: str, **settings: Scalar) -> dict[str, Scalar]:
    """Give settings of the privacy section; ``a__b_c`` stands for ``privacy.a.b-c``."""
    named = {
        f"privacy.{key.replace('__', '.').replace('_', '-')}": v for key, v in settings.items()
    }
    return {"privacy.mechanism": mechanism, **named}


def _each(
    mechanism: str, key: str, values: Iterable[Scalar], word: str, **others: Scalar
) -> Variants:
    return {
        f"{mechanism}-{value:g}" if isinstance(value, float) else f"{mechanism}-{value}": (
            f"{word} {value}",
            _of(mechanism, **{key: value}, **others),
        )
        for value in values
    }


NOISES = (1.0, 2.0, 4.0)


def _privtune(noise: float, **others: Scalar) -> dict[str, Scalar]:
    return _of("privtune", **({"noise": noise, "decoder": True} | others))


def bottleneck(
    width: int, levels: int, *, warm: str = "none", cut: int = 2
) -> tuple[str, tuple[str, Settings]]:
    """Name a bottleneck and give its strength and settings."""
    name = f"bottleneck-{width}x{levels}"
    label = f"{width} x {levels} levels"
    if warm != "none":
        name, label = f"{name}-warm", f"{label}, warm start"
    settings = _of(
        "bottleneck",
        bottleneck__width=width,
        bottleneck__levels=levels,
        learning__warm_start=warm,
    )
    if cut != 2:
        name, label = f"{name}-cut{cut}", f"{label}, {cut} blocks on the device"
        settings["model.cut"] = cut
    return name, (label, settings)


SHIPPED_BOTTLENECK = bottleneck(4, 4)
SWEEP: Variants = {
    "none": ("", _of("none")),
    **_each("gaussian", "noise", NOISES, "noise"),
    **_each("dchi", "noise", NOISES, "noise"),
    **_each("sap", "noise", NOISES, "noise"),
    **_each("dp-forward", "siblings__epsilon", (1e4, 1e3, 1e2), "epsilon"),
    **_each("santext+", "text__epsilon", (20.0, 12.0, 5.0), "epsilon"),
    **_each("custext+", "text__epsilon", (16.0, 6.0, 1.0), "epsilon"),
    **_each("rantext", "text__epsilon", (512.0, 64.0, 8.0), "epsilon"),
    **_each("rapt", "noise", (2.0, 4.0, 8.0), "noise"),
    **_each("textobfuscator", "siblings__clusters", (4096, 512, 64), "clusters"),
    **{
        f"privtune-{noise:g}": (f"noise {noise:g}, decoder", _privtune(noise))
        for noise in (0.25, 1.0, 4.0)
    },
    **_each("cells", "cells__cells", (512, 128, 32), "cells"),
    "cells-labels-32": (
        "32 cells by labels",
        _of("cells-labels", cells__cells=32, learning__rounds=1),
    ),
    **dict([bottleneck(8, 8), SHIPPED_BOTTLENECK, bottleneck(2, 4), bottleneck(1, 16)]),
}

_RECOVERIES: Variants = {
    "denoise": ("posterior mean", {"recovery.denoise": "posterior-mean"}),
    "scale": ("scaled", {"recovery.scale": "clean-norm"}),
    "distil": ("distilled first", {"recovery.adapt": "distil"}),
    "labels": ("public labels first", {"recovery.adapt": "labels"}),
}
RECOVERY: Variants = {
    f"{base}+{name}": (f"{SWEEP[base][0]}; {label}", {**SWEEP[base][1], **settings})
    for base, (name, (label, settings)) in product(("dchi-1", "privtune-0.25"), _RECOVERIES.items())
}

#: Without a private example: what public labels alone reach through each release.
PUBLIC: Variants = {
    f"public-only+{name}": (SWEEP[name][0], {**SWEEP[name][1], "recovery.adapt": "labels"})
    for name in ("none", "dchi-1", "sap-1", "dp-forward-10000", "privtune-0.25")
}

_PGD: dict[str, Settings] = {
    "pgd": {},
    **{
        f"pgd-no-{bound}": {f"privacy.privtune.{bound}": 0.0}
        for bound in ("consistency", "semantic", "validity", "radius")
    },
}
ABLATION: Variants = {
    "none": SWEEP["none"],
    "privtune-0.25": SWEEP["privtune-0.25"],
    "privtune-no-decoder": ("decoder off", _privtune(0.25, decoder=False)),
    "privtune-no-shift": ("no mean shift", _privtune(0.25, shift=0.0)),
    "privtune-no-importance": ("no importance", _privtune(0.25, importance_floor=1.0)),
    **{f"privtune-hops{n}": (f"{n} hops", _privtune(0.25, hops=n)) for n in (1, 3)},
    **{f"privtune-cut{n}": (f"cut at {n}", {**_privtune(0.25), "model.cut": n}) for n in (0, 1, 3)},
    **{
        f"privtune-{name}": (
            name.replace("-", " "),
            {**_privtune(0.25), "privacy.privtune.vector": "pgd", **settings},
        )
        for name, settings in _PGD.items()
    },
}
#: Shown for several seeds, and for a second task.
README = ("none", "dchi-1", "sap-1", "dp-forward-10000", "privtune-0.25")

#: What a search tries on each source. Public labels to start from are there for one task only.
SEARCHED: dict[str, Variants] = {
    MAIN: dict([bottleneck(4, 4), bottleneck(4, 4, warm="labels"), bottleneck(4, 4, cut=4)]),
    OTHER: dict([bottleneck(2, 4), bottleneck(4, 4)]),
}


def case(source: str, name: str, variants: Variants, seed: int = 0) -> Case:
    """Make one case, judged by the test set."""
    label, settings = variants[name]
    return Case(
        f"{source}-{name}-seed{seed}",
        {**SIZES[source], **settings, "run.seed": seed},
        name,
        label,
        DEVICES,
        private=not name.startswith("public-only"),
        # what the cloud does with rows changes none of them
        audited=not name.startswith("public-only"),
    )


def searched(source: str, name: str) -> Case:
    """Make a case of the search: judged by the devices' evaluation examples."""
    label, settings = {**SEARCHED[source], "none": SWEEP["none"]}[name]
    return Case(
        f"search-{source}-{name}",
        {**SIZES[source], **settings, "run.seed": 0},
        name,
        label,
        DEVICES,
        scored="validation",
        audited=name != "none",
    )


def chosen(rows: Iterable[Row], source: str) -> dict[float, str]:
    """Give the search's choice for each budget of points lost.

    Of the settings that lose no more on the devices' evaluation examples: the one from which an
    adaptive attacker reads the fewest content words. Empty until every case of the search is done.
    """
    own = f"search-{source}-"
    found = {row["variant"]: row for row in rows if row["name"].startswith(own)}
    if not set(SEARCHED[source]) | {"none"} <= set(found):
        return {}
    clean = found["none"]["accuracy"]
    best: dict[float, str] = {}
    for budget in BUDGETS:
        able = [n for n in SEARCHED[source] if 100 * (clean - found[n]["accuracy"]) <= budget]
        if able:
            best[budget] = min(able, key=lambda n: _read(found[n]))
    return best


def _read(row: Row) -> tuple[float, float]:
    """Give what the strongest attacker reads of content words; the more accurate of equals."""
    read = [row["recovered"][level]["content_top1"] or 0.0 for level in row["recovered"]]
    return max(read), -float(row["accuracy"])


def best_bottleneck(rows: Iterable[Row], source: str) -> str:
    """Give the search's choice within the paper's loss, else the loosest, else the default."""
    best = chosen(rows, source)
    return next((best[b] for b in BUDGETS if b in best), SHIPPED_BOTTLENECK[0])


def _sweep(rows: Sequence[Row], seeds: int) -> list[Case]:
    return [case(MAIN, name, SWEEP) for name in SWEEP]


def _recovery(rows: Sequence[Row], seeds: int) -> list[Case]:
    return [case(MAIN, name, RECOVERY) for name in RECOVERY]


def _public(rows: Sequence[Row], seeds: int) -> list[Case]:
    return [case(MAIN, name, PUBLIC) for name in PUBLIC]


def _seeds(rows: Sequence[Row], seeds: int) -> list[Case]:
    """List what the README shows: for several seeds, and on the second task."""
    return [
        case(source, name, SWEEP | SEARCHED[source], seed)
        for source in (MAIN, OTHER)
        for name, seed in product((*README, best_bottleneck(rows, source)), range(seeds))
    ]


def _ablation(rows: Sequence[Row], seeds: int) -> list[Case]:
    return [case(MAIN, name, ABLATION) for name in ABLATION]


def _search(rows: Sequence[Row], seeds: int) -> list[Case]:
    """List the grids; once one is done, its choices by the test set, which it has not seen."""
    cases: list[Case] = []
    for source, grid in SEARCHED.items():
        cases += [searched(source, name) for name in ("none", *grid)]
        confirmed = chosen(rows, source)
        if confirmed:
            names = sorted({"none", *confirmed.values()})
            cases += [case(source, name, SWEEP | grid) for name in names]
    return cases


#: A group's cases, given the rows that are stored (a search's choices hang on them) and seeds.
GROUPS: dict[str, Callable[[Sequence[Row], int], list[Case]]] = {
    "sweep": _sweep,
    "recovery": _recovery,
    "search": _search,
    "seeds": _seeds,
    "ablation": _ablation,
    "public": _public,
}
