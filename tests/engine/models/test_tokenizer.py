"""A tokenizer is looked at where it is loaded: what it loses, and whether the model has its tokens."""

from __future__ import annotations

import pytest
import toys
from kinds import tokenizer_of
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.tokenizer import spelling, tokens
from slicetune.engine.models import load


def saved(folder, tokenizer):
    """A small model's folder with this tokenizer in it."""
    toys.model_of_bytes("llama").save_pretrained(folder)  # an embedding of 263 rows
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_loses_spaces_is_refused():
    """As a byte-level one does that transformers below 5.22 takes for a Llama's."""
    tokenizer = toys.bytes_tokenizer(True)
    tokenizer.backend_tokenizer.decoder = decoders.Replace("Ġ", "")
    with pytest.raises(
        UserError, match=r"models/x: its tokenizer gives 'a b' back as 'ab'.*transformers 5\.22"
    ) as error:
        spelling.warnings(tokenizer, "models/x")
    assert "\n" not in str(error.value)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(UserError, match="back as 'aĠb'"):
        spelling.warnings(tokenizer, "models/x")


def test_what_else_a_tokenizer_loses_is_said():
    for kind in ("bytes", "tiktoken", "llama2", "llama2_legacy", "sentencepiece_bytes", "sentencepiece"):
        assert spelling.warnings(tokenizer_of(kind, "chatml"), "m") == []
    (line,) = spelling.warnings(tokenizer_of("wordpiece", "none"), "m")
    lost = "capitals, line breaks, accents, the spaces at punctuation"
    assert line == f"m: its tokenizer does not keep {lost}, so no translation has them"


def test_targets_that_cannot_be_written_are_counted():
    pieces = tokenizer_of("sentencepiece", "chatml")  # without bytes to fall back on
    assert spelling.lost_targets(pieces, ["the house", "the house </s>"]) is None
    lost = spelling.lost_targets(pieces, ["the “house”", "the house", "漢"])
    assert (lost.of, lost.unknown, lost.altered) == (3, 2, 0)
    assert lost.line("it/train").startswith(
        "warning: it/train: of 3 targets 2 have characters that the tokenizer has no token for, so no model writes them"
    )
    lost = spelling.lost_targets(tokenizer_of("wordpiece", "none"), ["The house", "the house"])
    assert (lost.unknown, lost.altered, lost.first) == (0, 1, "'The house' comes back as 'the house'")
    silent = toys.bytes_tokenizer(False)  # a vocabulary without a character and without an unknown token
    plain = PreTrainedTokenizerFast(tokenizer_object=_without(silent, "Ã"), eos_token="</s>")
    assert spelling.lost_targets(plain, ["ä", "a"]).altered == 1


def _without(tokenizer, piece):
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["model"]["vocab"][piece]
    return Tokenizer.from_str(json.dumps(content))


def test_tokens_beyond_the_embedding(tmp_path):
    assert load.load_tokenizer(saved(tmp_path / "fits", toys.bytes_tokenizer(True))).pad_token == "<pad>"
    extra = toys.bytes_tokenizer(True)
    extra.add_tokens(["Hund"])  # no prompt has it: the sentence that has is named
    loaded = load.load_tokenizer(saved(tmp_path / "extra", extra))
    ids = tokens.plain(loaded, "Der Hund.", "a")[0]
    with pytest.raises(UserError, match=r"^it/train/3: 'Hund' is token 263, but the model's embedding has 263 rows"):
        tokens.check(loaded, [("it/train/2", [0]), ("it/train/3", ids)], 263)
    marked = toys.bytes_tokenizer(True)
    marked.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    marked.chat_template = marked.chat_template.replace("<|end|>", "<|new|>")
    with pytest.raises(UserError, match=r"every prompt: '<\|new\|>' is token 263"):
        load.load_tokenizer(saved(tmp_path / "marked", marked))
    endless = toys.bytes_tokenizer(True)
    endless.eos_token = endless.pad_token = None  # its template ends a turn all the same
    assert load.load_tokenizer(saved(tmp_path / "endless", endless)).pad_token == "<|end|>"
    padded = toys.bytes_tokenizer(True)
    padded.add_special_tokens({"pad_token": "<new>"})  # a padding token is no part of the model
    assert load.load_tokenizer(saved(tmp_path / "padded", padded)).pad_token == "</s>"
