"""A stand-in for the server behind the chat page: it says what a test tells it to, when it is told.

Serves the page's own files with the headers that the real server gives them.
"""

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "src/chalot/serve/page"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEALTH = {
    "status": "ok", "model": "tiny", "scheme": "nl4", "context": 100, "digest": "d" * 64,
    "file_bytes": 3_400_000, "bits_per_weight": 4.5,
}  # fmt: skip
END: dict[str, Any] = {"finish_reason": "stop"}


class ChatServer(ThreadingHTTPServer):
    """`said` are the bodies of the requests; what is put into `words` is streamed as it comes.

    A word is a piece of text, END or another dictionary that ends the answer, or None: the
    connection breaks off. `refusal` is (status, error) for the next questions.
    """

    daemon_threads = True

    def __init__(self, headers: dict[str, str], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.headers = headers
        self.said: list[dict[str, Any]] = []
        self.words: queue.Queue[Any] = queue.Queue()
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.key: str | None = None
        self.left = threading.Event()  # a client that went away in mid-answer
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def gone(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def tell(self, status: int, content: Any) -> None:
        self.answer(status, "application/json", json.dumps(content).encode())

    def locked(self) -> bool:
        wanted = self.server.key
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        self.tell(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
        return True

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/health":
            if not self.locked():
                self.tell(200, HEALTH)
            return
        file = PAGE / (path.lstrip("/") or "index.html")
        if not file.is_file():
            self.tell(404, {"error": {"message": "no such page"}})
            return
        self.answer(200, KINDS[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.locked():
            return
        server.said.append(body)
        if server.refusal:
            status, error = server.refusal
            self.tell(status, {"error": error})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = 0
        try:
            while True:
                try:
                    word = server.words.get(timeout=0.05)
                except queue.Empty:
                    self.wfile.write(b": waiting\n\n")  # a client that left is noticed by this
                    continue
                if word is None:
                    return
                if isinstance(word, dict):
                    self.event({"choices": [{"delta": {}, **word}]})
                    usage = {"completion_tokens": count, "total_tokens": 10 + count}
                    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
                    usage["completion_tokens_details"] = details  # type: ignore[assignment]
                    self.event({"choices": [], "usage": usage})
                    self.wfile.write(b"data: [DONE]\n\n")
                    return
                count += 1
                self.event(
                    {"choices": [{"delta": {"content": word}}], "system_fingerprint": "e" * 64}
                )
        except OSError:
            server.left.set()

    def event(self, content: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()
