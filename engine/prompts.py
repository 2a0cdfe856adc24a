"""A sentence pair as the tokens that a model reads: prompt, target, end of turn.

The prompt's tokens are the same in scoring, training and decoding: `encode` with a target starts with exactly what
`encode` without one returns. Chat models get their tokenizer's chat template, others a plain one. Next: batching.py.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .batching import Example
    from .config import DataConfig
    from .corpus import Pair

# fmt: off
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician",
    "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay",
    "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}
# fmt: on
"""Language code → the name that prompts use."""

DOMAINS = {
    "it": "IT",
    "koran": "Koran",
    "bible": "Bible",
    "tatoeba": "everyday",
    "med": "medical",
    "sub": "subtitles",
    "edu": "education",
    "spok": "spoken",
    "thes": "thesis",
    "sci": "science",
    "blog": "microblog",
}
"""Domain → the name that prompts use, where it is not the domain's own (the short ones are CANEFT's file names)."""

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


ROLES = ("user", "assistant")


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


def draw(count: int, *key: object) -> int:
    """A number from 0 to `count` - 1 that depends on `key` alone: the same in every version of every library."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % count


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


def language(code: str) -> str:
    """The name of a language code. Raises UserError if it is not in LANGUAGES."""
    if code not in LANGUAGES:
        raise UserError(f"--data.pair or --data.pairs: language {code!r} is unknown; known are {' '.join(LANGUAGES)}")
    return LANGUAGES[code]


def encode(
    tokenizer: Any, prompt: Prompt, pair: Pair, with_target: bool = True, shots: Sequence[Pair] = ()
) -> tuple[list[int], int]:
    """Token ids of the prompt, and of target and end-of-turn token if `with_target`; and where the target starts.

    Training ends with the end-of-turn token: what a template renders after it (Qwen's newline) is left out. A special
    token's text inside a sentence is spelt with a space, so that data cannot forge a turn. `shots` are translated
    examples that come before the sentence, as turns of their own, or as lines where there is no chat template.
    """
    system = prompt.instruction(pair).format(**_fields(tokenizer, pair))
    turns = [_turns(tokenizer, prompt, each) for each in (*shots, pair)]
    user, target = turns[-1]
    if not tokenizer.chat_template:
        opening = prompt.target.partition("{reference}")[0].format(**_fields(tokenizer, pair))
        head = "\n".join([system, *(text for turn in turns[:-1] for text in turn), user, opening])
        prompt_ids = _plain_bos(tokenizer) + _tokens(tokenizer, head)
        if not with_target:
            return prompt_ids, len(prompt_ids)
        tail = _tokens(tokenizer, target[len(opening) :])
        return [*prompt_ids, *tail, *_eos(tokenizer)], len(prompt_ids)
    return _encode_chat(tokenizer, system, turns, with_target)


def _fields(tokenizer: Any, pair: Pair) -> dict[str, str]:
    return {
        "src": language(pair.languages[0]),
        "tgt": language(pair.languages[1]),
        "domain": DOMAINS.get(pair.domain, pair.domain),
        "sentence": _disarm(tokenizer, pair.source),
        "reference": _disarm(tokenizer, pair.target),
    }


def bare(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a sentence without a prompt: BOS where the tokenizer puts one, the text, the end token."""
    return [*_plain_bos(tokenizer), *_tokens(tokenizer, _disarm(tokenizer, text)), *_eos(tokenizer)]


def _turns(tokenizer: Any, prompt: Prompt, pair: Pair) -> tuple[str, str]:
    """What the user says and what is to be answered."""
    fields = _fields(tokenizer, pair)
    return prompt.user.format(**fields), prompt.target.format(**fields)


def plain(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], int]:
    """Token ids of two texts as they stand, between BOS and the end token; and where the target starts."""
    prompt_ids = _plain_bos(tokenizer) + _tokens(tokenizer, prompt)
    return [*prompt_ids, *_tokens(tokenizer, target), *_eos(tokenizer)], len(prompt_ids)


def chat(tokenizer: Any, messages: list[dict[str, str]], target: str) -> tuple[list[int], int]:
    """Token ids of messages and an answer by the chat template, and where the answer starts.

    Special tokens' texts in them are spelt with a space, as in `encode`. Raises UserError for messages that the
    template refuses.
    """
    import jinja2

    told = [message | {"content": _disarm(tokenizer, message["content"])} for message in messages]
    try:
        return _encode_messages(tokenizer, told, _disarm(tokenizer, target), True)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from None


def _encode_chat(
    tokenizer: Any, system: str, turns: Sequence[tuple[str, str]], with_target: bool
) -> tuple[list[int], int]:
    """The last turn is the sentence's own, those before it are examples."""
    return _encode_messages(tokenizer, _messages(tokenizer, system, turns), turns[-1][1], with_target)


def _encode_messages(
    tokenizer: Any, messages: list[dict[str, str]], target: str, with_target: bool
) -> tuple[list[int], int]:
    """Tokens of the prompt that decoding sees, and of the target and the token that ends its turn."""
    head = _render(tokenizer, messages, add_generation_prompt=True)
    prompt_ids = _single_bos(tokenizer, _tokens(tokenizer, head))
    if not with_target:
        return prompt_ids, len(prompt_ids)
    full = _render(tokenizer, [*messages, {"role": "assistant", "content": target}], add_generation_prompt=False)
    before, found, _ = full[len(head) :].partition(target)
    if not (full.startswith(head) and found):
        # The template rewrites earlier turns or the reply: the prompt as decoding sees it, the target, the end token.
        return [*prompt_ids, *_tokens(tokenizer, target), *_eos(tokenizer)], len(prompt_ids)
    ids = _single_bos(tokenizer, _tokens(tokenizer, full))
    if ids[: len(prompt_ids)] != prompt_ids:  # tokens merge across the seam: keep decoding's prompt, tokenise the rest
        ids = prompt_ids + _tokens(tokenizer, full[len(head) :])
    return _end_turn(tokenizer, ids, len(prompt_ids), len(_specials(tokenizer).findall(before))), len(prompt_ids)


def _end_turn(tokenizer: Any, ids: list[int], start: int, skip: int) -> list[int]:
    """Cut `ids` after the special token that ends the turn: the first from `start` on, `skip` ones passed over."""
    special = _special_ids(tokenizer)
    places = [i for i in range(start, len(ids)) if ids[i] in special]
    return ids[: places[skip] + 1] if len(places) > skip else ids + _eos(tokenizer)


def _messages(tokenizer: Any, system: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """System turn, turns of examples, user turn; the system text begins the first user turn where there is no role."""
    import jinja2

    roles = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)][:-1]
    messages = [{"role": "system", "content": system}, *roles]
    try:
        if system.strip() in _render(tokenizer, messages, add_generation_prompt=True):
            return messages
    except jinja2.TemplateError:  # Gemma-2: "System role not supported"
        pass
    return [{"role": "user", "content": f"{system}\n{turns[0][0]}"}, *roles[1:]]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    # Llama-3.2's template prints today's date unless it gets one: a prompt must not change from day to day.
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string="26 Jul 2024"
    )


def strip_prefix(text: str, target_language: str) -> str:
    """A hypothesis without the "English:" before it; `target_language` is a code or a name."""
    name = LANGUAGES.get(target_language, target_language)
    return re.sub(rf"^\s*{re.escape(name)}\s*[:：]", "", text, count=1, flags=re.IGNORECASE).strip()


def show(tokenizer: Any, example: Example) -> str:
    """One sample decoded, the tokens that are trained between ⟦ and ⟧."""
    ids, start = example.input_ids, example.target_start
    kind = "chat template" if tokenizer.chat_template else "plain template (the tokenizer has no chat template)"
    return (
        f"{example.uid}, {kind}: {start} tokens of prompt, {len(ids) - start} trained\n"
        f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧"
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token: name one in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _plain_bos(tokenizer: Any) -> list[int]:
    """The BOS token if this tokenizer puts one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


@lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> re.Pattern[str]:
    texts = {tokenizer.convert_ids_to_tokens(i) for i in _special_ids(tokenizer)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _disarm(tokenizer: Any, sentence: str) -> str:
    return _specials(tokenizer).sub(lambda match: f"{match[0][0]} {match[0][1:]}", sentence)
