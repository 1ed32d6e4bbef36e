"""Generation: batches equal single rows, stops, streamed text, sampling, KV caches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from llava_core.checkpoints.load import Loaded, build
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models import generation
from llava_core.models.generation import (
    Generated,
    GenerationSettings,
    end_ids,
    generate,
    generate_rows,
    generate_tokens,
    stream,
)
from llava_core.models.kv_cache import PreallocatedLayer, PrefixCache, preallocated_cache
from llava_core.models.llava import Llava
from llava_core.runtime import ConfigError, DataError

IMAGE = [IMAGE_TOKEN_ID] * 4
PROMPTS = [
    [1, *IMAGE, 20, 21, 22],
    [1, 30],
    [1, *IMAGE, 40, *IMAGE, 41, 42, 43, 44, 45, 46],
    [1, *range(50, 75)],
    [9, *IMAGE],
]
N_IMAGES = [1, 0, 2, 0, 1]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(1)
    loaded_model = build(*tiny.base_models(tmp_path_factory.mktemp("bases")), torch.float32)
    # as far apart as those of a trained model: rounding decides no token, and images and positions matter
    for name, p in loaded_model.model.named_parameters():
        if p.ndim > 1 and not name.startswith("vision_tower"):
            torch.nn.init.normal_(p, std=0.4)
    return loaded_model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(sum(N_IMAGES), 3, 32, 32, generator=torch.Generator().manual_seed(0))


def row_pixels(pixels: torch.Tensor) -> list[torch.Tensor | None]:
    """The images of each row."""
    return [part if len(part) else None for part in pixels.split(N_IMAGES)]


def by_plain_forward(model: Any, prompt: list[int], steps: int, *pixels: torch.Tensor | None) -> list[int]:
    """Greedy ids without cache, padding or any code of `generation`."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]), *pixels).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[int]]], None]:
    """Replace sampling: row k, identified by its seed, gets the k-th list of ids."""

    def follow(scripts: Sequence[Sequence[int]]) -> None:
        left = [iter([*script, *[97] * 300]) for script in scripts]
        monkeypatch.setattr(
            generation, "_sample", lambda _, settings, __: torch.tensor([next(left[s.seed]) for s in settings])
        )

    return follow


def said(loaded: Loaded, *texts: str) -> list[list[int]]:
    return [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


# ------------------------------------------------------------------------------------------------ batches


def test_batched_rows_equal_plain_forward_passes(loaded, pixels) -> None:
    together = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, GenerationSettings(12))
    for row, prompt, own in zip(together, PROMPTS, row_pixels(pixels), strict=True):
        expected = by_plain_forward(loaded.model, prompt, 12, own)
        ended = [k for k, token in enumerate(expected) if token == loaded.tokenizer.eos_token_id]
        expected = expected[: ended[0] + 1] if ended else expected
        assert list(row.token_ids) == expected
        assert row.finish == ("stop" if ended else "length")
    assert len({row.token_ids for row in together}) == len(PROMPTS)


def test_images_go_to_their_own_rows(loaded, pixels) -> None:
    settings = GenerationSettings(6)
    before = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings)
    other = pixels.clone()
    other[2] = -other[2]  # the second image of the third row
    after = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, other, settings)
    assert [a.token_ids != b.token_ids for a, b in zip(before, after, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_rows_with_own_settings_equal_single_rows(loaded, pixels) -> None:
    free = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, GenerationSettings(20))
    settings = [
        GenerationSettings(3),
        GenerationSettings(20, stop=free[1].text[4:6]),
        GenerationSettings(20, stop_ids=(free[2].token_ids[7],)),
        GenerationSettings(20, stop=("nowhere", free[3].text[2:3])),
        GenerationSettings(9),
    ]
    together = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings)
    assert [row.finish for row in together] == ["length", "stop", "stop", "stop", "length"]
    assert len(together[0].token_ids) == 3
    assert 1 < len(together[1].token_ids) < 20
    for k, own in enumerate(row_pixels(pixels)):
        assert [together[k]] == generate_rows(loaded.model, loaded.tokenizer, [PROMPTS[k]], own, settings[k])
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings) == [row.text for row in together]


