"""Convert a checkpoint into another format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from companion.checkpoints.divergence import first_divergence, first_module, verify_export
from companion.checkpoints.writers import WRITERS, Writer
from llava_core.checkpoints.describe import Adapter, Checkpoint, Options, check
from llava_core.checkpoints.files import atomic_folder, error_at
from llava_core.checkpoints.formats import lora
from llava_core.checkpoints.formats.names import export_name
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import SHARD_BYTES
from llava_core.registry import unknown
from llava_core.runtime import CheckpointError, ConfigError, display_path


def writer_named(name: str) -> Writer:
    if name not in WRITERS:
        raise ConfigError(f"{unknown('checkpoint format', name, WRITERS)}; other formats are only read")
    return WRITERS[name]


def key_map(checkpoint: Checkpoint, to: str) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Return the weight map: per tensor its name in the source, in llava_core and in the format `to`, and its shape."""
    rules = writer_named(to).rules
    return [
        (checkpoint.names.get(name, name), name, export_name(name, rules), tensor.shape)
        for name, tensor in checkpoint.tensors.items()
    ]


def write_peft(adapter: Adapter, folder: Path, model: Path) -> None:
    """Write an adapter for `PeftModel.from_pretrained` on transformers' LLaVA, whose tower has like-named layers."""
    modules = [export_name(name, lora.IN_TRANSFORMERS).removesuffix(".weight") for name in adapter.matrices]
    folder.mkdir()
    lora.write_adapter(
        adapter, folder, lora.IN_TRANSFORMERS, target_modules=modules, exclude_modules=None, layers_to_transform=None,
        layers_pattern=None, base_model_name_or_path=str(model),
    )  # fmt: skip


def convert(
    source: Path,
    target: Path,
    to: str,
    options: Options | None = None,
    usage: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    keep_adapter: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint in another format, read it back and compare every tensor.

    Args:
        source: folder or file of any format.
        target: folder that does not exist yet.
        to: a name of `WRITERS`.
        options, usage: as in `open_checkpoint`.
        keep_adapter: for "hf", leave the base as it is and write the adapter into `target / "adapter"`, for peft.
        verify: for "hf", also run both models in fp32 on a real prompt and compare tokens and the output of every
            module; needs memory for both.

    Returns:
        What was read and written; `largest_difference` is the one of verified modules, as a share of their output.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; or the written checkpoint differs, with the
            first tensor or module that does. The target is then removed.
    """
    writer = writer_named(to)
    if verify and to != "hf":
        raise CheckpointError(
            f"only what is written as 'hf' can be run by other code; '{to}' is compared tensor by tensor"
        )
    if keep_adapter and to != "hf":
        raise CheckpointError(f"an adapter is kept beside 'hf' only; '{to}' has it merged; fix: --to hf")
    names_tower = to in ("original", "projector")
    checkpoint = open_checkpoint(source, options, usage, not keep_adapter, names_tower).require(*writer.required_parts)
    adapter = checkpoint.adapter
    if adapter is not None and (adapter.replaced or not all(n.startswith("language_model.") for n in adapter.matrices)):
        raise error_at(source, "adapts more than the language model; fix: convert it without --keep-adapter")
    check(checkpoint)
    if keep_adapter and adapter is None:
        raise error_at(source, "has no adapter that could be kept; fix: convert it without --keep-adapter")
    if writer.only_required_parts:
        checkpoint.tensors = {n: t for n, t in checkpoint.tensors.items() if n.startswith(writer.required_parts)}
    with atomic_folder(target) as folder:
        writer.write(checkpoint, folder, shard_bytes)
        written = open_checkpoint(folder)
        difference = first_divergence(checkpoint, written)
        if checkpoint.adapter is not None and difference is None:
            write_peft(checkpoint.adapter, folder / "adapter", target)
            merged = open_checkpoint(folder / "adapter", Options(base=str(folder)))
            difference = first_divergence(open_checkpoint(source, options, usage), merged)
        if difference is not None:
            raise error_at(source, f"converted to '{to}' it is not the same: {difference}")
        modules = verify_export(checkpoint, folder) if verify else []
        wrong = first_module(modules)
        if wrong is not None:
            by = f"{wrong.largest:.3g} of {wrong.size:.3g}"
            raise error_at(source, f"in transformers the first module that differs is {wrong.name}, by {by}")
    return {
        "layout": checkpoint.format, "to": to, "tensors": len(written.tensors), "parameters": written.parameters,
        "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        "left_out": checkpoint.left_out, "notes": checkpoint.notes, "path": display_path(target),
        "largest_difference": max((m.relative for m in modules), default=None),
    }  # fmt: skip
