"""A sentencepiece file (BPE) as a fast tokenizer, so that no tokenizer code of a model folder has to run.

    tokenizer = fast_tokenizer(Path("model/tokenizer.model"), settings)     # settings: tokenizer_config.json
    tokenizer.save_pretrained(out)

transformers' own converter is for Llama's file: it forces a space before the text and three special pieces. This one
follows what the file itself says, and compares the outcome with sentencepiece's own on PROBES before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of pieces (sentencepiece_model.proto)."""
BPE = 2
"""Kind of model."""
SPACE = "▁"

PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "In 2024 waren es 1234567890 Stück zu 3,14159 €; 50 % davon — «neu».",
    "  two before,  two   three inside, two after  ",
    "def f(x):\n\tif x:\n        return x + 1\n\n\n    # done\r\n",
    "Füße, naïve, Łódź, Ελληνικά, Привет, עברית, العربية",
    "百川智能在2023年发布了大模型。日本語、한국어 ﬁ ① Ａ",
    "😀👩‍👩‍👧 𝔘𝔫𝔦 \u200b\u00a0\u3000 \x00",
    "<0x41> a▁b",
    "",
)
"""Texts that both tokenizers must spell alike."""


def fast_tokenizer(file: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a sentencepiece file with the special tokens that `settings` names (`<s>`, `</s>`, `<unk>`).

    It puts the BOS token before a text, and EOS behind it, where `settings` has `add_bos_token` or `add_eos_token`.
    Raises UserError for a file that is none, a kind that cannot be converted, and a probe that comes out otherwise.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = convert(file)
    _compare(file, tokenizer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    names = {key: _text(settings.get(key), usual) for key, usual in names.items()}
    for key, token in names.items():
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{file}: has no piece {token!r}, which tokenizer_config.json calls {key}")
    before, after = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
    if before or after:
        parts = [names["bos_token"]] * bool(before) + ["$A"] + [names["eos_token"]] * bool(after)
        used = [(names[key], tokenizer.token_to_id(names[key])) for key in ("bos_token", "eos_token")]
        tokenizer.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def convert(file: Path) -> Tokenizer:
    """The pieces, merges, normalisation and byte fallback that the file holds."""
    from tokenizers import AddedToken, Tokenizer, models

    proto = _read(file)
    kinds = {piece.type for piece in proto.pieces}
    suffix, prefix = proto.trainer_spec.treat_whitespace_as_suffix, proto.normalizer_spec.add_dummy_prefix
    if proto.trainer_spec.model_type != BPE or UNUSED in kinds or suffix or (prefix and USER_DEFINED in kinds):
        raise UserError(
            f"{file}: only a BPE model can be converted, without unused pieces, spaces at a word's end, or a user's "
            "pieces together with a space forced before the text"
        )
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges(normal, vocab),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(prefix)
    for piece in proto.pieces:  # in the file's order, so that ids stay; a user's piece is matched after normalisation
        if piece.type in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=True, special=False)])
    return tokenizer


def merges(normal: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces whose union is a piece, the highest score first: the order in which sentencepiece joins them.

    Ties (several ways to make a piece) by the ids of the parts, as transformers has it.
    """
    ranked = []
    for piece, score in normal.items():
        parts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        ranked += [(-score, vocab[a], vocab[b], a, b) for a, b in parts if a in normal and b in normal]
    return [(a, b) for *_, a, b in sorted(ranked)]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(dummy_prefix: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * dummy_prefix)


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{file}: not a sentencepiece model ({error}): download it again") from None
    if not proto.pieces or len({piece.piece for piece in proto.pieces}) != len(proto.pieces):
        raise UserError(f"{file}: not a sentencepiece model (no pieces, or one twice): download it again")
    return proto


def _compare(file: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where the two spell a probe differently; the text of a special token is no probe."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(file))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    for probe in PROBES:
        if any(token in probe for token in special):
            continue
        if tokenizer.encode(probe, add_special_tokens=False).ids != theirs.encode(probe):
            raise UserError(f"{file}: the converted tokenizer spells {probe!r} otherwise than sentencepiece does")


def _text(token: Any, usual: str) -> str:
    """A special token as tokenizer_config.json has it: a string, or a dict with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else usual
