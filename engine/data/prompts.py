"""A sentence pair as what a model reads: prompt, target, end of turn.

The prompt's tokens are the same in scoring, training and decoding: `encode` with a target starts with exactly what
`encode` without one returns. Chat models get their tokenizer's chat template others plain lines: tokenizer/.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError
from .config import DataConfig
from .draws import draw
from .languages import DOMAINS, language
from .records import Pair
from .tokenizer import tokens
from .tokenizer import turns as templates

SYSTEMS = {
    "released": "You are a translation specialist who specializes in translating texts from {src} into {tgt} in "
    "{domain} domain. Please translate the following content into {tgt} and only reply the translated sentence "
    'starting with "{tgt}:" without line breaks or any special tokens.',
    "paper": "You are a translation specialist who specializes in translating texts from {src} to {tgt} in the "
    "{domain} domain. Translate the following content into {tgt} and only reply to the translated sentence without "
    "line breaks or special symbols.",
    "short": "Translate from {src} into {tgt}. Domain: {domain}.",
}
"""System texts by the names of --data.prompt: CANEFT's released program, its paper, and a short one."""


TEMPLATES = (
    "Translate from {src} into {tgt}.",
    "Translate the following {src} sentence into {tgt}.",
    "Please give the {tgt} translation of this {src} text.",
    "How do you say this {src} sentence in {tgt}?",
    "Here is a sentence in {src}. Write it in {tgt}.",
    "Put the {src} text below into {tgt} and keep its meaning.",
    "Below is a {src} sentence; its {tgt} translation comes after it.",
    "You translate from {src} into {tgt}. Answer with the translation alone.",
    "Say in natural {tgt} what this {src} text says.",
    "What is the {tgt} version of the following {src} sentence?",
)
"""System texts of --data.prompt templates: LANDeRMT assigns ten instructions at random, and does not print them."""
PLAIN = (TEMPLATES[0], "short")
"""Values of --data.prompt with which a run compares its own: plain words, which a model is likely to know."""


@dataclass(frozen=True)
class Prompt:
    """Texts of the three turns, with the fields {src}, {tgt}, {domain}, {sentence} and {reference}."""

    system: str = SYSTEMS["released"]
    user: str = "{src}: {sentence}"
    target: str = "{tgt}: {reference}"
    templates: tuple[str, ...] = ()
    """System texts of which each sentence draws one in the place of `system`."""
    seed: int = 0
    """Of that draw."""

    def instruction(self, pair: Pair) -> str:
        """The system text of a sentence: wherever the sentence is read, the same one."""
        if not self.templates:
            return self.system
        place = draw(len(self.templates), "template", self.seed, *pair.languages, pair.domain, pair.index)
        return self.templates[place]


def resolve(data: DataConfig, seed: int = 0) -> Prompt:
    """The prompt that --data.prompt names or is; `seed` is that of `templates`.

    Raises UserError for a text without {tgt} or with unknown fields.
    """
    if data.prompt in SYSTEMS:
        return Prompt(system=SYSTEMS[data.prompt])
    if data.prompt == "templates":
        return Prompt(system=TEMPLATES[0], templates=TEMPLATES, seed=seed)
    names = " ".join((*SYSTEMS, "templates"))
    try:
        parsed = [
            (name, spec or kind) for _, name, spec, kind in string.Formatter().parse(data.prompt) if name is not None
        ]
    except ValueError as error:
        raise UserError(f"--data.prompt {data.prompt!r}: {error}; write {{{{ for a brace of the text") from None
    fields = {name for name, _ in parsed}
    if formatted := [name for name, extra in parsed if extra]:
        raise UserError(f"--data.prompt: {{{formatted[0]}}} has a format of its own: write the plain field")
    if unknown := sorted(fields - {"src", "tgt", "domain"}):
        raise UserError(f"--data.prompt: no field {{{unknown[0]}}}; there are {{src}}, {{tgt}} and {{domain}}")
    if "tgt" not in fields:
        raise UserError(f"--data.prompt {data.prompt!r}: write {names}, or a text that holds the field {{tgt}}")
    return Prompt(system=data.prompt)


def encode(
    tokenizer: Any, prompt: Prompt, pair: Pair, with_target: bool = True, shots: Sequence[Pair] = ()
) -> tuple[list[int], int]:
    """Token ids of the prompt, and of target and end-of-turn token if `with_target`; and where the target starts.

    Training ends with the end-of-turn token: what a template renders after it (Qwen's newline) is left out. A plain
    prompt ends at `English:`, and the space after it is the target's. A special token's text inside a sentence is spelt
    with a space, so that data cannot forge a turn. `shots` are translated examples that come before the sentence, as
    turns of their own, or as lines where there is no chat template.
    """
    system = prompt.instruction(pair).format(**_fields(tokenizer, pair))
    turns = [_turns(tokenizer, prompt, each) for each in (*shots, pair)]
    user, target = turns[-1]
    if tokenizer.chat_template:
        return tokens.answered(tokenizer, templates.messages(tokenizer, system, turns), target if with_target else None)
    opening = prompt.target.partition("{reference}")[0].format(**_fields(tokenizer, pair))
    head = "\n".join([system, *(text for turn in turns[:-1] for text in turn), user, opening])
    return tokens.plain(tokenizer, head, target[len(opening) :] if with_target else None)


def _fields(tokenizer: Any, pair: Pair) -> dict[str, str]:
    return {
        "src": language(pair.languages[0]),
        "tgt": language(pair.languages[1]),
        "domain": DOMAINS.get(pair.domain, pair.domain),
        "sentence": tokens.disarm(tokenizer, pair.source),
        "reference": tokens.disarm(tokenizer, pair.target),
    }


def _turns(tokenizer: Any, prompt: Prompt, pair: Pair) -> tuple[str, str]:
    """What the user says and what is to be answered."""
    fields = _fields(tokenizer, pair)
    return prompt.user.format(**fields), prompt.target.format(**fields)
