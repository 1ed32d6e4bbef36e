"""The base models of the miniature, trained from scratch: tokenizer, a text-only Llama in two sizes, a contrastive ViT.

They play Vicuna 7B / 13B and CLIP ViT-L/14 and have their file formats. The language models read only text: captions,
dialogues about scenes told in sentences or as rasters of word sums, science sentences. The vision tower sees only
image-caption pairs. `llava base-models` retrains all of them; the shipped ones were made with the defaults below.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from llava_core.constants import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID
from llava_core.data.cc3m import BRIEF_INSTRUCTIONS
from llava_core.data.conversation import TEMPLATES, Segment, encode
from llava_core.miniature import language, world
from llava_core.miniature.cc3m import web_caption
from llava_core.miniature.scienceqa import science_text
from llava_core.runtime import ROOT, progress, seed_everything, sha256_file, write_json
from llava_core.teacher.prompts import DETAIL_QUESTIONS

MODELS = ROOT / "models" / "mini"
VOCABULARY = 1024
IMAGE_SIZE, PATCH_SIZE = 112, 16
GRID = IMAGE_SIZE // PATCH_SIZE


@dataclass(frozen=True)
class LanguageModelSize:
    """Shape and training budget of one language model."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    batch: int = 32
    rates: tuple[float, float] = (1e-3, 6e-3)


SIZES = {
    "llm-7b": LanguageModelSize(128, 5, 4, 352, steps=1500),
    "llm-13b": LanguageModelSize(160, 5, 5, 432, steps=1500),
}


# --- the text that the language models read ---------------------------------------------------------------------------


def told(groups: Sequence[world.Group], place: str, rng: random.Random) -> str:
    """A scene in one sentence that leaves nothing out, each thing's place, number and color before its name."""
    parts = [
        f"{language.POSITION_PHRASE[g.position or 'middle']} {language.noun_phrase(g)}"
        for g in rng.sample(groups, len(groups))
    ]
    parts.insert(rng.choice((0, len(parts))), place)
    return language.sentence(", ".join(parts))


def patch_words(scene: world.Scene) -> list[str]:
    """What each patch of a scene's raster shows, in words, row by row: the place's name where nothing stands."""
    by_category = {g.category: g for g in scene.groups}
    patches = [scene.background] * GRID**2
    for item in scene.items:  # from far to near
        group = by_category[item.category]
        noun = group.category if group.count == 1 else language.plural(group.category)
        words = f"{group.position} {language.number_word(group.count)} {group.color} {noun}"
        centers = [(k + 0.5) / GRID for k in range(GRID)]
        columns = [k for k, x in enumerate(centers) if item.box[0] <= x <= item.box[2]]
        rows = [k for k, y in enumerate(centers) if item.box[1] <= y <= item.box[3]]
        between = int(GRID * (item.box[0] + item.box[2]) / 2)  # a narrow thing that covers no center
        for row, column in product(rows, columns or [between]):
            patches[GRID * row + column] = words
    return patches


def context_text(scene: world.Scene, rng: random.Random) -> str:
    """A text from which every fact of a scene can be read."""
    kind = rng.random()
    if kind < 0.6:
        return told(scene.groups, language.PLACE_PHRASE[scene.background], rng)
    groups = rng.sample(scene.groups, len(scene.groups))
    where = [f"{language.noun_phrase(g)} {language.POSITION_PHRASE[g.position or 'middle']}" for g in groups]
    return language.sentence(f"{language.listing(where)} {language.PLACE_PHRASE[scene.background]}")


def _dialogue(turns: list[tuple[str, str | None]], everything: bool = False) -> list[Segment]:
    """A rendered dialogue; `everything` supervises questions and contexts too, as plain pretraining does."""
    segments = TEMPLATES.get("v0").render(turns)
    return [Segment("".join(s.text for s in segments), True)] if everything else segments


