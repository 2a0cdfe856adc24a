"""Tokenised sentences into batches, and the order in which training reads them.

Prompts come from prompts.py; models read `Batch`. Labels come from where a sample's target starts, never from token
ids, so a tokenizer whose padding token is its end token masks nothing by accident.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import prompts

if TYPE_CHECKING:
    from .config import DataConfig
    from .corpus import Pair


@dataclass
class Example:
    """One tokenised sentence: prompt, target, end of turn."""

    input_ids: list[int]
    target_start: int
    """input_ids[target_start:] are the target's tokens, the end of turn included."""
    group: int
    """Index into DataConfig.groups: the direction where a run has several, else the domain."""
    uid: str
    """`<domain>/<split>/<record>`, for example it/train/17; `<pair>/` before it where a run has several directions."""


@dataclass
class Batch:
    """What one forward takes. `rows` is 1 when packed; `L` is the number of target tokens."""

    input_ids: Tensor
    """int64 [rows, width]."""
    position_ids: Tensor | None
    """int64 [rows, width], restarting with every sample, when packed; None when padded (on the right)."""
    segments: Tensor
    """int32 [samples, 2]: half-open range of each sample's tokens in the flattened [rows * width]."""
    target_segments: Tensor
    """int32 [samples, 2]: half-open range of the flattened positions that predict the sample's target tokens."""
    predict: Tensor
    """int64 [L]: flattened positions whose logits are needed, sample by sample."""
    target: Tensor
    """int64 [L]: the token that each of them must predict."""
    target_sample: Tensor
    """int64 [L]: the sample that each belongs to."""
    groups: Tensor
    """int64 [samples]."""
    uids: list[str]
    weight: Tensor
    """float32 [samples]: 1, or 0 for a sentence that only fills a rank's share."""
    ranges: list[tuple[int, int]]
    """`segments` on the host, so that nobody has to ask the device …"""
    target_ranges: list[tuple[int, int]]
    """… and `target_segments`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; the host does not wait for a GPU."""
        device = torch.device(device)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(**{field.name: moved(getattr(self, field.name)) for field in dataclasses.fields(self)})


def examples(
    tokenizer: Any,
    data: DataConfig,
    pairs: Sequence[Pair],
    groups: Sequence[str],
    split: str,
    max_length: int,
    seed: int = 0,
) -> tuple[list[Example], Counter[str]]:
    """Tokenise `pairs`, of the direction `data.pair`, in their order; `Example.group` counts `groups` from 0.

    `seed` is that of --data.prompt templates. Sentences are dropped whole, never cut. The counter says how many and
    why: "<domain>: <reason>" → sentences.
    """
    prompt, kept, dropped = prompts.resolve(data, seed), [], Counter[str]()
    number = {name: i for i, name in enumerate(groups)}
    for pair in pairs:
        ids, start = prompts.encode(tokenizer, prompt, pair)
        name = data.name(pair.domain)
        if start >= max_length:
            dropped[f"{name}: the prompt alone has {max_length} tokens or more"] += 1
        elif len(ids) > max_length:
            dropped[f"{name}: longer than {max_length} tokens"] += 1
        elif not 0 < start < len(ids):
            dropped[f"{name}: no token to predict"] += 1
        else:
            group = number[data.pair if data.pairs else pair.domain]
            kept.append(Example(ids, start, group, f"{name}/{split}/{pair.index}"))
    return kept, dropped