def test_finished_rows_leave_the_batch(loaded, pixels) -> None:
    sizes: list[int] = []
    hook = loaded.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    settings = [GenerationSettings(n) for n in (2, 5, 3, 2, 7)]
    rows = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings)
    hook.remove()
    assert [len(row.token_ids) for row in rows] == [2, 5, 3, 2, 7]
    assert sizes == [5, 5, 3, 2, 2, 1, 1]


def test_padding_is_masked_and_not_counted(loaded, pixels) -> None:
    masks: list[Any] = []
    positions: list[Any] = []

    def look(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])
        positions.append(kwargs["position_ids"])

    hook = loaded.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    generate(loaded.model, loaded.tokenizer, [[1, 5, 6], [1, 7, 8]], None, GenerationSettings(2))
    generate(loaded.model, loaded.tokenizer, [[1, 5, 6], [1, 7]], None, GenerationSettings(2))
    hook.remove()
    assert masks[:2] == positions[:2] == [None, None]
    assert [mask.tolist() for mask in masks[2:]] == [[[1, 1, 1], [0, 1, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]]
    assert [places.tolist() for places in positions[2:]] == [[[0, 1, 2], [0, 0, 1]], [[3], [2]]]


def test_sliding_window_is_respected() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6, eos_token_id=None)
    model = SimpleNamespace(language_model=MistralForCausalLM(config).eval())
    for p in model.language_model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.4)
    model.eval = lambda: model
    model.embed = lambda ids, *_: model.language_model.get_input_embeddings()(ids)
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13]]
    together = list(generate_tokens(model, prompts, None, GenerationSettings(14)))
    alone = [by_plain_forward(model.language_model, prompt, 14) for prompt in prompts]
    assert [list(row) for row in zip(*together, strict=True)] == alone
    assert preallocated_cache(model.language_model).is_sliding == [True, True]  # holds no more than its window
    kept, tokenizer = PrefixCache(), SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))
    for prompt in (prompts[0], [*prompts[0], 15, 16], prompts[0]):  # cannot be cropped: prefilled from the start
        assert generate_rows(model, tokenizer, [prompt], prefix=kept) == generate_rows(model, tokenizer, [prompt])


# ------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize(
    ("text", "stop", "displayed", "finish"),
    [
        ("red car\n### Human: what", "###", "red car", "stop"),
        ("red car## dog", "###", "red car## dog", "length"),
        ("the color is blue", "color is", "the", "stop"),  # several tokens
        ("what dog", "og", "what d", "stop"),  # inside one token, text before it
        ("assistant that can see", "ant that c", "assist", "stop"),  # from inside one token to inside another
        ("red. blue, dog", ("dog", ",", "."), "red", "stop"),  # the first in the text, not in the list
        ("helpful assistant", ("help", "helpful"), "", "stop"),
        ("ababac", "abac", "ab", "stop"),
        ("dog 漢字 dog", "字", "dog 漢", "stop"),
        ("blue car dog", "", None, None),
    ],
)
def test_stop_strings(loaded, scripted, text: str, stop: Any, displayed: str | None, finish: Any) -> None:
    if displayed is None:
        with pytest.raises(ConfigError, match="empty string"):
            GenerationSettings(stop=stop)
        return
    (ids,) = said(loaded, text)
    scripted([ids])
    (row,) = generate_rows(loaded.model, loaded.tokenizer, [[1]], None, GenerationSettings(len(ids), stop=stop))
    assert (row.text, row.finish) == (displayed, finish)
    assert row.token_ids == tuple(ids[: len(row.token_ids)])