OPTIONS: dict[str, Sequence[str]] = {
    "color": list(world.COLORS),
    "count": language.NUMBERS[1:4],
    "position": list(language.POSITION_PHRASE.values()),
    "background": [answer.rstrip(".").lower() for answer in language.PLACE_ANSWER.values()],
}


def multiple_choice(context: str, facts: language.Facts, rng: random.Random) -> tuple[str, str]:
    """A question with lettered options and a reply that says the fact before its letter, laid out as in ScienceQA."""
    qa = rng.choice([q for q in language.questions(facts, rng) if q.kind in OPTIONS])
    right = qa.answer.rstrip(".").lower()
    wrong = [o for o in OPTIONS[qa.kind] if o != right]
    choices = [right, *rng.sample(wrong, rng.randint(1, min(3, len(wrong))))]
    rng.shuffle(choices)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    reply = f"SOLUTION: {language.sentence(right)}\n###\nANSWER: {'ABCD'[choices.index(right)]}."
    return f"{qa.question}\nContext: {context}\nOptions: {options}", reply


def _caption(scene: world.Scene, rng: random.Random) -> str:
    """A caption by an annotator, or as the web writes them."""
    return web_caption(scene, rng) if rng.random() < 0.5 else rng.choice(language.captions(scene, rng))


def document(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """One training document of the language models, and the words of its patches (empty without a patch text).

    A patch text stands where LLaVA puts an image: one vector for each patch of a scene, the sum of the embeddings of
    the words for what is there. It is text, no image; but it has the form in which a projector will hand images over.
    """
    kind = rng.random()
    if kind < 0.12:
        return [Segment(science_text(rng), True, eos=True)], []
    scene = world.sample_scene(rng.randrange(1 << 30), 7)
    facts = language.facts_of_scene(scene)
    if kind < 0.16:
        return [Segment(_caption(scene, rng), True, eos=True)], []
    if kind < 0.19:  # the same questions with nothing to look at: the model learns the prior, not to guess one answer
        return _dialogue([(q.question, q.answer) for q in language.questions(facts, rng)[:2]], True), []
    patches = patch_words(scene) if rng.random() < 0.5 else []
    context = IMAGE_MARKER if patches else context_text(scene, rng)
    if kind < 0.43:
        if kind < 0.25:
            pair = rng.choice(DETAIL_QUESTIONS), language.describe(facts)
        elif kind < 0.35:
            pair = rng.choice(BRIEF_INSTRUCTIONS), _caption(scene, rng)
        else:
            return _dialogue([multiple_choice(context, facts, rng)]), patches
        return _dialogue([("\n".join(rng.sample((context, pair[0]), 2)), pair[1])]), patches
    qa = language.questions(facts, rng)[: rng.randint(1, 5)]
    if rng.random() < 0.3 and (reason := language.reasoning(facts, rng)):
        qa.insert(rng.randrange(len(qa)), reason)
    pairs: list[tuple[str, str | None]] = [(q.question, q.answer) for q in qa]
    first = f"{context}\n{pairs[0][0]}" if rng.random() < 0.8 else f"{pairs[0][0]}\n{context}"
    return _dialogue([(first, pairs[0][1]), *pairs[1:]]), patches


def train_tokenizer(out: Path, texts: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer and save it in transformers' format.

    Args:
        out: folder to write.
        texts: what it is trained on.
        vocabulary: number of pieces.

    Returns:
        A `PreTrainedTokenizerFast`; `###` is one piece, as a stop string should be cheap.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", "###"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def document_texts(count: int = 6000, seed: int = 0) -> Iterator[str]:
    """Texts that the language models' tokenizer is trained on: documents as they are and in lower case."""
    rng = random.Random(f"tokenizer-{seed}")
    for _ in range(count):
        segments, patches = document(rng)
        text = "".join(s.text for s in segments)
        yield from (text, text.lower(), "".join(f" {words}" for words in patches))


def caption_texts(count: int = 3000, seed: int = 0) -> Iterator[str]:
    """Texts that the contrastive model's tokenizer is trained on: captions alone."""
    rng = random.Random(f"captions-{seed}")
    for k in range(count):
        yield from language.captions(world.sample_scene(k, 2000 + seed), rng)


# --- training loops ---------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz in fp32 (torch's own uses bf16: 50 times slower on CPUs without it).

    Source: Jordan et al. 2024; the update is scaled to the size of an AdamW update.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing here evaluates twice
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                tall = x.size(0) > x.size(1)
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def _optimizers(model: nn.Module, hidden_rate: float, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Hidden matrices by Muon or AdamW at `hidden_rate`; embeddings, head, norms and biases by AdamW at `rate`."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": rest, "lr": rate}] + ([] if muon else [{"params": hidden, "lr": hidden_rate}])
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return [adamw, Muon(hidden, hidden_rate)] if muon else [adamw]


def _schedule(step: int, steps: int, warmup: float = 0.03) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    w = max(1, int(steps * warmup))
    return (step + 1) / w if step < w else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - w) / max(1, steps - w)))


