"""Gradients that are sent together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

BUCKET = 25 * 2**20
"""Bytes that are sent together, at least where there are as many."""


def buckets(entries: Iterable[T], way: Callable[[T], Hashable], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Entries that are sent in one way, in order, until a bucket is full."""
    alike: dict[Hashable, list[T]] = {}
    for entry in entries:
        alike.setdefault(way(entry), []).append(entry)
    for members in alike.values():
        bucket: list[T] = []
        size = 0
        for entry in members:
            bucket.append(entry)
            size += nbytes(entry)
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
