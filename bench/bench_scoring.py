"""Scoring many short sentences: ours against hooks that keep per-sample tensors, one sentence at a time.

    python bench/run.py cpu bench_scoring.py

Sentences a second by every method on the same sentences, and memory as the number of sentences grows: ours must stay
where it is.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import footprint
import pytest
import systems
import torch
from authors import HookScorer
from harness import Comparison, Contender, agree
from shapes import DEVICE, DTYPE, GPU, LLAMA31_8B, SCORE, SCORE_LONGER, SCORE_TINY, SMOKE, Load

from slicetune.engine.scoring import passes as scoring
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.statistics import Statistics

DOMAINS = ["a", "b", "c", "d"]
TOKENS_PER_BATCH = 4096 if GPU else 512
BASELINE = 4 if SMOKE else 32 if GPU else 24
"""Sentences that the baseline scores in a round: each costs it the same."""
GROWTH = (2, 4) if SMOKE else (32, 64, 128) if GPU else (12, 24, 48)
"""Numbers of sentences at which the baseline's memory is measured; ours is at eight times as many."""


def empty(load: Load, device: torch.device = DEVICE) -> Statistics:
    return Statistics(DOMAINS, load.model, device=device)


def right(model: Any, plain: Any, load: Load, examples: list) -> None:
    """Our sums over sentences are those of the baseline's scores."""
    statistics, hooks = empty(load), HookScorer(copy.deepcopy(plain))
    scoring.score(model, examples, statistics, ScoreConfig(tokens_per_batch=TOKENS_PER_BATCH))
    hooks.score(examples)
    groups = torch.tensor([example.group for example in examples])
    scores = torch.stack(hooks.scores).double()
    totals = torch.cat([statistics.total[p] for p in statistics.widths], -1).cpu()
    for group in groups.unique().tolist():
        want = scores[groups == group].sum(0)
        agree(totals[group].flatten(), want, 1e-4 if torch.float32 == DTYPE else 5e-2, f"scores of domain {group}")


@pytest.mark.parametrize("load", [SCORE, SCORE_LONGER, SCORE_TINY], ids=["short", "longer", "tiny"])
def test_scoring(benchmark, load):
    model = systems.random_model(load.model)
    plain = copy.deepcopy(model)  # scoring fuses the FFNs of the model that it is given
    examples = systems.sentences(load, max(load.sentences, 8 * GROWTH[-1]))
    growth = () if load is SCORE_LONGER else GROWTH
    config = ScoreConfig(tokens_per_batch=TOKENS_PER_BATCH)
    comparison = Comparison(benchmark, "scoring", _setting(load), derive=_rate)

    def ours() -> Contender:
        right(model, plain, load, examples[: 2 * len(DOMAINS)])
        statistics = empty(load)

        def run(count: int) -> None:
            scoring.score(model, examples[:count], statistics, config)

        memory = {str(8 * n): _memory(lambda n=n: run(8 * n)) for n in growth}
        held = footprint.resident(model, list(statistics.histogram.values()), statistics.total)
        facts = {"sentences": load.sentences, "growth": memory, "resident_bytes": held}
        facts["note"] = f"batches of up to {TOKENS_PER_BATCH:,} tokens"
        return Contender(lambda: run(load.sentences), facts=facts)

    def hooks(weight_gradients: bool) -> Callable[[], Contender]:
        def make() -> Contender:
            own = copy.deepcopy(plain)
            scorer = HookScorer(own, weight_gradients)

            def run(count: int) -> None:
                scorer.scores = []
                scorer.score(examples[:count])

            def measure(count: int) -> int:
                scorer.scores = []
                return _memory(lambda: run(count))

            memory = {str(n): measure(n) for n in growth}
            facts = {"sentences": BASELINE, "growth": memory, "resident_bytes": footprint.resident(own)}
            kept = 4 * load.model.neurons
            whole = 4 * LLAMA31_8B.neurons * 40_000 / 1e9
            facts["note"] = (
                f"keeps {kept / 1e3:.0f} kB a sentence, 4 bytes a neuron; by arithmetic {whole:.0f} GB for 40,000 "
                "sentences on Llama-3.1-8B"
            )
            return Contender(lambda: run(BASELINE), facts=facts)

        return make

    comparison.add("ours", ours, "ours")
    comparison.add("hooks at batch 1, full weight gradients", hooks(True))
    comparison.add("hooks at batch 1, frozen weights", hooks(False))
    comparison.measure(12 if GPU else 30 if load is SCORE else 12)


def _rate(row: dict[str, Any]) -> dict[str, Any]:
    return {"sentences_per_second": row["sentences"] / row["seconds"]}


def _setting(load: Load) -> str:
    return f"{load.model.layers} layers, hidden {load.model.hidden}, sentences of {load.length} tokens"


def _memory(run: Callable[[], Any]) -> int:
    gc.collect()
    return footprint.peak(run)
