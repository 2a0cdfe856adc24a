"""Texts and the turns of a chat as token ids: BOS, what is read, what is predicted, the token that ends it.

Every function that takes what is predicted returns all ids and where it starts; without it, the prompt that decoding
sees, which is the same ids. Prompt and target are tokenised as one text, as a reader of plain text would, and a plain
prompt never ends in white space: ` The` is one token, and a model that is shown a space alone was taught nothing about
what follows it. prompts.py has the words of a translation, turns.py those of a chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...common.errors import UserError
from . import turns

ANCHORS = ("\n", "a", ":")
"""Texts that are put before another one to see its tokens as they are in the middle of a text."""


def plain(tokenizer: Any, prompt: str, target: str | None = None) -> tuple[list[int], int]:
    """Token ids of two texts as they stand, between BOS and the end token; and where the target starts.

    White space at the prompt's end is the target's.
    """
    head = prompt.rstrip()
    rest = None if target is None else prompt[len(head) :] + target
    ids, start = _joined(tokenizer, head, rest)
    bos = _bos(tokenizer)
    return [*bos, *ids, *([] if rest is None else _end(tokenizer))], len(bos) + start


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
    """Tokens of the prompt that decoding sees, and of the target and the token that ends its turn.

    A marker that is plain text stands before that token: models that were taught it alone are stopped by its text.
    Raises UserError for a template without a use, and what jinja2 does for messages that it refuses.
    """
    turn = turns.turn(tokenizer)
    head = turns.render(tokenizer, messages, add_generation_prompt=True) + turn.lead
    if target is None:
        ids, start = _joined(tokenizer, head, None)
    else:
        ids, start = _joined(tokenizer, head, turn.seam + (target.strip() if turn.trims else target) + turn.close)
        ids += [] if turn.ends else _end(tokenizer)
    one = _single_bos(tokenizer, ids)
    return one, start - (len(ids) - len(one))


def disarm(tokenizer: Any, sentence: str) -> str:
    """A text in which special tokens' texts and a chat's markers are spelt with a space, so that it forges no turn."""
    return turns.forgeable(tokenizer).sub(lambda match: f"{match[0][0]} {match[0][1:]}", sentence)


def check(tokenizer: Any, named: Iterable[tuple[str, Sequence[int]]], rows: int) -> None:
    """Raises UserError for a text with a token that an embedding of `rows` rows has not; `named` are (name, ids)."""
    for name, ids in named:
        if ids and max(ids) >= rows:
            text = tokenizer.decode([max(ids)])
            raise UserError(
                f"{name}: {text!r} is token {max(ids)}, but the model's embedding has {rows} rows: take the tokenizer "
                "that belongs to the model, or the model whose embedding was resized for it"
            )


def _joined(tokenizer: Any, head: str, rest: str | None) -> tuple[list[int], int]:
    """Ids of both texts as one, and where the second starts; the first's ids are those that it has alone.

    Where tokens merge across the seam, the second's ids are those that it has after another text.
    """
    ids = _ids(tokenizer, head)
    if rest is None:
        return ids, len(ids)
    whole = _ids(tokenizer, head + rest)
    return (whole if whole[: len(ids)] == ids else ids + _inside(tokenizer, rest)), len(ids)


def _inside(tokenizer: Any, text: str) -> list[int]:
    """A text's ids in the middle of a text: without the space that sentencepiece puts before a whole one."""
    for anchor in ANCHORS:
        before, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token: name one in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def shown(tokenizer: Any) -> list[int]:
    """Ids of a short question and its answer: what all prompts and targets have."""
    if tokenizer.chat_template:
        return answered(tokenizer, [{"role": "user", "content": turns.ASKED}], turns.ANSWER)[0]
    return plain(tokenizer, turns.ASKED, turns.ANSWER)[0]


def ends(tokenizer: Any) -> list[int]:
    """Ids that end an answer in training, and the tokenizer's end token; ascending."""
    return sorted({shown(tokenizer)[-1], tokenizer.eos_token_id} - {None})


def stop_text(tokenizer: Any) -> str:
    """The marker that ends an answer where it is plain text and no token, else nothing."""
    return turns.turn(tokenizer).stop if tokenizer.chat_template else ""


def _bos(tokenizer: Any) -> list[int]:
    """The BOS token if this tokenizer puts one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids
