"""`llava demo`: the chat served by Voila on this machine only, behind a token; each visitor has a kernel."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

import nbformat
from traitlets.config import Config
from voila.app import Voila

from companion.demo import SETTINGS
from llava_core.runtime import ConfigError

HOST = "127.0.0.1"
CELL = "from companion.demo import served_chat\n\nserved_chat()"
LARGEST_FILE = 20_000_000  # bytes; in base64 and with its message less than `MESSAGE_BYTES`
MESSAGE_BYTES = 64 * 2**20
IDLE_SECONDS = 120  # without a page, after which a kernel is ended; it holds a model
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; frame-ancestors 'none'"
)
"""Content security policy: the page loads nothing from other hosts, as Voila's template otherwise does."""


class Server(Voila):
    """Voila that prints its address, with the token, once it listens."""

    browser_wanted = True
    opened = Path("open.html")  # leads a browser to the address: other users may read a command line

    def launch_browser(self) -> None:
        address = f"http://{HOST}:{self.port}/?token={self.token}"
        print(f"the chat is at {address} (Ctrl-C ends it)", flush=True)
        if self.browser_wanted:
            self.opened.write_text(f'<meta http-equiv="refresh" content="0; url={address}">')
            webbrowser.open(self.opened.as_uri())


def serve(settings: dict[str, Any], port: int | None = None, browser: bool = True) -> None:
    """Serve the chat until Ctrl-C.

    Args:
        settings: what `companion.demo.served_chat` reads, as JSON-like values.
        port: a free one by default.

    Raises:
        ConfigError: the port is in use.
    """
    os.environ[SETTINGS] = json.dumps({**settings, "largest_file": LARGEST_FILE, "folder": os.getcwd()})
    with tempfile.TemporaryDirectory(prefix="llava-demo-") as folder:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
        notebook.metadata["title"] = "LLaVA"
        nbformat.write(notebook, path := Path(folder) / "demo.ipynb")
        config = Config(MappingKernelManager={"cull_idle_timeout": IDLE_SECONDS, "cull_interval": 20})
        server = Server(config=config, ip=HOST, port=port or _free_port(), port_retries=0, log_level="ERROR")
        server.token = secrets.token_urlsafe(24)
        _check_port(server.port)
        server.browser_wanted, server.open_browser = browser, True
        server.opened = Path(folder) / "open.html"
        server.tornado_settings = {
            "headers": {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
            "websocket_max_message_size": MESSAGE_BYTES,
        }
        server.initialize([str(path)])
        server.start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port} cannot be used ({error}); fix: another --port, or none") from None
