"""Few-shot: the base model with translated examples in its prompt, drawn from the training text. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.errors import UserError
from ..data.config import DataConfig
from ..data.corpus import load_domain
from ..data.draws import order
from ..data.prompts import Prompt, encode
from ..data.records import Pair
from ..models.shapes import ModelShape
from .counts import Trainable
from .method import Method


@dataclass
class FewShot(Method):
    """In-context examples (LANDeRMT's Table 1 has five); zero-shot is Base."""

    shots: int = 5
    """Examples before each test sentence, each drawn anew with the seed."""

    kind: ClassVar[str] = "few_shot"
    title: ClassVar[str] = "Few-shot"
    selects: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UserError(f"--method.shots {self.shots}: must be at least 1; without examples it is recipes/base_*")

    def bounds(self, shape: ModelShape) -> Trainable:
        return Trainable.known(0)

    def examples(self, data: DataConfig, domain: str, tests: Sequence[Pair], seed: int) -> list[list[Pair]]:
        """Each test sentence's examples, from the domain's train split; for an unseen domain from those of all seen.

        `data` is one direction's. No example has the sentence's source or its reference. Raises UserError where there
        are too few.
        """
        pool = [p for d in ([domain] if domain in data.seen else data.seen) for p in load_domain(data, d, "train")]
        chosen = [self._draw(pool, test, seed) for test in tests]
        if any(len(few) < self.shots for few in chosen):
            raise UserError(f"--method.shots {self.shots}: {data.name(domain)} has only {len(pool)} training sentences")
        return chosen

    def _draw(self, pool: Sequence[Pair], test: Pair, seed: int) -> list[Pair]:
        found: list[Pair] = []
        sources, targets = {test.source}, {test.target}
        for i in order(len(pool), "shots", seed, *test.languages, test.domain, test.index):
            if len(found) == self.shots:
                break
            if pool[i].source not in sources and pool[i].target not in targets:
                found.append(pool[i])
                sources.add(pool[i].source)
        return found


def fit(
    tokenizer: Any, prompt: Prompt, tests: Sequence[Pair], examples: Sequence[list[Pair]], max_length: int
) -> tuple[list[list[Pair]], int]:
    """Examples that leave each prompt within `max_length` tokens, the last ones left out; and how many lost any."""
    kept = []
    for test, few in zip(tests, examples, strict=True):
        few = list(few)
        while few and len(encode(tokenizer, prompt, test, with_target=False, shots=few)[0]) > max_length:
            few.pop()
        kept.append(few)
    return kept, sum(len(short) < len(few) for short, few in zip(kept, examples, strict=True))
