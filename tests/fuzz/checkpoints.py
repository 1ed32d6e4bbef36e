"""Damaged and hostile checkpoints of every format: configurations, weights, tokenizers and the files themselves."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import foreign
import sentencepiece_models
import torch
from hostile_pickles import OPERATIONS, write_pickle
from PIL import Image

from companion.checkpoints import delta
from llava_core.checkpoints.load import save_checkpoint
from llava_core.checkpoints.tensors import open_file

from .case import Target

_NUMBERS = (-1, 0, 1, 2, 7, 10**6, 10**9, 2**63, 10**20, 1.5, 1e-300, 1e300, True)
_TEXTS = (
    "",
    "x",
    "a\ud800",
    "\x1b[31mred",
    "two\nerror: lines",
    "../../etc/passwd",
    "/etc/passwd",
    "gpt2",
    "x" * 10**6,
)
_OTHERS = (None, [], {}, [1], {"a": 1}, [[[]]] * 3, ["x"] * 10**5)
_COUNTS = (
    "n_layer", "n_layers", "num_layers", "n_embd", "n_head", "num_experts", "num_local_experts", "layer_types",
    "num_hidden_layers", "hidden_size", "vocab_size", "image_size", "rope_scaling", "lora_alpha", "r", "quantization",
    "head_dim", "num_channels", "max_window_layers", "sliding_window", "vision_feature_layer", "image_seq_length",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pth")


def prepare(folder: Path) -> list[Path]:
    """Write a sound checkpoint of each format, with its base models in a folder `bases` beside them."""
    bases = folder / "bases"
    bases.mkdir(parents=True)
    loaded = foreign.random_model(bases)
    Image.new("RGB", (40, 32), "red").save(bases / "image.png")
    language_model = foreign.write_llama(loaded, bases / "language_model")
    original = foreign.write_original(loaded, bases, folder / "original", shards=2)
    pieces = foreign.write_original(loaded, bases, folder / "sentencepiece", tower=True)
    for file in pieces.glob("tokenizer*"):
        file.unlink()
    sentencepiece_models.small_model(bases / "pieces.model")
    shutil.copyfile(bases / "pieces.model", pieces / "tokenizer.model")
    save_checkpoint(folder / "llava", loaded, "full", template="v1", image_position="first")
    foreign.write_hf(loaded, bases, folder / "hf")
    foreign.write_mmpretrain(loaded, folder / "mmpretrain")
    (folder / "projector").mkdir()
    torch.save(foreign.projector_tensors(loaded.model), folder / "projector" / "mm_projector.bin")
    foreign.write_adapter(loaded.model.language_model, folder / "lora", language_model)
    torch.save(foreign.projector_tensors(loaded.model), folder / "lora" / "non_lora_trainables.bin")
    config = json.loads((original / "config.json").read_text())
    (folder / "lora" / "config.json").write_text(json.dumps(config))
    delta.make(str(language_model), original, folder / "delta")
    names = ("original", "sentencepiece", "llava", "hf", "mmpretrain", "projector", "lora", "delta")
    return [folder / name for name in names]


def commands(path: Path, out: Path) -> list[list[str]]:
    """Return the commands that read a checkpoint: all must accept it, or all refuse it."""
    bases = path.parent.parent / "sound" / "bases"
    named = {
        "mmpretrain": ["--base", str(bases / "language_model"), "--vision-tower", str(bases / "clip")],
        "projector": ["--base", str(bases / "language_model"), "--vision-tower", str(bases / "clip")],
    }.get(path.name, [])
    if path.name == "delta":
        return [["delta", "apply", str(path), "--base", str(bases / "language_model"), "--out", str(out)]]
    to = "llava" if path.name == "hf" else "hf"
    image = str(bases / "image.png")
    return [
        ["inspect", str(path), *named],
        ["convert", str(path), str(out), "--to", to, *named],
        ["chat", "--model", str(path), "--image", image, *named],
    ]


def mutate(path: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink()]
    file = draw.choice([file for file in files if file.suffix != ".md"] or [path])
    if file == path:  # nothing is left that could be damaged
        return "nothing"
    kinds: list[Callable[[Path, random.Random], str]] = [damage_file, damage_bytes]
    if file.suffix == ".json":
        kinds = [damage_json] * 8 + kinds
    if file.name == "tokenizer.json":
        kinds += [_damage_tokenizer] * 8
    if file.suffix in _WEIGHTS:
        kinds += [_damage_tensors] * 8 + [_damage_header if file.suffix == ".safetensors" else _damage_pickle] * 4
    return f"{file.relative_to(path)}: {draw.choice(kinds)(file, draw)}"


def damage_file(file: Path, draw: random.Random) -> str:
    kind = draw.choice(("removed", "empty", "folder", "pipe", "link out", "link to itself", "3 GB of zeros", "pointer"))
    content = file.read_bytes()
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link out":
        outside = file.parent.with_name(f"{file.parent.name}-outside{file.suffix}")
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "3 GB of zeros":
        file.touch()
        os.truncate(file, 3 << 30)
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return kind


def damage_bytes(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if draw.random() < 0.3:
        length = draw.randrange(len(content) + 1)
        file.write_bytes(content[:length])
        return f"cut to {length} bytes"
    number = draw.choice((1, 3, 30))
    first = draw.choice((100, len(content)))
    for _ in range(number if content else 0):
        content[draw.randrange(min(first, len(content)))] = draw.randrange(256)
    file.write_bytes(content)
    return f"{number} of the first {first} bytes"


def _places(value: Any, most: int = 500) -> list[tuple[Any, Any]]:
    """Return (container, key) of the values in a JSON value, those of the first `most` items of each container."""
    found, waiting = [], [value]
    while waiting:
        inner = waiting.pop()
        keys = list(inner)[:most] if isinstance(inner, dict) else range(min(len(inner), most))
        for key in keys:
            found.append((inner, key))
            if isinstance(inner[key], dict | list):
                waiting.append(inner[key])
    return found


def _hostile(draw: random.Random) -> Any:
    return draw.choice(draw.choice((_NUMBERS, _NUMBERS, _TEXTS, _OTHERS)))


def damage_json(file: Path, draw: random.Random) -> str:
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return "nothing"
    if not isinstance(value, dict) or draw.random() < 0.05:
        text = draw.choice(
            ("[" * 10**5, "1" * 10**4, "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "\ufeff{}", '"\\ud800"')
        )
        file.write_text(text)
        return f"{text[:20]} in it"
    kind = draw.choice(("value", "value", "value", "field", "removed", "name", "many"))
    objects = [value, *(inner[key] for inner, key in _places(value) if isinstance(inner[key], dict))]
    inner, key = draw.choice(_places(value) or [(value, "a")])
    if kind == "value":
        inner[key] = _hostile(draw)
    elif kind == "field":
        inner, key = draw.choice(objects), draw.choice(_COUNTS)
        inner[key] = _hostile(draw)
    elif kind == "removed":
        inner.pop(key, None) if isinstance(inner, dict) else inner.pop(key)
        file.write_text(json.dumps(value))
        return f"without {key!r:.60}"
    elif kind == "name":
        inner, key = draw.choice(objects), draw.choice(_TEXTS)
        inner[key] = _hostile(draw)
    else:
        draw.choice(objects).update({f"field {k}": k for k in range(3 * 10**5)})
        key, inner = "300,000 fields", {"300,000 fields": ""}
    file.write_text(json.dumps(value))
    return f"{key!r:.60} = {inner[key]!r:.60}"


def _damage_tokenizer(file: Path, draw: random.Random) -> str:
    try:
        value = json.loads(file.read_text())
    except ValueError:
        return "nothing"
    kind = draw.choice(("normalizer", "added", "far", "vocabulary", "pre_tokenizer", "decoder", "post_processor"))
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    if kind == "normalizer":
        grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * draw.choice((2, 10, 10**6))}
        value["normalizer"] = {
            "type": "Sequence",
            "normalizers": [draw.choice((double, grow))] * draw.choice((1, 5, 40)),
        }
    elif kind == "added":
        first = 1 + max(value["model"]["vocab"].values())
        number = draw.choice((10**3, 3 * 10**5))
        value["added_tokens"] += [{"id": first + k, "content": f"<word {k}>", **token} for k in range(number)]
    elif kind == "far":
        number = draw.choice((320, 5000, 10**9, 2**32, 10**20))
        value["added_tokens"].append({"id": number, "content": "<far>", **token})
    elif kind == "vocabulary":
        value["model"]["vocab"][draw.choice(("zebra", "a\ud800", ""))] = draw.choice(
            (320, 5000, 2**31, 2**32, 10**20, -1)
        )
    else:
        pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        value[kind] = {"type": "Sequence", "pretokenizers": [pattern], "decoders": [double] * 40, "processors": []}
    file.write_text(json.dumps(value))
    return kind


def _damage_tensors(file: Path, draw: random.Random) -> str:
    from safetensors.torch import load_file, save_file

    try:
        open_file(file)  # an earlier damage may take torch.load for ever
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    except Exception:  # an earlier damage
        return "nothing"
    tensors = content.get("state_dict", content)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor) or not tensor.numel() or not tensor.ndim:
        return "nothing"
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda t: t.masked_fill(torch.rand(t.shape) < 0.1, float("nan")),
        "one infinity": lambda t: torch.cat([t.flatten()[1:], torch.tensor([float("inf")])]).view(t.shape),
        "integers": lambda t: t.to(torch.int32), "booleans": lambda t: t > 0,
        "complex": lambda t: t.to(torch.complex64),
        "float8": lambda t: t.to(torch.float8_e4m3fn), "half": lambda t: t.half(), "double": lambda t: t.double(),
        "scalar": lambda t: t.flatten()[0].clone(), "one axis": lambda t: t.flatten().clone(),
        "more axes": lambda t: t[None, None].clone(), "transposed": lambda t: t.movedim(0, -1).contiguous(),
        "zero rows": lambda t: t[:0].clone(), "zero columns": lambda t: torch.zeros(30000, 0),
        "more rows": lambda t: torch.cat([t, t]), "fewer rows": lambda t: t[:-1].clone(),
    }  # fmt: skip
    kind = draw.choice([*changes, "removed", "renamed", "many names", "bad name", "beside"])
    if kind in changes:
        tensors[name] = changes[kind](tensor)
    elif kind in ("removed", "renamed", "bad name"):
        del tensors[name]
    new = {
        "renamed": name + ".x",
        "bad name": draw.choice(("a\x1b[2J", "a\nerror: b", "é" * 10**5)),
        "beside": "beside",
    }
    if kind in new:
        tensors[new[kind]] = tensor.clone()
    elif kind == "many names":
        tensors |= {f"{name}.{k}": torch.zeros(1) for k in range(2 * 10**4)}
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    return f"{name}: {kind}"


def _damage_header(file: Path, draw: random.Random) -> str:
    """Change the JSON header of a safetensors file."""
    content = file.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
    except (ValueError, struct.error):
        return "nothing"
    name = draw.choice(sorted(header))
    field = draw.choice(("dtype", "shape", "data_offsets", "format"))
    values = {
        "dtype": ("F8_E4M3", "I64", "X", "C64", 3), "data_offsets": ([0, 2**63], [5, 1], [0, 0], [-1, 4]),
        "shape": ([2**31, 2**31], [0], [], [-1], [30000, 0], [10**20], [1] * 10**4), "format": ("x",),
    }  # fmt: skip
    header[name][field] = draw.choice(values[field])
    text = json.dumps(header).encode()
    size = draw.choice((len(text), len(text), len(text), 2**63, len(content), 10**8))
    file.write_bytes(struct.pack("<Q", size) + text + content[8 + length :])
    return f"{name} {field} = {header[name][field]!r:.40}, header of {size} bytes"


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def _damage_pickle(file: Path, draw: random.Random) -> str:
    """Replace a pickle by one that runs code, or takes time or memory."""
    kind = draw.choice(("code", "old code", "stride 0", "compressed", "many", "shared", "nested", *OPERATIONS))
    if kind in OPERATIONS:
        write_pickle(file, OPERATIONS[kind], old=draw.random() < 0.5)
        return kind
    mark = file.parent.with_name("executed")
    name, old = "model.norm.weight", kind in ("old code", "nested")
    tensors: dict[Any, Any] = {name: torch.ones(2)}
    if kind in ("code", "old code"):
        tensors[name] = _Code(mark)
    elif kind == "stride 0":
        tensors[name] = torch.zeros(1).expand(30_000, 30_000)
    elif kind == "many":
        tensors |= {f"model.{k}": torch.zeros(1) for k in range(2 * 10**4)}
    elif kind == "shared":
        whole = torch.zeros(10**6)
        tensors |= {f"model.{k}": whole.view(1000, 1000) for k in range(2000)}
    elif kind == "nested":
        value: Any = 0
        for _ in range(300):
            value = [value]
        tensors[name] = value
    torch.save(tensors, file, _use_new_zipfile_serialization=not old)
    if kind == "compressed":
        packed = file.with_suffix(".packed")
        with ZipFile(file) as stored, ZipFile(packed, "w", ZIP_DEFLATED) as archive:
            for entry in stored.infolist():
                filler = b"0" * 10**8 if entry.filename.endswith("data.pkl") and draw.random() < 0.5 else b""
                archive.writestr(entry.filename, stored.read(entry) + filler)
        packed.replace(file)
    return kind


TARGET = Target(prepare, mutate, commands, agree=True)