@pytest.mark.parametrize("listed", [[2, 88], 88, None])
def test_every_end_id_ends_a_row(loaded, scripted, monkeypatch, listed: Any) -> None:
    monkeypatch.setattr(loaded.model.language_model.generation_config, "eos_token_id", listed)
    red, dog = said(loaded, " red", " dog")
    scripted([[*red, end, *dog] for end in (2, 88, 77, 66)])
    settings = [GenerationSettings(8, seed=k, stop_ids=(77,)) for k in range(4)]
    rows = generate_rows(loaded.model, loaded.tokenizer, [[1]] * 4, None, settings)
    assert end_ids(loaded.model, loaded.tokenizer) == {2, *([88] if listed else [])}
    assert [row.finish for row in rows] == ["stop", "stop" if listed else "length", "stop", "length"]
    assert (rows[0].text, rows[2].text) == ("red", "red")
    assert rows[0].token_ids == (*red, 2)


def test_answer_of_max_new_tokens_can_stop(loaded, scripted) -> None:
    red, stopped = said(loaded, " red", " red ###")
    scripted([[*red, 2], stopped])
    settings = [GenerationSettings(len(red) + 1), GenerationSettings(len(stopped), seed=1, stop="###")]
    rows = generate_rows(loaded.model, loaded.tokenizer, [[1], [1]], None, settings)
    assert [(row.text, row.finish) for row in rows] == [("red", "stop")] * 2


