"""Tokenizers of the kinds that exist, a few hundred tokens each, and the chat templates that people have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Translate from German into English. Domain: IT.\nGerman: Das Haus ist alt und neu.\nEnglish: The house is old.",
    "system user assistant model Today is it and he said yes and no. 2024-07-26 0123456789 (!?) [/END] <think> a, yes",
] * 6
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _bytes(pieces: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pieces, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _learnt(made, trainers.BpeTrainer, list(SPECIAL), vocab_size=420, initial_alphabet=alphabet)


def _spaced(prefix: str, bytes_: bool) -> Tokenizer:
    """Sentencepiece's BPE; `▁` stands before `never` a text (Gemma), the `first` piece of one (Llama-2), or each."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=bytes_))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    special = ["<unk>", *SPECIAL, *(BYTES if bytes_ else ())]
    made = _learnt(made, trainers.BpeTrainer, special, vocab_size=len(special) + 150)
    if prefix == "each":  # as older files have it
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix, split=False)
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(plain)
    return _bytes_are_text(made) if bytes_ else made


def _bytes_are_text(made: Tokenizer) -> Tokenizer:
    """The trainer makes the bytes special, which no real tokenizer does: `decode` would leave them out."""
    import json

    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(content))


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _learnt(made, trainers.WordPieceTrainer, ["<unk>", *SPECIAL], vocab_size=300)


def _learnt(made: Tokenizer, trainer: Callable, special: list[str], **settings: object) -> Tokenizer:
    made.train_from_iterator(TEXTS, trainer(special_tokens=special, show_progress=False, **settings))
    bos = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "tiktoken": lambda: _bytes(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "sentencepiece": lambda: _spaced("never", bytes_=False),
    "sentencepiece_bytes": lambda: _spaced("never", bytes_=True),
    "llama2": lambda: _spaced("first", bytes_=True),
    "llama2_legacy": lambda: _spaced("each", bytes_=True),
    "wordpiece": _wordpiece,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token if loop.first else '' }}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
SHUT = "<think>\n\n</think>\n\n"
QWEN3 = CHATML.replace(
    "{{ m.content }}", f"{{% if m.role == 'assistant' and loop.last %}}{SHUT}{{% endif %}}{{{{ m.content }}}}"
)
QWEN3 = QWEN3.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}" + SHUT + "{% endif %}{% endif %}",
)
THINKS = CHATML.replace("{{ m.content }}", f"{{% if m.role == 'assistant' %}}{SHUT}{{% endif %}}{{{{ m.content }}}}")
THINKS = THINKS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
TEMPLATES: dict[str, str | dict[str, str] | None] = {
    "none": None,
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama2": LLAMA2,
    "llama2_bos": "{{ bos_token }}" + LLAMA2,  # it comes twice
    "dated": "<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}, {{ strftime_now('%-d %B') }}."
    "<|im_end|>\n" + CHATML,
    "named": {"default": CHATML, "tool_use": "{{ messages }}"},
    "qwen3": QWEN3,
    "thinks": THINKS,  # it opens thoughts, and renders an answer after empty ones
    "reasons": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),  # it renders none
    "normal": CHATML.replace("<|im_end|>", "<|end|>"),
    "text": CHATML.replace("<|im_end|>", "[/END]"),
    "text_token": CHATML.replace("<|im_end|>", "[/END]<|im_end|>"),
    "normal_token": CHATML.replace("<|im_end|>", "<|end|></s>"),
}


@cache
def _backend(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer_of(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A new tokenizer of a kind with a chat template; `normal…` has an added token that is not special."""
    inner = Tokenizer.from_str(_backend(kind))
    unknown = "<unk>" if inner.token_to_id("<unk>") is not None else None
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=unknown,
        additional_special_tokens=list(SPECIAL[3:]),
    )
    if template.startswith("normal"):
        made.add_tokens([AddedToken("<|end|>", normalized=False)])
    made.chat_template = TEMPLATES[template]
    return made
