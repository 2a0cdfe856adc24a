"""BLEU and chrF by sacreBLEU, with signatures; averages over seen, unseen and all domains.

    score_domain(["the rash fades"], ["the rash fades"], "en")     # {"bleu": 100.0, "bleu_signature": "nrefs:1|…", …}

The numbers are those of the `sacrebleu` command on the same two files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import UserError
from ..data.languages import short_code

METRICS = ("bleu", "chrf")


UNSPACED = ("th", "lo", "km", "my", "bo", "dz")
"""Beside Chinese and Japanese: Thai, Lao, Khmer, Burmese, Tibetan and Dzongkha set no words apart."""


def tokenizer_name(target_language: str) -> str:
    """sacreBLEU's tokenizer: 13a, except where words are not set apart by spaces.

    `zh` for Chinese; for Japanese `ja-mecab` where its package is installed, else `char`, as for the UNSPACED: 13a
    counts whole clauses as words there, so that BLEU is near 0. The signature names it. Codes of three letters and
    with a script or a country are known (tha, zho_Hant, zh_TW).
    """
    language = short_code(target_language)
    if language in ("zh", "yue"):
        return "zh"
    if language == "ja" and importlib.util.find_spec("MeCab") and importlib.util.find_spec("ipadic"):
        return "ja-mecab"
    return "char" if language in ("ja", *UNSPACED) else "13a"


def score_domain(
    hypotheses: Sequence[str], references: Sequence[str], target_language: str, smooth: str = "exp"
) -> dict[str, Any]:
    """Corpus BLEU and chrF2 (0–100) of a domain's translations: bleu, bleu_signature, chrf, chrf_signature, n.

    Where BLEU takes another tokenizer than 13a, bleu_13a and its signature stand beside it: papers that print one
    setting for all directions (LANDeRMT, Table 1) have that number. `smooth` is sacreBLEU's, of BLEU. Raises UserError
    where there is nothing to score or the two are not line-aligned.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} translations for {len(references)} references: decode the domain again")
    if not references:
        raise UserError("no test sentence to score: give the domain a test split or leave it out")
    scores: dict[str, Any] = {"n": len(references)}
    tokenizer = tokenizer_name(target_language)
    metrics = {"bleu": BLEU(tokenize=tokenizer, smooth_method=smooth), "chrf": CHRF()}
    if tokenizer != "13a":
        metrics["bleu_13a"] = BLEU(tokenize="13a", smooth_method=smooth)
    for name, metric in metrics.items():
        scores[name] = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
        scores[f"{name}_signature"] = metric.get_signature().format()
    return scores


def average(
    domains: Mapping[str, Mapping[str, Any]], seen: Sequence[str], unseen: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Unweighted means over the seen, the unseen and all domains; a part without any is left out."""
    parts = {"seen": list(seen), "unseen": list(unseen), "all": [*seen, *unseen]}
    rows = {part: [domains[name] for name in names if name in domains] for part, names in parts.items()}
    return {part: mean(scores) for part, scores in rows.items() if scores}


def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted means of bleu and chrf, and of comet where all rows have it.

    Of bleu_13a too where a row has one, other rows' bleu being that already.
    """
    metrics = [metric for metric in (*METRICS, "comet") if all(metric in row for row in rows)]
    means = {metric: sum(row[metric] for row in rows) / len(rows) for metric in metrics}
    if any("bleu_13a" in row for row in rows):
        means["bleu_13a"] = sum(row.get("bleu_13a", row["bleu"]) for row in rows) / len(rows)
    return means


def score_system(
    hypotheses: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    languages: Mapping[str, str],
    seen: Sequence[str],
    unseen: Sequence[str],
    smooth: str = "exp",
) -> dict[str, Any]:
    """One entry of results.json's `systems`: scores of each domain (the mappings' keys) and their averages.

    `languages` are the codes of the domains' target languages.
    """
    domains = {}
    for name, lines in hypotheses.items():
        scores = score_domain(lines, references[name], languages[name], smooth)
        signed = [key for key in scores if key.endswith("_signature")]
        signatures = {key.removesuffix("_signature"): scores.pop(key) for key in signed}
        domains[name] = {**scores, "signatures": signatures}
    return {"domains": domains, "averages": average(domains, seen, unseen)}