# ------------------------------------------------------------------------------------------------ streamed text


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece's way: `▁` for a space, and one token per byte for characters outside the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz#.\n"]
    raw = Tokenizer(models.BPE({p: k for k, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    from tokenizers import normalizers

    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


PIECES = ["red", " ", "  ", "\n", "#", "##", "é", "漢字", "👍🏽", "🇩🇪", "naïve", ".", " .", "a", "b", "€", "ab"]


def ended(tokenizer: Any, ids: list[int], stops: Sequence[str]) -> tuple[str, str]:
    """Text and finish of a row whose complete text is decoded after each token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n]).rstrip("\ufffd")
        if places := [p for stop in stops if (p := text.find(stop)) >= 0]:
            return text[: min(places)].strip(), "stop"
    return tokenizer.decode(ids).strip(), "length"


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_streamed_text_only_grows(loaded, scripted, kind: str) -> None:
    tokenizer = loaded.tokenizer if kind == "bytes" else fallback_tokenizer()
    draw, n = random.Random(kind), 150
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(n)]
    stops = [tuple({"".join(draw.choices(PIECES, k=draw.randint(1, 2))) for _ in range(k % 7)}) for k in range(n)]
    scripts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    scripted(scripts)
    settings = [GenerationSettings(len(i), stop=s, seed=k) for k, (i, s) in enumerate(zip(scripts, stops, strict=True))]
    displayed = list(stream(loaded.model, tokenizer, [[1]] * n, None, settings))
    for k in range(n):
        steps = [rows[k] for rows in displayed]
        assert (steps[-1].text, steps[-1].finish) == ended(tokenizer, scripts[k], stops[k])
        assert all(now.text.startswith(before.text) for before, now in itertools.pairwise(steps))
        assert not any("\ufffd" in step.text for step in steps)
    assert n / 4 < sum(row.finish == "stop" for row in displayed[-1]) < n * 3 / 4
    assert sum(any(ord(c) > 127 for c in row.text) for row in displayed[-1]) > n / 3
    assert sum(bool(row.text) for row in displayed[4]) > n / 2  # it appears as it is written


def test_incomplete_last_character_is_omitted(loaded, scripted) -> None:
    (ids,) = said(loaded, "dog漢")
    scripted([ids[:-1], [*ids[:-1], 2], [*ids[:-1], *said(loaded, "red")[0]]])
    settings = [GenerationSettings(n, seed=k) for k, n in enumerate((len(ids) - 1, 40, len(ids)))]
    cut, ended, broken = generate_rows(loaded.model, loaded.tokenizer, [[1]] * 3, None, settings)
    assert (cut.text, cut.finish) == ("dog", "length")
    assert (ended.text, ended.finish) == ("dog", "stop")
    assert broken.text.startswith("dog\ufffd")  # a character that was never finished is the model's own


def test_decoding_a_long_answer_stays_linear(loaded, scripted, monkeypatch) -> None:
    (ids,) = said(loaded, "the dog is red and the car is 漢 " * 6)
    scripted([ids])
    lengths: list[int] = []
    decode = type(loaded.tokenizer).decode

    def counted(self: Any, arguments: list[int], **options: Any) -> str:
        lengths.append(len(arguments))
        return decode(self, arguments, **options)

    monkeypatch.setattr(type(loaded.tokenizer), "decode", counted)
    text = generate(loaded.model, loaded.tokenizer, [[1]], None, GenerationSettings(len(ids), stop="###"))
    assert text == ["the dog is red and the car is 漢 " * 5 + "the dog is red and the car is 漢"]
    assert max(lengths) < 25
    assert len(lengths) < 1.3 * len(ids)


def test_no_space_is_retracted_before_a_full_stop(loaded, scripted) -> None:
    words = ["a", "dog", "</s>", ".", "b", "cat", "?"]
    raw = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=True)
    scripted([[0, 1, 3, 4, 5, 6]])
    steps = [row.text for (row,) in stream(loaded.model, tokenizer, [[1]], None, GenerationSettings(6))]
    assert steps == ["a", "a dog", "a dog .", "a dog . b", "a dog . b cat", "a dog . b cat ?"]


def test_last_step_of_stream_equals_generate_rows(loaded, pixels) -> None:
    settings = [GenerationSettings(n) for n in (4, 9, 1, 6, 6)]
    steps = list(stream(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings))
    assert len(steps) == 9
    assert steps[-1] == generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings)
    assert [row.finish is None for row in steps[0]] == [True, True, False, True, True]
    assert all(isinstance(row, Generated) for rows in steps for row in rows)


# ------------------------------------------------------------------------------------------------ sampling


def test_sampled_rows_do_not_depend_on_the_batch(loaded, pixels) -> None:
    settings = [
        GenerationSettings(5, 1.0, seed=5),  # its end moves the others up
        GenerationSettings(12, 0.7, top_p=0.8, seed=6),
        GenerationSettings(12),
        GenerationSettings(12, 1.5, top_k=40, seed=7),
        GenerationSettings(12, 1.0, 0.9, seed=8),
    ]
    parts = row_pixels(pixels)
    single = [
        generate_rows(loaded.model, loaded.tokenizer, [p], own, s)[0]
        for p, own, s in zip(PROMPTS, parts, settings, strict=True)
    ]
    assert generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, settings) == single
    order = [3, 0, 4, 2]
    some = torch.cat([own for k in order if (own := parts[k]) is not None])
    second = generate_rows(
        loaded.model, loaded.tokenizer, [PROMPTS[k] for k in order], some, [settings[k] for k in order]
    )
    assert second == [single[k] for k in order]
    greedy = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, GenerationSettings(12))
    assert [a.token_ids == g.token_ids for a, g in zip(single, greedy, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_seed_determines_samples(loaded) -> None:
    drawn = generate(
        loaded.model, loaded.tokenizer, [[1, 30]] * 3, None, [GenerationSettings(8, 2.0, seed=s) for s in (3, 3, 4)]
    )
    assert drawn[0] == drawn[1] != drawn[2]


def draws(probabilities: list[float], n: int = 4000, **settings: Any) -> torch.Tensor:
    """Relative frequency of each token in n draws."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(n, -1)
    each = [GenerationSettings(**{"temperature": 1.0, **settings})] * n
    ids = generation._sample(logits, each, [torch.Generator().manual_seed(k) for k in range(n)])
    return torch.bincount(ids, minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.5, 0.0, 0.15, 0.25]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"top_k": 2}, [0, 2 / 3, 0, 0, 1 / 3]),
        ({"top_k": 99}, [0.1, 0.5, 0.0, 0.15, 0.25]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),  # one token at least
        ({"top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 0, 1 / 3]),  # the fewest that reach it
        ({"top_p": 0.8, "top_k": 4}, [0, 5 / 9, 0, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 1.0, "top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0, "top_p": 0.1}, [0, 1, 0, 0, 0]),
    ],
)
def test_sampling_frequencies(settings: dict[str, Any], expected: list[float]) -> None:
    actual = draws([0.1, 0.5, 0.0, 0.15, 0.25], **settings)
    for share, wanted in zip(actual.tolist(), expected, strict=True):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 4000) ** 0.5 + 1e-9


def test_top_p_at_the_boundary_keeps_the_fewest() -> None:
    assert (draws([0.5, 0.25, 0.25], top_p=0.5) > 0).tolist() == [True, False, False]
    assert (draws([0.5, 0.25, 0.25], top_p=0.75) > 0).tolist() == [True, True, False]
    assert (draws([0.25] * 4, 400, top_p=1e-12) > 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-53, 3)])
