"""Tokenizers of foreign folders give SentencePiece's ids, or an error."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny
from sentencepiece import sentencepiece_model_pb2
from sentencepiece_models import llama_model, small_model

from llava_core.checkpoints.tokenizer import open_tokenizer
from llava_core.data.conversation import TEMPLATES
from llava_core.data.label_mask import supervised_text
from llava_core.data.tokenization import bos_ids, token_ids
from llava_core.runtime import CheckpointError

PARTS = (
    " ", "  ", "   ", " " * 9, "\n", "\n\n", "\t", "detail.", "Provide", "Hello", "world", "日本語", "中文", "한국어",
    "👍🏽", "🎉", "é", "ﬁ", "def f(x):", "\n    return x ** 2", "{}", "a.b", "<br>", "###", "Human:", "12.5", "'s", "#",
)  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 24))) for _ in range(count)]


@pytest.fixture(scope="module", params=["small", "llama"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = small_model if request.param == "small" else llama_model
    return make(tmp_path_factory.mktemp(request.param) / "tokenizer.model")


def folder_of(model_file: Path, folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "LLaMATokenizer": {"tokenizer_config": {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": ""}},
    "4.28": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}},
    "4.37": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<unk>"}},
}  # fmt: skip


@pytest.mark.parametrize("config", list(CONFIGS))
def test_tokens_equal_those_of_sentencepiece(model_file, tmp_path, config) -> None:
    tokenizer = open_tokenizer(folder_of(model_file, tmp_path / "t", **CONFIGS[config]))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in texts(1000):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text
    assert tokenizer("Hi")["input_ids"] == [1, *theirs.encode("Hi")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    tokenizer.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["legacy"] is (config != "4.37")
    again = open_tokenizer(tmp_path / "again")
    for text in texts(50, seed=1):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"][1:]) == text


def test_ids_of_llamas_own_vocabulary(tmp_path) -> None:
    tokenizer = open_tokenizer(llama_model(tmp_path / "tokenizer.model").parent)
    for text, ids in (
        (" Hello", [29871, 15043]),
        ("Hi", [6324]),
        ("detail.  Provide", [9493, 29889, 29871, 9133, 680]),
    ):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("template", ["v0", "v1", "v1_tight", "plain"])
@pytest.mark.parametrize("legacy", [True, False])
def test_supervised_tokens_decode_to_the_answers(model_file, tmp_path, template, legacy) -> None:
    tokenizer = open_tokenizer(folder_of(model_file, tmp_path / "t", tokenizer_config={"legacy": legacy}))
    ends = {"v0": " {}\n###", "plain": "{}\n"}.get(template, " {}</s>")
    some = texts(200, seed=2)
    for first, second, *answers in zip(some[::4], some[1::4], some[2::4], some[3::4], strict=True):
        turns = list(zip((f"<image>\n{first}", second), answers, strict=True))
        encoded = TEMPLATES.get(template).encode(turns, tokenizer, 3)
        assert supervised_text(encoded, tokenizer) == "".join(ends.replace("{}", answer) for answer in answers)


@pytest.mark.parametrize("legacy", [True, False])
def test_later_turns_follow_the_legacy_setting(model_file, tmp_path, legacy) -> None:
    tokenizer = open_tokenizer(folder_of(model_file, tmp_path / "t", tokenizer_config={"legacy": legacy}))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    encoded = TEMPLATES.get("v1").encode([("a", "red"), ("b", None)], tokenizer, 3, system="A.")
    later = pieces.encode("USER: b ASSISTANT:")
    if not legacy:  # transformers 4.37 gives the text after EOS no dummy prefix
        later = pieces.encode("<unk>USER: b ASSISTANT:")[len(pieces.encode("<unk>")) :]
    assert later != pieces.encode("USER: b ASSISTANT:") or legacy
    assert encoded.input_ids == [1, *pieces.encode("A. USER: a ASSISTANT: red"), 2, *later]
    whole = tokenizer("A. USER: a ASSISTANT: red</s>USER: b ASSISTANT:")["input_ids"]
    assert whole == encoded.input_ids


def test_text_after_an_image_has_a_dummy_prefix(model_file, tmp_path) -> None:
    tokenizer = open_tokenizer(folder_of(model_file, tmp_path / "t", tokenizer_config={"legacy": False}))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    encoded = TEMPLATES.get("v1").encode([("<image>\na", None)], tokenizer, 1, system="A.")
    before, after = pieces.encode("A. USER: "), pieces.encode("\na ASSISTANT:")
    assert encoded.input_ids == [1, *before, -200, *after]
    assert token_ids(tokenizer, "\na ASSISTANT:") == after


def test_added_tokens_keep_their_ids(model_file, tmp_path) -> None:
    rows = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).get_piece_size()
    added = {"<im_end>": rows + 2, "<im_patch>": rows, "<im_start>": rows + 1, "[PAD]": rows + 3}
    files = {"added_tokens": added, "special_tokens_map": {"bos_token": "</s>", "pad_token": "[PAD]"}}
    tokenizer = open_tokenizer(folder_of(model_file, tmp_path / "t", **files))
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in added} == added
    assert bos_ids(tokenizer) == [2]
    assert tokenizer.pad_token_id == rows + 3
    assert tokenizer("red<im_start>", add_special_tokens=False)["input_ids"][-1] == rows + 1
    files["added_tokens"] = {"<im_patch>": rows + 1}
    with pytest.raises(CheckpointError, match=rf"<im_patch> has id {rows + 1} in its files and {rows} by its order"):
        open_tokenizer(folder_of(model_file, tmp_path / "t", **files))


def test_wrong_tokenizer_json_is_an_error(model_file, tmp_path) -> None:
    folder = folder_of(model_file, tmp_path / "t")
    tokenizer = open_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    open_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"the tokens of .* in its tokenizer.model .*; fix: remove tokenizer.json"
    ):
        open_tokenizer(folder)


def test_normalising_model_is_followed(tmp_path) -> None:
    text = ["Ｆｕｌｌ  width ﬁne text of a car"] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = open_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for words in ("ﬁne  car", "  a car ", "Ｆｕｌｌ"):
        assert tokenizer(words, add_special_tokens=False)["input_ids"] == theirs.encode(words)


def test_tokenizer_json_alone_keeps_its_bos(model_file, tmp_path) -> None:
    open_tokenizer(folder_of(model_file, tmp_path / "t")).save_pretrained(tmp_path / "json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        (tmp_path / "json" / name).unlink(missing_ok=True)
    assert open_tokenizer(tmp_path / "json").bos_token == "<s>"


@pytest.mark.parametrize(
    ("piece", "charsmap"), [("a" * 10**5, b""), ("a", (4).to_bytes(4, "little") + bytes(4) + b"b" * 10**6 + b"\0")]
)
def test_sentencepiece_models_that_lengthen_a_text_are_refused(piece, charsmap, tmp_path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(small_model(tmp_path / "tokenizer.model").read_bytes())
    model.pieces.add(piece=piece, score=-1e9)
    model.normalizer_spec.precompiled_charsmap = charsmap
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        open_tokenizer(tmp_path)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("number", [0, 9_000])
def test_steps_and_tokens_of_released_tokenizers_are_read(number, tmp_path) -> None:
    """The steps of ALBERT's normalizer, DeepSeek's pre-tokenizer, and LLaMA 3's post-processor and decoder."""
    split = {"type": "Split", "pattern": {"Regex": r"\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    replace = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    steps = [replace, replace, *({"type": kind} for kind in ("NFKD", "StripAccents", "Lowercase"))]
    steps.append(replace | {"pattern": {"Regex": " {2,}"}, "content": " "})
    one, two = [{"SpecialToken": {"id": "<s>", "type_id": 0}}], [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*one, *two, *one, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": one + two, "pair": pair, "special_tokens": special}
    decoders = ["ByteFallback", "Fuse"]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tiny.tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    value = json.loads(file.read_text()) | {
        "normalizer": {"type": "Sequence", "normalizers": steps} if number else replace,  # the second as Gemma's
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, split, split, split, bytes_]},
        "post_processor": {"type": "Sequence", "processors": [bytes_, template]},
        "decoder": {"type": "Sequence", "decoders": [replace, *({"type": d} for d in decoders), strip]},
    }
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value["added_tokens"] += [{"id": 320 + k, "content": f"<word {k}>", **token} for k in range(number)]
    file.write_text(json.dumps(value))
    begin = time.monotonic()
    assert open_tokenizer(tmp_path)("red")["input_ids"][0] == 1
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("name", "value"), [("model_max_length", "x"), ("padding_side", "above"), ("model_max_length", [])]
)
def test_settings_that_fail_at_the_first_text_are_refused(name, value, tmp_path) -> None:
    tiny.tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_with_other_fields_are_refused(file, tmp_path, capfd) -> None:
    """The library prints the name of such a field as it is."""
    tiny.tokenizer(tmp_path)
    path = tmp_path / file
    value = json.loads(path.read_text()) if path.exists() else {}
    token = {"content": "<s>", "single_word": False, "\x1b[31mred": 1}
    value |= {"added_tokens": [token | {"id": 1}]} if file == "tokenizer.json" else {"bos_token": token}
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"{file}: a token has fields beyond .*; fix: "):
        open_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["##", "x" * 200])
def test_a_model_that_would_end_in_a_panic_is_not_opened(prefix, tmp_path, capfd) -> None:
    tiny.tokenizer(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["model"]["continuing_subword_prefix"] = prefix
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its BPE has a continuing_subword_prefix; fix: "):
        open_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_the_tokenizer_of_another_version_is_not_opened(tmp_path) -> None:
    tiny.tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": ["tokenizer.4.json"]}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: names other tokenizers; fix: "):
        open_tokenizer(tmp_path)
