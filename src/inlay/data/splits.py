"""Deterministic splitting and subsampling, independent of platform and of any library's random generator."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from inlay.data.rows import Rows


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count - 1 in an order that depends on `seed` alone."""
    return sorted(range(count), key=lambda i: hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest())


def strata(rows: Rows, task: str) -> list[Hashable]:
    """What a split keeps in proportion: the classes, or the fifths of a score's range of ranks."""
    if task.endswith("classification"):
        return rows.column("label")
    if task == "regression":
        scores = rows.column("label")
        ranks = sorted(range(len(scores)), key=scores.__getitem__)
        fifth: list[Hashable] = [0] * len(scores)
        for rank, i in enumerate(ranks):
            fifth[i] = 5 * rank // len(scores)
        return fifth
    return [0] * len(rows)


def quotas(sizes: Mapping[Hashable, int], total: int) -> dict[Hashable, int]:
    """Share `total` out in proportion to `sizes`, largest remainders first."""
    whole = sum(sizes.values())
    exact = {key: total * size / whole for key, size in sizes.items()}
    share = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: (share[key] - exact[key], str(key)))
    for key in by_remainder[: total - sum(share.values())]:
        share[key] += 1
    return share


def subsample(groups: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """`count` indices in their own order, each group in proportion; all of them if there are no more."""
    if count >= len(groups):
        return list(range(len(groups)))
    members = defaultdict(list)
    for i in shuffled(len(groups), seed):
        members[groups[i]].append(i)
    share = quotas({group: len(m) for group, m in members.items()}, count)
    return sorted(i for group, m in members.items() for i in m[: share[group]])


def hold_out(
    groups: Sequence[Hashable], keys: Sequence[Hashable], sizes: Mapping[str, int], seed: int
) -> dict[str, list[int]]:
    """Split indices into "train" and the named held-out parts.

    Groups are kept in proportion, and rows with equal keys stay on one side: such rows go together, with the group of
    the first of them. A part may therefore miss its size by a few rows.
    """
    together = defaultdict(list)
    for i, key in enumerate(keys):
        together[key].append(i)
    bundles = list(together.values())
    pool = defaultdict(list)
    for i in shuffled(len(bundles), seed):
        pool[groups[bundles[i][0]]].append(bundles[i])

    parts: dict[str, list[int]] = {}
    for name, size in sizes.items():
        share = quotas({group: sum(map(len, waiting)) for group, waiting in pool.items()}, size)
        chosen: list[int] = []
        for group, waiting in pool.items():
            room, kept = share[group], []
            for bundle in waiting:
                if len(bundle) <= room:
                    chosen += bundle
                    room -= len(bundle)
                else:
                    kept.append(bundle)
            pool[group] = kept
        parts[name] = sorted(chosen)
    return {"train": sorted(i for waiting in pool.values() for bundle in waiting for i in bundle), **parts}