def _fit(
    model: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[Any], torch.Tensor],
    steps: int,
    name: str,
    rates: tuple[float, float],
    muon: bool = False,
) -> float:
    """Plain training loop at peak `rates` (hidden matrices, rest); returns the mean loss of the last 50 steps."""
    optimizers, losses = _optimizers(model, *rates, muon), []
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    bar = progress(steps, name)
    for step in range(steps):
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * _schedule(step, steps)
        loss = loss_of(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.update(1)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    bar.close()
    return float(np.mean(losses[-50:]))


def _text_batches(
    tokenizer: Any, batch: int, make: Callable[[], tuple[list[Segment], list[str]]], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches (ids, labels, words): documents of similar length together, right-padded, so no mask is needed.

    ids and labels are (batch, T); words is (patches, 4), the word ids of each patch in the order of the batch, -1 for
    none.
    """
    order = random.Random(f"order-{seed}")
    known: dict[str, list[int]] = {}

    def word_ids(patch: str) -> list[int]:
        if patch not in known:
            known[patch] = (tokenizer(f" {patch}", add_special_tokens=False)["input_ids"][-4:] + [-1] * 4)[:4]
        return known[patch]

    while True:
        made = (make() for _ in range(batch * 16))
        pool = sorted(((encode(s, tokenizer, len(p)), p) for s, p in made), key=lambda e: len(e[0].input_ids))
        rows = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        order.shuffle(rows)
        for row in rows:
            width = max(len(e.input_ids) for e, _ in row)
            ids = torch.full((batch, width), tokenizer.pad_token_id)
            labels = torch.full((batch, width), IGNORE_INDEX)
            for k, (e, _) in enumerate(row):
                ids[k, : len(e.input_ids)] = torch.tensor(e.input_ids)
                labels[k, : len(e.labels)] = torch.tensor(e.labels)
            words = [word_ids(patch) for _, patches in row for patch in patches]
            yield ids, labels, torch.tensor(words, dtype=torch.long).reshape(-1, 4)


def embed_with_patches(embedding: nn.Module, ids: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, T, D) of ids, each patch being the sum of those of its words, some louder than others.

    Args:
        embedding: of the language model.
        ids: (B, T), patches as `IMAGE_TOKEN_ID`.
        words: (patches, 4) word ids in the order of the patches, -1 for none.
    """
    embeds = embedding(ids.clamp(min=0))
    loudness = (0.4 + 1.2 * torch.rand(words.shape)) * (words >= 0)
    patches = (embedding(words.clamp(min=0)) * loudness[..., None]).sum(1)
    return embeds.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], patches)


