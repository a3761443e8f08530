"""The packaged sources: real text that needs no hub."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Callable

import pyarrow as pa

from privtune_flwr.assets import asset_folder
from privtune_flwr.data.snippets import read_polar_snippets

_RETWEET = re.compile(r"""^\W*RT\s+@|^["“”'.\s]*@\w+\s*:""")
_LINK_OR_NAME = re.compile(r"https?://\S+|@\w+")
_AUTHORS = {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"}


def _movie_snippets() -> pa.Table:
    text, label = read_polar_snippets("movie-snippets")
    return pa.table({"text": text, "label": label})


def _bbc_news() -> pa.Table:
    rows = []
    for path in sorted((asset_folder("bbc-news") / "bbc-news").glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8").strip()
        except UnicodeDecodeError:  # one article with a pound sign of an older encoding
            text = content.decode("latin-1").strip()
        rows.append({"text": text, "label": path.parent.name, "headline": text.splitlines()[0]})
    return pa.Table.from_pylist(rows)


def _newsgroups() -> pa.Table:
    folder = asset_folder("orange-text")
    rows = []
    for split in ("train", "test"):
        lines = (folder / f"20newsgroups-{split}.tab").read_text(encoding="utf-8").split("\n")
        # three lines of header (names, types, roles), then a stray empty one
        fields = (line.partition("\t") for line in lines[3:] if line.strip())
        rows += [{"text": text, "label": group, "split": split} for group, _, text in fields]
    return pa.Table.from_pylist(rows)


def _election_tweets() -> pa.Table:
    path = asset_folder("orange-text") / "election-tweets-2016.tab"
    with path.open(encoding="utf-8", newline="") as file:
        names, _, _, *rows = csv.reader(file, delimiter="\t")
    text, label = [], []
    for row in rows:
        tweet = dict(zip(names, row, strict=True))
        content = html.unescape(tweet["Content"])
        # Somebody else's words, be it by the button or by quoting '"@name: ..."'.
        if tweet["Is retweet"] == "True" or _RETWEET.search(content):
            continue
        text.append(" ".join(_LINK_OR_NAME.sub(" ", content).split()))
        label.append(_AUTHORS[tweet["Author"]])
    return pa.table({"text": text, "label": label})


# name: the reader, and the source's class names in order (empty: by name)
PACKAGED: dict[str, tuple[Callable[[], pa.Table], tuple[str, ...]]] = {
    "movie-snippets": (_movie_snippets, ("negative", "positive")),
    "bbc-news": (_bbc_news, ()),
    "20newsgroups": (_newsgroups, ()),
    "election-tweets": (_election_tweets, ("Clinton", "Trump")),
}
