"""Greedy generation against transformers' own `LlavaForConditionalGeneration.generate`, on the same random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from benchmarks.common import Clock, circumstances, in_own_process, in_turns, peak_mib, product_seconds
from llava_core.checkpoints.configs import quiet_transformers
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models.generation import GenerationSettings, generate_rows
from llava_core.models.llava import Llava
from llava_core.runtime import resolve_device

SHAPES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())["generate"]
"""Language models by name: arguments of `LlamaConfig`."""

TOWER = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3,
    "image_size": 128, "patch_size": 16, "projection_dim": 16,
}  # fmt: skip
N_PATCHES, PAD_ID = 64, 0


def _configs(shape: str) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    # no EOS: both generate max_new_tokens
    text = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, pad_token_id=PAD_ID, bos_token_id=None, eos_token_id=None
    )
    return text, CLIPVisionConfig(**TOWER)


def our_model(shape: str, device: torch.device) -> Llava:
    """Our model with random weights, in fp32 on a CPU and bf16 on a GPU."""
    from transformers import CLIPVisionModel, LlamaForCausalLM

    torch.manual_seed(0)
    text, vision = _configs(shape)
    with quiet_transformers():
        return Llava(CLIPVisionModel(vision), LlamaForCausalLM(text)).eval().to(device, _dtype(device))


def peer_model(shape: str, device: torch.device, ours: Llava | None = None) -> Any:
    """The peer with our weights, or with random ones of its own where only memory counts."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text, vision = _configs(shape)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1, image_seq_length=N_PATCHES,
        vision_feature_layer=-2, pad_token_id=PAD_ID, tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    with quiet_transformers():
        peer = LlavaForConditionalGeneration(config).eval().to(device, _dtype(device))
        peer.generation_config.eos_token_id = None
    # transformers has only the projector of LLaVA-1.5; here both use the same linear one
    projector = torch.nn.Linear(vision.hidden_size, text.hidden_size).to(device, _dtype(device))
    peer.model.multi_modal_projector = copy.deepcopy(ours.multi_modal_projector) if ours else projector
    if ours is not None:
        peer.model.vision_tower.load_state_dict(ours.vision_tower.state_dict())
        peer.model.language_model.load_state_dict(ours.language_model.model.state_dict())
        peer.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    return peer


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def tokenizer_of(size: int) -> Any:
    """A tokenizer of `size` words `w0`, `w1`, ..., so that both sides also decode."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def prompts_of(shape: str, batch: int) -> tuple[list[list[int]], torch.Tensor]:
    """Random prompts with one image each, of 128 tokens down to 104 in a batch, and their pixels."""
    generator = torch.Generator().manual_seed(batch)
    high = SHAPES[shape]["vocab_size"] - 1
    prompts = []
    for k in range(batch):
        words = torch.randint(3, high, (64 - 8 * (k % 4),), generator=generator).tolist()
        prompts.append([*words[:8], *[IMAGE_TOKEN_ID] * N_PATCHES, *words[8:]])
    return prompts, torch.randn(batch, 3, TOWER["image_size"], TOWER["image_size"], generator=generator)


Run = Callable[[], tuple[list[list[int]], list[str]]]


def our_run(model: Llava, prompts: Sequence[Sequence[int]], pixels: torch.Tensor, tokenizer: Any, new: int) -> Run:
    """A call that continues the prompts with our code and returns ids and texts."""
    settings = GenerationSettings(new)
    pixels = pixels.to(model.language_model.device, model.language_model.dtype)

    def run() -> tuple[list[list[int]], list[str]]:
        rows = generate_rows(model, tokenizer, prompts, pixels, settings)
        return [list(row.token_ids) for row in rows], [row.text for row in rows]

    return run


def peer_run(model: Any, prompts: Sequence[Sequence[int]], pixels: torch.Tensor, tokenizer: Any, new: int) -> Run:
    """The same call with transformers' own."""
    longest, image_id = max(map(len, prompts)), model.config.image_token_id
    ids = torch.full((len(prompts), longest), PAD_ID)
    mask = torch.zeros_like(ids)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt) :] = torch.tensor([image_id if t == IMAGE_TOKEN_ID else t for t in prompt])
        mask[k, longest - len(prompt) :] = 1
    ids, mask, pixels = ids.to(model.device), mask.to(model.device), pixels.to(model.device, model.dtype)

    def run() -> tuple[list[list[int]], list[str]]:
        output = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=new, do_sample=False
        )[:, longest:].tolist()
        return output, tokenizer.batch_decode(output)

    return run


