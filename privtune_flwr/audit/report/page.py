"""The audit as one HTML page that opens without a network."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Undefined

from privtune_flwr.audit.report import view
from privtune_flwr.audit.report.figures import averaging_figure, curve_figure, frontier_figure

_HEAT = (0.1, 0.25, 0.5, 0.75, 0.9)  # shares at which a cell takes the next colour
_HEADLINE = {"top1": "all tokens", "content_top1": "content words"}
_TITLES = {
    "unaware": "Does not know the perturbation",
    "adaptive": "Knows everything but the devices\N{RIGHT SINGLE QUOTATION MARK} secrets",
    "in-domain": "Knows that, and owns text of the same kind",
}


def write_page(path: Path, audit: dict[str, Any]) -> None:
    """Write the page.

    Nothing on it is fetched from elsewhere, and the same audit gives the same bytes.

    Parameters
    ----------
    path : Path
        An HTML file; its folder exists. Replaced at once, so that no half page is ever seen.
    audit : dict
        As in ``audit.json``. Parts may be missing or ``null``. Shares are in [0, 1], as is any
        number with a fraction among ``side_channels``; a text there stands as it is.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=view.percent,
        span=view.span,
        plain=_plain,
        heat=_heat,
        share=view.value,
        number=_number,
        exact=_exact,
    )
    environment.tests["partial"] = _is_partial
    environment.globals.update(
        {"measure": view.measure, "MEASURES": view.MEASURES, "FLOORS": view.FLOORS}
    )
    text = environment.get_template("page.html.j2").render(_context(audit))
    temporary = path.with_suffix(".tmp.html")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _context(audit: Mapping[str, Any]) -> dict[str, Any]:
    frontier = audit.get("frontier") or ()
    run = audit.get("run") or {}
    averaging = (audit.get("repeats") or {}).get("averaging") or ()
    readings = view.readings(audit.get("sentences") or ())
    return {
        "audit": audit,
        "run": run,
        "config": run.get("config") or {},
        "final": run.get("final") or {},
        "privacy": run.get("privacy") or {},
        "evidence": audit.get("evidence") or {},
        "floors": audit.get("floors") or {},
        "repeats": audit.get("repeats") or {},
        "verdict": view.verdict(audit),
        "valid": view.verdict(audit) == "valid",
        "invalid": view.verdict(audit) == "invalid",
        "levels": view.levels_of(audit),
        "panels": _panels(audit),
        "families": view.by_family(audit),
        "best": {
            level: attack["key"]
            for level in view.levels_of(audit)
            if (attack := view.strongest(audit, level)) is not None
        },
        "apart": view.not_applicable(audit),
        "skipped": {s["key"]: s.get("why", "") for s in audit.get("skipped") or ()},
        "readings": readings,
        "readers": sorted({reading.attack for reading in readings}),
        "frontier": frontier if len(frontier) > 1 else (),
        "frontier_figure": frontier_figure(frontier) if len(frontier) > 1 else None,
        "averaging_figure": averaging_figure(averaging) if len(averaging) > 1 else None,
        "curves": _curves(audit),
    }


def _panels(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    panels = []
    for level, said in view.levels_of(audit).items():
        bars = []
        for name, label in _HEADLINE.items():
            attack = view.strongest(audit, level, name)
            floor = view.floor_of(audit, level, name)
            share = view.value(view.measure(attack, name))
            bars.append(
                {
                    "label": label,
                    "attack": attack,
                    "figure": view.measure(attack, name),
                    "floor": floor,
                    "at_floor": share is not None and floor is not None and share <= floor,
                }
            )
        title = _TITLES.get(level, level)
        panels.append({"level": level, "title": title, "said": said, "bars": bars})
    return panels


def _curves(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": attack["key"], "figure": curve_figure(str(index), attack["curve"])}
        for index, attack in enumerate(view.attacks_of(audit))
        if len((attack.get("curve") or {}).get("x") or ()) > 1
    ]


def _is_partial(attack: Mapping[str, Any], evidence: Mapping[str, Any]) -> bool:
    shown = attack.get("sentences")
    return shown is not None and shown < (evidence.get("sentences") or 0)


def _heat(figure: Any) -> int:
    share = view.value(figure)
    return 0 if share is None else bisect_right(_HEAT, share)


def _plain(content: Any) -> str:
    """Write any JSON value for a reader."""
    if content is None or content == "":
        return "\N{EN DASH}"
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, int):
        return f"{content:,}".replace(",", "\u202f")
    if isinstance(content, float):
        return view.percent(content) if 0 <= content <= 1 else f"{content:.4g}"
    if isinstance(content, Mapping):
        return ", ".join(f"{key} {_exact(item)}" for key, item in content.items()) or "\N{EN DASH}"
    return str(content)


def _number(content: Any) -> str | None:
    """Write a number that is no share; ``None`` where there is none."""
    if content is None or isinstance(content, Undefined):
        return None
    return f"{content:,}" if isinstance(content, int) else f"{content:.4g}"


def _exact(setting: Any) -> str:
    return str(setting).lower() if isinstance(setting, bool) else str(setting)
