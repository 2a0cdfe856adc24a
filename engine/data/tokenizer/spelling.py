"""What a tokenizer cannot give back of a text: seen when it is loaded, and counted on the sentences of a run.

warnings(tokenizer, "models/x")             # refuses one that loses spaces, tells of lost capitals and the like
lost_targets(tokenizer, texts)              # how many targets can neither be learned nor written as they are
lost_by_split(tokenizer, directions, …)     # the same of a corpus
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...common.errors import UserError
from .. import corpus
from ..config import DataConfig
from . import tokens, turns

DETOKENISE = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Exactly what the model wrote: some tokenizers' configs would have ` .` turned into `.` and `do not` into `don't`."""
KINDS = {
    "capitals": "The house",
    "line breaks": "the\nhouse",
    "accents": "ä é",
    "the spaces at punctuation": "it is (the house), yes.",
}
"""What a tokenizer may lose, and a text that has it."""


def warnings(tokenizer: Any, name: str) -> list[str]:
    """A line if the tokenizer cannot give back what some targets have; what it cannot is lost in every translation.

    Raises UserError, which names the model as `name`, where the spaces between words are lost.
    """
    back = _back(tokenizer, "a b")
    if "a" in back and "b" in back and not re.search(r"a\s+b", back):
        import transformers

        raise UserError(
            f"{name}: its tokenizer gives 'a b' back as {back!r}, without the space ({type(tokenizer).__name__} of "
            f"transformers {transformers.__version__}): install transformers 5.22 or newer, or set tokenizer_class to "
            "PreTrainedTokenizerFast in its tokenizer_config.json"
        )
    # What the vocabulary lacks shows on the targets, which are counted (lost_targets); this is about what is known.
    known = {kind: text for kind, text in KINDS.items() if not _unknown(tokenizer, text)}
    gone = [kind for kind, text in known.items() if unicodedata.normalize("NFC", _back(tokenizer, text)) != text]
    return [f"{name}: its tokenizer does not keep {', '.join(gone)}, so no translation has them"] if gone else []


@dataclass(frozen=True)
class Lost:
    """Of some targets, those that a tokenizer does not give back."""

    of: int
    unknown: int
    """Targets with a character that is the unknown token."""
    altered: int
    """Others that come back as another text, white space apart."""
    first: str
    """One of them, and how it comes back."""

    def line(self, name: str) -> str:
        """What the run says of the targets that go by `name`."""
        parts = [f"{self.unknown:,} have characters that the tokenizer has no token for"] * bool(self.unknown)
        parts += [f"{self.altered:,} are altered by the tokenizer"] * bool(self.altered)
        return f"warning: {name}: of {self.of:,} targets {' and '.join(parts)}, so no model writes them: {self.first}"


def lost_targets(tokenizer: Any, texts: Iterable[str]) -> Lost | None:
    """How many of `texts` the tokenizer cannot give back; None if it gives back all."""
    unknown, of, counts, first = turns.unknown_id(tokenizer), 0, [0, 0], ""
    rest = iter(texts)
    while some := [tokens.disarm(tokenizer, text) for text in islice(rest, 1000)]:
        of += len(some)
        ids = tokenizer(some, add_special_tokens=False)["input_ids"]
        for text, own, back in zip(some, ids, tokenizer.batch_decode(ids, **DETOKENISE), strict=True):
            if unknown in own or _plain(text) != _plain(back):
                counts[unknown not in own] += 1
                first = first or f"{text[:60]!r} comes back as {back[:60]!r}"
    return Lost(of, *counts, first) if first else None


def lost_by_split(tokenizer: Any, directions: Sequence[DataConfig], seed: int) -> dict[str, Lost]:
    """`<domain>/<split>` → what is lost of the targets that a run trains on and is measured by, where anything is."""
    found = {}
    for data in directions:
        places = [(domain, "train", data.score_sentences) for domain in data.seen]
        places += [(domain, "test", data.test_sentences) for domain in data.domains]
        for domain, split, limit in places:
            pairs = corpus.load_domain(data, domain, split, limit, seed)
            lost = lost_targets(tokenizer, (pair.target for pair in pairs))
            found |= {f"{data.name(domain)}/{split}": lost} if lost else {}
    return found


def _unknown(tokenizer: Any, text: str) -> bool:
    return turns.unknown_id(tokenizer) in tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain(text: str) -> list[str]:
    return unicodedata.normalize("NFC", text).split()


def _back(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], **DETOKENISE).strip()