def peak(side: str, shape: str, batch: int, new_tokens: int, device: str) -> float:
    """Peak memory (MiB) of one side's generation, the model included; to be called in a process of its own."""
    place = resolve_device(device)
    model, run = (our_model, our_run) if side == "ours" else (peer_model, peer_run)
    built: Any = model(shape, place)
    prompts, pixels = prompts_of(shape, batch)
    return peak_mib(run(built, prompts, pixels, tokenizer_of(SHAPES[shape]["vocab_size"]), new_tokens), place)


def bench_generate(
    model: Literal["tiny", "small", "smollm2-135m"] = "small",
    batches: Sequence[int] = (1, 8),
    new_tokens: int = 64,
    rounds: int = 7,
    device: Literal["cpu", "cuda", "auto"] = "cpu",
    memory: bool = True,
    clock: Clock = "wall",
) -> dict[str, Any]:
    """Measure greedy generation, prefill and decoding, against transformers'.

    Args:
        model: shape of the language model, a name of `SHAPES`.
        batches: rows per case; the prompts of a batch are of several lengths.
        new_tokens: tokens that each row writes.
        rounds: timed turns per case.
        device: "cpu" (fp32), "cuda" (bf16) or "auto".
        memory: also measure the peak of each side, in a process of its own.
        clock: as in `in_turns`.

    Returns:
        Of the case with the lowest ratio: `ratio` (tokens/s ours / peer, median over the rounds), `ours`
        and `peer` (tokens/s); `peak_memory_ratio` (ours / peer), the highest of the cases, None if not measured;
        `device`; `same_tokens`, whether both generated the same tokens in every case; `cases`, one row each, with
        `products`, the share of our time that is matrix products and attention kernels (CPU).
    """
    place = resolve_device(device)
    ours = our_model(model, place)
    theirs = peer_model(model, place, ours)
    tokenizer = tokenizer_of(SHAPES[model]["vocab_size"])
    facts = circumstances(place)
    cases = []
    for batch in batches:
        given = (*prompts_of(model, batch), tokenizer, new_tokens)
        runs = our_run(ours, *given), peer_run(theirs, *given)
        same = runs[0]() == runs[1]()  # also the warm-up
        times, written = in_turns(*runs, rounds, clock), batch * new_tokens
        peaks: list[float] = []
        if memory:
            case = {"shape": model, "batch": batch, "new_tokens": new_tokens, "device": device}
            peaks = [in_own_process("benchmarks.generate:peak", side=side, **case) for side in ("ours", "peer")]
        cases.append(
            {
                **facts, "shape": model, "batch": batch, "prompt": max(map(len, given[0])), "new_tokens": new_tokens,
                "ours": round(written / times["ours"], 1), "peer": round(written / times["peer"], 1),
                **{name: round(times[name], 3) for name in ("ratio", "ratio_low", "ratio_high")},
                "rounds": rounds, "clock": clock,
                "products": None if place.type == "cuda" else round(product_seconds(runs[0]) / times["ours"], 3),
                "peak_mib_ours": round(peaks[0]) if peaks else None,
                "peak_mib_peer": round(peaks[1]) if peaks else None,
                "peak_memory_ratio": round(peaks[0] / peaks[1], 3) if peaks else None,
                "same_tokens": same,
            }
        )  # fmt: skip
    slowest = min(cases, key=lambda row: row["ratio"])
    return {
        **{name: slowest[name] for name in ("ratio", "ours", "peer")},
        "peak_memory_ratio": max((row["peak_memory_ratio"] for row in cases if row["peak_memory_ratio"]), default=None),
        "device": facts["device"],
        "same_tokens": all(row["same_tokens"] for row in cases),
        "cases": cases,
    }
