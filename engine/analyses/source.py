"""What an analysis takes from a run's folder: its settings, its base model and tokenizer, its sentences.

source = Source("runs/x")
source.config.method, source.examples("train", 400), source.model()
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data import corpus, prompts, records
from ..data.batching import Example
from ..data.examples import encode_pairs
from ..evaluation.results import dev_loss
from ..methods.caneft.settings import Caneft
from ..methods.landermt.settings import Landermt
from ..run.config import RunConfig, read_run
from ..run.job import Inputs


def caneft_of(config: RunConfig) -> Caneft:
    """The run's CANEFT selection. Raises UserError where the run is another method's."""
    if type(config.method) is not Caneft:
        raise UserError(f"{config.out} is a run of {config.method.title}: name one of CANEFT")
    return config.method


def finished(run: Path) -> dict[str, Any]:
    """results.json of a run. Raises UserError where there is none."""
    try:
        return json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/results.json: {error}: start the run again to finish it") from None


def loss_text(results: Mapping[str, Any]) -> str:
    """The loss over the dev sentences for a table; empty where the run had none."""
    loss = dev_loss(results)
    return f"{loss:.4f}" if math.isfinite(loss) else ""


class Source(Inputs):
    """A run's base model and sentences, as its own stages read them."""

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.run = Path(run)
        super().__init__(read_run(run))

    def pairs(self, split: str, limit: int) -> list[list[records.Pair]]:
        """Sentence pairs of each group of the statistics (domain, or direction), in the order of the run.

        At most `limit` a domain; 0 is all. Where a group has several domains they take turns.
        """
        found: dict[str, list[list[records.Pair]]] = {name: [] for name in self.config.data.groups}
        for data in self.directions:
            for domain in data.seen:
                pairs = corpus.load_domain(data, domain, split, limit, self.config.seed)
                found[data.pair if data.pairs else domain].append(pairs)
        return [[pair for turn in zip_longest(*domains) for pair in turn if pair] for domains in found.values()]

    def encode(self, pairs: Sequence[records.Pair], split: str, prompt: str = "") -> list[Example]:
        """Tokenised pairs, with another prompt if one is given; those that do not fit are left out."""
        found = []
        for data in self.directions:
            mine = [pair for pair in pairs if pair.languages == (data.source, data.target)]
            data = replace(data, prompt=prompt or data.prompt)
            found += encode_pairs(self.tokenizer, data, mine, data.groups, split, data.max_length, self.config.seed)[0]
        return found

    def examples(self, split: str, limit: int) -> list[Example]:
        """Tokenised sentences of all seen domains, at most `limit` a domain (0: all)."""
        found = [e for pairs in self.pairs(split, limit) for e in self.encode(pairs, split)]
        if not found:
            raise UserError(f"{split}: no sentence is left: raise --data.max-length, or look at the files")
        return found

    def without_domain(self) -> str:
        """The run's prompt with the words around {domain} taken out. Raises UserError where it names none."""
        if self.config.data.prompt == "templates":
            raise UserError("--plain-prompt: the run has ten templates; say which text without the domain to use")
        return without_domain(prompts.resolve(self.config.data).system)


def without_domain(system: str) -> str:
    """A system text without what names the domain: `Domain: {domain}.`, or `in (the) {domain} domain`.

    >>> without_domain("Translate from {src} into {tgt}. Domain: {domain}.")
    'Translate from {src} into {tgt}.'
    """
    for words in (" Domain: {domain}.", " in the {domain} domain", " in {domain} domain"):
        system = system.replace(words, "")
    if "{domain}" in system:
        raise UserError(f"--plain-prompt: say how {system!r} reads without its domain")
    return system


def landermt_of(run: str | Path) -> Landermt:
    """The run's settings of LANDeRMT. Raises UserError where it is another method's."""
    method = read_run(run).method
    if not isinstance(method, Landermt):
        raise UserError(f"{run} is a run of {method.title}: name one of LANDeRMT")
    return method
