"""ONNX files written by hand, so that the tests of the image filter need no package `onnx`."""

from __future__ import annotations

import struct
from pathlib import Path

FLOAT, INT64 = 1, 7


def _varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + _varint(value >> 7)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _node(kind: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    return b"".join(_part(1, name) for name in inputs) + _part(2, output) + _part(4, kind) + attributes


def _value(name: str, shape: list[int]) -> bytes:
    sizes = b"".join(_part(1, _number(1, size)) for size in shape)
    return _part(1, name) + _part(2, _part(1, _number(1, FLOAT) + _part(2, sizes)))


def write_red_detector(path: Path, outputs: int = 2, last: float = 1.0) -> Path:
    """Write a model with the input of open_nsfw whose last of `outputs` scores is near 1 for images that are red.

    `last` is the weight of the red channel's mean, which comes last in BGR; NaN makes all scores NaN.
    """
    axes = _part(1, "axes") + _number(8, 1) + _number(8, 2) + _number(20, INT64)
    keep = _part(1, "keepdims") + _number(3, 0) + _number(20, 2)
    weights = [0.0] * (3 * outputs)
    weights[-1] = last
    tensor = _number(1, 3) + _number(1, outputs) + _number(2, FLOAT) + _part(8, "w")
    tensor += _part(9, struct.pack(f"<{len(weights)}f", *weights))
    graph = _part(1, _node("ReduceMean", ["x"], "mean", _part(5, axes) + _part(5, keep)))
    graph += _part(1, _node("MatMul", ["mean", "w"], "logits")) + _part(1, _node("Softmax", ["logits"], "scores"))
    graph += _part(2, "g") + _part(5, tensor) + _part(11, _value("x", [1, 224, 224, 3]))
    graph += _part(12, _value("scores", [1, outputs]))
    path.write_bytes(_number(1, 8) + _part(7, graph) + _part(8, _part(1, "") + _number(2, 13)))
    return path
