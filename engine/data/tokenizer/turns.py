"""A tokenizer's chat template: the turns of a chat as text, and what it puts around an answer.

What stands before an answer belongs to the prompt, so that decoding asks for the answer alone; what ends one is found
by showing the template an answer. Next: tokens.py makes ids of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from ...common.errors import UserError
from ...common.files import first_line

ROLES = ("user", "assistant")
ASKED, ANSWER = "Question 17?", "Answer 17."
"""What the template is shown."""
DAY = datetime(2024, 7, 26)
"""Today, to a template that prints the date: a prompt must not change from day to day."""
DIRECTIVES = (*"aAbBcdeHIjmMpSuUVwWxXyYGzZDFTR", "f", "-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y")
"""Of strftime."""


@dataclass(frozen=True)
class Turn:
    """What a template puts around an answer."""

    lead: str
    """Between the prompt that the template gives and the answer, and part of the prompt: `</think>` of some."""
    seam: str
    """White space before the answer, which is predicted with it: Llama-2's space."""
    close: str
    """From the answer's end to that of the marker which ends its turn."""
    stop: str
    """What marks the end as plain text, as far as it is no token; else empty."""
    ends: bool
    """Whether `close` ends with a token, which then ends decoding; else the end token comes after it."""
    trims: bool
    """Whether the template takes white space off an answer's ends."""
    marks: tuple[str, ...]
    """Markers of the template that are no special tokens."""


@lru_cache(maxsize=8)
def turn(tokenizer: Any) -> Turn:
    """How the tokenizer's template writes an answer. Raises UserError for one that cannot be used."""
    asked, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}
    head, full, spaced = (
        _shown(tokenizer, [asked], True),
        _shown(tokenizer, [asked, answer], False),
        _shown(tokenizer, [asked, answer | {"content": f"\t{ANSWER}\t"}], False),
    )
    before, found, after = full.rpartition(ANSWER)
    if not found:
        raise UserError(f"{tokenizer.name_or_path}: the chat template leaves out the answer: {REMEDY}")
    between = before[len(head) :] if before.startswith(head) else ""
    lead = between.rstrip(" ") if between.strip() else ""
    close, stop, ends = _closing(tokenizer, after)
    marks = [text for text in _normal(tokenizer) if text in full.replace(ASKED, "").replace(ANSWER, "")]
    marks += [stop] * bool(stop)
    return Turn(lead, between[len(lead) :], close, stop, ends, f"{ANSWER}\t" not in spaced, tuple(marks))


REMEDY = "put one with a user's and an assistant's turn into its chat_template.jinja"


def _closing(tokenizer: Any, after: str) -> tuple[str, str, bool]:
    """`close`, `stop` and `ends` of a Turn, by what the template puts after an answer."""
    match = _any_of([*special_texts(tokenizer, ends=True), *_normal(tokenizer)]).search(after)
    if match and not _is_token(tokenizer, after[: match.end()], match[0]):
        match = None
    text = (after[: match.start()] if match else after).strip()
    ids = tokenizer(ANSWER + after, add_special_tokens=False)["input_ids"]
    if text and not (_like_a_marker(text) and text in tokenizer.decode(ids)):
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template ends an answer with {text!r}, which is no token and cannot "
            "be told from a translation: make it a special token of the tokenizer"
        )
    return after[: match.end() if match else after.index(text) + len(text)], text, match is not None


def _is_token(tokenizer: Any, close: str, marker: str) -> bool:
    ids = tokenizer(ANSWER + close, add_special_tokens=False)["input_ids"]
    return list(ids[-1:]) == [tokenizer.convert_tokens_to_ids(marker)]


def messages(tokenizer: Any, system: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """System turn, turns of examples (user, assistant), and of the last turn what the user says.

    The system text begins the first user turn where the template has no such role.
    """
    import jinja2

    roles = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)][:-1]
    whole = [{"role": "system", "content": system}, *roles]
    try:
        if system.strip() in render(tokenizer, whole, add_generation_prompt=True):
            return whole
    except jinja2.TemplateError:  # Gemma-2: "System role not supported"
        pass
    return [{"role": "user", "content": f"{system}\n{turns[0][0]}"}, *roles[1:]]


def render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """The conversation as text: on a fixed day, and of models that can think first, without thinking."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=_dated(tokenizer.get_chat_template()),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        date_string=DAY.strftime("%d %b %Y"),
        enable_thinking=False,
    )


def _dated(template: str) -> str:
    """The template with the fixed day as its clock: a macro hides the function that transformers gives it."""
    if "strftime_now" not in template:
        return template
    parts = "".join(f".replace('%{part}', '{DAY.strftime('%' + part)}')" for part in DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{template}"


def _shown(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return render(tokenizer, messages, add_generation_prompt)
    except (jinja2.TemplateError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template cannot be used ({first_line(error)}): {REMEDY}"
        ) from None


def unknown_id(tokenizer: Any) -> int | None:
    """The token of what the vocabulary lacks; none where the end token has its part too (GPT-2), as in bytes."""
    unknown = tokenizer.unk_token_id
    return None if unknown == tokenizer.eos_token_id else unknown


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are no text: BOS, ends, turns, padding, unknown."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def special_texts(tokenizer: Any, ends: bool = False) -> tuple[str, ...]:
    """The special tokens' texts; with `ends` those that can end a turn, which the unknown token never does."""
    without = {unknown_id(tokenizer)} if ends else set()
    return tuple(tokenizer.convert_ids_to_tokens(i) for i in sorted(special_ids(tokenizer) - without))


def _normal(tokenizer: Any) -> tuple[str, ...]:
    """Texts of tokens that were added, are not special and can be markers: of some models their markers are such."""
    special = special_ids(tokenizer)
    added = (str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if i not in special)
    return tuple(text for text in added if _like_a_marker(text))


def _like_a_marker(text: str) -> bool:
    """Words and marks of punctuation stand in sentences; people add such tokens too."""
    return len(text.strip()) > 2 and not text.strip()[0].isalnum()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


@lru_cache(maxsize=8)
def forgeable(tokenizer: Any) -> re.Pattern[str]:
    """The texts that would be read as the structure of a chat if a sentence held them."""
    marks = turn(tokenizer).marks if tokenizer.chat_template else ()
    return _any_of([*special_texts(tokenizer), *marks])
