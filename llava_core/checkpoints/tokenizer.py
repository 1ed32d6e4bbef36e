"""Tokenizers of checkpoint folders; code that a folder brings is never run.

A `tokenizer.json` is used as it is. A lone `tokenizer.model` (LLaMA, Vicuna, the original releases) is rebuilt with the
merges that SentencePiece applies, which transformers 5 does not do: it orders them by id instead of score, and adds no
dummy prefix to a text that begins with a space.
"""

from __future__ import annotations

import math
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

from llava_core.checkpoints.configs import quiet_transformers
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.runtime import CompanionError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_PROBES = (
    "Hi", " Hello", "detail.  Provide", "a\n\nb\tc", "     x", "def f(x):\n    return x ** 2", "日本語 中文",
    "👍🏽 é ﬁ", "1234.5%", '"it\'s"', "https://a.b/c_d?e=1", "trailing  ",
)  # fmt: skip
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ADDED_TOKENS = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_TOKEN_FIELDS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"}
_STEPS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_MOST_ADDED, _MOST_STEPS, _MOST_GROWTH, _LONGEST_PIECE = 10_000, 2_000, 10_000, 256
_AGAIN = "download it again"
_MARK = "▁"  # SentencePiece's space
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_folder(folder: Path) -> Path | None:
    """Return the folder if it contains a tokenizer."""
    return folder if has_file(folder, "tokenizer.json") or has_file(folder, "tokenizer.model") else None


def open_tokenizer(folder: Path, **options: Any) -> Any:
    """Open the tokenizer of a folder as a PreTrainedTokenizerFast; `options` are those of its constructor.

    Raises:
        CheckpointError: files missing or damaged, or ids that differ from those of the folder's SentencePiece model.
    """
    try:
        _check_files(folder)
        with quiet_transformers():
            tokenizer = _open(folder, options)
            tokenizer.decode(tokenizer(_PROBES[0])["input_ids"])
        difference = _difference_to_sentencepiece(tokenizer, folder)
    except (CompanionError, KeyboardInterrupt, SystemExit):
        raise
    # damaged files: sentencepiece raises bare Exceptions, a panic of tokenizers is a BaseException
    except BaseException as error:
        reason = " ".join(str(error).split())[:160]
        raise error_at(folder, f"the tokenizer cannot be read ({reason})") from error
    if difference is not None:
        fix = "remove tokenizer.json, so that tokenizer.model counts" if has_file(folder, "tokenizer.json") else ""
        raise error_at(folder, f"{difference}; fix: {fix or 'add the tokenizer.json of this model'}")
    return tokenizer


def _check_files(folder: Path) -> None:
    """Check the tokenizer's files before they are opened: a few bytes of them can ask for any time and memory."""
    for name in TOKENIZER_FILES:
        if has_file(folder, name):
            contained_file(folder, name)
    files = {name: read_config(folder, name) for name in _JSON_FILES if has_file(folder, name)}
    added = [(name, fields.get(key)) for name, fields in files.items() for key in _ADDED_TOKENS]
    for name, tokens in [*added, *((name, fields) for name, fields in files.items() if name != "tokenizer.json")]:
        listed = list(tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ())
        if len(listed) > _MOST_ADDED:
            raise error_at(folder / name, f"adds {len(listed):,} tokens, more than {_MOST_ADDED:,}; fix: {_AGAIN}")
        for token in listed:
            if isinstance(token, dict) and "content" in token and not token.keys() <= _TOKEN_FIELDS:
                raise error_at(folder / name, f"a token has fields beyond {sorted(_TOKEN_FIELDS)}; fix: {_AGAIN}")
    if "fast_tokenizer_files" in files.get("tokenizer_config.json", {}):  # transformers would read another one
        raise error_at(folder / "tokenizer_config.json", "names other tokenizers; fix: remove 'fast_tokenizer_files'")
    whole = files.get("tokenizer.json", {})
    model = whole.get("model")
    if isinstance(model, dict) and model.get("type") == "BPE" and model.get("continuing_subword_prefix"):
        raise error_at(folder / "tokenizer.json", "its BPE has a continuing_subword_prefix; fix: take one without it")
    steps = {part: whole.get(part) for part in _STEPS}
    if _number_of_values(steps) > _MOST_STEPS or max(_growth(steps[part]) for part in _STEPS[:3]) > _MOST_GROWTH:
        raise error_at(folder / "tokenizer.json", f"its steps may lengthen a text without a bound; fix: {_AGAIN}")


def _number_of_values(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_number_of_values, inner))


