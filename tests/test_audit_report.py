"""The audit's page and console table: complete, safe, self-contained, the same every time."""

from __future__ import annotations

import copy
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from privtune_flwr.audit.report.console import print_audit
from privtune_flwr.audit.report.page import write_page
from privtune_flwr.audit.report.view import FLOORS, MEASURES, floor_of, readings, strongest

ROOT = Path(__file__).parent.parent
SCRIPT = "<script>alert(1)</script>"


def figure(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "n": 0}
    return {"value": value, "low": value - 0.004, "high": value + 0.004, "n": 900}


def measures(top1: float, content: float, first: float) -> dict[str, Any]:
    """The two headline figures, and others that occur nowhere else in the audit."""
    rest = [name for name in MEASURES if name not in ("top1", "content_top1")]
    others = {name: figure(first + 0.001 * i) for i, name in enumerate(rest)}
    return {"top1": figure(top1), "content_top1": figure(content), **others}


def attack(name: str, family: str, level: str, *figures: float, **more: Any) -> dict[str, Any]:
    return {
        "key": f"{name}@{level}", "name": name, "family": family, "level": level, "seconds": 2.5,
        "sentences": 40, "settings": {}, "measures": measures(*figures), "curve": None, **more,
    }  # fmt: skip


def token(text: str, guess: str, kind: str = "content") -> dict[str, Any]:
    return {"text": text, "guess": guess, "hit": text == guess, "kind": kind}


CURVE = {"x": [1, 2, 3], "y": [3.0, None, 1.0], "xlabel": f"$x${SCRIPT}", "ylabel": "loss"}
AUDIT: dict[str, Any] = {
    "format": 1,
    "run": {
        "name": "run-7", "run_id": "ab12", "config": {"model.name": "minilm", "model.cut": 2},
        "final": {"test_accuracy": 0.8371},
        "privacy": {"mechanism": "privtune", "statement": "It is so & so.", "decoder": True},
    },
    "headline": "Nearly all of it.", "valid": True, "invalid_because": [], "preset": "quick",
    "evidence": {"kind": "private", "sentences": 40, "tokens": 900, "seed": 0, "said": "All rows."},
    "definitions": {"asr": "What we call top-1."}, "levels": {},
    "floors": {
        "constant": measures(0.0631, 0.0021, 0.2), "public-prior": measures(0.0712, 0.0062, 0.21),
        "in-domain-prior": measures(0.0773, 0.0113, 0.22),
    },
    "attacks": [
        attack("cosine", "retrieval", "unaware", 0.0341, 0.0132, 0.3),
        attack("gaussian", "gaussian", "adaptive", 0.9583, 0.8714, 0.31),
        attack("mlp", "learned", "adaptive", 0.9305, 0.8816, 0.32, curve=CURVE, sentences=9),
        attack("gaussian", "gaussian", "in-domain", 0.9617, 0.9028, 0.33),
    ],
    "skipped": [{"key": "mlp@in-domain", "why": "only in a full audit"}],
    "best": {
        "unaware": "cosine@unaware",
        "adaptive": "gaussian@adaptive",
        "in-domain": "gaussian@in-domain",
    },
    "best_content": {
        "unaware": "cosine@unaware",
        "adaptive": "mlp@adaptive",
        "in-domain": "gaussian@in-domain",
    },
    "attributes": [{
        "attribute": "label", "attack": "logistic", "accuracy": figure(0.7891),
        "balanced_accuracy": 0.7782, "majority": 0.5333, "shuffled": 0.4974, "n_train": 1000,
        "n_test": 400,
    }],
    "repeats": {
        "policy": "once", "releases_in_store": 1, "differing": 0,
        "averaging": [{"releases": r, "top1": 0.9, "content_top1": 0.7 + r / 40} for r in (1, 4)],
        "linkage": {"sentences": 200, "linked": 0.9855, "by_length": 0.0456, "chance": 0.0057},
    },
    "side_channels": [
        {"name": "length", "seen": "every sentence's", "figure": "entropy", "value": "4.2 bits"},
        {"name": "label", "seen": True, "figure": "known", "value": 0.9988},
    ],
    "canaries": [{
        "name": "copied", "attack": "gaussian@adaptive", "strength": 0.5, "found": 0.9939,
        "needed": 0.95, "control": 0.0011, "control_limit": 0.03, "passed": True,
    }],
    "sentences": [{"attack": "gaussian@adaptive", "share": 0.75, "tokens": [
        token("[CLS]", "[CLS]", "special"), token("kauf", "kauf"), token("##man", "##man"),
        token("'", "'", "function"), token("s", "s", "function"), token(SCRIPT, "film"),
        token("twist", SCRIPT), token(".", ".", "function"),
    ]}],
    "sentences_said": "A simulation holds the text.",
    "frontier": [], "settings": {"seed": 0}, "versions": {"python": "3.11"},
    "command": "privtune audit runs/run-7 --quick", "seconds": 95.2,
    "created": "2026-11-22T05:00:00Z", "limits": ["A lower bound."],
}  # fmt: skip
FRONTIER = [
    {"name": f"run{i}", "label": label, "accuracy": 0.8 + i / 100, "unaware": 0.03,
     "adaptive": adaptive, "adaptive_content": 0.5, "floor": 0.07}
    for i, (label, adaptive) in enumerate([("none", 0.991), ("privtune $c$", 0.972)])
]  # fmt: skip


