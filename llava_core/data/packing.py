"""Sequence packing with shared-prefix deduplication: samples of a batch in rows without padding.

A row is a tree in depth-first order (see `llava_core.ops.packed_mask`): the prefix of all samples of the row, below it
the prefix of the samples of each image, below that the rest of each sample. Each token attends to the same tokens at
the same positions as in a row of its own, so loss and gradients equal those of single samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.tokenization import Encoded

MIN_SHARED = 8
"""Tokens; a shorter shared prefix is not deduplicated."""
Ids = NDArray[np.int64]


@dataclass
class PackedRow:
    """One row of T tokens.

    Attributes:
        input_ids: (T,) image positions are `IMAGE_TOKEN_ID`.
        position_ids: (T,) position of each token in its sample.
        ends: (T,) per key the exclusive end of the queries that attend to it; see `llava_core.ops.packed_mask`.
        logit_positions: (M,) positions whose hidden states predict; one in a shared prefix may occur several times.
        targets: (M,) token ids that they predict: every supervised token of every sample once.
        images: key of each image in the row's order.
        samples: indices into the packed items.
    """

    input_ids: Ids
    position_ids: Ids
    ends: Ids
    logit_positions: Ids
    targets: Ids
    images: list[Hashable]
    samples: list[int]


@dataclass
class _RowBuilder:
    """A row to which nodes of the tree are appended in depth-first order."""

    ids: list[Ids] = field(default_factory=list)
    positions: list[Ids] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)  # [start, stop, end of the subtree]
    length: int = 0

    def add(self, ids: Ids, position: int) -> int:
        """Append a node; return its index."""
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.nodes.append([self.length, self.length + len(ids), self.length + len(ids)])
        self.length += len(ids)
        return len(self.nodes) - 1

    def close(self, node: int) -> None:
        """End the subtree of a node: the nodes added since belong to it."""
        self.nodes[node][2] = self.length


def pack(
    items: Sequence[Encoded], images: Sequence[Hashable | None], max_tokens: int, share: bool = True
) -> list[PackedRow]:
    """Pack samples into rows: first-fit decreasing over groups of samples with an equal key in `images`.

    A sample longer than `max_tokens` has a row of its own. Tokens from the last supervised one on are left out: no loss
    depends on them. A shared prefix contains an image only if the image precedes the text that differs.
    """
    block = {key: -2 - k for k, key in enumerate(dict.fromkeys(key for key in images if key is not None))}
    # image positions get a number per image, so that equal ids mean equal tokens
    ids = [_inputs(item, block.get(key, IMAGE_TOKEN_ID)) for item, key in zip(items, images, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for k, key in enumerate(images):
        groups.setdefault(key if share and key is not None else ("single", k), []).append(k)
    parts = [part for group in groups.values() for part in _split(group, ids, max_tokens)]
    parts.sort(key=lambda part: -_size(part, ids))  # stable: rows depend only on the batch
    rows: list[list[list[int]]] = []
    free: list[int] = []
    for part in parts:
        size = _size(part, ids)
        place = next((r for r, tokens in enumerate(free) if tokens >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(max_tokens)
        rows[place].append(part)
        free[place] -= size
    names = {number: key for key, number in block.items()}
    return [_build_row(parts, ids, items, names, share) for parts in rows]


def _inputs(item: Encoded, block: int) -> Ids:
    ids, labels = np.asarray(item.input_ids), np.asarray(item.labels)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    stop = int(supervised[-1]) if len(supervised) else 0
    ids = ids[: max(stop, 1)]  # the last supervised token is a target only
    return np.where(ids == IMAGE_TOKEN_ID, block, ids)


def _split(group: list[int], ids: Sequence[Ids], max_tokens: int) -> list[list[int]]:
    """Split a group of samples of one image into parts that fit into a row."""
    parts: list[list[int]] = []
    for k in sorted(group, key=lambda k: -len(ids[k])):
        if parts and _size([*parts[-1], k], ids) <= max_tokens:
            parts[-1].append(k)
        else:
            parts.append([k])
    return parts


def _size(part: Sequence[int], ids: Sequence[Ids]) -> int:
    """Tokens of samples with their shared prefix stored once."""
    return sum(len(ids[k]) for k in part) - (len(part) - 1) * _shared([ids[k] for k in part], 0)


def _shared(sequences: Sequence[Ids], begin: int) -> int:
    """Length of the shared prefix from `begin` on; at least one token of each sequence remains."""
    most = min(map(len, sequences)) - 1 - begin
    first = sequences[0][begin : begin + max(most, 0)]
    for other in sequences[1:]:
        first = first[: int(np.argmin(np.append(first == other[begin : begin + len(first)], False)))]
    return len(first) if len(first) >= MIN_SHARED else 0


def _build_row(
    parts: Sequence[list[int]], ids: Sequence[Ids], items: Sequence[Encoded], names: dict[int, Hashable], share: bool
) -> PackedRow:
    builder, samples = _RowBuilder(), [k for part in parts for k in part]
    paths: dict[int, list[tuple[int, int]]] = {}  # position ranges of each sample

    def node(tokens: Ids, position: int, path: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
        index = builder.add(tokens, position)
        return index, [*path, (builder.nodes[index][0], builder.nodes[index][1])]

    root_length = _shared([ids[k] for k in samples], 0) if share and len(samples) > 1 else 0
    root, root_path = node(ids[samples[0]][:root_length], 0, []) if root_length else (None, [])
    for part in parts:
        shared = _shared([ids[k] for k in part], root_length) if len(part) > 1 else 0
        begin = root_length + shared
        prefix, path = node(ids[part[0]][root_length:begin], root_length, root_path) if shared else (None, root_path)
        for k in part:
            _, paths[k] = node(ids[k][begin:], begin, path)
        if prefix is not None:
            builder.close(prefix)
    if root is not None:
        builder.close(root)
    logit_positions, targets = [], []
    for k in samples:
        labels = np.asarray(items[k].labels)
        supervised = np.flatnonzero(labels != IGNORE_INDEX)
        positions = np.concatenate([np.arange(start, stop) for start, stop in paths[k]])
        supervised = supervised[supervised > 0]  # no token precedes the first one to predict it
        logit_positions.append(positions[supervised - 1])
        targets.append(labels[supervised])
    row = np.concatenate(builder.ids)
    begins = np.append(0, row[:-1]) != row
    begins[[start for start, *_ in builder.nodes]] = True  # the same image may end one node and begin the next
    starts = np.flatnonzero((row < 0) & begins)
    return PackedRow(
        input_ids=np.where(row < 0, IMAGE_TOKEN_ID, row),
        position_ids=np.concatenate(builder.positions),
        ends=np.concatenate([np.full(stop - start, end) for start, stop, end in builder.nodes]),
        logit_positions=np.concatenate(logit_positions),
        targets=np.concatenate(targets),
        images=[names[int(row[k])] for k in starts],
        samples=samples,
    )
