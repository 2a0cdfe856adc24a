"""Which parameters are updated together, and when: LANDeRMT trains a unit only when one of its pairs is in the update.

A parameter says it by an attribute `update_group`; one without it takes part in every update. ZeRO cannot see units
in its flat partitions, but it keeps parameter groups apart, so each UpdateGroup is an optimizer group, and one that
took no part is marked inactive: SparseColumnAdamW then leaves its weights, moments and step count as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class UpdateGroup:
    """Parameters that share their updates and their optimizer settings."""

    pairs: frozenset[str] | None = None
    """Language pairs (de-en, …): active in an update that holds a sentence of any of them; None is every update."""
    rate: float = 1.0
    """Its learning rate as a multiple of the run's."""
    decays: bool = True
    """Whether weight decay counts."""

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        rate = "" if self.rate == 1 else f" x{self.rate:g}"
        return ("every update" if self.pairs is None else " ".join(sorted(self.pairs))) + rate

    def active(self, pairs: Collection[str] | None) -> bool:
        """Whether it takes part in an update of `pairs`; None is one that is not split by pairs."""
        return self.pairs is None or pairs is None or not self.pairs.isdisjoint(pairs)


EVERY_UPDATE = UpdateGroup()


def optimizer_groups(params: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in the order of their first parameters; each carries its `update_group`."""
    groups: dict[UpdateGroup, list[nn.Parameter]] = {}
    for p in params:
        groups.setdefault(getattr(p, "update_group", EVERY_UPDATE), []).append(p)
    return [
        {"params": members, "update_group": group} | ({} if group.decays else {"weight_decay": 0.0})
        for group, members in sorted(groups.items(), key=lambda item: item[0].rate != 1)
    ]


def activate(groups: Iterable[dict[str, Any]], pairs: Collection[str] | None) -> None:
    """Mark which of an optimizer's groups take part in an update that holds sentences of `pairs`."""
    for group in groups:
        group["active"] = group["update_group"].active(pairs)
