"""HTTP connection to a chat server: redirects are not followed, answers and waits are bounded, secrets are replaced."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import json
import os
import re
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llava_core.runtime import ConfigError, printable, shortened

NO_SDK = "a live teacher needs the package openai: pip install 'llava-core[live]'"
REPLY_BYTES = 4 * 2**20  # of an answer, decompressed
FILE_BYTES = 512 * 2**20  # of a file of batch results
TOTAL_TIME = 3  # an answer takes at most so many times the longest silence, a file ten times as long
MOST_WAIT = 120.0  # seconds; if a server asks for more, its refusal is final
ANNOUNCED_WAIT = 5.0  # seconds; shorter waits are not printed
ENCODINGS = ("identity", "gzip", "deflate")
_LONGEST = 500  # characters of an error
Hook = Callable[[Any], None]
Result = TypeVar("Result")


class UnusableAnswerError(BaseException):
    """The body is too large or not decodable; no `Exception`, after which the SDK would repeat the request."""


def one_line(error: object) -> str:
    """Return an error, which may have a server's text in it, as one printable line of bounded length."""
    text = " ".join(str(error)[: 4 * _LONGEST].split()) or type(error).__name__
    return shortened(printable(text), _LONGEST)


def open_sdk(
    base_url: str | None,
    api_key: str | None,
    timeout: float,
    max_retries: int,
    before: Hook = lambda request: None,
    after: Hook = lambda answer: None,
) -> tuple[Any, Any]:
    """Return the openai package and its client.

    Args:
        timeout: longest silence of the server in seconds; a whole answer may take `TOTAL_TIME` times as long.
        before, after: called with each request and its answer, in the thread that asks.

    Raises:
        ConfigError: the package is not installed, or the key or the address cannot be used.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ConfigError(NO_SDK) from error
    hide, retry_headers = secret_filter(base_url, api_key or os.environ.get("OPENAI_API_KEY", "")), RetryHeaders()

    class Client(openai.DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            before(request)
            is_file = "/files" in request.url.path
            seconds, most = timeout * TOTAL_TIME * (10 if is_file else 1), FILE_BYTES if is_file else REPLY_BYTES
            end, send = time.monotonic() + seconds, super().send
            options |= {"stream": True, "follow_redirects": False}

            def ask() -> tuple[Any, bytes]:
                response = send(request, **options)
                return response, read_answer(response, most, end)

            try:
                response, body = _within(seconds, ask)
            except TimeoutError:
                message = f"no whole answer in {seconds:g} s"
                raise openai.APIConnectionError(message=message, request=request) from None
            except Exception as error:
                if (text := hide(str(error).encode())) == str(error).encode():
                    raise
                raise type(error)(text.decode()) from None  # it repeated what was sent or received
            headers = {"content-type": "application/json", **retry_headers(response)}
            answer = type(response)(response.status_code, headers=headers, content=hide(body), request=request)
            after(answer)
            return answer

    client = Client(headers={"Accept-Encoding": "gzip, deflate"})
    try:
        sdk = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout, max_retries=max_retries, http_client=client
        )
    except Exception as error:  # the SDK's own without a key, another package's for an invalid address
        raise ConfigError(f"the openai SDK: {hide(one_line(error).encode()).decode()}") from None
    key = str(sdk.api_key)
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError("the API key has a space, a line break or another character that a header cannot have")
    return openai, sdk


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """Return the result of `work`, or raise TimeoutError; a socket's timeout bounds each read, not all of them."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def read_answer(response: Any, most: int, end: float) -> bytes:
    """Return the body of a streamed response, or an error that stands for a redirect or for the body of a refusal.

    Raises:
        UnusableAnswerError: a body with status 200 is larger than `most` bytes or cannot be decompressed.
        TimeoutError: it goes on after `end`, a time of `time.monotonic`.
    """
    try:
        if not 300 <= response.status_code < 400:
            return _read(response, most, end)
        target = one_line(response.headers.get("location") or "no address")
        message = f"the server redirects to {target}, which is not followed; give its address as the base URL to ask it"
    except UnusableAnswerError as error:
        if response.status_code < 300:
            raise
        message = str(error)
    finally:
        response.close()
    return json.dumps({"error": {"message": message}}).encode()