@torch.no_grad()
def lookup_init(model: Any, tokenizer: Any, seed: int = 0) -> None:
    """Begin training with attention that can look things up: a tiny model needs thousands of steps to find it alone.

    The residual stream gets a constant (dimension 0), a word part A, parts B, C, D for the words one, two and three
    places before, and a part S for what was found. Layer 0 fills B, C, D. Heads of layer 1 find the same word earlier
    and carry it and what stood before it to S: "two red dogs" answers for dogs, and so does a patch that holds all
    three. Heads of layer 2 find the place where the word stood three before and carry what is there: "left" answers
    with what is on the left. Where nothing matches, attention rests on the first token. Layer 3 hands S to the word
    five places on: from the last word of a question to where its answer begins. Everything is trained from there,
    nothing is frozen.

    Source: the idea is the induction circuit (Olsson et al. 2022) as an initialisation (cf. Trockman and Kolter 2023).
    """
    config = model.config
    d, width = config.hidden_size // config.num_attention_heads, 20
    half = d // 2
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half).float() / half)
    a, b, c, before3 = (slice(1 + k * width, 1 + (k + 1) * width) for k in range(4))
    s = slice(1 + 4 * width, 128)
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(rows: int, columns: int) -> torch.Tensor:
        n = max(rows, columns)
        return torch.linalg.qr(torch.randn(n, n, generator=generator))[0][:rows, :columns]

    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * 0.1)
    singular = {language.plural(name): name for name in world.CATEGORIES}
    codes: dict[str, torch.Tensor] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        word = token.lstrip("Ġ").lower()  # "dog", " dogs" and " Dog" are one word
        code = codes.setdefault(singular.get(word, word), torch.randn(width, generator=generator))
        embedding[index, a] = code * width**0.5 / code.norm()
    embedding[:, 0] = 2.0
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in model.model.layers:  # quiet what is random, or it drowns what is not
        layer.self_attn.o_proj.weight.mul_(0.2)
        layer.mlp.down_proj.weight.mul_(0.2)

    def previous(layer: Any, head: int, offset: int, sharpness: float) -> None:
        """Attend `offset` places back: the constant, turned by the rotary angles of that distance."""
        rows, n = slice(head * d, (head + 1) * d), 6
        query, key = torch.zeros(d), torch.zeros(d)
        query[:n], query[half : half + n] = torch.cos(angles[:n] * offset), -torch.sin(angles[:n] * offset)
        key[:n] = 1.0
        for weight, values in ((layer.q_proj.weight, query), (layer.k_proj.weight, key)):
            weight[rows] = 0
            weight[rows, 0] = values * sharpness

    def match(layer: Any, head: int, source: slice, sharpness: float, rest: float = 0.3, apart: float = 1.2) -> None:
        """Attend where `source` holds this word, rather far off than near (a faster rotary pair), else to the start."""
        rows, n = slice(head * d, (head + 1) * d), 9
        places = [head * d + p for p in (*range(half - n, half), *range(d - n, d))]
        projection = orthogonal(2 * n, width) * sharpness
        for weight, part in ((layer.q_proj.weight, a), (layer.k_proj.weight, source)):
            weight[rows] = 0
            weight[places, part] = projection
        layer.q_proj.weight[places, 0] = projection @ embedding[config.bos_token_id, a] * rest
        layer.q_proj.weight[head * d + 4, 0], layer.k_proj.weight[head * d + 4, 0] = apart, -apart

    def carry(layer: Any, head: int, source: slice, target: slice, gain: float, turn: bool = True) -> None:
        """Copy part `source` of what the head attends to into part `target`, turned so as not to look like a word."""
        rows = slice(head * d, (head + 1) * d)
        layer.v_proj.weight[rows] = 0
        layer.o_proj.weight[:, rows] = 0
        n, size = source.stop - source.start, target.stop - target.start
        layer.v_proj.weight[head * d : head * d + n, source] = torch.eye(n) * gain
        layer.o_proj.weight[target, head * d : head * d + n] = (orthogonal(size, n) if turn else torch.eye(n)) * gain

    for head, (offset, target) in enumerate(((1, b), (2, c), (3, before3))):
        previous(layers[0], head, offset, 1.6)
        carry(layers[0], head, a, target, 0.66, turn=False)
    for head, source in enumerate((b, c, before3, a)):
        match(layers[1], head, a, 1.3)
        carry(layers[1], head, source, s, 0.9)
    for head, source in enumerate((a, b, c)):
        match(layers[2], head, before3, 1.7)
        carry(layers[2], head, source, s, 0.9)
    middle = (s.start + s.stop) // 2
    for head, half_s in enumerate((slice(s.start, middle), slice(middle, s.stop))):
        previous(layers[3], head, 5, 1.6)
        carry(layers[3], head, half_s, half_s, 1.2, turn=False)