class Reader(HTMLParser):
    """Keeps the text, the attributes and the ids, and refuses tags that do not balance."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(tmp_path: Path, **changes: Any) -> tuple[str, Reader]:
    path = tmp_path / "page.html"
    write_page(path, {**copy.deepcopy(AUDIT), **changes})
    reader = Reader()
    html = path.read_text(encoding="utf-8")
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert list(tmp_path.iterdir()) == [path]
    return html, reader


def shown(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:.1f} %"


def test_it_opens_without_a_network(tmp_path: Path) -> None:
    html, reader = page(tmp_path, frontier=FRONTIER)
    assert "://" not in html
    assert "@import" not in html
    targets = [a[key] or "" for _, a in reader.tags for key in ("src", "href") if key in a]
    assert targets
    assert all(target.startswith("#") or target == "data:," for target in targets)
    assert all(link.startswith("#") for link in re.findall(r"url\(['\"]?([^)]*)", html))
    policy = next(a for a in reader.all("meta") if a.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert not reader.all("script")


def test_links_and_ids_of_the_page_meet(tmp_path: Path) -> None:
    _, reader = page(tmp_path, frontier=FRONTIER)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    inside = {(a[key] or "")[1:] for _, a in reader.tags for key in ("href",) if key in a}
    labelled = {a["aria-labelledby"] for _, a in reader.tags if "aria-labelledby" in a}
    assert (inside - {"ata:,"}) | labelled <= set(ids)
    assert reader.all("html")[0]["lang"] == "en"
    assert all(a.get("scope") for a in reader.all("th"))
    assert len(reader.all("caption")) == len(reader.all("table"))


def test_every_attack_and_floor_stands_there_with_its_figures(tmp_path: Path) -> None:
    _, reader = page(tmp_path)
    for one in AUDIT["attacks"]:
        first, second = one["measures"]["top1"], one["measures"]["content_top1"]
        assert f"{one['name']} " in reader.text
        assert f"{shown(first)} / {shown(second)}" in reader.text
        ends = f"{100 * first['low']:.1f}\N{EN DASH}{100 * first['high']:.1f} /"
        assert ends in reader.text
    for holder in [*(a["measures"] for a in AUDIT["attacks"]), *AUDIT["floors"].values()]:
        assert all(shown(holder[name]) in reader.text for name in MEASURES)
    assert all(name in reader.text for name in FLOORS.values())
    # one in each column
    assert reader.text.count("▲ best") == 3
    assert reader.text.count("on 9 sentences") == 2  # its cell, and the panel it leads by content
    assert "mlp@in-domain : only in a full audit" in reader.text


def test_every_part_is_on_the_page(tmp_path: Path) -> None:
    _, reader = page(tmp_path)
    for part in (
        "run-7", "Nearly all of it.", "✓ VALID", "All rows.", "83.7 %", "It is so & so.", "78.9 %",
        "77.8 %", "53.3 %", "49.7 %", "98.6 %", "4.6 %", "0.6 %", "4.2 bits", "99.9 %", "99.4 %",
        "≥ 95.0 %", "≤ 3.0 %", "✓ passed", "What we call top-1.", "A lower bound.",
        "privtune audit runs/run-7 --quick", "2026-11-22T05:00:00Z", "72.5 %", "80.0 %",
        "model.cut",
    ):  # fmt: skip
        assert part in reader.text, part
    assert len(reader.all("svg")) == 2  # averaging, and the curve of the one attack that has one


def test_the_strongest_is_shown_for_each_figure_beside_the_higher_floor(tmp_path: Path) -> None:
    by_content = strongest(AUDIT, "adaptive", "content_top1")
    assert by_content is not None
    assert by_content["key"] == "mlp@adaptive"  # although gaussian@adaptive is the best overall
    html, _ = page(tmp_path)
    assert floor_of(AUDIT, "unaware", "top1") == 0.0712
    assert floor_of(AUDIT, "in-domain", "top1") == 0.0773
    judged = html.split("<article")[2]
    assert "panel judged" in judged
    assert re.findall(r"<b>([\d.]+)", judged) == ["95.8", "88.2"]
    assert "no better than not looking" in html.split("<article")[1]
    assert "no better than not looking" not in judged


@pytest.mark.parametrize("valid", [False, None])
def test_an_invalid_audit_says_so_first(tmp_path: Path, valid: bool | None) -> None:
    failed = [{**AUDIT["canaries"][0], "found": 0.41, "passed": False}]
    why = "canary copied: 41 % found"
    html, reader = page(tmp_path, valid=valid, invalid_because=[why], canaries=failed)
    assert "<title>INVALID: " in html
    text = reader.text
    assert text.index("INVALID AUDIT") < text.index("What could the cloud")
    assert text.index("✗ INVALID") < text.index(why) < text.index("Nearly all of it.")
    assert "✓ VALID" not in text
    assert "✗ FAILED" in text
    assert "judge by this one" not in text


def test_an_audit_without_canaries_is_neither_valid_nor_invalid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"valid": None, "checked": False, "canaries": [], "repeats": {}}
    html, reader = page(tmp_path, **changes)
    assert "INVALID" not in html
    assert "✓ VALID" not in reader.text
    assert "UNCHECKED" in reader.text
    assert "No canary has been planted" in reader.text
    print_audit([{**AUDIT, **changes}])
    out = capsys.readouterr().out
    assert "unchecked: no leak was planted" in out
    assert "INVALID" not in out


def test_an_attack_that_makes_no_sense_here_has_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "not applicable: narrow rows"
    apart = {
        "key": "l2@unaware", "name": "l2", "family": "retrieval", "level": "unaware", "why": why,
    }  # fmt: skip
    _, reader = page(tmp_path, skipped=[*AUDIT["skipped"], apart])
    assert re.search(r"l2 not applicable see below · not run · not run", reader.text)
    assert f"l2@unaware : {why}" in reader.text
    print_audit([{**AUDIT, "skipped": [*AUDIT["skipped"], apart]}])
    out = capsys.readouterr().out
    assert re.search(r"l2 .*not applicable", out)
    assert f"l2@unaware: {why}" in out
    assert "left out: mlp@in-domain" in out


def test_text_is_escaped(tmp_path: Path) -> None:
    _, reader = page(tmp_path, headline=SCRIPT, limits=[SCRIPT], skipped=[])
    assert not reader.all("script")
    assert reader.text.count(SCRIPT) == 5  # headline, limit, true token, reading, label of a curve
    titles = [a["title"] for _, a in reader.tags if "title" in a]
    assert f"read as: {SCRIPT}" in titles
    assert "$x$" in reader.text


def test_words_are_rebuilt_and_marked() -> None:
    (reading,) = readings(AUDIT["sentences"])
    said = [(run.text, run.state, run.guess) for run in reading.runs if run.state != "gap"]
    assert said == [
        ("kaufman", "hit-content", ""),
        ("'s", "hit-function", ""),
        (SCRIPT, "miss", "film"),
        ("twist", "miss", SCRIPT),
        (".", "hit-function", ""),
    ]
    assert reading.read == f"kaufman's film {SCRIPT}."
    marked = [token("Ġnot", "Ġnot"), token("ably", "able"), token("Ġso", "Ġso")]
    (other,) = readings([{"attack": "a", "share": 0.6, "tokens": marked}])
    assert "".join(run.text for run in other.runs) == "notably so"
    assert other.read == "notable so"


def test_no_text_is_shown_without_sentences(tmp_path: Path) -> None:
    why = "The devices hold their text; none is here."
    _, reader = page(tmp_path, sentences=[], sentences_said=why)
    assert why in reader.text
    assert "shows text of the run" not in reader.text
    assert not reader.all("mark")
    _, reader = page(tmp_path)
    assert "shows text of the run" in reader.text
    assert reader.all("mark")


def test_the_frontier_needs_more_than_one_run(tmp_path: Path) -> None:
    for frontier in ([], None, FRONTIER[:1]):
        _, reader = page(tmp_path, frontier=frontier)
        assert "Privacy against usefulness" not in reader.text
    html, reader = page(tmp_path, frontier=FRONTIER)
    assert "Privacy against usefulness" in reader.text
    assert "99.1 %" in reader.text
    assert "privtune $c$" in reader.text
    drawn = html.split("<svg", 2)[1].split("</svg>")[0]
    assert "var(--leak)" in drawn
    assert not re.search(r"(fill|stroke): #(?!fff|000)", drawn)  # all from the style sheet


def test_the_same_audit_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page(tmp_path, frontier=FRONTIER)[0] == page(tmp_path, frontier=FRONTIER)[0]


def test_an_audit_with_little_in_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    bare = {"key": "a@new", "name": "a", "level": "new", "measures": {"top1": figure(None)}}
    for audit in ({}, {"run": None, "floors": None, "attacks": [bare]}, dict.fromkeys(AUDIT)):
        write_page(path, audit)
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        assert "INVALID" in reader.text
        assert "No canary has been planted" in reader.text
        print_audit([audit])


def test_the_console_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    other = copy.deepcopy(AUDIT)
    other.update(valid=False, invalid_because=["canary [copied] not found"])
    other["run"]["name"] = "[bold]run-8"
    print_audit([AUDIT, other])
    out = capsys.readouterr().out
    for one in AUDIT["attacks"]:
        first, second = one["measures"]["top1"], one["measures"]["content_top1"]
        assert out.count(f"{shown(first)} / {shown(second)}") >= 2
    assert "▲ 95.8 % / 87.1 %" in out
    assert "label by logistic: 78.9 % (majority 53.3 %, shuffled 49.7 %)" in out
    assert "INVALID" in out
    assert "canary [copied] not found" in out
    assert "[bold]run-8" in out
    assert "95.8 % / 88.2 %" in out  # the runs' table: the strongest for each of the two


def test_the_package_carries_the_template() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["privtune_flwr"]
    library = ROOT / "privtune_flwr"
    carried = {path for pattern in patterns for path in library.glob(pattern)}
    templates = {p for p in (library / "audit" / "report").iterdir() if p.is_file()}
    assert {p for p in templates if p.suffix != ".py"} <= carried
