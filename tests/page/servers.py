"""Runs `kiln serve` with the demo model as a process, and sends it requests beside the page."""

import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request


class Server:
    """A running server. After `kill`, `start` uses the same port."""

    def __init__(self, binary: str, *arguments: str, key: str | None = None):
        self.binary, self.arguments, self.key = binary, arguments, key
        self.port = 0
        self.start()

    def start(self) -> None:
        log = tempfile.NamedTemporaryFile("r", suffix=".log")
        environment = {**os.environ, **({"KILN_API_KEY": self.key} if self.key else {})}
        command = [self.binary, "serve", "--port", str(self.port), *self.arguments]
        with open(log.name, "w") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            text = open(log.name).read()
            found = re.search(r"listening on http://\S*:(\d+)", text)
            if found and re.search(r"\bready\b", text):
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
