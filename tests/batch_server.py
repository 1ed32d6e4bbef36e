"""A local server with the files and batches of OpenAI's API; run as a program, its faults are arguments.

What it bills is a request that it has executed; each one is a line of its log. Every call is a line of its events,
written before it is answered, so that a test can kill the caller at a known moment.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chat_server import refusal

USAGE = (1000, 500)


class State:
    """State of the server.

    Args:
        folder: gets `billed.jsonl`, `events.jsonl` and `batches.jsonl` (the batches).
        missing: there is no batch endpoint.
        refuse: every file fails validation, with this message.
        most: more requests per batch are refused as too many waiting tokens.
        looks: how often a batch is looked at before it has ended.
        ends: how the first batches end, e.g. `expired` with half of the requests executed; `completed` when used up.
        faults: custom status (int) or code by the last words of a request, met each time.
        malformed: last words of requests whose first reply is of a wrong format.
        stall: the first call of this kind is executed, and answered after seconds in which a test kills the caller;
            `late create` is executed when a file was deleted, as a call that is slow on its way.
        lost: creations that are executed, and answered with 500.
        choice: fields of every reply's choice, instead of the usual ones.
        refuses: parameters with which a line is refused, as of `chat_server`.
        error: status and body of every line's answer.
        lines: what is written instead of an executed line, by the last word of its request; ID stands for its id, and
            LEVELS for 200,000 brackets.
        answers: what is sent instead of an answer, by the kind of call (`upload`, `create`, `list`, `poll`).
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        known = {"missing": False, "refuse": "", "most": 10**9, "looks": 1, "ends": [], "faults": {}, "malformed": []}
        known |= {"stall": "", "lost": 0, "choice": {}, "refuses": [], "error": None, "lines": {}, "answers": {}}
        assert set(options) <= set(known)
        self.options = known | options
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.deleted = threading.Event()
        self.stalled = False

    def write(self, file: str, row: Any) -> None:
        with (self.folder / file).open("a") as log:
            log.write(json.dumps(row) + "\n")

    def stalls(self, event: str) -> bool:
        self.write("events.jsonl", event)
        if self.options["stall"].removeprefix("late ") != event or self.stalled:
            return False
        self.stalled = True
        return True

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked["input_file_id"] not in self.files:
            return 400, {"error": {"message": "no such file", "code": None}}
        number = len(self.batches) + 1
        batch = {
            "id": f"batch_{number}", "object": "batch", "endpoint": asked["endpoint"], "created_at": int(time.time()),
            "input_file_id": asked["input_file_id"], "completion_window": asked["completion_window"],
            "metadata": asked.get("metadata"), "status": "validating", "looks": 0,
        }  # fmt: skip
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        size = len(self.files[asked["input_file_id"]])
        self.write("batches.jsonl", {"requests": len(lines), "bytes": size, "model": lines[0]["body"]["model"]})
        batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        self.batches[batch["id"]] = batch
        wrong = self.options["refuse"]
        code = "invalid_json_line"
        if len(lines) > self.options["most"]:
            wrong, code = "Enqueued token limit reached", "token_limit_exceeded"
        if (
            len({line["custom_id"] for line in lines}) < len(lines)
            or len({line["body"]["model"] for line in lines}) > 1
        ):
            wrong = "an id twice, or two models"
        if wrong:
            batch["end"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": code, "message": wrong, "line": 1}]}
        else:
            batch["end"] = self.options["ends"].pop(0) if self.options["ends"] else "completed"
            self.execute(batch, lines)
        return 200, batch

    def execute(self, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        done, failed = [], []
        texts = {line["custom_id"]: line["body"]["messages"][-1]["content"] for line in lines}
        for number, line in enumerate(lines):
            words = line["body"]["messages"][-1]["content"].split()
            fault = self.options["faults"].get(words[-1])
            row: dict[str, Any] = {"id": f"r{number}", "custom_id": line["custom_id"], "response": None, "error": None}
            if batch["end"] != "completed" and number >= len(lines) // 2:
                if batch["end"] == "expired":  # a cancelled batch does not name what it left out
                    failed.append(row | {"error": {"code": "batch_expired", "message": "too late"}})
            elif isinstance(fault, int):
                error = {"error": {"message": "not this one", "code": None}}
                failed.append(row | {"response": {"status_code": fault, "body": error}})
            elif refused := self.options["error"] or refusal(line["body"], self.options["refuses"]):
                failed.append(row | {"response": {"status_code": refused[0], "body": refused[1]}})
            else:
                done.append(row | {"response": {"status_code": 200, "body": self.answer(line["body"])}})
                self.write("billed.jsonl", {"key": line["custom_id"], "tokens": USAGE})
        batch["request_counts"] |= {"completed": len(done), "failed": len(failed)}
        for name, rows in (("output_file_id", done), ("error_file_id", failed)):
            if rows:
                batch[name] = f"file-{name}-{batch['id']}"
                self.files[batch[name]] = b"".join(self.line(row, texts) + b"\n" for row in reversed(rows))

    def line(self, row: dict[str, Any], texts: dict[str, str]) -> bytes:
        text: str | None = self.options["lines"].get(texts[row["custom_id"]].split()[-1])
        if text is None:
            return json.dumps(row).encode()
        return text.replace("ID", row["custom_id"]).replace("LEVELS", "[" * 200_000).encode()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        content = "Question:\nA description?" if text.split()[-1] in self.options["malformed"] else f"This is {text}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}
        choice |= self.options["choice"]
        return {"id": "1", "object": "chat.completion", "model": "gpt-4-0314", "choices": [choice], "usage": usage}


def handler(state: State) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def send(self, status: int, body: Any, stalled: bool = False, kind: str = "") -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            if kind in state.options["answers"]:
                content = state.options["answers"][kind].encode()
            if stalled:
                time.sleep(30)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if state.options["missing"]:
                self.send(404, {"detail": "Not Found"})
            elif self.path.endswith("/files"):
                boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
                part = next(part for part in body.split(boundary) if b"filename=" in part)
                with state.lock:
                    name = f"file-{len(state.files)}"
                    state.files[name] = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
                    stalled = state.stalls("upload")
                self.send(200, {"id": name, "object": "file", "purpose": "batch"}, stalled, "upload")
            else:
                with state.lock:
                    stalled = state.stalls("create")
                if stalled and state.options["stall"].startswith("late"):
                    state.deleted.wait(20)
                with state.lock:
                    status, batch = state.create(json.loads(body))
                    if state.options["lost"] > 0:
                        state.options["lost"] -= 1
                        status, batch = 500, {"error": {"message": "lost", "code": None}}
                self.send(status, batch, stalled, "create")

        def do_DELETE(self) -> None:
            with state.lock:
                result = state.files.pop(self.path.rpartition("/")[2], None)
                state.write("events.jsonl", "delete")
            state.deleted.set()
            self.send(200 if result is not None else 404, {"deleted": result is not None})

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].split("/")[2:]  # after /v1
            with state.lock:
                kind = "content" if parts[-1] == "content" else "list" if len(parts) == 1 else "poll"
                stalled = state.stalls(kind)
                if kind == "content":
                    status, body = 200, state.files[parts[1]]
                elif kind == "list":
                    status, body = 200, {"object": "list", "data": [*state.batches.values()][::-1], "has_more": False}
                else:
                    batch = state.batches[parts[1]]
                    batch["looks"] += 1
                    ended = batch["looks"] > state.options["looks"]
                    status, body = 200, batch | {"status": batch["end"] if ended else "in_progress"}
            self.send(status, body, stalled, kind)

    return Handler


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(State(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
    server.daemon_threads = True
    print(server.server_address[1], flush=True)  # noqa: T201
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
