"""Runs `kiln serve` as a process, sends it requests beside the page, and is a Hub that it downloads from."""

import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request


class Server:
    """A running server. After `kill`, `start` uses the same port."""

    def __init__(self, binary: str, *arguments: str, key: str | None = None, wait: bool = True, **environment: str):
        """With `wait=False` the server may still be starting. Each step generates one request, so that the others
        wait: how many tokens a step may have is otherwise measured, and depends on the machine."""
        self.binary, self.arguments, self.key = binary, ("--max-step-tokens", "0", *arguments), key
        self.wait, self.environment = wait, environment
        self.port = 0
        self.start()

    def start(self) -> None:
        log = tempfile.NamedTemporaryFile("r", suffix=".log")
        environment = {**os.environ, **self.environment, **({"KILN_API_KEY": self.key} if self.key else {})}
        command = [self.binary, "serve", "--port", str(self.port), *self.arguments]
        with open(log.name, "w") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            text = open(log.name).read()
            found = re.search(r"listening on http://\S*:(\d+)", text)
            if found and (not self.wait or re.search(r"\bready\b", text)):
                self.port = int(found[1])
                self.url = f"http://127.0.0.1:{self.port}"
                return
            time.sleep(0.05)
        raise AssertionError(f"{command} did not start: {open(log.name).read()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def request(self, path: str, body: dict | None = None) -> bytes:
        """Sends a request and returns the body of the response, also of an error response."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            return error.read()

    def metric(self, name: str) -> float:
        for line in self.request("/metrics").decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def wait_until(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


class Hub:
    """A Hub that has the demo model as `own/tiny`. It stops at each file that is the key of an event in `gates`
    until the event is set; the list of files is `""`. Of a file with a gate it sends a half before."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    MODEL = pathlib.Path(__file__).parents[2] / "models/demo"

    def __init__(self, *gates: str):
        self.gates = {name: threading.Event() for name in gates}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def tag(path: str) -> str:
        """A stand-in for the hash of a file."""
        return path.replace("/", "-")

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path
        name = ""
        if "/tree/" in path:
            files = [*self.MODEL.rglob("*.json"), *self.MODEL.rglob("*.safetensors")]
            body = json.dumps([
                {"type": "file", "oid": self.tag(path), "size": (self.MODEL / path).stat().st_size, "path": path}
                for path in (str(file.relative_to(self.MODEL)) for file in files)
            ]).encode()
        elif path.startswith("/api/"):
            body = json.dumps({"id": "own/tiny", "sha": self.COMMIT}).encode()
        else:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            body = (self.MODEL / name).read_bytes()
        gate = self.gates.get(name)
        if gate and not name:
            gate.wait()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("X-Repo-Commit", self.COMMIT)
        request.send_header("ETag", json.dumps(self.tag(name)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if gate and name:
            request.wfile.write(body[: len(body) // 2])
            gate.wait()
            body = body[len(body) // 2 :]
        request.wfile.write(body)


class OtherClient:
    """A long request of another client, until `hang_up` closes its connection."""

    def __init__(self, server: Server):
        body = json.dumps({"prompt": "a red circle", "num_inference_steps": 1000})
        self.connection = socket.create_connection(("127.0.0.1", server.port))
        self.connection.sendall(
            f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )

    def hang_up(self) -> None:
        self.connection.close()

    def __enter__(self) -> "OtherClient":
        return self

    def __exit__(self, *_) -> None:
        self.hang_up()