def _growth(step: Any) -> float:
    """Return how many times as long a text may be after a step of a tokenizer, at most."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    if inner := [value for value in step.values() if isinstance(value, list)]:
        return _growth(inner)
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        return _longest_replacement(b64decode(charsmap))
    return max(2, 1 + len(str(step.get("content", step.get("prepend", "")))))


def _longest_replacement(charsmap: bytes) -> int:
    """Return the bytes of the longest text that a SentencePiece map of characters puts in the place of one."""
    return max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")))


def _open(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if has_file(folder, "tokenizer.json"):
        contained_file(folder, "tokenizer.json")
        # not AutoTokenizer: LlamaTokenizer would replace the normalizer that is in the file
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if tokenizer.bos_token is None:  # without tokenizer_config.json
            first = tokenizer("a")["input_ids"][:1]
            if first != tokenizer("a", add_special_tokens=False)["input_ids"][:1]:
                tokenizer.bos_token = tokenizer.convert_ids_to_tokens(first[0])
        return tokenizer
    if has_file(folder, "tokenizer.model"):
        return _from_sentencepiece(folder, options)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _from_sentencepiece(folder: Path, options: dict[str, Any]) -> Any:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(contained_file(folder, "tokenizer.model")))
    spec = _normalizer_spec(pieces)
    config = read_config(folder, "tokenizer_config.json") if has_file(folder, "tokenizer_config.json") else {}
    special = _special_tokens(folder, config, pieces)
    legacy = config.get("legacy") in (None, True)  # transformers before 4.32 does not write it
    vocabulary = {pieces.id_to_piece(k): k for k in range(pieces.get_piece_size())}
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = models.BPE(vocabulary, _merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:  # LLaMA keeps them
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = spec.add_dummy_prefix
    if prefix and legacy:  # each text between special tokens gets the dummy prefix
        steps.append(normalizers.Prepend(_MARK))
    elif prefix:  # the first one only; the second step also marks a text that begins with a space
        marks = ((" ", "first"), (_MARK, "never"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(*m, split=False) for m in marks])
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _MARK)])
    backend.decoder = decoders.Sequence([
        decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    named = {token for token in special.values() if token in vocabulary}
    control = [p for p, k in vocabulary.items() if pieces.is_control(k) or pieces.is_unknown(k) or p in named]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    for number, token in sorted(_added_tokens(folder, config).items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            actual = backend.token_to_id(token.content)
            raise error_at(folder, f"{token.content} has id {number} in its files and {actual} by its order; fix: get "
                           "the tokenizer files that belong together")  # fmt: skip
    bos, eos = special["bos_token"], special["eos_token"]
    parts = [bos] * bool(config.get("add_bos_token", True)) + ["$A"] + [eos] * bool(config.get("add_eos_token"))
    ids = [(token, backend.token_to_id(token)) for token in {bos, eos}]
    backend.post_processor = processors.TemplateProcessing(single=parts, pair=[*parts, "$B:1"], special_tokens=ids)
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, **special}
    settings |= {k: config[k] for k in ("model_max_length", "padding_side", "chat_template") if k in config}
    return PreTrainedTokenizerFast(tokenizer_object=backend, legacy=legacy, **settings | options)


def _normalizer_spec(pieces: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    model.ParseFromString(pieces.serialized_model_proto())
    longest = max(len(piece.piece) for piece in model.pieces)
    if longest > _LONGEST_PIECE or _longest_replacement(model.normalizer_spec.precompiled_charsmap) > _MOST_GROWTH:
        raise ValueError("a piece or a replaced character of its tokenizer.model is longer than any text")
    return model.normalizer_spec


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE model, the first to apply first.

    SentencePiece merges the pair whose result has the highest score. Among equal scores (LLaMA's runs of spaces) it
    takes the leftmost pair, so that a run grows from the left: longest left part first.
    """
    merges = []
    for piece, k in vocabulary.items():
        for cut in range(1, 1 if pieces.is_byte(k) else len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-pieces.get_score(k), -cut, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _special_tokens(folder: Path, config: dict[str, Any], pieces: Any) -> dict[str, str]:
    """Return the special tokens of the folder's files, else those of the SentencePiece model."""
    mapped = read_config(folder, "special_tokens_map.json") if has_file(folder, "special_tokens_map.json") else {}
    default = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    special = {}
    for name in _SPECIAL:
        token = mapped.get(name) or config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not token and default.get(name, -1) >= 0:
            token = pieces.id_to_piece(default[name])
        if token and isinstance(token, str):
            special[name] = token
        elif name in ("bos_token", "eos_token"):
            raise error_at(folder, f"has no {name}; fix: name it in special_tokens_map.json")
    return special


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, Any]:
    """Return id -> token beyond the SentencePiece model, of `tokenizer_config.json` or of `added_tokens.json`."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder") or {}
    if not listed and has_file(folder, "added_tokens.json"):
        listed = {number: {"content": token} for token, number in read_config(folder, "added_tokens.json").items()}
    settings = {"lstrip": False, "rstrip": False, "special": True}
    return {
        int(number): AddedToken(
            token["content"], normalized=False, **{k: bool(token.get(k, v)) for k, v in settings.items()}
        )
        for number, token in listed.items()
    }


def _difference_to_sentencepiece(tokenizer: Any, folder: Path) -> str | None:
    """Return the first probe text whose ids are not those of the folder's SentencePiece model, if it has one."""
    from sentencepiece import SentencePieceProcessor

    if not has_file(folder, "tokenizer.model"):
        return None
    path = contained_file(folder, "tokenizer.model")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        if has_file(folder, "tokenizer.json"):  # a tokenizer.model of another kind, as Llama 3's
            return None
        raise
    _normalizer_spec(pieces)
    for text in _PROBES:
        ids, expected = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if ids != expected:
            return f"the tokens of {text!r} are {ids}, in its tokenizer.model {expected}"
    return None


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copy the tokenizer's files unchanged; without a source nothing is copied."""
    for name in TOKENIZER_FILES:
        if source is not None and has_file(source, name):
            shutil.copyfile(contained_file(source, name), target / name)
