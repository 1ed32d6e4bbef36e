"""The original format: eras by evidence, towers inside, and fields that our model does not implement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, edit_tensors, loaded, root  # noqa: F401 - fixtures
from foreign import logits

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.data.conversation import TEMPLATES
from llava_core.runtime import CheckpointError

V0 = {"pad_token": "[PAD]"}
V1 = {"pad_token": "<unk>"}
SINCE_1_0 = {"mm_use_im_patch_token": False, "image_aspect_ratio": "square"}
DELIMITED = {"mm_use_im_start_end": True}
ERAS = {  # special tokens, config.json, template, image position
    "v0": ({**V0, "bos_token": "</s>"}, DELIMITED, "v0_exact", "last"),
    "v0 of June 2023": ({**V0, "bos_token": "<s>"}, DELIMITED, "v0_exact", "last"),
    "v0 for ScienceQA": ({**V0, "bos_token": "</s>"}, {}, "v0_exact", "last"),
    "v0 by BOS": ({"bos_token": {"content": "</s>"}}, DELIMITED, "v0_exact", "last"),
    "v0 by code 1.0": (V0, SINCE_1_0, "v0_exact_1_0", "first"),
    "v0 by code 1.0, delimiters": (
        V0, SINCE_1_0 | DELIMITED | {"transformers_version": "4.31.0"}, "v0_exact", "first"
    ),
    "v0 by code 1.6, delimiters": (
        V0, SINCE_1_0 | DELIMITED | {"transformers_version": "4.37.2"}, "v0_exact_1_0", "first"
    ),
    "v1.1": (V1, DELIMITED | {"transformers_version": "4.28.0.dev0"}, "v1_tight", "last"),
    "v1.1 without version": (V1, DELIMITED, "v1_tight", "last"),
    "v1.1 without delimiters": (V1, {}, "v1_tight", "last"),
    "1.0, delimiters": (V1, SINCE_1_0 | DELIMITED | {"transformers_version": "4.31.0"}, "v1_tight", "first"),
    "1.0, patch token only": (V1, {"mm_use_im_patch_token": True}, "v1", "first"),
    "1.5, delimiters, no version": (V1, SINCE_1_0 | DELIMITED, "v1_tight", "first"),
    "1.6, delimiters, no version": (V1, SINCE_1_0 | DELIMITED | {"mm_patch_merge_type": "flat"}, "v1", "first"),
    "1.6, delimiters": (V1, {"image_aspect_ratio": "pad", "transformers_version": "4.37.2"} | DELIMITED, "v1", "first"),
    "1.5": (V1, SINCE_1_0 | {"transformers_version": "4.31.0"}, "v1", "first"),
    "pad decides before BOS": ({**V1, "bos_token": "</s>"}, SINCE_1_0, "v1", "first"),
}  # fmt: skip


def write(loaded, root: Path, folder: Path, config: dict, tokens: dict | None = None, tower: str | None = None) -> Path:
    """The original format with the fields of an era, and the tower under the prefix `tower`."""
    foreign.write_original(loaded, root, folder)
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in SINCE_1_0} | config
    (folder / "config.json").write_text(json.dumps(fields))
    if tokens is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    if tower is not None:
        inside = {tower + n: t.clone() + 0.25 for n, t in loaded.model.vision_tower.state_dict().items()}
        edit_tensors(folder, lambda tensors: tensors.update(inside))
    return folder


@pytest.fixture(scope="module")
def plain(loaded, root, tmp_path_factory) -> Path:
    """A checkpoint whose `config.json` has no field of an era."""
    return write(loaded, root, tmp_path_factory.mktemp("plain") / "c", {})


@pytest.mark.parametrize("era", ERAS)
def test_evidence_decides_template_and_image_position(plain, era, tmp_path) -> None:
    tokens, config, template, position = ERAS[era]
    folder = shutil.copytree(plain, tmp_path / "c")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text("{}")
    change_json(folder / "config.json", **config)
    checkpoint = open_checkpoint(folder)
    usage = checkpoint.description.usage
    assert (usage["template"], usage["image_position"]) == (template, position)
    assert usage["image_delimiters"] == (["<im_start>", "<im_end>"] if config.get("mm_use_im_start_end") else None)
    TEMPLATES.get(template)
    (note,) = (note for note in checkpoint.notes if note.startswith(f"template {template}"))
    assert ("--assume template" in note) == ("no version" in era)


def test_era_without_evidence_is_an_assumption(plain, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "c")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (note,) = (note for note in open_checkpoint(folder).notes if note.startswith("template"))
    assert "assumed" in note
    assert "fix: --assume template=" in note
    changed = open_checkpoint(folder, usage={"template": "v0_exact"})
    assert not any(note.startswith("template") for note in changed.notes)


PREFIXES = ("model.vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tower_inside_under_both_prefixes(loaded, root, prefix, tmp_path) -> None:
    folder = write(loaded, root, tmp_path / "c", SINCE_1_0 | {"mm_vision_tower": "org/not-here"}, tower=prefix)
    (problem,) = inspect(folder)["problems"]
    assert "org/not-here" in problem
    assert "fix: --vision-tower DIR gives configuration and image settings" in problem
    options = Options(vision_tower=str(root / "clip"))
    ours = load(folder, options=options)
    tower = ours.model.vision_tower.state_dict()
    assert all(torch.equal(tower[n], t + 0.25) for n, t in loaded.model.vision_tower.state_dict().items())
    assert ours.processor.to_dict() == loaded.processor.to_dict()
    for to in ("original", "llava", "hf", "mmpretrain"):
        convert(folder, tmp_path / to, to, options)
        torch.testing.assert_close(logits(load(tmp_path / to)), logits(ours), rtol=0, atol=0)
    convert(tmp_path / "hf", tmp_path / "back", "original")
    for written in ("original", "back"):
        config = json.loads((tmp_path / written / "config.json").read_text())
        assert config["mm_vision_tower"] == "org/not-here"
        assert config["unfreeze_mm_vision_tower"] is True


def test_settings_of_another_tower_are_refused(loaded, root, tmp_path) -> None:
    folder = write(loaded, root, tmp_path / "c", {"mm_vision_tower": "org/not-here"}, tower=PREFIXES[0])
    other = shutil.copytree(root / "clip", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    change_json(other / "config.json", vision_config=config["vision_config"] | {"patch_size": 8})
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight has shape .*, its configuration says"):
        load(folder, options=Options(vision_tower=str(other)))


def test_a_tower_inside_needs_no_option(loaded, root, tmp_path) -> None:
    folder = write(loaded, root, tmp_path / "c", SINCE_1_0, tower=PREFIXES[1])
    convert(folder, tmp_path / "out", "original")
    with pytest.raises(CheckpointError, match="contains what --vision-tower names"):
        load(tmp_path / "out", options=Options(vision_tower="org/other"))


def test_original_needs_the_name_of_the_tower(loaded, root, tmp_path) -> None:
    source = foreign.write_hf(loaded, root, tmp_path / "hf")
    for to in ("original", "projector"):
        with pytest.raises(CheckpointError, match=r"names no vision tower.*fix: --vision-tower NAME"):
            convert(source, tmp_path / to, to)
        convert(source, tmp_path / to, to, Options(vision_tower="openai/clip-vit-large-patch14"))
        config = json.loads((tmp_path / to / "config.json").read_text())
        assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14"
    with pytest.raises(CheckpointError, match="contains what --vision-tower names"):
        convert(source, tmp_path / "llava", "llava", Options(vision_tower="openai/clip-vit-large-patch14"))


NOT_IMPLEMENTED = {
    "mm_resampler_type": "perceiver", "mm_video_tower": "LanguageBind/LanguageBind_Video_merge", "X": ["Video"],
    "s2": True, "s2_scales": "336,672,1008", "mm_vision_select_feature": "cls_patch",
    "mm_projector_type": "mlp3x_gelu", "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
    "mm_image_tower": "LanguageBind/LanguageBind_Image", "mm_perceiver_depth": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", NOT_IMPLEMENTED)
def test_fields_that_change_the_computation_are_refused(plain, loaded, field, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "original")
    change_json(folder / "config.json", **{field: NOT_IMPLEMENTED[field]})
    projector, adapter = tmp_path / "projector", tmp_path / "lora"
    for other in (projector, adapter):
        other.mkdir()
        shutil.copyfile(folder / "config.json", other / "config.json")
    torch.save(foreign.projector_tensors(loaded.model), projector / "mm_projector.bin")
    foreign.write_adapter(loaded.model.language_model, adapter, base=plain)
    for path in (folder, projector, adapter):
        with pytest.raises(CheckpointError, match=f"config.json: {field} is .*changes the computation.*fix: run it"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_resampler_type": None, "s2": False, "mm_projector_lr": 2e-5, "mm_video_tower": None},
        {"mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "mm_tunable_parts": "mm_mlp_adapter"},
    ],
)
def test_fields_that_change_nothing_are_accepted(plain, fields, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "c")
    change_json(folder / "config.json", **fields)
    assert inspect(folder)["problems"] == []


@pytest.mark.parametrize(
    "fields", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}]
)
def test_a_trained_tower_must_be_in_the_files(plain, loaded, root, fields, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "c")
    change_json(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match="its vision tower was trained, and the files lack it"):
        open_checkpoint(folder)
    complete = write(loaded, root, tmp_path / "d", fields, tower=PREFIXES[1])
    assert "vision_tower" in open_checkpoint(complete).parts


def test_written_config_is_what_clients_of_1_6_read(plain, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "c")
    change_json(folder / "config.json", rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    for to in ("original", "projector"):
        convert(folder, tmp_path / to, to)
        config = json.loads((tmp_path / to / "config.json").read_text())
        assert config["model_type"] == "llava_llama"
        assert config["rope_theta"] == 5000.0
        assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    theirs = config["rope_parameters"]
    assert (theirs["rope_type"], theirs["factor"], theirs["rope_theta"]) == ("linear", 2.0, 5000.0)
    change_json(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(CheckpointError, match="no rope scaling 'yarn'; fix: --to hf"):
        convert(folder, tmp_path / "yarn", "original")


def test_sliding_window_counts_and_inst_prompts_are_told(loaded, root, plain, tmp_path) -> None:
    folder = shutil.copytree(plain, tmp_path / "c")
    full = logits(load(folder))
    change_json(folder / "config.json", model_type="llava_mistral", sliding_window=4, head_dim=None)
    got = load(folder)
    assert got.model.language_model.config.sliding_window == 4
    assert torch.allclose(logits(got)[:, :4], full[:, :4], atol=1e-5)
    assert not torch.allclose(logits(got)[:, 4:], full[:, 4:], atol=1e-3)
    (note,) = (note for note in open_checkpoint(folder).notes if note.startswith("template"))
    assert "[INST] prompts" in note
