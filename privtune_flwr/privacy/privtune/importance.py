"""How much noise each token gets (*reconstruction* of the entropy-weighted, TF-IDF-like scale).

``imp_v = tfidf_v (1 - H_v / log C)``: tokens that are informative and belong to few topics matter
most and are distorted least. Everything comes from public text, since a scale learned from private
text would point at its rare words.

Public text has no classes, so H_v is the entropy of v over C topics: k-means clusters of the
public sentences, each the idf-weighted mean of its tokens' bank entries. Counts are smoothed
towards the topics' sizes; otherwise a word seen once would have entropy zero, the highest
importance, and so the least noise by accident. For the same reason tokens that public text lacks,
and special tokens, keep the full noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SMOOTHING = 10.0  # pseudo-occurrences, spread like the topics' sizes


def importance(
    sequences: Sequence[NDArray[np.int32]], bank_VD: NDArray[np.float32], *, topics: int = 20
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

    Returns
    -------
    float64 array, shape (V,)
        ``imp_v`` of at least 0; NaN where public text lacks the entry.
    """
    from scipy.sparse import csr_array, diags_array
    from sklearn.cluster import KMeans

    vocabulary = len(bank_VD)
    lengths = np.array([len(s) for s in sequences])
    row_of = np.repeat(np.arange(len(sequences)), lengths)
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    counts_NV = csr_array((np.ones(len(ids)), (row_of, ids)), shape=(len(sequences), vocabulary))
    counts_NV.sum_duplicates()
    count_V = np.bincount(ids, minlength=vocabulary)
    documents_V = np.bincount(counts_NV.indices, minlength=vocabulary)
    idf_V = np.log(len(sequences) / np.maximum(documents_V, 1))

    topics = max(1, min(topics, len(sequences) // 10))
    weighted_NV = csr_array(counts_NV @ diags_array(idf_V))
    weight_N = np.maximum(weighted_NV.sum(axis=1), 1e-9)
    sentence_ND = (weighted_NV @ bank_VD.astype(np.float64)) / weight_N[:, None]
    topic_N = KMeans(topics, n_init=1, random_state=0).fit_predict(sentence_ND)
    topic_NC = csr_array(
        (np.ones(len(topic_N)), (np.arange(len(topic_N)), topic_N)),
        shape=(len(sequences), topics),
    )
    entropy_V = _topic_entropy((counts_NV.T @ topic_NC).toarray())
    certainty_V = 1 - entropy_V / np.log(topics) if topics > 1 else np.ones(vocabulary)
    score_V = np.log1p(count_V) * idf_V * np.maximum(certainty_V, 0)
    return np.where(count_V > 0, score_V, np.nan)


def noise_scale(
    importance_V: NDArray[np.float64], exempt: NDArray[np.int64], *, floor: float
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
        scale_V[known] = floor + (1 - floor) * (1 - rank)
    # Rounding to float32 must not undercut the floor that bounds eta.
    return np.maximum(scale_V.astype(np.float32), np.nextafter(np.float32(floor), np.float32(1)))


def _topic_entropy(count_VC: NDArray[np.float64]) -> NDArray[np.float64]:
    prior_C = count_VC.sum(axis=0) / count_VC.sum()
    share_VC = count_VC + _SMOOTHING * prior_C
    share_VC /= share_VC.sum(axis=1, keepdims=True)
    logs = np.log(share_VC, where=share_VC > 0, out=np.zeros_like(share_VC))
    entropy: NDArray[np.float64] = -(share_VC * logs).sum(axis=1)
    return entropy
