"""Which sentences, and how they become prompts: --data.*."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..common.errors import UserError
from ..common.settings import check_bounds, matters


@dataclass
class DataConfig:
    """Which sentences, and how they become prompts."""

    # Where files lie matters to no stage: what is in them does, and stages keep the corpus's fingerprint.

    dir: str = matters("", "tiny")
    """A folder `<pair>/<domain>/<split>.jsonl[.gz]`, line-aligned `<split>.<lang>[.gz]`, a hub id, or `tiny`; also
    `<split>.tsv`, `.csv` and `.parquet`."""
    pair: str = matters("score", "de-en")
    """Source-target. The folder may name the pair the other way round."""
    pairs: tuple[str, ...] = matters("score", ())
    """Several directions in one run, as in `de-en en-de`, in the place of `pair`: results and statistics are theirs."""
    train_pairs: tuple[str, ...] = matters("train", ())
    """Those of `pairs` that are trained, all being scored and decoded; empty is all."""
    seen: tuple[str, ...] = matters("score", ("it", "law", "medical", "subtitles"))
    """Domains that are scored and trained. Of several directions each takes those of them that the corpus has of it."""
    unseen: tuple[str, ...] = matters("decode", ("koran",))
    """Domains that are only evaluated."""
    prompt: str = matters("score", "released")
    """System text: `released`, `paper`, `short`, or a text of your own with {src}, {tgt} and {domain}; `templates`: one
    of ten for each sentence, drawn with the seed, the same in scoring, training and decoding."""
    score_sentences: int = matters("score", 10_000)
    """Sentences a seen domain, and of each direction, that are scored (the paper: 10k)."""
    train_sentences: int = matters("train", 2_000)
    """Sentences a seen domain, and of each direction, that a method that chooses neurons trains on (the paper: 2k)."""
    budget: Literal["paper", "equal"] = matters("train", "paper")
    """`paper`: methods that choose no neurons train on all --data.score-sentences; `equal`: all on the same ones."""
    dev_sentences: int = matters("train", 200)
    """Sentences a seen domain, and of each direction, for the dev loss."""
    test_sentences: int = matters("decode", 0)
    """Sentences a domain, and of each direction, that are decoded; 0 is all."""
    test_split: Literal["test", "dev"] = matters("", "test")
    """Which split is decoded and measured; `dev` where a corpus has no test files."""
    test_dir: str = matters("", "")
    """Where the test split lies if not in --data.dir: another corpus, of the same pair and domains."""
    max_length: int = matters("score", 512)
    """Tokens of prompt and target together; longer sentences are counted and dropped."""
    max_dropped: float = matters("", 0.01)
    """Share of broken records that is tolerated before a file is refused."""

    def __post_init__(self) -> None:
        for flag, pair in (("--data.pair", self.pair), *(("--data.pairs", pair) for pair in self.pairs)):
            if pair.count("-") != 1 or not all(pair.split("-")):
                raise UserError(f"{flag} {pair!r}: write source-target, as in de-en")
        if twice := [pair for pair, count in Counter(self.pairs).items() if count > 1]:
            raise UserError(f"--data.pairs names {' '.join(twice)} more than once: name each direction once")
        if strange := [pair for pair in self.train_pairs if pair not in self.pairs]:
            raise UserError(f"--data.train-pairs {' '.join(strange)}: not in --data.pairs {' '.join(self.pairs)}")
        if not self.seen:
            raise UserError("--data.seen is empty: name at least one domain to train on")
        both = sorted(set(self.seen) & set(self.unseen))
        if both:
            raise UserError(
                f"--data.unseen names {' '.join(map(repr, both))}, which --data.seen names too: keep each in one list"
            )
        for name in (*self.domains, *(code for pair in (self.pair, *self.pairs) for code in pair.split("-"))):
            if not re.fullmatch(r"\w[\w.+ -]*", name) or ".." in name:
                raise UserError(f"--data: {name!r} is no name of a domain or a language: files are named after it")
        whole, natural = (1, math.inf), (0, math.inf)
        bounds = dict.fromkeys(("score_sentences", "train_sentences", "max_length"), whole)
        bounds |= dict.fromkeys(("dev_sentences", "test_sentences"), natural) | {"max_dropped": (0, 1)}
        check_bounds(self, "data", bounds)

    @property
    def source(self) -> str:
        return self.pair.split("-")[0]

    @property
    def target(self) -> str:
        return self.pair.split("-")[1]

    @property
    def domains(self) -> tuple[str, ...]:
        return (*self.seen, *self.unseen)

    @property
    def groups(self) -> tuple[str, ...]:
        """What statistics are split by: the directions where there are several, else the seen domains."""
        return self.pairs or self.seen

    @property
    def directions_of_groups(self) -> tuple[str, ...]:
        """The direction of each of the `groups`: of one direction all seen domains have it."""
        return self.pairs or (self.pair,) * len(self.seen)

    def name(self, domain: str) -> str:
        """How results, files and uids name a domain of `pair`: `<pair>/<domain>` where a run has several directions."""
        return f"{self.pair}/{domain}" if self.pairs else domain
