"""Packed rows: the samples of a batch behind each other, without padding, and each common beginning once.

A row is laid out as a forest (see `llava_core.ops.packed_mask`): what all its samples begin with, which is the system
text as a rule; under it, image by image, what the samples of an image begin with; under that, the rest of each sample.
Each token attends to exactly what it would attend to alone, at the same position: loss and gradients do not change.

An image can be shared only where it stands before what differs. The paper puts it before or after the question at
random: a sample that has its image after the question computes it by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import Encoded

LEAST_SHARED = 8  # tokens: a shorter common beginning is not worth a node
Numbers = NDArray[np.int64]


@dataclass
class PackedRow:
    """One row of T tokens.

    Attributes:
        input_ids: (T,) image positions are `IMAGE_TOKEN_ID`.
        position_ids: (T,) place of each token in its sample.
        ends: (T,) where the tokens end that see this one; for `llava_core.ops.Segments`.
        sources: (M,) tokens whose hidden states predict; a shared one may be there several times.
        targets: (M,) token ids that they predict: every supervised token of every sample once.
        images: key of each image block in the row's order.
        samples: positions of the samples in what was packed.
    """

    input_ids: Numbers
    position_ids: Numbers
    ends: Numbers
    sources: Numbers
    targets: Numbers
    images: list[Hashable]
    samples: list[int]


@dataclass
class _Builder:
    """A row that grows node by node."""

    ids: list[Numbers] = field(default_factory=list)
    positions: list[Numbers] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)  # [start, stop, end of all that follows from it]
    length: int = 0

    def add(self, ids: Numbers, position: int) -> int:
        """Append a node; return its number."""
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.nodes.append([self.length, self.length + len(ids), self.length + len(ids)])
        self.length += len(ids)
        return len(self.nodes) - 1

    def close(self, node: int) -> None:
        """Everything that was added since follows from this node."""
        self.nodes[node][2] = self.length


def pack(
    items: Sequence[Encoded], images: Sequence[Hashable | None], capacity: int, share: bool = True
) -> list[PackedRow]:
    """Pack samples into rows.

    Samples of one image go into the same row. The longest groups are placed first, each in the first row that has room.

    Args:
        items: ids and labels; the tokens from the last supervised one on are left out, since nothing depends on them.
        images: a key per sample, equal for equal images; None for text only.
        capacity: most tokens of a row. A sample that is longer has a row of its own.
        share: compute common beginnings once.

    Returns:
        The rows; together they hold each sample once.
    """
    block = {key: -2 - k for k, key in enumerate(dict.fromkeys(key for key in images if key is not None))}
    # image positions get a number per image, so that equal ids mean equal tokens
    ids = [_inputs(item, block.get(key, IMAGE_TOKEN_ID)) for item, key in zip(items, images, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for k, key in enumerate(images):
        groups.setdefault(key if share and key is not None else ("alone", k), []).append(k)
    parts = [part for group in groups.values() for part in _within(group, ids, capacity)]
    parts.sort(key=lambda part: -_size(part, ids))  # stable: rows depend on nothing but the batch
    rows: list[list[list[int]]] = []
    room: list[int] = []
    for part in parts:
        size = _size(part, ids)
        place = next((r for r, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(capacity)
        rows[place].append(part)
        room[place] -= size
    names = {number: key for key, number in block.items()}
    return [_row(parts, ids, items, names, share) for parts in rows]


def _inputs(item: Encoded, block: int) -> Numbers:
    ids, labels = np.asarray(item.input_ids), np.asarray(item.labels)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    stop = int(supervised[-1]) if len(supervised) else 0
    ids = ids[: max(stop, 1)]  # the last supervised token is predicted, never read
    return np.where(ids == IMAGE_TOKEN_ID, block, ids)


def _within(group: list[int], ids: Sequence[Numbers], capacity: int) -> list[list[int]]:
    """Cut a group of samples of one image where it would not fit into a row."""
    parts: list[list[int]] = []
    for k in sorted(group, key=lambda k: -len(ids[k])):
        if parts and _size([*parts[-1], k], ids) <= capacity:
            parts[-1].append(k)
        else:
            parts.append([k])
    return parts


def _size(part: Sequence[int], ids: Sequence[Numbers]) -> int:
    """Tokens of samples that share their common beginning."""
    return sum(len(ids[k]) for k in part) - (len(part) - 1) * _common([ids[k] for k in part], 0)


def _common(sequences: Sequence[Numbers], begin: int) -> int:
    """How many tokens all sequences have in common from `begin` on; at least one token of each remains."""
    most = min(map(len, sequences)) - 1 - begin
    first = sequences[0][begin : begin + max(most, 0)]
    for other in sequences[1:]:
        first = first[: int(np.argmin(np.append(first == other[begin : begin + len(first)], False)))]
    return len(first) if len(first) >= LEAST_SHARED else 0


def _row(
    parts: Sequence[list[int]],
    ids: Sequence[Numbers],
    items: Sequence[Encoded],
    names: dict[int, Hashable],
    share: bool,
) -> PackedRow:
    builder, samples = _Builder(), [k for part in parts for k in part]
    paths: dict[int, list[tuple[int, int]]] = {}  # where the tokens of each sample stand

    def node(tokens: Numbers, position: int, path: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
        number = builder.add(tokens, position)
        return number, [*path, (builder.nodes[number][0], builder.nodes[number][1])]

    root_length = _common([ids[k] for k in samples], 0) if share and len(samples) > 1 else 0
    root, above = node(ids[samples[0]][:root_length], 0, []) if root_length else (None, [])
    for part in parts:
        shared = _common([ids[k] for k in part], root_length) if len(part) > 1 else 0
        begin = root_length + shared
        top, path = node(ids[part[0]][root_length:begin], root_length, above) if shared else (None, above)
        for k in part:
            _, paths[k] = node(ids[k][begin:], begin, path)
        if top is not None:
            builder.close(top)
    if root is not None:
        builder.close(root)
    sources, targets = [], []
    for k in samples:
        labels = np.asarray(items[k].labels)
        supervised = np.flatnonzero(labels != IGNORE_INDEX)
        where = np.concatenate([np.arange(start, stop) for start, stop in paths[k]])
        supervised = supervised[supervised > 0]  # nothing stands before the first token that could predict it
        sources.append(where[supervised - 1])
        targets.append(labels[supervised])
    row = np.concatenate(builder.ids)
    begins = np.append(0, row[:-1]) != row
    begins[[start for start, *_ in builder.nodes]] = True  # the same image may end one node and begin the next
    starts = np.flatnonzero((row < 0) & begins)
    return PackedRow(
        input_ids=np.where(row < 0, IMAGE_TOKEN_ID, row),
        position_ids=np.concatenate(builder.positions),
        ends=np.concatenate([np.full(stop - start, end) for start, stop, end in builder.nodes]),
        sources=np.concatenate(sources),
        targets=np.concatenate(targets),
        images=[names[int(row[k])] for k in starts],
        samples=samples,
    )