def pack(examples: Sequence[Example], weights: Sequence[float] | None = None) -> Batch:
    """One row [1, total tokens] without padding; position_ids restart with every sample."""
    lengths = [len(example.input_ids) for example in examples]
    starts = list(accumulate(lengths, initial=0))[:-1]
    ids = torch.tensor([[token for example in examples for token in example.input_ids]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return _batch(examples, starts, ids, positions, weights)


def pad(examples: Sequence[Example], pad_id: int, weights: Sequence[float] | None = None) -> Batch:
    """One row a sample [samples, longest], padded on the right with `pad_id`."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    return _batch(examples, [row * width for row in range(len(examples))], ids, None, weights)


def _batch(
    examples: Sequence[Example],
    starts: Sequence[int],
    ids: Tensor,
    positions: Tensor | None,
    weights: Sequence[float] | None,
) -> Batch:
    """Index the targets of samples whose tokens begin at `starts` in the flattened `ids`."""
    assert all(0 < e.target_start < len(e.input_ids) for e in examples), "a sample without a token to predict"
    assert weights is None or len(weights) == len(examples)
    placed = list(zip(starts, examples, strict=True))
    segments = [(at, at + len(e.input_ids)) for at, e in placed]
    predicting = [(at + e.target_start - 1, at + len(e.input_ids) - 1) for at, e in placed]
    predict = torch.cat([torch.arange(first, last) for first, last in predicting])
    counts = torch.tensor([last - first for first, last in predicting])
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=torch.tensor(segments, dtype=torch.int32),
        target_segments=torch.tensor(predicting, dtype=torch.int32),
        predict=predict,
        target=ids.flatten()[predict + 1],
        target_sample=torch.repeat_interleave(torch.arange(len(examples)), counts),
        groups=torch.tensor([e.group for e in examples]),
        uids=[e.uid for e in examples],
        weight=torch.ones(len(examples)) if weights is None else torch.tensor(weights, dtype=torch.float32),
        ranges=segments,
        target_ranges=predicting,
    )


def batches_by_tokens(examples: Sequence[Example], tokens_per_batch: int, packed: bool) -> Iterator[list[int]]:
    """Indices of batches of at most `tokens_per_batch` tokens (padding counted when not `packed`), for scoring and dev.

    Sentences are sorted by length, ties by index, longest first (a batch that does not fit in memory is the first);
    every sentence comes once. A sentence longer than the budget is a batch of its own.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    batch: list[int] = []
    used = 0
    for i in order:
        length = len(examples[i].input_ids)
        width = len(examples[batch[0]].input_ids) if batch else length
        cost = used + length if packed else (len(batch) + 1) * width
        if batch and cost > tokens_per_batch:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += length
    if batch:
        yield batch


def shuffled(items: Iterable[int], *key: object) -> list[int]:
    """`items` in an order that depends on `key` alone: the same in every version of every library.

    They are sorted by a hash of (key, item), so leaving some out does not change the order of the others.
    """
    prefix = "/".join(map(str, key))

    def digest(item: int) -> bytes:
        return hashlib.blake2b(f"{prefix}/{item}".encode(), digest_size=16).digest()

    return sorted(items, key=digest)


class Order:
    """Which sentences each optimizer step reads: a function of (seed, epoch, step), so a resumed run needs no state.

    It does not know of ranks: `share` deals an update's sentences out. The last update of an epoch has what is left.
    """

    def __init__(self, seed: int, sentences: int, global_batch: int) -> None:
        assert sentences > 0
        assert global_batch > 0
        self.seed, self.sentences, self.global_batch = seed, sentences, global_batch
        self.updates_per_epoch = -(-sentences // global_batch)
        self._epoch, self._permutation = -1, []  # of the epoch read last

    def update(self, epoch: int, step: int) -> list[int]:
        """Indices of the sentences of optimizer step `step` (0 … updates_per_epoch - 1, within the epoch)."""
        assert 0 <= step < self.updates_per_epoch, f"an epoch has {self.updates_per_epoch} updates, not a number {step}"
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, shuffled(range(self.sentences), "order", self.seed, epoch)
        return self._permutation[step * self.global_batch : (step + 1) * self.global_batch]

    def share(self, epoch: int, step: int, rank: int, world: int, accumulation: int) -> list[list[int]]:
        """The micro-batches of `rank` in that update."""
        return share(self.update(epoch, step), rank, world, accumulation)


class PairOrder:
    """As Order, where every micro-batch holds sentences of one group (LANDeRMT trains on batches of one pair).

    `groups[i]` is the group of sentence i. Each epoch a group's sentences are shuffled and cut into micro-batches of
    `micro_batch` (its last one may be smaller), those of all groups are shuffled, and an update is `micro_batches` of
    them: whichever pairs they are of.
    """

    def __init__(self, seed: int, groups: Sequence[int], micro_batches: int, micro_batch: int) -> None:
        assert groups
        self.seed, self.micro_batches, self.micro_batch = seed, micro_batches, micro_batch
        self.members: dict[int, list[int]] = {group: [] for group in sorted(set(groups))}
        for i, group in enumerate(groups):
            self.members[group].append(i)
        count = sum(-(-len(members) // micro_batch) for members in self.members.values())
        self.updates_per_epoch = -(-count // micro_batches)
        self._epoch, self._cut = -1, []  # micro-batches of the epoch read last

    def update(self, epoch: int, step: int) -> list[int]:
        """Indices of the sentences of optimizer step `step` (0 … updates_per_epoch - 1, within the epoch)."""
        return [i for micro in self._update(epoch, step) for i in micro]

    def share(self, epoch: int, step: int, rank: int, world: int, accumulation: int) -> list[list[int]]:
        """The `accumulation` micro-batches of `rank` in that update; [] where there is none left for it."""
        mine = self._update(epoch, step)[rank::world]
        assert len(mine) <= accumulation
        return mine + [[]] * (accumulation - len(mine))

    def _update(self, epoch: int, step: int) -> list[list[int]]:
        assert 0 <= step < self.updates_per_epoch, f"an epoch has {self.updates_per_epoch} updates, not a number {step}"
        if epoch != self._epoch:
            self._epoch, cut = epoch, []
            for members in self.members.values():
                drawn = shuffled(members, "order", self.seed, epoch)
                cut += [drawn[at : at + self.micro_batch] for at in range(0, len(drawn), self.micro_batch)]
            self._cut = [cut[i] for i in shuffled(range(len(cut)), "pairs", self.seed, epoch)]
        return self._cut[step * self.micro_batches : (step + 1) * self.micro_batches]


def share(indices: Sequence[int], rank: int, world: int, accumulation: int) -> list[list[int]]:
    """The `accumulation` micro-batches of `rank` out of `world`: over all ranks every index comes exactly once.

    Sizes differ by at most one; a micro-batch may be [], which the caller fills with a sentence of weight 0.
    """
    assert 0 <= rank < world
    assert accumulation > 0
    slots = world * accumulation
    return [list(indices[micro * world + rank :: slots]) for micro in range(accumulation)]
