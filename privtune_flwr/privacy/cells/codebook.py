"""Which word lies in which cell, and what row stands for a cell.

Shapes: ``V`` vocabulary, ``N`` text entries of it, ``d`` hidden size, ``F`` features of a word,
``C`` cells, ``K`` classes, ``q`` principal axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from privtune_flwr.privacy.public import PublicKnowledge

CODEBOOK = "codebook"
CELL = "cell"
_AXES = 64
_BATCH = 4096

Tables = dict[str, NDArray[Any]]


def word_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weigh words by how common they are in public text, damped: common ones are not all."""
    return 1.0 + np.log1p(counts.astype(np.float64))


def cluster(
    points_NF: NDArray[np.floating[Any]], weights_N: NDArray[np.float64], cells: int
) -> NDArray[np.int64]:
    """Cluster words by k-means; the same arguments give the same cells.

    Returns
    -------
    int64 array, shape (N,)
        Numbers of at most ``cells`` cells, without gaps.
    """
    from sklearn.cluster import MiniBatchKMeans

    points = np.asarray(points_NF, dtype=np.float64)
    cells = min(cells, len(np.unique(points, axis=0)))
    model = MiniBatchKMeans(cells, batch_size=_BATCH, n_init=3, random_state=0)
    found = model.fit_predict(points, sample_weight=weights_N)
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def codebook_tables(
    label_N: NDArray[np.int64],
    rows_ND: NDArray[np.floating[Any]],
    weights_N: NDArray[np.float64],
    text: NDArray[np.int64],
    vocabulary: int,
) -> Tables:
    """Give each cell a row: the weighted mean of its words' bank entries, moved apart.

    Means of many words lie close together. Their distances to the common mean are scaled, all by
    one factor, to what those of words are, so that cells look to the model as different as words.
    Special tokens share cell 0, whose row is the common mean.

    Returns
    -------
    dict
        ``cell`` int32 (V,) and ``codebook`` float32 (C, d).
    """
    rows = np.asarray(rows_ND, dtype=np.float64)
    share_N = weights_N / weights_N.sum()
    mean_D = share_N @ rows
    total_C = np.bincount(label_N, weights=weights_N)
    sums_CD = np.zeros((len(total_C), rows.shape[1]))
    np.add.at(sums_CD, label_N, rows * weights_N[:, None])
    apart_CD = sums_CD / total_C[:, None] - mean_D
    wanted = float(share_N @ np.linalg.norm(rows - mean_D, axis=1))
    present = float((total_C / total_C.sum()) @ np.linalg.norm(apart_CD, axis=1))
    if present > 0:
        apart_CD *= wanted / present
    cell_V = np.zeros(vocabulary, dtype=np.int32)
    cell_V[text] = label_N + 1
    codebook_CD = np.concatenate([mean_D[None], mean_D + apart_CD]).astype(np.float32)
    return {CELL: cell_V, CODEBOOK: codebook_CD}


def public_tables(public: PublicKnowledge, cells: int) -> Tables:
    """Make cells from public statistics: directions of bank entries, and how common words are."""
    text = public.text_ids
    bank_ND = np.asarray(public.bank[text], dtype=np.float64)
    weights_N = word_weights(public.counts[text])
    centred = bank_ND - np.average(bank_ND, axis=0, weights=weights_N)
    length_N1 = np.linalg.norm(centred, axis=1, keepdims=True)
    label_N = cluster(centred / np.maximum(length_N1, 1e-12), weights_N, cells - 1)
    return codebook_tables(label_N, bank_ND, weights_N, text, public.vocab_size)


def draft_tables(public: PublicKnowledge) -> Tables:
    """Gather what cells from word scores need besides the scores; the bank by its main axes.

    Returns
    -------
    dict
        ``reduced`` float16 (V, q), ``axes`` float32 (q, d), ``mean`` float32 (d,), ``weights``
        float32 (V,), which is zero for special tokens.
    """
    bank_VD = np.asarray(public.bank, dtype=np.float64)
    text = public.text_ids
    mean_D = bank_VD[text].mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(bank_VD[text], rowvar=False))
    axes_QD = axes.T[::-1][:_AXES]
    weights_V = np.zeros(public.vocab_size)
    weights_V[text] = word_weights(public.counts[text])
    return {
        "reduced": ((bank_VD - mean_D) @ axes_QD.T).astype(np.float16),
        "axes": np.ascontiguousarray(axes_QD, dtype=np.float32),
        "mean": mean_D.astype(np.float32),
        "weights": weights_V.astype(np.float32),
    }


def axes_of(dimension: int) -> int:
    """Give q, the number of axes that :func:`draft_tables` keeps."""
    return min(_AXES, dimension)


def word_scores(rates_VK: NDArray[np.floating[Any]], inverse: float) -> NDArray[np.float64]:
    """Score words for classes: smoothed log-odds of noisy rates, centred over the classes.

    Parameters
    ----------
    rates_VK : float array, shape (V, K)
        Noisy occurrences a sentence, of text entries.
    inverse : float
        Devices by sentences: half of it is added to each rate.

    Returns
    -------
    float64 array, shape (V, K)
        log P(k | v) / P(k). Most words are too rare to say anything, so the spread of the rates
        about zero is the noise's: twice it is added as well, which draws what is not above the
        noise towards no opinion.
    """
    rates = np.asarray(rates_VK, dtype=np.float64)
    spread = 1.4826 * float(np.median(np.abs(rates)))
    smoothing = 2 * spread + inverse / 2
    share_K = np.maximum(rates.sum(axis=0), 0)
    share_K = share_K / share_K.sum() if share_K.sum() > 0 else np.ones(rates.shape[1])
    share_K = np.maximum(share_K, 0.2 / rates.shape[1])
    share_K /= share_K.sum()
    smoothed = np.maximum(rates, 0) + smoothing * share_K * rates.shape[1]
    score = np.log(smoothed / smoothed.sum(axis=1, keepdims=True) / share_K)
    return np.asarray(score - score.mean(axis=1, keepdims=True))
