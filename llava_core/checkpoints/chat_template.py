"""Chat templates of transformers: read from a folder, rendered in a process of its own, compared with our templates."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from llava_core.checkpoints.describe import IMAGE_DELIMITERS
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, ImagePosition, Template, place_image
from llava_core.data.tokenization import Turn

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "SYSTEM7", "QUESTION7", "ANSWER7", "NEXT7"  # words of no template
_POSITIONS: tuple[ImagePosition, ...] = ("first", "last")
_SECONDS, _BYTES, _CHARACTERS = 10, 1 << 30, 1 << 16  # limits of rendering: a template is a program of others
_RENDER = """
import json, re, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
def raise_exception(message): raise ValueError(message)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
except (ImportError, ValueError):
    pass
request = json.load(sys.stdin)
world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
world.globals["raise_exception"] = raise_exception
world.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
template = world.from_string(re.sub("{%(-?) *(end)?generation *(-?)%}", r"{#\\1 \\3#}", request["template"]))
texts = [template.render(messages=m, add_generation_prompt=True, **request["tokens"]) for m in request["dialogues"]]
print(json.dumps([text[:int(sys.argv[2])] for text in texts]))
"""


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a folder, in the order in which transformers looks for it, or None."""
    for name in FILES:
        if not has_file(folder, name):
            continue
        if name.endswith(".jinja"):
            try:
                return contained_file(folder, name).read_bytes().decode()  # line ends as they are
            except UnicodeDecodeError as error:
                raise error_at(folder / name, f"not UTF-8 ({error}); fix: download it again") from error
        found = read_config(folder, name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def usage_of_template(chat_template: str, where: Path) -> dict[str, Any]:
    """Return template, system message and image's place that give the same text as a folder's chat template.

    Raises:
        CheckpointError: it cannot be rendered, or gives the text of no template.
    """
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    later = {"role": "user", "content": [{"type": "text", "text": _NEXT}]}
    rendered = _render(chat_template, [[question], [question, answer, later]], where)
    delimited = IMAGE_MARKER.join(IMAGE_DELIMITERS)
    delimiters = IMAGE_DELIMITERS if delimited in rendered[0] else None
    wanted = [text.removeprefix(_TOKENS["bos_token"]).replace(delimited, IMAGE_MARKER) for text in rendered]
    templates = [TEMPLATES.get(name) for name in TEMPLATES.names()]
    for template, position in product([t for t in templates if t.encoder is None], _POSITIONS):
        asked = place_image(f"{IMAGE_MARKER}\n{_QUESTION}", position, "")
        before, _, after = _text(template, [(asked, None)], _SYSTEM).partition(_SYSTEM)
        system = wanted[0].removeprefix(before).removesuffix(after)  # of a text that has both; else nothing is equal
        dialogues: list[list[Turn]] = [[(asked, None)], [(asked, _ANSWER), (_NEXT, None)]]
        if wanted == [_text(template, turns, system) for turns in dialogues]:
            place = {"image_position": position, "image_delimiters": delimiters}
            return {"template": template.name, "system": system, **place}
    raise error_at(where, f"its chat template renders {rendered[0][:160]!r}, the text of no template here")


def _text(template: Template, turns: list[Turn], system: str) -> str:
    """The text of a dialogue, with image markers and EOS."""
    return "".join(
        IMAGE_MARKER if segment.image else segment.text + _TOKENS["eos_token"] * segment.eos
        for segment in template.render(turns, system)
    )


def _render(chat_template: str, dialogues: list[Any], where: Path) -> list[str]:
    request = {"template": chat_template, "dialogues": dialogues, "tokens": _TOKENS}
    command = [sys.executable, "-P", "-c", _RENDER, str(_BYTES), str(_CHARACTERS)]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise error_at(where, f"its chat template takes more than {_SECONDS} seconds") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["out of memory"])[-1][:160]
        raise error_at(where, f"its chat template cannot be rendered ({reason})")
    texts: list[str] = json.loads(done.stdout)
    return texts
