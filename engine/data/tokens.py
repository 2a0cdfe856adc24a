"""Texts and the turns of a chat as token ids: BOS, what is read, what is predicted, the token that ends it.

Every function that takes what is predicted returns all ids and where it starts; without it, the prompt that decoding
sees, which is the same ids. prompts.py has the words of a translation. Next: batching.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..common.errors import UserError

ROLES = ("user", "assistant")


def plain(tokenizer: Any, prompt: str, target: str | None = None) -> tuple[list[int], int]:
    """Token ids of two texts as they stand, between BOS and the end token; and where the target starts."""
    prompt_ids = _bos(tokenizer) + _ids(tokenizer, prompt)
    rest = [] if target is None else [*_ids(tokenizer, target), *_end(tokenizer)]
    return prompt_ids + rest, len(prompt_ids)


def bare(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a sentence without a prompt: BOS where the tokenizer puts one, the text, the end token."""
    return [*_bos(tokenizer), *_ids(tokenizer, disarm(tokenizer, text)), *_end(tokenizer)]


def chat(tokenizer: Any, messages: list[dict[str, str]], target: str) -> tuple[list[int], int]:
    """Token ids of messages and an answer by the chat template, and where the answer starts.

    Special tokens' texts in them are spelt with a space (`disarm`). Raises UserError for messages that the template
    refuses.
    """
    import jinja2

    told = [message | {"content": disarm(tokenizer, message["content"])} for message in messages]
    try:
        return answered(tokenizer, told, disarm(tokenizer, target))
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from None


def answered(tokenizer: Any, messages: list[dict[str, str]], target: str | None) -> tuple[list[int], int]:
    """Tokens of the prompt that decoding sees, and of the target and the token that ends its turn."""
    head = _render(tokenizer, messages, add_generation_prompt=True)
    prompt_ids = _single_bos(tokenizer, _ids(tokenizer, head))
    if target is None:
        return prompt_ids, len(prompt_ids)
    full = _render(tokenizer, [*messages, {"role": "assistant", "content": target}], add_generation_prompt=False)
    before, found, _ = full[len(head) :].partition(target)
    if not (full.startswith(head) and found):
        # The template rewrites earlier turns or the reply: the prompt as decoding sees it, the target, the end token.
        return [*prompt_ids, *_ids(tokenizer, target), *_end(tokenizer)], len(prompt_ids)
    ids = _single_bos(tokenizer, _ids(tokenizer, full))
    if ids[: len(prompt_ids)] != prompt_ids:  # tokens merge across the seam: keep decoding's prompt, tokenise the rest
        ids = prompt_ids + _ids(tokenizer, full[len(head) :])
    return _end_turn(tokenizer, ids, len(prompt_ids), len(_specials(tokenizer).findall(before))), len(prompt_ids)


def _end_turn(tokenizer: Any, ids: list[int], start: int, skip: int) -> list[int]:
    """Cut `ids` after the special token that ends the turn: the first from `start` on, `skip` ones passed over."""
    special = special_ids(tokenizer)
    places = [i for i in range(start, len(ids)) if ids[i] in special]
    return ids[: places[skip] + 1] if len(places) > skip else ids + _end(tokenizer)


def messages(tokenizer: Any, system: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """System turn, turns of examples (user, assistant), and of the last turn what the user says.

    The system text begins the first user turn where the template has no such role.
    """
    import jinja2

    roles = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)][:-1]
    whole = [{"role": "system", "content": system}, *roles]
    try:
        if system.strip() in _render(tokenizer, whole, add_generation_prompt=True):
            return whole
    except jinja2.TemplateError:  # Gemma-2: "System role not supported"
        pass
    return [{"role": "user", "content": f"{system}\n{turns[0][0]}"}, *roles[1:]]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    # Llama-3.2's template prints today's date unless it gets one: a prompt must not change from day to day.
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string="26 Jul 2024"
    )


def disarm(tokenizer: Any, sentence: str) -> str:
    """A text in which special tokens' texts are spelt with a space, so that it cannot forge a turn."""
    return _specials(tokenizer).sub(lambda match: f"{match[0][0]} {match[0][1:]}", sentence)


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are no text: BOS, ends, turns, padding."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token: name one in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _bos(tokenizer: Any) -> list[int]:
    """The BOS token if this tokenizer puts one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


@lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> re.Pattern[str]:
    texts = {tokenizer.convert_ids_to_tokens(i) for i in special_ids(tokenizer)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