def _read(response: Any, most: int, end: float) -> bytes:
    encoding = response.headers.get("content-encoding", "").strip().lower() or "identity"
    if encoding not in ENCODINGS:
        raise UnusableAnswerError(f"the answer has the encoding {one_line(encoding)}, which was not asked for")
    decoder = None if encoding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    body, received = bytearray(), 0
    for part in response.iter_raw():
        received += len(part)
        try:
            body += decoder.decompress(part, most + 1 - len(body)) if decoder else part
        except zlib.error as error:
            raise UnusableAnswerError(f"the answer is not valid {encoding} ({error})") from None
        if max(received, len(body)) > most:
            raise UnusableAnswerError(f"the answer is larger than {most / 2**20:g} MiB")
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(body).replace(b"\0", b"")  # UTF-16, which no JSON API speaks, would hide a secret


class RetryHeaders:
    """Headers that tell the SDK when to repeat a refused request: bounded waits, printed once each."""

    def __init__(self) -> None:
        self._printed_until = 0.0

    def __call__(self, response: Any) -> dict[str, str]:
        """Return the headers of a response; a wait that is no positive number leaves it to the SDK's backoff."""
        never = {"x-should-retry": "false"}
        headers = never if response.headers.get("x-should-retry") == "false" else {}
        wait, status = asked_wait(response.headers), response.status_code
        if wait is None or not wait > 0 or status < 400:
            return headers
        if wait >= ANNOUNCED_WAIT and time.monotonic() > self._printed_until:
            self._printed_until = time.monotonic() + min(wait, MOST_WAIT)
            end = f"; more than {MOST_WAIT:g} s are not waited" if wait > MOST_WAIT else ""
            print(f"note: status {status}: the server asks for a wait of {wait:.4g} s{end}", file=sys.stderr)
        return never if wait > MOST_WAIT else {"retry-after": f"{wait:.3f}", **headers}


def asked_wait(headers: Any) -> float | None:
    """Return the seconds of `Retry-After`, a number or a date; NaN and negative ones as they are."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return float(headers[name]) * unit
    with contextlib.suppress(IndexError, TypeError, ValueError, OverflowError):  # neither a number nor a possible date
        if date := email.utils.parsedate_tz(headers.get("retry-after")):
            return email.utils.mktime_tz(date) - time.time()
    return None


def secret_filter(base_url: str | None, api_key: str) -> Callable[[bytes], bytes]:
    """Return a function that replaces the key, and user names and passwords of addresses, in what a server sends.

    They are found in any case, and with letters escaped as JSON, HTML and addresses do. A short word as key, such as
    `none`, stands for no key.
    """
    secrets = {api_key} if len(api_key) >= (16 if api_key.isalpha() else 6) else set[str]()
    for address in (base_url or os.environ.get("OPENAI_BASE_URL", ""), *urllib.request.getproxies().values()):
        with contextlib.suppress(ValueError):  # no address
            parts = urlsplit(address)
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            if user or password:
                secrets |= {password or user, base64.b64encode(f"{user}:{password}".encode()).decode()}
    if not secrets:
        return lambda content: content
    forms = ("".join(map(_forms, secret)) for secret in sorted(secrets, key=len, reverse=True))
    pattern = re.compile("|".join(forms).encode(), re.IGNORECASE)
    return lambda content: pattern.sub(b"[API key]", content)


def _forms(letter: str) -> str:
    code = ord(letter)
    return rf"\\{{0,4}}(?:{re.escape(letter)}|u{code:04x}|x{code:02x}|%{code:02x}|&#{code};|&#x{code:x};)"
