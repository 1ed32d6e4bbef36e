"""A local server of chat completions with injected faults; run as a program, the faults are arguments.

A request's fault is drawn from its text and the number of its attempt, so that a second attempt may meet another one.
What the server bills is a reply that it has sent to the last byte; each one is a line of its log, which is written
before that byte, so that no client has a reply that the log lacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from llava_core.runtime import read_jsonl

FAULTS = ("429", "429 seconds", "429 date", "500", "stalled", "truncated", "invalid", "closed")
STATUS = {"429": 429, "429 seconds": 429, "429 date": 429, "500": 500, "401": 401, "400": 400}


def refusal(request: dict[str, Any], refuses: Sequence[str]) -> tuple[int, Any] | None:
    """Status and body of the answer to a request with one of these parameters."""
    for name in refuses:
        if name in request:
            text = f"Unsupported parameter: '{name}' is not supported with this model."
            if name == "max_tokens":
                text += " Use 'max_completion_tokens' instead."
            error = {"message": text, "type": "invalid_request_error", "param": name, "code": "unsupported_parameter"}
            return 400, {"error": error}
    return None


class Server:
    """Answers on 127.0.0.1.

    Args:
        log: gets a JSON line per billed reply: the request's last message, tokens, and the model that answered.
        faulty: share of the attempts that meet a fault.
        faults: which ones, drawn evenly.
        malformed: share of the replies that are billed and of a wrong format.
        seconds: a reply takes.
        stall: seconds of silence of the fault `stalled`.
        rename_after: after so many replies another snapshot answers.
        usage: tokens of prompt and completion, or the field itself.
        choice: fields of every reply's choice, instead of the usual ones.
        refuses: parameters with which a request is refused as OpenAI's newer models do.
        error: status and error of every answer.
        raw: every answer as it is sent: status (200), headers (lines), body (an object or text, in which KEY stands for
            the authorisation that was sent), repeat (a text and how often it follows), spaces (so many, compressed,
            before the body), drip (seconds between further bytes, without an end; so many `bytes` at a time) of the
            `part` head or body.
    """

    def __init__(
        self,
        log: Path,
        faulty: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        malformed: float = 0.0,
        seconds: float = 0.0,
        stall: float = 3.0,
        rename_after: int = 10**9,
        usage: Any = (1000, 500),
        choice: dict[str, Any] | None = None,
        refuses: tuple[str, ...] = (),
        error: tuple[int, Any] | None = None,
        raw: dict[str, Any] | None = None,
    ) -> None:
        self.log, self.faulty, self.faults, self.malformed = log, faulty, tuple(faults), malformed
        self.seconds, self.stall, self.rename_after, self.usage = seconds, stall, rename_after, usage
        self.choice, self.refuses, self.error = choice or {}, refuses, error
        self.raw = raw
        self.sent: list[list[str]] = []
        self.attempts: Counter[str] = Counter()
        self.billed = self.under_way = self.most_under_way = 0
        self.times: list[float] = []
        self.met: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(h[15:]) for h in head.split("\r\n") if h.lower().startswith("content-length:"))
        request = json.loads(await reader.readexactly(length))
        self.times.append(time.monotonic())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.raw is not None:
                return await self._send_raw(writer, head, self.raw)
            return await self._answer(request, writer)
        finally:
            self.under_way -= 1

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        text = "\n".join(m["content"] for m in request["messages"][-3:])
        self.attempts[text] += 1
        rng = random.Random(f"{text}-{self.attempts[text]}")
        fault = rng.choice(self.faults) if rng.random() < self.faulty else ""
        self.met[fault] += 1
        self.sent.append(sorted(request.keys() - {"messages", "model"}))
        refused = self.error or refusal(request, self.refuses)
        if refused:
            return await self._send(writer, refused[0], json.dumps(refused[1]).encode())
        if fault in STATUS:
            later = datetime.now(UTC) + timedelta(seconds=1)
            when = {"429 seconds": "1", "429 date": format_datetime(later, usegmt=True)}.get(fault)
            body = json.dumps({"error": {"message": "not now", "type": "t", "code": None}}).encode()
            return await self._send(writer, STATUS[fault], body, f"Retry-After: {when}\r\n" if when else "")
        if fault == "closed":
            return False
        if fault == "invalid":
            return await self._send(writer, 200, b'{"choices": [{"mess')
        if fault == "stalled":
            await asyncio.sleep(self.stall)
            return False
        await asyncio.sleep(self.seconds)
        model = "gpt-4-0314" if self.billed < self.rename_after else "gpt-4-0613"
        repaired = request["messages"][-1]["content"].startswith("This reply cannot be used")
        bad = not repaired and random.Random(text).random() < self.malformed
        content = "Question:\nA description?" if bad else f"This is {text[-40:]}"
        usage = self.usage
        if isinstance(usage, list | tuple):
            usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": model, "usage": usage}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        answer["choices"] = [choice | self.choice]
        body = json.dumps(answer).encode()
        if fault == "truncated":
            await self._send(writer, 200, body[: len(body) // 2], declared=len(body))
            return False
        await self._send(writer, 200, body[:-1], declared=len(body))
        self.billed += 1
        row = {"text": text, "tokens": self.usage, "model": model}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        writer.write(body[-1:])
        await writer.drain()
        return True

    async def _send_raw(self, writer: asyncio.StreamWriter, head: str, raw: dict[str, Any]) -> bool:
        key = next((line[15:] for line in head.split("\r\n") if line.lower().startswith("authorization:")), "")
        body = raw.get("body", "")
        text, count = raw.get("repeat", ("", 0))
        body = body if isinstance(body, str) else json.dumps(body)
        content = (body.replace("KEY", key) + text * count).encode("latin-1")
        lines = [f"HTTP/1.1 {raw.get('status', 200)} X", *raw.get("headers", [])]
        if "spaces" in raw:
            content = gzip.compress(b" " * raw["spaces"] + content)
            lines.append("Content-Encoding: gzip")
        if "drip" not in raw:
            lines.append(f"Content-Length: {len(content)}")
        end = "" if raw.get("part") == "head" else "\r\n"
        writer.write("\r\n".join([*lines, end]).replace("KEY", key).encode() + content)
        await writer.drain()
        while "drip" in raw:
            writer.write(b"X-More: 1\r\n" if raw.get("part") == "head" else raw.get("bytes", 1) * b" ")
            await writer.drain()
            await asyncio.sleep(raw["drip"])
        return True

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, body: bytes, more: str = "", declared: int | None = None
    ) -> bool:
        size = len(body) if declared is None else declared
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{more}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True


class Running:
    """The server as a process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        assert process.stdout is not None
        self.url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"

    def billed(self) -> list[dict[str, Any]]:
        return read_jsonl(self.log) if self.log.exists() else []

    def stop(self) -> dict[str, Any]:
        output: dict[str, Any] = json.loads(self.process.communicate()[0])
        return output


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Running]:
    """Run a server with these arguments of `Server`; its log is in the folder."""
    words = [sys.executable, __file__, str(folder / "billed.jsonl"), json.dumps(options)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Running(process, folder / "billed.jsonl")
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


async def main(log: Path, options: dict[str, Any]) -> None:
    """Print the port on stdout, serve until stdin ends, then print the faults that occurred."""
    server = Server(log, **options)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    seen = {"met": server.met, "most_under_way": server.most_under_way, "times": server.times, "sent": server.sent}
    print(json.dumps(seen), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
