"""Which sentences an update trains: an order that resumes, over an epoch or by language pair."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.errors import UserError
from ..data.batching import Example
from ..data.draws import shuffled
from ..methods.landermt.routed import Router
from .config import TrainConfig


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


def order_of(train: TrainConfig, seed: int, examples: Sequence[Example], router: Router | None) -> Order | PairOrder:
    """The order of training sentences; of a routed model in micro-batches of one pair.

    Raises UserError where an update does not divide into those.
    """
    update, micro = train.global_batch_size, train.micro_batch_size
    if router is None:
        return Order(seed, len(examples), update)
    if not micro or update % micro:
        raise UserError(
            f"--train.global-batch-size {update}, --train.micro-batch-size {micro}: a routed model reads micro-batches "
            "of one pair, and whole ones an update: set both, as in 80 and 8"
        )
    return PairOrder(seed, [example.group for example in examples], update // micro, micro)
