"""Tests that the checks of soak.py find what they are for: python test_soak.py KILN

Among others it runs the soak against a `kiln serve` that is killed meanwhile, and against a server that answers
with status 500.
"""

import contextlib
import http.server
import io
import os
import signal
import socketserver
import subprocess
import sys
import threading

import soak
from support import free_port, png_size, wait_for


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers with status 500, and without a field that says when to come back."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


class BrokenServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """Clients that hang up are no news."""


def refused(check, *arguments) -> str:
    try:
        check(*arguments)
    except AssertionError as error:
        return str(error)
    raise AssertionError(f"{check.__name__}{arguments} was accepted")


def growth_is_found() -> None:
    steady = [100.0, 140.0, 120.0] * 20
    assert soak.level("memory in MiB", [10.0] * 20 + steady) is None, "a warm-up is no growth"
    leak = [100.0 + number for number in range(120)]
    assert soak.level("memory in MiB", leak) == "memory in MiB grew from 160 to 200"
    assert soak.level("descriptors", [float(number) for number in range(90)]) is not None
    assert soak.level("threads", [8.0, 8.0]) is not None, "too few samples"


def bad_waits_are_found() -> None:
    assert soak.wait_asked(200, {}) is None
    assert soak.wait_asked(429, {"Retry-After": "3"}) == 3
    for value in ["0", "soon", "", "3601"]:
        refused(soak.wait_asked, 503, {"Retry-After": value})


def damaged_images_are_found() -> None:
    from reference_server import png

    file = png(5, 4, 7)
    assert png_size(file) == (5, 4)
    refused(png_size, file[:20] + b"\1" + file[21:])
    refused(png_size, b"\xff\xd8\xff" + file)
    refused(png_size, file + b"\0")


def a_killed_server_is_found(kiln: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [kiln, "serve", "--port", str(port), "--enable-sdapi", "--max-queue", "16"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(f"{url}/health/ready", process)
    test = soak.Soak(url, process.pid, 6)
    timer = threading.Timer(3, process.send_signal, [signal.SIGKILL])
    timer.start()
    test.run()
    process.wait()
    expected = ["no connection: ConnectionRefusedError", "the server's process has ended"]
    for problem in expected:
        assert any(problem in text for text in test.problems), (problem, test.problems)


def status_500_is_found() -> None:
    server = BrokenServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    test = soak.Soak(f"http://127.0.0.1:{server.server_address[1]}", os.getpid(), 2)
    test.run()
    server.shutdown()
    for problem in ["good: image: 500", "bad: wrong value", "poll: /metrics: 500", "/health: AssertionError: 500"]:
        assert any(problem in text for text in test.problems), (problem, test.problems)


def main() -> None:
    growth_is_found()
    bad_waits_are_found()
    damaged_images_are_found()
    # The soak prints the problems that it finds.
    with contextlib.redirect_stdout(io.StringIO()):
        status_500_is_found()
        a_killed_server_is_found(sys.argv[1])
    print("soak: the checks find what they are for")


if __name__ == "__main__":
    main()
