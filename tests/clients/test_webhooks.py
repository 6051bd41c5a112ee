"""Checks the webhooks of `kiln serve` with the public library of Standard Webhooks, and jobs with `kiln jobs`.

Usage: python test_webhooks.py KILN
"""

import base64
import http.server
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from support import free_port, png_size, running, variables

SECRETS = ["whsec_" + base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2)]
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it is sent. Answers with the statuses of `answers`, then with 204."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: queue.Queue = queue.Queue()
        self.answers: queue.Queue = queue.Queue()
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.got.put((self.path, headers, body))
        status = self.server.answers.get() if not self.server.answers.empty() else 204
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.got.put((self.path, {}, b""))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def verify(headers: dict[str, str], body: bytes) -> dict:
    """The message, after each secret has verified it, and another one has not."""
    for secret in SECRETS:
        message = Webhook(secret).verify(body.decode(), headers)
    for secret, content in [(OTHER_SECRET, body), (SECRETS[0], body + b" ")]:
        try:
            Webhook(secret).verify(content.decode(), headers)
        except WebhookVerificationError:
            continue
        raise AssertionError("a wrong signature was accepted")
    return message


class Jobs:
    """`kiln jobs` with one server."""

    def __init__(self, kiln: str, url: str, folder: str):
        self.command, self.url, self.folder = [kiln, "jobs"], url, folder

    def run(self, *arguments: str, code: int = 0) -> str:
        command = [*self.command, *arguments, "--server", self.url]
        done = subprocess.run(
            command, cwd=self.folder, env=variables(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, (command, done)
        return done.stdout if code == 0 else done.stderr


def delivered(jobs: Jobs, receiver: Receiver) -> None:
    options = ["--steps", "2", "--seed", "7", "--webhook", receiver.url]
    printed = jobs.run("submit", "a large red circle", *options, "--wait", "--output", "circle.png")
    job, path = printed.split()
    assert png_size((Path(jobs.folder) / path).read_bytes()) == (128, 128)
    _, headers, body = receiver.got.get(timeout=60)
    assert headers["content-type"] == "application/json" and headers["user-agent"].startswith("kiln/")
    message = verify(headers, body)
    assert message["type"] == "image.job.completed" and message["timestamp"].endswith("Z"), message
    shown = json.loads(jobs.run("show", job, "--json"))
    assert message["data"] == shown, (message, shown)
    assert shown["files"][0]["bytes"] == (Path(jobs.folder) / path).stat().st_size


def cancelled(jobs: Jobs, receiver: Receiver) -> None:
    job = jobs.run("submit", "a large red circle", "--steps", "1000", "--webhook", receiver.url).strip()
    assert jobs.run("cancel", job) == f"{job} cancelled\n"
    _, headers, body = receiver.got.get(timeout=60)
    message = verify(headers, body)
    assert (message["type"], message["data"]["id"]) == ("image.job.cancelled", job), message
    assert "was cancelled" in jobs.run("wait", job, code=4)


def retried(jobs: Jobs, receiver: Receiver) -> None:
    """A redirection is a failure; the second try comes after five seconds, with the same id."""
    receiver.answers.put(302)
    begun = time.monotonic()
    jobs.run("submit", "a blue square", "--steps", "1", "--webhook", receiver.url)
    tries = [receiver.got.get(timeout=60) for _ in range(2)]
    assert time.monotonic() - begun >= 5
    assert [path for path, _, _ in tries] == ["/hook", "/hook"], "the redirection was followed"
    ids = {headers["webhook-id"] for _, headers, _ in tries}
    assert len(ids) == 1 and tries[0][2] == tries[1][2], tries
    assert int(tries[0][1]["webhook-timestamp"]) < int(tries[1][1]["webhook-timestamp"])
    for _, headers, body in tries:
        verify(headers, body)


def refused(jobs: Jobs) -> None:
    for url, flag in [
        ("http://127.0.0.1:1/", "--webhook-allow-private"),
        ("http://2130706433/", "--webhook-allow-private"),
        ("http://example.com/", "--webhook-host"),
        ("http://key@hooks.example/", "user name"),
    ]:
        error = jobs.run("submit", "a cat", "--webhook", url, code=2)
        assert flag in error and "(webhook, status 400)" in error, error


def main() -> None:
    [kiln] = sys.argv[1:]
    receiver = Receiver()
    settings = {"KILN_WEBHOOK_SECRET": ",".join(SECRETS), "KILN_WEBHOOK_HOST": "127.0.0.1,hooks.example"}

    def serve(folder: str, port: int, *arguments: str):
        command = [kiln, "serve", "demo", "--port", str(port), "--jobs", f"{folder}/jobs", *arguments]
        return running(command, f"http://127.0.0.1:{port}/health/ready", **settings)

    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        jobs = Jobs(kiln, f"http://127.0.0.1:{port}", folder)
        with serve(folder, port, "--webhook-allow-private"):
            delivered(jobs, receiver)
            cancelled(jobs, receiver)
            retried(jobs, receiver)
            listed = json.loads(jobs.run("list", "--json"))
            statuses = [job["status"] for job in listed["data"]]
            assert statuses == ["completed", "cancelled", "completed"], statuses
        with serve(folder, port, "--no-warm-up"):
            refused(jobs)
            # The list is that of the last server.
            assert json.loads(jobs.run("list", "--json"))["data"] == listed["data"]
    assert receiver.got.empty()
    print("webhooks: done")


if __name__ == "__main__":
    main()
