"""The public tables that OPT-3 is solved over (*reconstruction*): made in design, or loaded.

All of it comes from the bank, its graph and public rows. In ``per = occurrence`` the device solves
for its own rows, so the same tables then travel as the artefact.

Shapes: ``V`` vocabulary, ``d`` hidden size, ``S`` places of support, ``A`` sampled entries, ``C``
topics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.privacy.privtune.optimise import Rows

if TYPE_CHECKING:
    from privtune_flwr.privacy.privtune.targets import Members
    from privtune_flwr.privacy.public import PublicKnowledge

ATTRACTING, REPELLING, BETWEEN = 16, 12, 8  # members of N_n, of N_1, of each hop set between
_SAMPLED = 128
_PROBE_ROWS = 10_000
_FAR_SHARE = 4  # the least similar quarter of the sampled entries are the far ones

#: Names and types of the tables; shapes follow from V and d.
TABLES: dict[str, type[np.generic]] = {
    "bank": np.float16,
    "support": np.int32,
    "sample": np.int32,
    "probe": np.float32,
    "centre": np.float32,
    "whiten": np.float32,
    "limit": np.float32,
}


class Geometry:
    """What a descent needs to know about the bank.

    Parameters
    ----------
    tables : mapping of arrays
        As :func:`geometry_tables` makes them: ``bank`` (V, d); ``support`` (V, S - 1), ids of
        supporting entries other than v itself, -1 for none: attracting ones, repelling ones, all
        others; ``sample`` (A,) ids; ``probe`` (d + 1, C), the last row its bias; ``centre`` (d,),
        ``whiten`` (d, d) and ``limit`` (1,) of the Mahalanobis ball.
    unit : float
        Median distance of a bank entry to its nearest neighbour.
    """

    def __init__(self, tables: Mapping[str, NDArray[Any]], unit: float) -> None:
        self.unit = unit
        self._bank_vd = torch.tensor(np.asarray(tables["bank"], dtype=np.float32))
        support = np.asarray(tables["support"], dtype=np.int64)
        with_itself = np.insert(support, ATTRACTING, np.arange(len(support)), axis=1)
        self._support_vs = torch.tensor(with_itself)
        self._sample_a = torch.tensor(np.asarray(tables["sample"], dtype=np.int64))
        self._sample_ad = self._bank_vd[self._sample_a]
        self._sample_square_a = self._sample_ad.square().sum(dim=1)
        self._weight = float(np.log(len(support) / len(self._sample_a)))
        self._probe_dc = torch.tensor(np.asarray(tables["probe"][:-1], dtype=np.float32))
        self._bias_c = torch.tensor(np.asarray(tables["probe"][-1], dtype=np.float32))
        self.centre_d = torch.tensor(np.asarray(tables["centre"], dtype=np.float32))
        self._whiten_dd = torch.tensor(np.asarray(tables["whiten"], dtype=np.float32))
        self.limit = float(tables["limit"][0])

    @classmethod
    def of(
        cls, public: PublicKnowledge, hop_sets: list[Members], validity: float, unit: float
    ) -> Self:
        """Make the tables from public knowledge, in full precision."""
        return cls(geometry_tables(public, hop_sets, validity), unit)

    def rows(self, clean_bd: torch.Tensor, ids_b: torch.Tensor) -> Rows:
        """Look up what the program needs about a block of tokens."""
        support_bs = self._support_vs[ids_b]
        missing_bs = support_bs < 0
        entries_bsd = self._bank_vd[support_bs.clamp(min=0)]
        offset_bs = torch.zeros(support_bs.shape).masked_fill(missing_bs, -torch.inf)
        doubled_ba = (self._sample_a[None, :, None] == support_bs[:, None, :]).any(dim=2)
        sample_offset_ba = torch.full(doubled_ba.shape, self._weight)
        return Rows(
            clean_bd=clean_bd,
            white_bd=self.whitened(clean_bd - self.centre_d),
            topics_bc=torch.log_softmax(clean_bd @ self._probe_dc + self._bias_c, dim=1),
            entries_bsd=entries_bsd,
            square_bs=entries_bsd.square().sum(dim=2),
            offset_bs=offset_bs,
            sample_offset_ba=sample_offset_ba.masked_fill(doubled_ba, -torch.inf),
            far_bd=self._far(self._bank_vd[ids_b]),
            attracting=ATTRACTING,
            repelling=1 + REPELLING,
        )

    def sample_squares(self, x_bd: torch.Tensor) -> torch.Tensor:
        """Squared distances to the sampled entries, (B, A)."""
        square_b1 = x_bd.square().sum(dim=1, keepdim=True)
        return square_b1 + self._sample_square_a - 2 * x_bd @ self._sample_ad.T

    def whitened(self, difference_bd: torch.Tensor) -> torch.Tensor:
        """Whiten differences of rows: their norm is then the Mahalanobis distance, (B, d)."""
        return difference_bd @ self._whiten_dd

    def topic_change(self, p_bd: torch.Tensor) -> torch.Tensor:
        """How p changes the probe's logits, (B, C)."""
        return p_bd @ self._probe_dc

    def _far(self, entries_bd: torch.Tensor) -> torch.Tensor:
        sample_ad = torch.nn.functional.normalize(self._sample_ad, dim=1)
        cosine_ba = torch.nn.functional.normalize(entries_bd, dim=1) @ sample_ad.T
        count = max(1, len(sample_ad) // _FAR_SHARE)
        least_bf = cosine_ba.topk(count, dim=1, largest=False).indices
        chosen_ba = torch.zeros_like(cosine_ba).scatter_(1, least_bf, 1 / count)
        return chosen_ba @ sample_ad


def geometry_tables(
    public: PublicKnowledge, hop_sets: list[Members], validity: float
) -> dict[str, NDArray[Any]]:
    """Make the tables; ids count within the whole vocabulary.

    Parameters
    ----------
    public : PublicKnowledge
        Bank, rows and sentences.
    hop_sets : list of Members
        Of the text entries, N_1 to N_n, at least :data:`ATTRACTING` members each where there are.
    validity : float
        Share of public rows that the Mahalanobis ball holds; 0 gives one without bound.
    """
    from privtune_flwr.privacy.privtune.targets import farthest_set

    text = public.text_ids
    # n = 1 attracts to the direct neighbours: then only the token itself repels.
    groups = [(farthest_set(hop_sets), ATTRACTING)]
    groups += [(hop_sets[0], REPELLING if len(hop_sets) > 1 else 0)]
    groups += [(members, BETWEEN) for members in hop_sets[1:-1]]
    support = np.full((public.vocab_size, support_places(len(hop_sets))), -1, dtype=np.int32)
    first = 0
    for members, places in groups:
        ids_NQ = members.ids[:, :places]
        chosen = np.where(ids_NQ >= 0, text[ids_NQ], -1)
        support[text, first : first + chosen.shape[1]] = chosen
        first += places
    centre, whiten, limit = _ellipsoid(public, validity)
    sampled = min(_SAMPLED, len(public.text_ids))
    sample = np.random.default_rng(0).choice(public.text_ids, sampled, replace=False)
    return {
        "bank": np.asarray(public.bank),
        "support": support,
        "sample": np.sort(sample).astype(np.int32),
        "probe": topic_probe(public),
        "centre": centre,
        "whiten": whiten,
        "limit": limit,
    }


def support_places(hops: int) -> int:
    """Width of the support table for n hops."""
    return ATTRACTING + REPELLING + BETWEEN * max(0, hops - 2)


def topic_probe(public: PublicKnowledge) -> NDArray[np.float32]:
    """Train the probe g: which topic a row's sentence has, from the row alone.

    The device has no top model whose prediction could be kept, so a linear classifier stands for
    it, trained on public rows for the topics of
    :func:`~privtune_flwr.privacy.privtune.importance.sentence_topics`.

    Returns
    -------
    float32 array, shape (d + 1, C)
        Weights, and in the last row the bias.
    """
    from privtune_flwr.privacy.privtune.importance import sentence_topics

    def build() -> dict[str, NDArray[Any]]:
        from sklearn.linear_model import LogisticRegression

        rows = public.rows()
        sentences = np.split(rows.ids, np.cumsum(rows.lengths)[:-1])
        topic_N = np.repeat(sentence_topics(sentences, np.asarray(public.bank)), rows.lengths)
        if topic_N.max() == 0:
            return {"probe": np.zeros((public.hidden_size + 1, 1), np.float32)}
        chosen = np.random.default_rng(0).permutation(len(topic_N))[:_PROBE_ROWS]
        # Rows are scaled as one: coefficients then need no unit of their own.
        spread = float(rows.values.std())
        fitted = LogisticRegression(C=0.1, max_iter=60, tol=1e-2)
        fitted.fit(rows.values[chosen] / spread, topic_N[chosen])
        weights, bias = fitted.coef_ / spread, fitted.intercept_
        if len(weights) == 1:  # two classes: one logit
            weights, bias = np.concatenate([0 * weights, weights]), np.array([0, bias[0]])
        return {"probe": np.vstack([weights.T, bias]).astype(np.float32)}

    return public.cached("privtune-probe", {"rows": _PROBE_ROWS}, build)["probe"]


def _ellipsoid(
    public: PublicKnowledge, validity: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Centre, whitening matrix and radius of the ball that holds a share of public rows."""
    rows = np.asarray(public.rows().values, dtype=np.float64)
    centre = rows.mean(axis=0)
    covariance = np.cov(rows, rowvar=False)
    covariance += 1e-3 * np.mean(np.diag(covariance)) * np.eye(len(covariance))
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    reach = np.linalg.norm((rows - centre) @ whiten, axis=1)
    limit = np.quantile(reach, validity) if validity else reach.max() * 1e3
    return (
        centre.astype(np.float32),
        np.ascontiguousarray(whiten, dtype=np.float32),
        np.array([limit], dtype=np.float32),
    )
