"""Hutto and Gilbert's rated snippets (ICWSM 2014): identifier, mean rating, text."""

from __future__ import annotations

from privtune_flwr.assets import asset_folder

SNIPPET_CLASSES = ("negative", "positive")
SNIPPET_FILES = {
    "movie-snippets": "movieReviewSnippets_GroundTruth.txt",
    "amazon-snippets": "amazonReviewSnippets_GroundTruth.txt",
    "nyt-snippets": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_THRESHOLD = 0.5  # on a scale of -4 to 4; what lies between is neutral


def read_snippets(name: str) -> list[tuple[float, str]]:
    """Read one of the four files.

    Returns
    -------
    list[tuple[float, str]]
        Mean rating in [-4, 4] and text, in the file's order.
    """
    path = asset_folder("snippets") / SNIPPET_FILES[name]
    rows = (line.split("\t", 2) for line in path.read_text(encoding="utf-8").splitlines())
    return [(float(rating), text.strip()) for _, rating, text in rows if text.strip()]


def read_polar_snippets(name: str) -> tuple[list[str], list[str]]:
    """Read one of the four files without its neutral rows.

    Returns
    -------
    tuple[list[str], list[str]]
        Texts, and ``negative`` (rating below -0.5) or ``positive`` (above 0.5) for each.
    """
    polar = [(rating, text) for rating, text in read_snippets(name) if abs(rating) > _THRESHOLD]
    return [text for _, text in polar], [SNIPPET_CLASSES[rating > 0] for rating, _ in polar]
