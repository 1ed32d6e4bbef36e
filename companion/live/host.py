"""One ES module, three hosts: an HTML output (book and JupyterLab), an anywidget, and a page of a MyST site.

A module has `export default { render({ model, el }) }`, as anywidget defines it; it reads its content by
`model.get(NAME)`. The content is JSON, and in a live kernel also bytes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.runtime import atomic_write, fingerprint

if TYPE_CHECKING:
    from anywidget import AnyWidget
    from IPython.display import HTML

FOLDER = Path(__file__).parent


def joined(*files: str) -> str:
    """Return module files of this folder as one module; the last one has the default export."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in files]
    inner = [re.sub(r"^export (?=class|const|function)", "", text, flags=re.M) for text in texts]
    return re.sub(r'^import .* from "\./.*";$\n', "", "\n".join(inner), flags=re.M)


def html_output(esm: str, content: Mapping[str, Any], fallback: str) -> HTML:
    """Return an output that runs a module, also in a page that is opened from a file; nothing is fetched.

    Args:
        esm: the module.
        content: what `model.get` returns by name; bytes arrive as base64 text.
        fallback: HTML that stands in the module's element until it runs, and where no script may run.
    """
    from IPython.display import HTML

    run, given = esm.replace("export default ", "const module = "), _json(content)
    key = fingerprint([esm, given])  # a page may have several outputs, and one of them twice
    return HTML(
        f'<div class="companion-host" data-key="{key}"><div>{fallback}</div>'
        f'<script type="application/json">{given}</script><script type="module">{run}\n'
        f"const host = document.querySelector(\"[data-key='{key}']:not([data-taken])\");\n"
        'host.dataset.taken = "";\n'
        "const content = JSON.parse(host.querySelector(\"script[type='application/json']\").textContent);\n"
        "const model = { get: (name) => content[name], set() {}, save_changes() {} };\n"
        "host.running = module.render({ model, el: host.firstElementChild });\n"
        "</script></div>"
    )


def widget(esm: str, content: Mapping[str, Any], **more: Any) -> AnyWidget:
    """Return the same module as an anywidget for a live kernel.

    Args:
        esm, content: as in `html_output`; bytes are sent as they are.
        more: names and first values of what the module sets, such as `turns`.
    """
    import anywidget
    import traitlets

    synced = {**content, **more}
    traits = {
        name: (traitlets.Bytes() if isinstance(value, bytes) else traitlets.Any()).tag(sync=True)
        for name, value in synced.items()
    }
    return type("CompanionWidget", (anywidget.AnyWidget,), {"_esm": esm, **traits})(**synced)


def write_myst(folder: Path, name: str, title: str, esm: str, content: Mapping[str, Any]) -> Path:
    """Write NAME.md with an `{anywidget}` directive, and the module with its content beside it; return the page.

    The content stands in the module, so that it is a static file of the site and not a part of the page's text.
    """
    own = (
        f"{esm.replace('export default ', 'const module = ')}\nconst content = {_json(content)};\n"
        "export default { render: ({ model, el }) => module.render({ el, model: {\n"
        "  get: (name) => content[name], set() {}, save_changes() {} } }) };\n"
    )
    atomic_write(folder / f"{name}.mjs", own)
    page = f"# {title}\n\n:::{{anywidget}} ./{name}.mjs\n{{}}\n:::\n"
    return atomic_write(folder / f"{name}.md", page)


def _json(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, default=lambda value: base64.b64encode(value).decode())
    return text.replace("<", "\\u003c")  # "<" would end the element that holds it
