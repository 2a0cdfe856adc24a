"""Batched greedy decoding: sentence pairs → one line of translation each, dealt out over the ranks.

    part = translate(model, tokenizer, prompt, pairs, batch_size=32, max_new_tokens=256, rank=r, world=w)
    hypotheses = gather(part)              # on every rank, in the order of the pairs
    write_lines(out / "translations/caneft/it.en", hypotheses)

Every rank decodes with a whole model of its own. Next: bleu.py scores the lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import distributed
from ..common.files import LINE_BREAKS, write_json, write_lines
from ..data import languages, prompts
from ..data.prompts import Prompt
from ..data.records import Pair
from ..methods.landermt.routing import router_of

DETOKENISE = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Exactly what the model wrote: some tokenizers' configs would have ` .` turned into `.` and `do not` into `don't`."""


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
) -> list[str | None]:
    """This rank's translations of `pairs`, in their order; None where another rank decodes (none if `world` is 1).

    Greedy, left-padded. Sentences are sorted by prompt length, longest first, and rank r takes every world-th, so
    ranks end together; a batch may mix directions, and a routed model is told them. `after_batch(done, batches)` is
    called equally often on every rank, so that it may agree on a stop; it may raise. Each translation is one line:
    prefix stripped, line breaks turned into spaces. `shots` are each sentence's examples; where these are lines of text
    (no chat template) the answer is the line that the model writes, since a base model goes on with the next example.
    """
    assert 0 <= rank < world
    router = router_of(model)
    given = [()] * len(pairs) if shots is None else shots
    encoded = zip(pairs, given, strict=True)
    prompted = [prompts.encode(tokenizer, prompt, pair, with_target=False, shots=few)[0] for pair, few in encoded]
    order = sorted(range(len(pairs)), key=lambda i: (-len(prompted[i]), i))
    mine = order[rank::world]
    batches = -(-len(order[::world]) // batch_size)
    result: list[str | None] = [None] * len(pairs)
    if not pairs:
        return result
    ends = end_tokens(model, tokenizer, prompt, pairs[0])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    stop = {"stop_strings": ["\n"], "tokenizer": tokenizer} if any(given) and not tokenizer.chat_template else {}
    with _greedy(model, ends, pad, max_new_tokens):
        for number in range(batches):
            chosen = mine[number * batch_size : (number + 1) * batch_size]
            if chosen:
                if router is not None:
                    router.set(["-".join(pairs[i].languages) for i in chosen])
                for i, tokens in zip(chosen, _decode(model, [prompted[i] for i in chosen], pad, stop), strict=True):
                    text = tokenizer.decode(_until(ends, tokens), **DETOKENISE)
                    result[i] = as_line(text.partition("\n")[0] if stop else text, pairs[i].languages[1])
            if after_batch is not None:
                after_batch(number + 1, batches)
    return result


def gather(part: Sequence[str | None]) -> list[str]:
    """The ranks' parts as one list on every rank; a single process's part is complete already."""
    parts: list[Sequence[str | None]] = [part]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, list(part))
    whole = [next((line for line in lines if line is not None), None) for lines in zip(*parts, strict=True)]
    assert None not in whole, f"sentence {whole.index(None)} was decoded by no rank"
    return whole


def _until(ends: list[int], tokens: list[int]) -> list[int]:
    """The tokens before the first end token; padding follows it."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def as_line(text: str, language: str) -> str:
    """A model's answer as a line of the translations file: without the `English:` that it was asked to start with."""
    return LINE_BREAKS.sub(" ", languages.strip_prefix(text, language)).strip()


def end_tokens(model: nn.Module, tokenizer: Any, prompt: Prompt, pair: Pair) -> list[int]:
    """Ids that end a translation: the generation config's, the tokenizer's, and the one that ends a training sentence.

    The last is the chat template's end of turn, which some checkpoints' generation config does not list.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    last = prompts.encode(tokenizer, prompt, pair)[0][-1]
    return sorted({int(end) for end in (*listed, tokenizer.eos_token_id, last) if end is not None})


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
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in prompted])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompted])
    device = next(model.parameters()).device
    made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **stop)
    return made[:, width:].tolist()


class Translated:
    """Which domains of a system are translated: `translations/<system>/finished.json` has each file's sha256.

    `identity` (plain JSON) is what they must have been made with: model, sentences, settings.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.record, self.identity = folder, folder / "finished.json", json.loads(json.dumps(identity))

    def has(self, name: str) -> bool:
        """Whether the file `name` is there, whole and of this identity; the same on every rank (a collective)."""
        return distributed.share_object(distributed.first(lambda: self._finished().get(name) == self._digest(name)))

    def write(self, name: str, lines: Sequence[str]) -> None:
        """Write `lines` to the file `name`, and that it is finished. The first rank alone calls it."""
        kept = {other: digest for other, digest in self._finished().items() if (self.folder / other).is_file()}
        write_lines(self.folder / name, lines)
        content = {"identity": self.identity, "files": kept | {name: self._digest(name)}}
        write_json(self.record, content)

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
