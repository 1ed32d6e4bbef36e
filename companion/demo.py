"""Chat widget for JupyterLab and `llava demo`: images, streamed answers, and the attention of each word."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from PIL import Image

from companion.figures import image_uri
from companion.guard import Guard
from companion.terminal_chat import visible_region
from llava_core.chat import CAPTION, Conversation, plain_question
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import RunConfig, load_scale
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES
from llava_core.data.images import load_image
from llava_core.data.tokenization import Turn
from llava_core.runtime import ROOT, CompanionError, DataError, display_path, resolve, resolve_device, resolve_dtype

SETTINGS = "LLAVA_DEMO"
"""Environment variable with which `llava demo` hands its arguments, as JSON, to the kernel of each visitor."""
SUGGESTIONS = ("What do you see?", "Describe this in detail.", CAPTION)
LARGEST_FILE = 8_000_000  # bytes; Jupyter's server ends a connection at a message of 10 MiB
MOST_IMAGES = 24  # of the gallery
UPDATE_SECONDS = 0.04  # between two states of an answer that are sent to the page


class Chat(anywidget.AnyWidget):
    """A chat about images; generation runs in a thread, so that the kernel can receive a stop.

    Attributes:
        conversation: the live `Conversation`, with its turns.
    """

    _esm = Path(__file__).with_suffix(".mjs").read_text(encoding="utf-8")
    gallery = traitlets.List().tag(sync=True)  # {name, src}
    suggestions = traitlets.List(list(SUGGESTIONS)).tag(sync=True)
    about = traitlets.List().tag(sync=True)  # sentences on the checkpoint and the filters
    largest_file = traitlets.Int(LARGEST_FILE).tag(sync=True)
    question = traitlets.Unicode().tag(sync=True)  # what the box begins with
    image = traitlets.Dict().tag(sync=True)  # {name, src, crop}: what the model sees
    turns = traitlets.List().tag(sync=True)  # {question, answer, note}; the last one grows while `busy`
    busy = traitlets.Bool(False).tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    attention = traitlets.Dict().tag(sync=True)  # {turn, words: [{text, weights}]}

    def __init__(self, loaded: Loaded, images: Sequence[Path] = (), guard: Guard | None = None, **state: Any) -> None:
        super().__init__(**state)
        self.conversation, self.guard = Conversation(loaded), guard or Guard()
        self._images = list(images)[:MOST_IMAGES]
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.about = [*self.about, self.guard.sentence]
        self.gallery = [{"name": p.stem, "src": image_uri(load_image(p), within=(88, 88))} for p in self._images]
        self.on_msg(self._receive)
        if self._images:
            self.pick(0)

    def _receive(self, _: Any, message: dict[str, Any], buffers: list[Any]) -> None:
        match message.get("do"):
            case "ask":
                self.ask(message["text"], message["tokens"], message["temperature"])
            case "stop":
                self._stopping.set()
            case "pick":
                self.pick(message["number"])
            case "image":
                self.open_file(message["name"], buffers[0])
            case "clear":
                self.clear()
            case "attend":
                self.attend(message["turn"])

    # ---------------------------------------------------------------------------------------- actions

    def pick(self, number: int) -> None:
        """Start a dialogue about an image of the gallery."""
        path = self._images[number]
        self._guarded(lambda: self._set_image(path.name, load_image(path)))

    def open_file(self, name: str, content: Any) -> None:
        """Start a dialogue about the image in the bytes of a file; a file that is none is an error on the page."""
        self._guarded(lambda: self._set_image(name, load_image(bytes(content), name)))

    def clear(self) -> None:
        """Start again about the same image."""
        self.wait(stop=True)
        self.conversation.turns.clear()
        self.turns, self.attention, self.error, self.status = [], {}, "", ""

    def ask(self, text: str, max_new_tokens: int = 96, temperature: float = 0.0) -> None:
        """Begin to answer; nothing happens while an answer is under way. `wait` waits for the end."""
        if not self.busy:
            self._start(lambda: self._answer(text, int(max_new_tokens), float(temperature)))

    def attend(self, number: int) -> None:
        """Begin to compute the attention of each word of an answer."""
        if not self.busy:
            self._start(lambda: self._attend(number))

    def wait(self, stop: bool = False) -> None:
        """Wait until no thread generates; `stop` ends it after its current token."""
        if stop:
            self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    # ---------------------------------------------------------------------------------------- work

    def _start(self, work: Callable[[], None]) -> None:
        self._stopping.clear()
        self.busy = True

        def run() -> None:
            try:
                self._guarded(work)
            finally:
                self.busy = False

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        self.error = ""
        try:
            work()
        except CompanionError as error:
            self.error = " ".join(str(error).split())
        except Exception as error:  # of the model, such as a full memory: the page stays usable
            self.error = f"the model failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _set_image(self, name: str, image: Image.Image) -> None:
        self.guard.check_image(image)
        self.wait(stop=True)
        seen = self.conversation.set_image(image)
        processor = self.conversation.loaded.processor
        shown = {"src": image_uri(seen), "whole": image_uri(image, within=(160, 160)), "mode": processor.mode}
        self.image = {"name": name, **shown, "crop": visible_region(image, processor)}
        self.clear()

    def _answer(self, text: str, max_new_tokens: int, temperature: float) -> None:
        if self.conversation.image is None:
            raise DataError("there is no image; choose or upload one")
        text = plain_question(text)
        self.guard.check_text(text)
        before, known = self.turns, len(self.conversation.turns)
        begun, shown, first, count, answer = time.monotonic(), 0.0, 0.0, 0, ""
        try:
            steps = self.conversation.stream(text, max_new_tokens, temperature)
            for count, answer in enumerate(steps, start=1):  # noqa: B007 - read after the loop
                first = first or time.monotonic() - begun
                if time.monotonic() - shown > UPDATE_SECONDS:
                    self.turns, shown = [*before, {"question": text, "answer": answer, "note": ""}], time.monotonic()
                if self._stopping.is_set():
                    break
        except Exception:
            self.turns = before  # a failed answer is no turn, neither here nor in the conversation
            raise
        note = "stopped at the longest answer" if self.conversation.finish == "length" else ""
        if len(self.conversation.turns) == known:
            self.conversation.turns.append((text, answer))
            note = "stopped"
        self.turns = [*before, {"question": text, "answer": answer, "note": note}]
        rate = (count - 1) / max(time.monotonic() - begun - first, 1e-3)
        self.status = f"First word after {first:.1f} s, then {rate:.0f} tokens per second."

    def _attend(self, number: int) -> None:
        words = word_attention(self.conversation.loaded, self.conversation.image, self.conversation.turns[: number + 1])
        shown = [{"text": text, "weights": [round(w, 6) for w in weights]} for text, weights in words]
        self.attention = {"turn": number, "words": shown}


def chat_widget(loaded: Loaded, images: Sequence[Path], question: str = SUGGESTIONS[0]) -> Chat:
    """Return the chat about a chapter's model with a gallery of images, without filters."""
    return Chat(loaded, images, about=about(loaded, "the model of this chapter"), question=question)


