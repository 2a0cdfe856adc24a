"""Paired bootstrap of corpus BLEU over test sentences and seeds.

    counts = sentence_counts(hypotheses, references, "en")        # [n, 10], once a file
    boot = Bootstrap({"law": 200, "koran": 200}, seeds=3)
    a, b = boot.scores(counts_of_a), boot.scores(counts_of_b)     # [draws, seeds, domains]
    boot.difference(a, b, ["law"])                                # mean, 95 % interval, p

Koehn (2004) draws sentences. Here seeds are drawn too, so that an interval covers both: other test sentences, and
another seed of the training. All systems meet the same draws. Three seeds are few: such an interval is rather too
narrow than too wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slicetune.engine.evaluation.bleu import tokenizer_name

DRAWS = 2000
ORDERS = 4


def sentence_counts(hypotheses: Sequence[str], references: Sequence[str], language: str) -> np.ndarray:
    """int64 [n, 10]: of each sentence the matched n-grams (4), all n-grams (4), and the lengths of both sides."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer_name(language), effective_order=True)
    found = [metric.sentence_score(h, [r]) for h, r in zip(hypotheses, references, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in found]
    return np.array(rows, dtype=np.int64)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU, 0–100, of summed counts [..., 10], with sacreBLEU's smoothing `exp`."""
    matched, total = sums[..., :ORDERS].astype(float), sums[..., ORDERS : 2 * ORDERS].astype(float)
    ours, theirs = sums[..., -2].astype(float), sums[..., -1].astype(float)
    logs, halvings = np.zeros(ours.shape), np.zeros(ours.shape)
    for n in range(ORDERS):
        none = (matched[..., n] == 0) & (total[..., n] > 0)
        halvings += none
        share = np.where(none, 0.5**halvings, matched[..., n]) / np.maximum(total[..., n], 1)
        logs += np.log(np.maximum(share, 1e-300))
    short = np.where(ours < theirs, 1 - theirs / np.maximum(ours, 1e-300), 0.0)
    empty = (total[..., -1] == 0) | (matched.sum(-1) == 0)
    return np.where(empty, 0.0, 100 * np.exp(np.minimum(short, 0) + logs / ORDERS))


@dataclass(frozen=True)
class Difference:
    """A difference of two systems' BLEU, its 95 % interval, and p of a two-sided test that it is 0."""

    mean: float
    low: float
    high: float
    p: float


class Bootstrap:
    """The draws, which all systems share: of each domain's sentences, and of the seeds. The first draw is the truth."""

    def __init__(self, sentences: Mapping[str, int], seeds: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(0)
        self.domains = list(sentences)
        self.weights = {}
        for domain, n in sentences.items():
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
            self.weights[domain] = np.concatenate([np.ones((1, n), dtype=np.int64), drawn])
        truth = np.arange(seeds)[None]
        self.seeds = np.concatenate([truth, rng.integers(seeds, size=(draws, seeds))])

    def scores(self, counts: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """BLEU [1 + draws, seeds, domains] of a system; `counts` are its sentences', a mapping by domain a seed."""
        return np.stack(
            [np.stack([bleu(self.weights[d] @ of[d]) for d in self.domains], axis=-1) for of in counts], axis=1
        )

    def mean(self, scores: np.ndarray, domains: Sequence[str]) -> np.ndarray:
        """[1 + draws]: over the domains and the drawn seeds. A system of one seed has that one in every draw."""
        of = scores[..., [self.domains.index(domain) for domain in domains]].mean(-1)
        if of.shape[1] == 1:
            return of[:, 0]
        return np.take_along_axis(of, self.seeds, axis=1).mean(1)

    def difference(self, one: np.ndarray, other: np.ndarray, domains: Sequence[str]) -> Difference:
        """Of `one` minus `other`, over the domains."""
        every = self.mean(one, domains) - self.mean(other, domains)
        truth, drawn = float(every[0]), every[1:]
        if not drawn.any():
            return Difference(truth, truth, truth, 1.0)
        low, high = (float(x) for x in np.quantile(drawn, (0.025, 0.975)))
        beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return Difference(truth, low, high, min(1.0, 2 * (1 + beyond) / (1 + len(drawn))))
