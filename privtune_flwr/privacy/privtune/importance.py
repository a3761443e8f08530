"""How much noise each token gets (*reconstruction* of the entropy-weighted, TF-IDF-like scale).

``imp_v = tfidf_v (1 - H_v / log C)``: tokens that are informative and belong to few topics matter
most and are distorted least. Everything comes from public text, since a scale learned from private
text would point at its rare words.

Public text has no classes, so H_v is the entropy of v over C topics: k-means clusters of the
public sentences, each the idf-weighted mean of its tokens' bank entries. Counts are smoothed
towards the topics' sizes; otherwise a word seen once would have entropy zero, the highest
importance, and so the least noise by accident. For the same reason tokens that public text lacks,
and special tokens, keep the full noise, and so does whatever a protect list names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from transformers import PreTrainedTokenizerBase

Kind = Literal["tfidf-entropy", "tfidf", "entropy", "none"]

# How tokenizers mark where a piece stands: WordPiece, byte-level BPE, SentencePiece.
_MARKS = re.compile(r"^(##|\u0120|\u010a|\u2581)+|</w>$")
_SMOOTHING = 10.0  # pseudo-occurrences, spread like the topics' sizes


def importance(
    sequences: Sequence[NDArray[np.int32]],
    bank_VD: NDArray[np.float32],
    *,
    topics: int = 20,
    kind: Kind = "tfidf-entropy",
) -> NDArray[np.float64]:
    """Score the vocabulary on public text.

    tfidf_v = log(1 + n_v) log(N / f_v), with n_v occurrences in f_v of N sentences.

    Parameters
    ----------
    sequences : sequence of int32 arrays (T,)
        Public sentences.
    bank_VD : float32 array, shape (V, d)
        The bank.
    topics : int
        C; fewer if there are fewer sentences than ten a topic.
    kind : {"tfidf-entropy", "tfidf", "entropy", "none"}
        The product, one factor of it, or no scores at all.

    Returns
    -------
    float64 array, shape (V,)
        ``imp_v`` of at least 0; NaN where public text lacks the entry.
    """
    vocabulary = len(bank_VD)
    if kind == "none":
        return np.full(vocabulary, np.nan)
    counts_NV = _counts(sequences, vocabulary)
    count_V = np.asarray(counts_NV.sum(axis=0))
    score_V = np.ones(vocabulary)
    if kind != "entropy":
        score_V = np.log1p(count_V) * _idf(counts_NV)
    if kind != "tfidf":
        topic_N = sentence_topics(sequences, bank_VD, topics=topics)
        score_V = score_V * _certainty(counts_NV, topic_N)
    return np.where(count_V > 0, score_V, np.nan)


def sentence_topics(
    sequences: Sequence[NDArray[np.int32]], bank_VD: NDArray[np.float32], *, topics: int = 20
) -> NDArray[np.int64]:
    """Cluster public sentences, each the idf-weighted mean of its tokens' bank entries.

    Returns
    -------
    int64 array, one for each sentence
        Its topic, below C; C is at most a tenth of the number of sentences.
    """
    from scipy.sparse import csr_array, diags_array
    from sklearn.cluster import KMeans

    counts_NV = _counts(sequences, len(bank_VD))
    topics = max(1, min(topics, len(sequences) // 10))
    weighted_NV = csr_array(counts_NV @ diags_array(_idf(counts_NV)))
    weight_N = np.maximum(weighted_NV.sum(axis=1), 1e-9)
    sentence_ND = (weighted_NV @ bank_VD.astype(np.float64)) / weight_N[:, None]
    return np.asarray(KMeans(topics, n_init=1, random_state=0).fit_predict(sentence_ND), np.int64)


def noise_scale(
    importance_V: NDArray[np.float64],
    exempt: NDArray[np.int64],
    *,
    floor: float,
    buckets: int = 0,
) -> NDArray[np.float32]:
    """Turn scores into scales: s_v = s_min + (1 - s_min)(1 - rank of imp_v).

    Parameters
    ----------
    importance_V : float64 array, shape (V,)
        NaN where nothing is known.
    exempt : int array
        Entries that keep s = 1 whatever their score, as the special tokens.
    floor : float
        s_min, in (0, 1].
    buckets : int
        B > 0: ranks are cut into B equal shares first, whose scales lie evenly from 1 down to
        ``floor``; B = 1 gives every entry s = 1.

    Returns
    -------
    float32 array, shape (V,)
        In [floor, 1]; 1 for exempt and unknown entries. Ties share their mean rank.
    """
    from scipy.stats import rankdata

    scale_V = np.ones(len(importance_V))
    known = np.isfinite(importance_V)
    known[exempt] = False
    if known.sum() > 1:
        rank = (rankdata(importance_V[known]) - 1) / (known.sum() - 1)
        if buckets > 0:
            rank = np.minimum(np.floor(rank * buckets), buckets - 1) / max(1, buckets - 1)
        scale_V[known] = floor + (1 - floor) * (1 - rank)
    # Rounding to float32 must not undercut the floor that bounds eta.
    return np.maximum(scale_V.astype(np.float32), np.nextafter(np.float32(floor), np.float32(1)))


def protected_entries(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, patterns: Sequence[str]
) -> NDArray[np.int64]:
    """List the vocabulary entries that a protect list names.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Gives each entry's text, the marks of its own removed (``##ing`` is ``ing``).
    vocabulary : int
        V.
    patterns : sequence of str
        Regular expressions, searched for anywhere in the text whatever its case; ``^`` and ``$``
        bind one to the whole entry. An entry is a word-piece: a word that the tokenizer splits
        is protected only where its pieces are named.

    Returns
    -------
    int64 array
        Ids, sorted.
    """
    if not patterns:
        return np.array([], dtype=np.int64)
    texts = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    named = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    hits = [
        entry
        for entry, text in enumerate(texts)
        if text is not None and any(n.search(_MARKS.sub("", text)) for n in named)
    ]
    return np.array(hits, dtype=np.int64)


def _counts(sequences: Sequence[NDArray[np.int32]], vocabulary: int) -> csr_array:
    from scipy.sparse import csr_array

    lengths = np.array([len(s) for s in sequences])
    row_of = np.repeat(np.arange(len(sequences)), lengths)
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    counts_NV = csr_array((np.ones(len(ids)), (row_of, ids)), shape=(len(sequences), vocabulary))
    counts_NV.sum_duplicates()
    return counts_NV


def _idf(counts_NV: csr_array) -> NDArray[np.float64]:
    documents_V = np.bincount(counts_NV.indices, minlength=counts_NV.shape[1])
    idf: NDArray[np.float64] = np.log(counts_NV.shape[0] / np.maximum(documents_V, 1))
    return idf


def _certainty(counts_NV: csr_array, topic_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give 1 - H_v / log C of each entry."""
    from scipy.sparse import csr_array

    topics = int(topic_N.max()) + 1
    if topics == 1:
        return np.ones(counts_NV.shape[1])
    topic_NC = csr_array(
        (np.ones(len(topic_N)), (np.arange(len(topic_N)), topic_N)), shape=(len(topic_N), topics)
    )
    entropy_V = _topic_entropy((counts_NV.T @ topic_NC).toarray())
    return np.asarray(np.maximum(1 - entropy_V / np.log(topics), 0))


def _topic_entropy(count_VC: NDArray[np.float64]) -> NDArray[np.float64]:
    prior_C = count_VC.sum(axis=0) / count_VC.sum()
    share_VC = count_VC + _SMOOTHING * prior_C
    share_VC /= share_VC.sum(axis=1, keepdims=True)
    logs = np.log(share_VC, where=share_VC > 0, out=np.zeros_like(share_VC))
    entropy: NDArray[np.float64] = -(share_VC * logs).sum(axis=1)
    return entropy