def train_language_model(name: str, out: Path, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Train one text-only Llama on the world's text and save it in bf16.

    Args:
        name: "llm-7b" or "llm-13b", a key of `SIZES`.
        out: folder to write, with its tokenizer inside.
        seed: of initialisation and documents.
        steps: optimizer steps; the size's own when None.

    Returns:
        The training facts that go into the manifest.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[name]
    steps = steps or size.steps
    seed_everything(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(out, document_texts())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            initializer_range=0.06,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    )
    lookup_init(model, tokenizer, seed)
    model.train()
    rng = random.Random(f"text-{seed}")

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, labels, words = batch
        embeds = embed_with_patches(model.get_input_embeddings(), ids, words)
        logits = model(inputs_embeds=embeds[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)

    begin = time.time()
    documents = _text_batches(tokenizer, size.batch, lambda: document(rng), seed)
    loss = _fit(model, documents, loss_of, steps, name, size.rates)
    model.to(torch.bfloat16).save_pretrained(out)
    return {
        "shape": {k: v for k, v in asdict(size).items() if k in ("hidden", "layers", "heads", "intermediate")},
        "batch": size.batch,
        "rates": size.rates,
        "seed": seed,
        "steps": steps,
        "final_loss": loss,
        "minutes": (time.time() - begin) / 60,
    }


def _clip_example(index: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """One image-caption pair of the tower's pretraining: two thirds show one group, so names are learned first."""
    rng = random.Random(f"clip-{seed}-{index}")
    scene = world.sample_scene(index, 1000 + seed, n_groups=1 if index % 3 else None)
    pixels = np.asarray(world.draw_scene(scene, IMAGE_SIZE), dtype=np.uint8)
    names = sorted(noun for g in scene.groups for noun in [g.category if g.count == 1 else language.plural(g.category)])
    return pixels, [*language.captions(scene, rng), language.sentence(language.listing(names))]


def _clip_examples(count: int, seed: int) -> tuple[torch.Tensor, list[list[str]]]:
    """Draw `count` examples on all cores: uint8 pixels (N, 3, H, W), five captions each and a sixth of names alone."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = list(
            progress(pool.map(_clip_example, range(count), [seed] * count, chunksize=64), "drawing", total=count)
        )
    pixels = torch.from_numpy(np.stack([p for p, _ in made])).permute(0, 3, 1, 2).contiguous()
    return pixels, [c for _, c in made]


def pixel_statistics() -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that the miniature's image processor uses (0.5, 0.25: drawn images)."""
    return [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


@torch.no_grad()
def unit_features(vision_model: Any, pixels: torch.Tensor) -> float:
    """Scale a tower's residual stream until the features before its last layer have unit deviation.

    Each layer reads the stream through a layer norm, so what the tower computes stays the same; but the projector reads
    it as it is, and its learning rate is meant for features of this size.

    Args:
        vision_model: transformers' CLIP vision transformer, changed in place.
        pixels: (N, 3, H, W) normalised images to measure on.

    Returns:
        The factor.
    """
    features = vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    factor = 1 / float(features.std())
    writers = [m for layer in vision_model.encoder.layers for m in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for writer in (vision_model.pre_layrnorm, *writers):
        writer.weight.mul_(factor)
        writer.bias.mul_(factor)
    return factor


def _caption_ids(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer([t + "</s>" for t in texts], padding=True, return_tensors="pt", add_special_tokens=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def train_clip(
    out: Path,
    tokenizer: Any,
    seed: int = 0,
    steps: int = 5000,
    images: int = 24000,
    batch: int = 80,
    names: float = 0.7,
) -> dict[str, Any]:
    """Train a CLIPModel contrastively on drawn scenes and their captions and save it in bf16.

    Args:
        out: folder to write: transformers' CLIPModel (its vision half is the tower), tokenizer, image settings.
        tokenizer: the miniature's tokenizer, also read by the text half.
        seed: of initialisation, scenes and order.
        steps: optimizer steps.
        images: how many scenes are drawn; each step sees a random window of up to 6 pixels shift.
        batch: image-caption pairs contrasted at once.
        names: share of batches whose captions name categories alone: colors and places tell the pairs of a batch apart
            long before shapes do, so shapes are learned where nothing else helps. These see mirrored images too.

    Returns:
        The training facts that go into the manifest.
    """
    from transformers import CLIPConfig, CLIPModel

    seed_everything(seed)
    begin = time.time()
    pixels, texts = _clip_examples(images, seed)
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 128,
    }  # fmt: skip
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": len(tokenizer), "max_position_embeddings": 48, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "projection_dim": 128,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    model.train()
    rng = np.random.default_rng(seed)

    def batches() -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            for rows in rng.permutation(images)[: images // batch * batch].reshape(-1, batch):
                dx, dy = rng.integers(-6, 7, size=2)
                window = torch.roll(pixels[rows], (int(dy), int(dx)), (2, 3))
                named = rng.random() < names
                if named and rng.random() < 0.5:
                    window = window.flip(3)
                chosen = [texts[r][5 if named else rng.integers(5)] for r in rows]
                same = torch.tensor([[a == b for b in chosen] for a in chosen], dtype=torch.float32)
                yield _normalise(window), _caption_ids(tokenizer, chosen), same / same.sum(1, keepdim=True)

    def loss_of(item: tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        window, ids, target = item  # equal captions in a batch are all right answers: they share the target
        logits = model(pixel_values=window, **ids).logits_per_image
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    loss = _fit(model, batches(), loss_of, steps, "clip", (5e-3, 1.5e-3), muon=True)
    factor = unit_features(model.eval().vision_model, _normalise(pixels[:64]))
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    mean, std = pixel_statistics()
    settings = {"size": IMAGE_SIZE, "mode": "crop", "mean": mean, "std": std}
    return {
        "shape": vision, "seed": seed, "steps": steps, "names": names, "images": images,
        "final_loss": loss, "image": settings, "feature_factor": factor, "minutes": (time.time() - begin) / 60,
    }  # fmt: skip


# --- gates: what the base models must be able to do, on scenes never trained on ---------------------------------------

HELD_OUT_SEED = 999_331


def _held_out_scenes(count: int) -> list[world.Scene]:
    return [world.sample_scene(10_000_000 + k, HELD_OUT_SEED) for k in range(count)]


@torch.inference_mode()
def exact_answers(model: Any, tokenizer: Any, dialogues: list[tuple[str, str]], batch: int = 64) -> list[bool]:
    """Whether greedy decoding answers each (question, answer) exactly, terminator included.

    One forward pass suffices: greedy text equals the answer if and only if every answer token is the argmax after the
    right ones before it.
    """
    right: list[bool] = []
    for k in range(0, len(dialogues), batch):
        rows = [encode(_dialogue([pair]), tokenizer, 0) for pair in dialogues[k : k + batch]]
        width = max(len(e.input_ids) for e in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        for n, e in enumerate(rows):
            ids[n, : len(e.input_ids)], labels[n, : len(e.labels)] = torch.tensor(e.input_ids), torch.tensor(e.labels)
        guess = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORE_INDEX)).all(1).tolist()
    return right


def text_gates(folder: Path, scenes: int = 150) -> dict[str, Any]:
    """Exact answers of a language model on held-out questions, with the scene told in words and with nothing shown.

    Returns:
        `told` and `blind`: share answered exactly; `blind_prior`: the best constant answer per kind of question;
        `told_by_kind`; `n`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(HELD_OUT_SEED)
    questions: list[tuple[str, language.QA]] = []
    for scene in _held_out_scenes(scenes):
        found = language.questions(language.facts_of_scene(scene), rng)[:4]
        questions += [(context_text(scene, rng), q) for q in found]
    told = exact_answers(model, tokenizer, [(f"{context}\n{q.question}", q.answer) for context, q in questions])
    blind = exact_answers(model, tokenizer, [(q.question, q.answer) for _, q in questions])
    by_kind: dict[str, list[bool]] = {}
    answers: dict[str, list[str]] = {}
    for (_, q), ok in zip(questions, told, strict=True):
        by_kind.setdefault(q.kind, []).append(ok)
        answers.setdefault(q.kind, []).append(q.answer)
    prior = sum(max(map(a.count, set(a))) for a in answers.values()) / len(questions)
    return {
        "n": len(questions), "told": sum(told) / len(told), "blind": sum(blind) / len(blind), "blind_prior": prior,
        "told_by_kind": {kind: sum(oks) / len(oks) for kind, oks in sorted(by_kind.items())},
    }  # fmt: skip


def _linear_probe(x: torch.Tensor, y: torch.Tensor, train: int, classes: int) -> float:
    """Held-out accuracy of logistic regression on features x (N, D), targets y (N,), its first `train` rows fitted."""
    mean, std = x[:train].mean(0), x[:train].std(0) + 1e-6
    x = (x - mean) / std
    probe = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02, weight_decay=0.05)
    for _ in range(400):
        loss = F.cross_entropy(probe(x[:train]), y[:train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((probe(x[train:]).argmax(1) == y[train:]).float().mean())


def patch_weights(box: tuple[float, float, float, float], grid: int) -> np.ndarray:
    """Share of each patch (grid * grid,) that a box covers, normalised to sum 1."""
    edges = np.arange(grid + 1) / grid
    x = np.clip(np.minimum(edges[1:], box[2]) - np.maximum(edges[:-1], box[0]), 0, None)
    y = np.clip(np.minimum(edges[1:], box[3]) - np.maximum(edges[:-1], box[1]), 0, None)
    weights = np.outer(y, x).ravel()
    return weights / weights.sum()


def pool_over_box(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Features (N, 2 D) of objects: their patches' mean, by covered area, and maximum, over those that count.

    Args:
        features: (N, patches, D) of the image that each object stands in.
        weights: (N, patches) from `patch_weights`.
    """
    covered = weights >= 0.3 * weights.amax(1, keepdim=True)
    highest = features.masked_fill(~covered[..., None], -torch.inf).amax(1)
    return torch.cat([torch.einsum("np,npd->nd", weights, features), highest], 1)


def vision_gates(folder: Path, scenes: int = 6000, candidates: int = 100) -> dict[str, Any]:
    """Linear probes on patch features and image-caption retrieval of the contrastive tower, on held-out scenes.

    Returns:
        `category`, `color`: accuracy of a linear probe on features of layer -2, pooled over an object's box, fitted on
        four fifths of the scenes (`*_last`: layer -1); `retrieval`: R@1, image to caption, among `candidates` held-out
        pairs; `n` objects tested.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = _held_out_scenes(scenes)
    pooled: dict[str, list[torch.Tensor]] = {"": [], "_last": []}
    for k in range(0, scenes, 200):
        part = drawn[k : k + 200]
        pixels = torch.from_numpy(np.stack([np.asarray(world.draw_scene(s, IMAGE_SIZE)) for s in part]))
        boxes = [patch_weights(i.box, GRID) for s in part for i in s.items]
        weights = torch.tensor(np.stack(boxes), dtype=torch.float32)
        image = [k for k, s in enumerate(part) for _ in s.items]
        with torch.inference_mode():
            output = model.vision_model(_normalise(pixels.permute(0, 3, 1, 2)), output_hidden_states=True)
            for suffix, states in zip(pooled, output.hidden_states[-2:], strict=True):
                pooled[suffix].append(pool_over_box(states[image, 1:], weights))
    items = [i for s in drawn for i in s.items]
    train = sum(len(s.items) for s in drawn[: scenes * 4 // 5])
    found: dict[str, Any] = {"n": len(items) - train}
    for kind, names in (("category", list(world.CATEGORIES)), ("color", list(world.COLORS))):
        y = torch.tensor([names.index(getattr(i, kind)) for i in items])
        for suffix, parts in pooled.items():
            found[kind + suffix] = _linear_probe(torch.cat(parts).clone(), y, train, len(names))
    rng = random.Random(HELD_OUT_SEED)
    texts = [language.captions(s, rng)[1] for s in drawn[:candidates]]
    pixels = torch.from_numpy(np.stack([np.asarray(world.draw_scene(s, IMAGE_SIZE)) for s in drawn[:candidates]]))
    with torch.inference_mode():
        images = _normalise(pixels.permute(0, 3, 1, 2))
        scores = model(pixel_values=images, **_caption_ids(tokenizer, texts)).logits_per_image
    best = scores.argmax(1).tolist()
    found["retrieval"] = sum(texts[b] == texts[k] for k, b in enumerate(best)) / candidates
    return found


def measure_gates(models: Path = MODELS) -> dict[str, Any]:
    """All gates of the shipped base models and whether each one is passed."""
    text = {name: text_gates(models / name) for name in SIZES}
    vision = vision_gates(models / "clip")
    passed = {
        "probe category >= 90 %": vision["category"] >= 0.9,
        "probe color >= 90 %": vision["color"] >= 0.9,
        "retrieval R@1 of 100 >= 60 %": vision["retrieval"] >= 0.6,
        **{f"{n} answers text questions >= 90 %": t["told"] >= 0.9 for n, t in text.items()},
        **{f"{n} blind <= prior + 5 points": t["blind"] <= t["blind_prior"] + 0.05 for n, t in text.items()},
    }
    return {"vision": vision, "text": text, "passed": passed}


# --- the command ------------------------------------------------------------------------------------------------------


def train_base_models(out: Path = MODELS, only: list[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """Retrain the base models from scratch, one after the other; each manifest says how many minutes it took.

    Args:
        out: folder of `llm-7b`, `llm-13b`, `clip`.
        only: names to train; all when None.
        seed: of everything.

    Returns:
        The gates, as stored in `gates.json` beside the models.
    """
    for name in only or [*SIZES, "clip"]:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        if name == "clip":
            folder.mkdir(parents=True)
            facts = train_clip(folder, train_tokenizer(folder, caption_texts(), 640), seed)
            write_preprocessor(folder)
        else:
            facts = train_language_model(name, folder, seed)
        write_manifest(folder, facts)
    gates = measure_gates(out)
    write_json(out / "gates.json", gates)
    return gates


def write_preprocessor(folder: Path) -> None:
    """The image settings in transformers' file format."""
    mean, std = pixel_statistics()
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "do_resize": True, "do_center_crop": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
            "rescale_factor": 1 / 255, "image_mean": mean, "image_std": std,
        },
    )  # fmt: skip


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Training facts and the SHA-256 of every file, checked when the model is loaded."""
    files = {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.name != "manifest.json"}
    write_json(folder / "manifest.json", {"license": "Apache-2.0", "training": facts, "files": files})
