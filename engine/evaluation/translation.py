"""Batched greedy decoding: sentence pairs → one line of translation each, dealt out over the ranks.

    part = translate(model, tokenizer, prompt, pairs, batch_size=32, max_new_tokens=256, rank=r, world=w)
    lines = gather(part)                   # on every rank, in the order of the pairs
    write_lines(out / "translations/caneft/it.en", [line.text for line in lines])

A rank decodes with a whole model of its own, or together with others (models/large): then `rank` and `world` are its
group's, parallel.shares. Next: bleu.py scores the lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common import distributed
from ..common.files import LINE_BREAKS, write_json, write_lines
from ..data import languages, prompts
from ..data.prompts import Prompt
from ..data.records import Pair
from ..data.tokenizer import tokens, turns
from ..data.tokenizer.spelling import DETOKENISE
from ..methods.landermt.routing import router_of
from ..models import kinds
from ..models.large.partition import gathering, is_partitioned


class Line(NamedTuple):
    """A translation, on one line."""

    text: str
    cut: bool
    """Whether the model had not ended it after --evaluate.max-new-tokens."""


def translate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    pairs: Sequence[Pair],
    batch_size: int,
    max_new_tokens: int,
    rank: int = 0,
    world: int = 1,
    after_batch: Callable[[int, int], None] | None = None,
    shots: Sequence[Sequence[Pair]] | None = None,
) -> list[Line | None]:
    """This rank's translations of `pairs`, in their order; None where another rank decodes (none if `world` is 1).

    Greedy, left-padded. Sentences are sorted by prompt length, longest first, and rank r takes every world-th, so
    ranks end together; a batch may mix directions, and a routed model is told them. `after_batch(done, batches)` is
    called equally often on every rank, so that it may agree on a stop; it may raise. Each translation is one line:
    prefix stripped, line breaks turned into spaces. `shots` are each sentence's examples; where these are lines of text
    (no chat template) the answer is the line that the model writes, since a base model goes on with the next example.
    Of a partitioned model every rank runs as many batches as the others: one without sentences decodes one of another
    rank's and drops the answer.
    Raises UserError for a prompt with a token that the model has not.
    """
    assert 0 <= rank < world
    router = router_of(model)
    given = [()] * len(pairs) if shots is None else shots
    encoded = zip(pairs, given, strict=True)
    prompted = [prompts.encode(tokenizer, prompt, pair, with_target=False, shots=few)[0] for pair, few in encoded]
    named = [(f"{pair.domain}/test/{pair.index}", ids) for pair, ids in zip(pairs, prompted, strict=True)]
    tokens.check(tokenizer, named, model.get_input_embeddings().num_embeddings)
    kinds.look_at_lengths(model.config, named, max_new_tokens)
    order = sorted(range(len(pairs)), key=lambda i: (-len(prompted[i]), i))
    mine = order[rank::world]
    batches = -(-len(order[::world]) // batch_size)
    result: list[Line | None] = [None] * len(pairs)
    if not pairs:
        return result
    ends = end_tokens(model, tokenizer, prompt, pairs[0])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    stop = stop_text(tokenizer, any(given))
    in_step = is_partitioned(model)
    more = {"synced_gpus": in_step} | ({"stop_strings": [stop], "tokenizer": tokenizer} if stop else {})
    with gathering(model), _greedy(model, ends, pad, max_new_tokens):
        for number in range(batches):
            chosen = mine[number * batch_size : (number + 1) * batch_size]
            if chosen or in_step:
                run = chosen or order[-1:]  # a rank without a sentence takes part in the others' gathering
                if router is not None:
                    router.set(["-".join(pairs[i].languages) for i in run])
                made = _decode(model, [prompted[i] for i in run], pad, more)
                for i, ids in zip(chosen, made, strict=bool(chosen)):
                    result[i] = _line(tokenizer, ids, ends, stop, max_new_tokens, pairs[i].languages[1])
            if after_batch is not None:
                after_batch(number + 1, batches)
    return result


def stop_text(tokenizer: Any, examples: bool) -> str:
    """The text, not a token, that ends an answer: a chat's marker, or the line's end after examples; else nothing."""
    marker = tokens.stop_text(tokenizer)
    return marker or ("\n" if examples and not tokenizer.chat_template else "")


def _line(tokenizer: Any, ids: list[int], ends: list[int], stop: str, limit: int, language: str) -> Line:
    """What the model wrote, up to what ends it."""
    own = _until(ends, ids)
    text = tokenizer.decode(own, **DETOKENISE)
    text, stopped, _ = text.partition(stop) if stop else (text, "", "")
    return Line(as_line(text, language), len(own) >= limit and not stopped)


def gather(part: Sequence[Line | None]) -> list[Line]:
    """The ranks' parts as one list on every rank; a single process's part is complete already."""
    parts: list[Sequence[Line | None]] = [part]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, list(part))
    whole = [next((line for line in lines if line is not None), None) for lines in zip(*parts, strict=True)]
    assert None not in whole, f"sentence {whole.index(None)} was decoded by no rank"
    return whole


def _until(ends: list[int], ids: list[int]) -> list[int]:
    """The tokens before the first end token; padding follows it."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def as_line(text: str, language: str) -> str:
    """A model's answer as a line of the translations file: without the `English:` that it was asked to start with."""
    return LINE_BREAKS.sub(" ", languages.strip_prefix(text, language)).strip()


