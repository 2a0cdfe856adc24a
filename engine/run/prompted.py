"""Whether the base knows the prompt that a run is given: its loss on a few sentences, also with plain prompts.

A base that was taught one prompt translates worse with another one. Training then teaches the prompt first, and what
looks like a gain in translation can be that alone. So a run measures it once, with the untouched base, whichever stage
loads it first, and warns.

Of unseen domains a few test sentences are read too: on text that the base was never taught every prompt is about as bad
as another, and only text that it knows tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common import distributed
from ..common.errors import UserError
from ..common.files import read_json, write_json
from ..data import corpus
from ..data.batching import Example, batches_by_tokens
from ..data.examples import encode_pairs
from ..data.prompts import PLAIN
from ..models import load
from ..models.attention import inputs_of
from ..models.large.parallel import shares
from ..models.large.partition import gathering
from ..models.packing import packs_long_rows
from ..training.updates import Batcher
from .job import Job

SENTENCES = 32
"""About so many are read, the same number of each domain and direction."""
TOKENS = 512
"""Of a batch: the logits of all its tokens stand at once."""
FAR = 0.1
"""Nats a target token by which a prompt is worse than a plain one, from which on a run warns. Measured on 32 sentences:
a prompt 0.10 worse cost a small model 0.6 BLEU, one 0.15 worse 2.4 and one 0.41 worse 6.4; of a pretrained LLM none was
more than 0.07 worse."""
FILE = "prompt.json"


@dataclass(frozen=True)
class Known:
    """What was measured: mean cross-entropy of target tokens in nats."""

    given: str
    """--data.prompt of the run."""
    loss: float
    plain: str
    """The value of --data.prompt, of those of PLAIN that the run was not given, with the lowest loss."""
    plain_loss: float
    sentences: int

    def warning(self) -> str:
        """Two lines, where the given prompt is far worse; else nothing."""
        if not self.loss - self.plain_loss > FAR:
            return ""
        return (
            f'warning: the base does not know this prompt well: with --data.prompt "{self.given}" its loss on '
            f"{self.sentences} sentences is {self.loss:.2f} nats a target token, with --data.prompt "
            f'"{self.plain}" {self.plain_loss:.2f}\n'
            "         what training gains may then be the learning of the prompt alone: take the second one, or the "
            "prompt that the base was taught"
        )


def warned(job: Job, base: nn.Module) -> nn.Module:
    """`base`, the untouched base in evaluation mode, after prompt.json and its warning if the run has none yet.

    Every rank calls it, with the whole model, a partitioned one, or its part of one that ranks decode together. The
    model is not changed, and nothing random is drawn.
    """
    data = job.config.data
    if not data.dev_sentences:
        return base
    about = _identity(job)
    if distributed.share_object(distributed.first(lambda: _read(job.out, about))):
        return base
    prompts = [data.prompt, *(prompt for prompt in PLAIN if prompt != data.prompt)]
    sentences = _sentences(job, prompts)
    if not sentences:
        return base
    losses = _losses(base, sentences, len(prompts), job.pad_id)
    if not all(map(math.isfinite, losses)):
        return base  # the stage itself will say what is wrong
    best = min(range(1, len(prompts)), key=losses.__getitem__)
    known = Known(data.prompt, losses[0], prompts[best], losses[best], len(sentences) // len(prompts))
    if distributed.rank() == 0:
        write_json(job.out / FILE, {"identity": about, "known": asdict(known)})
    if line := known.warning():
        distributed.print0(line)
    return base


def known(job: Job) -> Known | None:
    """What this run has measured; None where it has not. The first rank alone calls it."""
    return _read(job.out, _identity(job))


def of_results(results: dict[str, Any]) -> Known | None:
    """The same by a run's results.json."""
    return Known(**results["prompt"]) if "prompt" in results else None


def _identity(job: Job) -> dict[str, Any]:
    """What the losses depend on, but for the unseen domains: other ones later do not make it measure again."""
    return {
        "prompt": job.config.data.prompt,
        "seed": job.config.seed,
        "model": load.fingerprint(job.base),
        "corpus": job.report.fingerprint,
    }


def _read(out: Path, identity: dict[str, Any]) -> Known | None:
    try:
        found = read_json(out / FILE)
        return Known(**found["known"]) if found["identity"] == identity else None
    except (UserError, OSError, KeyError, TypeError):
        return None


def _sentences(job: Job, prompts: Sequence[str]) -> list[Example]:
    """The first sentences of each domain and direction with every prompt, whose number is `Example.group`.

    They are dev sentences of seen domains, and test sentences of unseen ones, which need have no others.
    Left out are sentences that one of the prompts makes too long, or with a token that the model has not.
    """
    each = math.ceil(SENTENCES / sum(len(data.domains) for data in job.directions))
    found: dict[str, list[Example]] = {}
    for data in job.directions:
        names = data.pairs or data.domains
        for domain in data.domains:
            split, most = ("dev", data.dev_sentences) if domain in data.seen else ("test", data.test_sentences)
            pairs = corpus.load_domain(data, domain, split, min(each, most or each))
            for number, prompt in enumerate(prompts):
                worded = replace(data, prompt=prompt)
                kept, _ = encode_pairs(job.tokenizer, worded, pairs, names, split, data.max_length, job.config.seed)
                for example in kept:
                    if max(example.input_ids) < job.shape.vocab:
                        found.setdefault(example.uid, []).append(replace(example, group=number))
    return [example for versions in found.values() if len(versions) == len(prompts) for example in versions]


@torch.no_grad()
def _losses(model: nn.Module, examples: Sequence[Example], groups: int, pad_id: int) -> list[float]:
    """Mean cross-entropy of each group's target tokens, over all ranks (a collective)."""
    rank, world = shares(model)
    batcher = Batcher(packs_long_rows(model), pad_id)
    batches = list(batches_by_tokens(examples, TOKENS, batcher.packed))
    total = torch.zeros(2, groups, dtype=torch.float64)
    with gathering(model):
        for turn in range(0, len(batches), world):  # as many forwards on every rank, which gathers or sums in each
            mine = batches[turn + rank] if turn + rank < len(batches) else []
            batch = batcher.filled([examples[i] for i in mine], examples[0])
            logits = model(**inputs_of(model, batch)).logits.flatten(0, 1)[batch.predict]
            losses = F.cross_entropy(logits.float(), batch.target, reduction="none")
            weight = batch.weight[batch.target_sample]
            total += _by_group(torch.stack([losses * weight, weight]), batch.groups[batch.target_sample], groups)
    sums = distributed.sums(*total.flatten().tolist())  # ranks that compute together count alike in both
    return [loss / count for loss, count in zip(sums[:groups], sums[groups:], strict=True)]


def _by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [rows, groups] in float64 on the host of values [rows, L] by their group [L]."""
    zeros = torch.zeros(len(values), groups, dtype=torch.float64)
    return zeros.index_add(1, group.cpu(), values.cpu().double())