def test_zero_probability_is_never_sampled(monkeypatch: pytest.MonkeyPatch, u: float, token: int) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(u, dtype=torch.float64))
    assert draws([0, 0.3, 0.3, 0.4, 0, 0], 1)[token] == 1


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0; at least 1"),
        ({"max_new_tokens": -3}, "at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 1.01}, "top_p = 1.01; between 0 and 1"),
        ({"top_p": -0.5}, "between 0 and 1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"stop": ("###", "")}, "empty string"),
    ],
)
def test_invalid_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**settings)


def test_invalid_prompts_are_errors(loaded, pixels) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    with pytest.raises(DataError, match="no prompts"):
        generate(model, tokenizer, [])
    with pytest.raises(DataError, match="prompt 2 of 2 is empty"):
        generate(model, tokenizer, [[1], []])
    with pytest.raises(DataError, match="1 settings for 2 prompts"):
        generate(model, tokenizer, [[1], [2]], None, [GenerationSettings()])
    with pytest.raises(DataError, match="2 prompts"):
        generate_rows(model, tokenizer, [[1], [2]], prefix=PrefixCache())
    with pytest.raises(ValueError, match="4 image tokens in the text but 8"):
        generate(model, tokenizer, [PROMPTS[0]], pixels[:2])
    with pytest.raises(ValueError, match="two forms"):
        stream(model, tokenizer, [PROMPTS[0]], pixels[:1], image_features=model.encode_images(pixels[:1]))


def test_too_many_tokens_are_an_error_before_prefill(loaded) -> None:
    full = [7] * 246
    with pytest.raises(DataError, match=r"prompt 2 of 2 has 246 tokens; .* 256 positions; .* at most 10"):
        stream(loaded.model, loaded.tokenizer, [[1], full], None, [GenerationSettings(200), GenerationSettings(11)])
    with pytest.raises(DataError, match="at most 0"):
        generate_tokens(loaded.model, [[7] * 300], None)
    rows = generate_rows(loaded.model, loaded.tokenizer, [full], None, GenerationSettings(10, stop_ids=(-1,)))
    assert 0 < len(rows[0].token_ids) <= 10


# ------------------------------------------------------------------------------------------------ KV caches


@pytest.fixture
def fed(loaded) -> Iterator[list[int]]:
    """Number of input tokens of each forward pass of the language model."""
    counts: list[int] = []
    hook = loaded.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield counts
    hook.remove()


def test_image_features_equal_pixel_values(loaded, pixels) -> None:
    features = loaded.model.encode_images(pixels)
    assert features.shape == (len(pixels), 4, 32)
    seen: list[int] = []
    hook = loaded.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    rows = generate_rows(loaded.model, loaded.tokenizer, PROMPTS, None, GenerationSettings(6), image_features=features)
    assert seen == []
    assert rows == generate_rows(loaded.model, loaded.tokenizer, PROMPTS, pixels, GenerationSettings(6))
    assert seen == [1]
    hook.remove()
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():  # bitwise: the tower sees the same batch of one image in both
        single = loaded.model.encode_images(pixels[:1])
        assert torch.equal(loaded.model(ids, pixels[:1]).logits, loaded.model(ids, image_features=single).logits)
    # a batch of another size rounds differently
    torch.testing.assert_close(features[:1], single, rtol=1e-5, atol=1e-5)


