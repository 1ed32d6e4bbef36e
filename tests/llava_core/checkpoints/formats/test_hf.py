"""An export in transformers' own class, with its own processor: our pixels, our prompt, our greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from companion.checkpoints.convert import convert
from llava_core.checkpoints.load import Loaded, load, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.inference import prompt_ids
from llava_core.models.generation import GenerationSettings, generate_tokens
from llava_core.runtime import CheckpointError

NEW = 12
QUESTIONS = ("what color is the car", "what dog", "is the car red and the dog blue")


KINDS = [
    ("v0", "linear", "last", False),
    ("v1", "mlp2x_gelu", "first", False),
    ("v0_exact", "linear", "last", True),
    ("v1", "linear", "first", True),
    ("v1_tight", "linear", "last", True),
    ("v1_hf", "mlp2x_gelu", "first", False),
    ("v0_exact", "linear", "first", True),
    ("v0_exact_eval", "linear", "last", True),
    ("v0_exact_1_0", "linear", "data", False),
]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def exported(request, tmp_path_factory) -> tuple[Loaded, Any, Any, list[Image.Image], Path]:
    """Our model, transformers' model and processor of the same checkpoint, and images of several shapes."""
    template, projector, position, delimited = request.param
    root = tmp_path_factory.mktemp("exported")
    loaded = foreign.random_model(root, projector, delimiters=delimited)
    usage = {"template": template, "image_position": position}
    usage |= {"image_delimiters": foreign.DELIMITERS} if delimited else {}
    saved = save_checkpoint(root / "c", loaded, "full", **usage)
    convert(saved, root / "hf", "hf")
    ours = load(saved)
    theirs = LlavaForConditionalGeneration.from_pretrained(root / "hf").eval()
    processor = AutoProcessor.from_pretrained(root / "hf")
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((40, 64), (77, 33), (32, 32))]
    return ours, theirs, processor, [Image.fromarray(p) for p in pixels], root / "hf"


def messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def our_tokens(loaded: Loaded, question: str, image: Image.Image) -> list[int]:
    ids = prompt_ids(loaded, [(question, None)], has_image=True)
    pixels = torch.from_numpy(loaded.processor(image))[None]
    return [int(t[0]) for t in generate_tokens(loaded.model, [ids], pixels, GenerationSettings(NEW))]