@torch.inference_mode()
def word_attention(
    loaded: Loaded, image: Image.Image | None, turns: Sequence[Turn]
) -> list[tuple[str, list[float]]]:  # fmt: skip
    """Return the words of the last answer, each with its attention to the P visual tokens.

    The attention is that of the positions that predict the word's tokens, as a mean over tokens, layers and heads; the
    dialogue is encoded as in training.

    Raises:
        DataError: the dialogue has no image.
    """
    model, tokenizer, manifest = loaded.model, loaded.tokenizer, loaded.manifest
    if image is None:
        raise DataError("there is no image; choose or upload one")
    template = TEMPLATES.get(manifest.get("template", "v0"))
    with_image = template.with_image(turns, manifest.get("image_position", "data"), "")
    encoded = template.encode(
        with_image, tokenizer, model.n_image_tokens,
        system=manifest.get("system"), delimiters=manifest.get("image_delimiters"),
    )  # fmt: skip
    ids, supervised = encoded.input_ids, [k for k, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    start = len(supervised) - 1
    while start > 0 and supervised[start - 1] == supervised[start] - 1:
        start -= 1  # the last run of supervised positions is the last answer
    answer = supervised[start:]
    device, language_model = model.language_model.device, model.language_model
    pixels = torch.from_numpy(loaded.processor(image))[None].to(device)
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")  # the one that returns attention weights
    try:
        output = model(torch.tensor([ids], device=device), pixels, output_attentions=True, use_cache=False)
    finally:
        language_model.set_attn_implementation(before)
    mean = torch.stack([layer[0].float().mean(0) for layer in output.attentions]).mean(0)  # (T, T), query by key
    rows = mean[:, torch.tensor(ids, device=device) == IMAGE_TOKEN_ID].cpu()  # (T, P)
    text, ends = "", []
    for k in range(len(answer)):
        text = tokenizer.decode([ids[p] for p in answer[: k + 1]], clean_up_tokenization_spaces=False)
        ends.append(len(text))
    words = []
    for word in re.finditer(r"\S+", text.partition(template.stop or "\0")[0]):
        starts = [0, *ends[:-1]]
        tokens = [k for k, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < word.end() and b > word.start()]
        words.append((word.group(), rows[[answer[k] - 1 for k in tokens]].mean(0).tolist()))
    return words


def about(loaded: Loaded, name: str, folder: Path | None = None) -> list[str]:
    """Return sentences on a checkpoint for those who chat with it; `folder` may be that of a run's checkpoint."""
    model, manifest = loaded.model, loaded.manifest
    size = sum(parameter.numel() for parameter in model.parameters())
    count = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million"
    template, pixels = manifest.get("template", "v0"), loaded.processor.size
    sentences = [f"{name}: {count} parameters, template {template}, images of {pixels} x {pixels} pixels."]
    base = manifest.get("base") or {}
    if base:
        names = [Path(str(base[part])).name for part in ("vision_tower", "language_model") if part in base]
        sentences.append(f"Base models: {', '.join(names)}.")
    if folder and (folder.parent / "config.yaml").is_file():
        config = RunConfig.read(folder.parent / "config.yaml")
        sentences.append(f"Run {folder.parent.name} of {config.experiment.name} at the scale {config.scale.name}.")
    if "models/mini" in str(base.get("language_model")):
        sentences.append(
            "A miniature: it knows drawn scenes with a few kinds of things, colors and places. Its answers about "
            "photographs mean nothing."
        )
    else:
        sentences.append("It may name things that the image does not have: check what matters.")
    return sentences


# ---------------------------------------------------------------------------------------------- `llava demo`


def newest_checkpoint() -> Path:
    """Return the checkpoint of the newest finished run of visual instruction tuning at the smallest scale.

    Raises:
        DataError: there is none.
    """
    found = (ROOT / "runs" / "finetune" / "mini").glob("*/checkpoint/manifest.json")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise DataError("no trained model in runs/finetune/mini; fix: `llava reproduce` trains one, or --model DIR")
    return newest.parent


def held_out_images() -> list[Path]:
    """Return the images of LLaVA-Bench (In-the-Wild) at the smallest scale, or none where they are not made yet."""
    folder = resolve(load_scale("mini").data["bench-wild"]) / "images"
    return images_in(folder) if folder.is_dir() else []


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))


def served_chat() -> Any:
    """Return the chat that `llava demo` asked for in the environment, or the sentence that says why there is none."""
    from IPython.display import HTML

    from companion.figures import html_safe

    given = json.loads(os.environ[SETTINGS])
    try:
        os.chdir(given["folder"])  # that of the command; Voila starts a kernel in the notebook's
        path, place = Path(given["model"]), resolve_device("auto")
        dtype = resolve_dtype("bfloat16" if place.type == "cuda" else "float32")
        loaded = load(path, dtype, place, Options(**given["options"]), **given["usage"])
        image_file = Path(given["guard_image"]) if given["guard_image"] else None
        guard = Guard(given["guard"], image_file)
        images = [Path(name) for name in given["images"]]
        sentences = about(loaded, display_path(path), path)
        return Chat(loaded, images, guard, about=sentences, question=SUGGESTIONS[0], largest_file=given["largest_file"])
    except Exception as error:  # a visitor reads no traceback
        return HTML(f'<p role="alert">{html_safe(" ".join(str(error).split()))}</p>')