def end_tokens(model: nn.Module, tokenizer: Any, prompt: Prompt, pair: Pair) -> list[int]:
    """Ids that end a translation: the generation config's, the tokenizer's, and the one that ends a training sentence.

    The last is the chat template's end of turn, which some checkpoints' generation config does not list. The token of
    unknown characters is none: it stands in a text.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    unknown = turns.unknown_id(tokenizer)
    last = prompts.encode(tokenizer, prompt, pair)[0][-1]
    return sorted({int(end) for end in (*listed, tokenizer.eos_token_id, last) if end is not None} - {unknown})


@contextmanager
def _greedy(model: nn.Module, ends: list[int], pad: int, max_new_tokens: int) -> Iterator[None]:
    """The model decodes greedily in here, whatever its own generation config says.

    `generate` fills in what it is not given from that config: Llama-3.1's samples at temperature 0.6, Qwen2.5's has a
    repetition penalty of 1.05. So the config itself is replaced meanwhile.
    """
    from transformers import GenerationConfig

    theirs, training = model.generation_config, model.training
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = theirs
        model.train(training)


@torch.inference_mode()
def _decode(model: nn.Module, prompted: list[list[int]], pad: int, stop: dict[str, Any]) -> list[list[int]]:
    """Token lists of prompts → token lists of what the model adds to each; `stop`: more that `generate` ends at."""
    width = max(map(len, prompted))
    ids = torch.tensor([[pad] * (width - len(own)) + own for own in prompted])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompted])
    device = next(model.parameters()).device
    made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **stop)
    return made[:, width:].tolist()


class Translated:
    """Which domains of a system are translated: `translations/<system>/finished.json` has each file's sha256.

    It also has how many lines of each were `cut` at --evaluate.max-new-tokens. `identity` (plain JSON) is what they
    must have been made with: model, sentences, settings.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.record, self.identity = folder, folder / "finished.json", json.loads(json.dumps(identity))

    def has(self, name: str) -> bool:
        """Whether the file `name` is there, whole and of this identity; the same on every rank (a collective)."""
        return distributed.share_object(distributed.first(lambda: self._finished().get(name) == self._digest(name)))

    def write(self, name: str, lines: Sequence[Line]) -> None:
        """Write `lines` to the file `name`, and that it is finished. The first rank alone calls it."""
        kept = {other: digest for other, digest in self._finished().items() if (self.folder / other).is_file()}
        counts = {other: count for other, count in cut_lines(self.folder).items() if other in kept}
        write_lines(self.folder / name, [line.text for line in lines])
        files = kept | {name: self._digest(name)}
        counts |= {name: sum(line.cut for line in lines)}
        write_json(self.record, {"identity": self.identity, "files": files, "cut": counts})

    def _finished(self) -> dict[str, str]:
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            files = content["files"] if content["identity"] == self.identity else {}
            return files if isinstance(files, dict) else {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}

    def _digest(self, name: str) -> str:
        path = self.folder / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def cut_lines(folder: Path) -> dict[str, int]:
    """Of each file of a `translations/<system>` how many lines were cut; empty where an older version wrote them."""
    try:
        counts = json.loads((folder / "finished.json").read_text(encoding="utf-8"))["cut"]
        return {name: int(count) for name, count in counts.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