def until(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens up to the first stop, so that rows of a batch can be compared."""
    return tokens[: next((k for k, t in enumerate(tokens) if t in stops), len(tokens))]


def test_processor_gives_our_pixels_and_prompt(exported) -> None:
    ours, _, processor, images, _ = exported
    for question, image in zip(QUESTIONS, images, strict=True):
        text = processor.apply_chat_template(messages(question), add_generation_prompt=True)
        batch = processor(images=image, text=text, return_tensors="pt")
        np.testing.assert_allclose(batch["pixel_values"][0].numpy(), ours.processor(image), atol=2e-6)
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        ids = [-200 if t == image_id else t for t in batch["input_ids"][0].tolist()]
        assert ids == prompt_ids(ours, [(question, None)], has_image=True)
        delimiters = ours.tokenizer.convert_tokens_to_ids(ours.manifest.get("image_delimiters") or [])
        assert [ids[ids.index(-200) - 1], ids[::-1][ids[::-1].index(-200) - 1]] == delimiters or not delimiters


def test_same_greedy_tokens_single_and_batched(exported) -> None:
    ours, theirs, processor, images, _ = exported
    stops = theirs.generation_config.eos_token_id
    wanted = [until(our_tokens(ours, q, i), stops) for q, i in zip(QUESTIONS, images, strict=True)]
    assert len({tuple(w) for w in wanted}) == len(wanted)
    texts = [processor.apply_chat_template(messages(q), add_generation_prompt=True) for q in QUESTIONS]
    for question, image, tokens in zip(texts, images, wanted, strict=True):
        batch = processor(images=image, text=question, return_tensors="pt")
        generated = theirs.generate(**batch, max_new_tokens=NEW)[0, batch["input_ids"].shape[1] :].tolist()
        assert until(generated, stops) == tokens
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
    generated = theirs.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist()
    assert [until(row, stops) for row in generated] == wanted


def test_transformers_pipeline_gives_our_answers(exported) -> None:
    ours, _, _, images, folder = exported
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    for question, image in zip(QUESTIONS[:2], images, strict=False):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        output = pipe(text=[{"role": "user", "content": content}], max_new_tokens=NEW, return_full_text=False)
        stops = [ours.tokenizer.eos_token_id, *pipe.model.generation_config.eos_token_id]
        tokens = until(our_tokens(ours, question, image), stops)
        assert output[0]["generated_text"].strip() == ours.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_chat_template_renders_earlier_turns(exported) -> None:
    ours, _, processor, _, _ = exported
    turns = [*messages("what color"), {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    turns += [{"role": "user", "content": [{"type": "text", "text": "and the dog"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    rendered = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    image_id, n = processor.tokenizer.convert_tokens_to_ids("<image>"), ours.model.n_image_tokens
    wanted = prompt_ids(ours, [("what color", "red"), ("and the dog", None)], has_image=True)
    once = [t for k, t in enumerate(wanted) if t != -200 or wanted[k - 1] != -200]
    assert wanted.count(-200) == n
    decode = processor.tokenizer.decode
    assert decode(rendered) == decode([image_id if t == -200 else t for t in once])


def test_changed_separator_changes_the_prompt(exported) -> None:
    ours, _, processor, _, _ = exported
    template = processor.chat_template
    assert "Assistant:" in template or "ASSISTANT:" in template
    wrong = template.replace("uman:", "uman :").replace("SER:", "SER :")
    right, other = (
        processor.apply_chat_template(messages("what"), chat_template=t, add_generation_prompt=True)
        for t in (template, wrong)
    )
    decoded = ours.tokenizer.decode([t for t in prompt_ids(ours, [("what", None)], has_image=True) if t >= 0])
    plain = right.replace("<image>", "")
    assert "".join(decoded.split()) == "".join(plain.split())
    assert right != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"config\.json: vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"projector_hidden_act": "gelu_pytorch_tanh"}, "projector_hidden_act is 'gelu_pytorch_tanh'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"image_seq_length": 5}, "image_seq_length is 5"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, r"config\.json: .*'siglip_vision_model'; fix: "),
        ({"vision_config": {"model_type": "pixtral"}}, r"config\.json: .*'pixtral'; fix: .*CLIP"),
        ({"text_config": {"model_type": "gemma2"}}, r"config\.json: .*model_type 'gemma2'.*fix: "),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is 30.0, which"),
        ({"text_config": {"sliding_window": 8}}, "sliding_window is 8"),
        ({"preprocessor": None}, r"no preprocessor_config\.json.*fix: copy it"),
    ],
)  # fmt: skip
def test_settings_that_are_not_implemented_are_named(change, message, tmp_path) -> None:
    loaded = foreign.random_model(tmp_path / "bases")
    folder = foreign.write_hf(loaded, tmp_path / "bases", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    if change.pop("preprocessor", 0) is None:
        (folder / "preprocessor_config.json").unlink()
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("top", [True, False])
def test_tied_embeddings_at_either_level(top, tmp_path) -> None:
    """transformers 5 ties by either field, and stores the tied tensor once."""
    from transformers import LlavaForConditionalGeneration

    folder = foreign.write_hf(foreign.random_model(tmp_path / "bases"), tmp_path / "bases", tmp_path / "hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    theirs.config.tie_word_embeddings, theirs.config.text_config.tie_word_embeddings = top, not top
    theirs.lm_head.weight = theirs.model.language_model.embed_tokens.weight
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = top
    (folder / "config.json").write_text(json.dumps(config))
    head = load(folder).model.language_model.lm_head.weight
    assert torch.equal(head, LlavaForConditionalGeneration.from_pretrained(folder).lm_head.weight)


def test_unknown_usage_field_is_an_error(exported, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="'colour' cannot be set; these can: template"):
        convert(exported[-1].parent / "c", tmp_path / "x", "hf", usage={"colour": 1})
