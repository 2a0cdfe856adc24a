"""Draws that depend on their key alone: the same on every rank, in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator


def shuffled(items: Iterable[int], *key: object) -> list[int]:
    """`items` in an order that depends on `key` alone: the same in every version of every library.

    They are sorted by a hash of (key, item), so leaving some out does not change the order of the others.
    """
    prefix = "/".join(map(str, key))

    def digest(item: int) -> bytes:
        return hashlib.blake2b(f"{prefix}/{item}".encode(), digest_size=16).digest()

    return sorted(items, key=digest)


def draw(count: int, *key: object) -> int:
    """A number from 0 to `count` - 1 that depends on `key` alone: the same in every version of every library."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % count


def order(count: int, *key: object) -> Iterator[int]:
    """The numbers below `count` in an order that depends on `key` alone (Fisher-Yates, as far as it is read)."""
    moved: dict[int, int] = {}
    for i in range(count):
        j = i + draw(count - i, *key, i)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
