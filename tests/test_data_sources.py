"""Packaged sources and public text: counts, classes, and tokens."""

from __future__ import annotations

import re
from collections import Counter

import datasets
import numpy as np
import pytest
from data_kit import class_counts

from privtune_flwr.assets import asset_folder, model_folder
from privtune_flwr.data import (
    DataError,
    load_public_dataset,
    load_public_text,
    load_source,
    tokenise,
)


def test_movie_snippets(movies):
    assert class_counts(movies) == {"negative": 5061, "positive": 4982}
    assert movies.features["label"].names == ["negative", "positive"]
    assert movies.features["text"] == datasets.Value("string")
    assert movies[0]["text"].startswith("The Rock is destined to be the 21st Century's new")
    # thresholds, row by row, against the file itself
    path = asset_folder("snippets") / "movieReviewSnippets_GroundTruth.txt"
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    kept = iter(zip(movies["text"], movies["label"], strict=True))
    for _, rating, text in rows:
        if abs(float(rating)) > 0.5:
            assert next(kept) == (text.strip(), int(float(rating) > 0))
    assert next(kept, None) is None


def test_bbc_news_keeps_the_headline():
    news = load_source("bbc-news")
    counts = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert class_counts(news) == counts
    assert all(r["text"].startswith(r["headline"]) and len(r["headline"]) > 5 for r in news)
    assert "\ufffd" not in "".join(news["text"])
    by_headline = load_source("bbc-news", text_column="headline")
    assert by_headline["text"][:] == news["headline"][:]


def test_newsgroups_have_their_official_split(newsgroups):
    assert Counter(newsgroups["split"]) == {"train": 11293, "test": 7528}
    assert len(class_counts(newsgroups)) == 20


def test_election_tweets_do_not_name_their_author():
    tweets = load_source("election-tweets")
    assert class_counts(tweets) == {"Clinton": 2624, "Trump": 2595}
    together = "\n".join(tweets["text"])
    assert not re.search(r"https?://|t\.co/|@\w|^RT\b\s*@|&amp;", together, re.MULTILINE)
    assert all(text == " ".join(text.split()) and text for text in tweets["text"])


def test_public_corpora():
    assert [len(load_public_text([n])) for n in ("amazon-snippets", "nyt-snippets", "tweets")] == [
        3708,
        5190,
        4200,
    ]
    both = load_public_text(["nyt-snippets", "tweets"])
    assert both == load_public_text(["nyt-snippets"]) + load_public_text(["tweets"])
    labelled = load_public_dataset(["amazon-snippets", "tweets"])
    assert class_counts(labelled) == {"negative": 1218 + 1062, "positive": 1725 + 2300}
    assert Counter(labelled["corpus"]) == {"amazon-snippets": 2943, "tweets": 3362}
    for names in (["movie-snippets"], [], ["tweets", "tweets"]):
        with pytest.raises(DataError, match="public corpora"):
            load_public_text(names)


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(DataError, match=r"nope: unknown source.*movie-snippets.*hub:NAME"):
        load_source("nope")


def test_given_class_names_set_the_order_of_a_packaged_source():
    swapped = load_source("movie-snippets", labels=("positive", "negative"))
    assert swapped[0]["label"] == 0
    with pytest.raises(DataError, match="5061 of 10043 rows"):
        load_source("movie-snippets", labels=("positive", "other"))


def test_tokens_are_ragged_truncated_and_bracketed():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    texts = ["A film.", "word " * 500]
    short, long = tokenise(tokenizer, texts, 16)
    assert tokenizer.convert_ids_to_tokens(short) == ["[CLS]", "a", "film", ".", "[SEP]"]
    assert (short.dtype, long.shape) == (np.int32, (16,))
    assert (long[0], long[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    # the tokenizer file asks for 128 at most and pads to 128: neither may reach the caller
    assert len(tokenise(tokenizer, texts, 200)[1]) == 200
    assert tokenise(tokenizer, [], 16) == []
    with pytest.raises(ValueError, match="1 of 1 texts have no tokens"):
        tokenise(lambda *_, **__: {"input_ids": [[]]}, ["x"], 16)