def test_shared_prefix_is_prefilled_once(loaded, pixels, fed: list[int]) -> None:
    settings, kept = GenerationSettings(5, stop_ids=(-1,)), PrefixCache()
    first = PROMPTS[2]
    features = loaded.model.encode_images(pixels[1:3])
    prompts = [first, [*first, 60, 61], [*first[:8], 70, *first[8:], 71], first, first]
    for prompt in prompts:
        row, *_ = generate_rows(
            loaded.model, loaded.tokenizer, [prompt], None, settings, image_features=features, prefix=kept
        )
        assert [row] == generate_rows(loaded.model, loaded.tokenizer, [prompt], pixels[1:3], settings)
        assert kept.ids[: len(prompt)] == prompt
        assert kept.cache is not None
        assert kept.cache.get_seq_length() == len(kept.ids)
    assert len(fed) == 2 * 5 * len(prompts)
    assert fed[::10] == [len(first), 2, len(prompts[2]) - 8, len(first) - 8, 1]


def test_generated_tokens_are_part_of_the_prefix(loaded, fed: list[int]) -> None:
    kept, settings = PrefixCache(), GenerationSettings(6, stop_ids=(-1,))
    (row,) = generate_rows(loaded.model, loaded.tokenizer, [[1, 5]], None, settings, prefix=kept)
    longer = [1, 5, *row.token_ids, 8, 9]
    assert kept.ids == longer[: 2 + len(row.token_ids) - 1]  # the last one was drawn and never fed
    del fed[:]
    generate_rows(loaded.model, loaded.tokenizer, [longer], None, settings, prefix=kept)
    assert fed[0] == 3


def test_interrupted_prompt_keeps_the_prefix_cache_valid(loaded) -> None:
    kept, settings = PrefixCache(), GenerationSettings(6)
    expected = generate_rows(loaded.model, loaded.tokenizer, [[1, 5, 6, 7]], None, settings)
    halves = stream(loaded.model, loaded.tokenizer, [[1, 5, 6, 8]], None, settings, prefix=kept)
    next(halves), next(halves)
    assert generate_rows(loaded.model, loaded.tokenizer, [[1, 5, 6, 7]], None, settings, prefix=kept) == expected

    steps = stream(loaded.model, loaded.tokenizer, [[1, 5, 6, 8]], None, settings, prefix=kept)
    next(steps)
    last = loaded.model.language_model.model.layers[-1]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    hook = last.register_forward_pre_hook(interrupt)  # the other layers have taken the step
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    hook.remove()
    assert kept.cache is None
    assert generate_rows(loaded.model, loaded.tokenizer, [[1, 5, 6, 7]], None, settings, prefix=kept) == expected


def test_preallocated_layer_equals_dynamic_layer() -> None:
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    rows, kept = 4, 0
    for step in range(60):
        length = draw.choice([1, 1, 1, 5, 40])
        fresh = [torch.randn(rows, 2, length, 3, generator=generator) for _ in range(2)]
        before = ours.keys.data_ptr() if step else None
        for mine, other in zip(ours.update(*fresh), theirs.update(*fresh), strict=True):
            assert torch.equal(mine, other)  # both only copy
        kept += before == ours.keys.data_ptr()
        change = draw.random()
        if change < 0.1 and rows > 1:
            rows -= 1
            index = torch.tensor(sorted(draw.sample(range(rows + 1), rows)))
            ours.batch_select_indices(index), theirs.batch_select_indices(index)
        elif change < 0.3:
            n = draw.choice([1, 7, ours.get_seq_length()])
            ours.crop(-min(n, ours.get_seq_length())), theirs.crop(-min(n, theirs.get_seq_length()))
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert kept > 25  # most steps copy nothing


def test_language_model_is_driven_by_public_arguments(loaded) -> None:
    """The same ids with transformers' own cache, which a language model creates by default."""
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(2)
    llm = LlamaForCausalLM(config).eval()
    for p in llm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.4)
    model = Llava(loaded.model.vision_tower, llm)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    expected = llm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False, pad_token_id=0
    )
    actual = torch.tensor(list(generate_tokens(model, ids.tolist(), None, GenerationSettings(80)))).T
    assert torch.equal(actual, expected[:, 4:])
