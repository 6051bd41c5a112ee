"""Runs a mix of good and bad clients against a running `kiln serve`, and checks that it stays well.

Usage: python soak.py URL PID [MINUTES]. For a server with the demo model, --enable-sdapi and no API keys, on
Linux, as its memory and descriptors are read from /proc/PID. Needs only Python; scripts/soak.sh starts the server.

64 clients choose at random, again and again: a good request (images, chat, streams, /sdapi), a request that is
hung up (in its body, while it is generated, while it is streamed), a connection that sends nothing or half a
request, a body that cannot be read, a poll of a status. It is checked that

- every good request is answered with 200 and images that can be decoded and have the size that was asked for;
  429 and 503 with Retry-After are waited out, and the request is sent again;
- no bad request is answered with a status of 500 or above, and every one that is complete is answered;
- no connection is refused, and /health answers within a second, each time on a new connection;
- memory and descriptors of the last third of the time are not above those of the middle third by more than
  TOLERANCE says, and afterwards the server has no job and no connection left.
"""

import base64
import collections
import contextlib
import dataclasses
import http.client
import json
import os
import random
import socket
import statistics
import struct
import sys
import threading
import time
import traceback
import urllib.parse

from support import data_url, png_size

CLIENTS = 64
# What the median of the last third may be above that of the middle third: a share of it, and a number.
TOLERANCE = {"memory in MiB": (0.05, 8), "descriptors": (0.05, 16), "threads": (0.05, 4)}
LONGEST_ANSWER = 120
LONGEST_HEALTH = 1.0
JSON = {"Content-Type": "application/json"}
PROMPTS = ["a large red circle", "a small green square on a blue background", 'a "white" triangle\n红']


def level(kind: str, samples: list[float]) -> str | None:
    """Says what is wrong if the last third of the samples is above the middle third."""
    third = len(samples) // 3
    if third < 3:
        return f"{kind}: only {len(samples)} samples"
    middle, last = statistics.median(samples[third : 2 * third]), statistics.median(samples[-third:])
    share, number = TOLERANCE[kind]
    if last > middle * (1 + share) + number:
        return f"{kind} grew from {middle:.0f} to {last:.0f}"
    return None


def wait_asked(status: int, headers) -> float | None:
    """The seconds that an answer asks to wait before the request is sent again; fails if it does not say."""
    if status not in (429, 503):
        return None
    seconds = headers.get("Retry-After", "")
    assert seconds.isdecimal() and 1 <= int(seconds) <= 3600, f"{status} with Retry-After {seconds!r}"
    return float(seconds)


@dataclasses.dataclass
class Good:
    """A request that must be answered with images."""

    name: str
    path: str
    body: dict
    size: tuple[int, int]
    count: int = 1


def good_request(rng: random.Random) -> Good:
    prompt = rng.choice(PROMPTS)
    width, height = rng.choice([(64, 64), (96, 64), (128, 128), (192, 128)])
    count = rng.choice([1, 1, 1, 2])
    name = rng.choice(["image", "image", "url", "chat", "chat stream", "image stream", "txt2img"])
    fields = {"num_inference_steps": rng.randint(1, 6), "seed": rng.randrange(2**32)}
    if rng.random() < 0.3:
        fields |= {"negative_prompt": " ", "true_cfg_scale": 4.0}
    if name == "txt2img":
        body = {"prompt": prompt, "steps": rng.randint(1, 6), "seed": -1, "batch_size": count}
        body |= {"width": width, "height": height, "cfg_scale": 1}
        return Good(name, "/sdapi/v1/txt2img", body, (width, height), count)
    if name.startswith("chat"):
        body = {"model": "any", "messages": [{"role": "user", "content": prompt}]}
        body |= {"extra_body": {**fields, "width": width, "height": height, "num_outputs_per_prompt": count}}
        body |= {"stream": True} if name == "chat stream" else {}
        return Good(name, "/v1/chat/completions", body, (width, height), count)
    body = {"prompt": prompt, "size": f"{width}x{height}", "n": count, **fields}
    if name == "url":
        body["response_format"] = "url"
    if name == "image stream":
        body |= {"stream": True, "partial_images": 1, "n": 1}
        count = 1
    return Good(name, "/v1/images/generations", body, (width, height), count)


def images_of(name: str, content: bytes) -> list[bytes]:
    """The files in the answer to a good request."""
    if name == "image stream":
        events = [json.loads(line[5:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
        [last] = [event for event in events if event.get("type") == "image_generation.completed"]
        return [base64.b64decode(last["b64_json"], validate=True)]
    if name == "chat stream":
        assert content.rstrip().endswith(b"data: [DONE]"), content[-200:]
        chunks = [json.loads(line[5:]) for line in content.split(b"\n") if line.startswith(b"data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        return [data_url(image["image_url"]["url"]) for delta in deltas for image in delta.get("images", [])]
    answer = json.loads(content)
    if name == "chat":
        message = answer["choices"][0]["message"]
        assert len(message["images"]) == len(message["content"])
        return [data_url(image["image_url"]["url"]) for image in message["images"]]
    if name == "url":
        return [data_url(image["url"]) for image in answer["data"]]
    files = answer["images"] if name == "txt2img" else [image["b64_json"] for image in answer["data"]]
    return [base64.b64decode(file, validate=True) for file in files]


def bad_bodies(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A body that must be refused: what it is, its bytes, and headers."""
    good = {"prompt": "a", "num_inference_steps": 1}
    wrong = [
        {"prompt": 7},
        {"prompt": ["a"]},
        {**good, "size": "17x4"},
        {**good, "size": [64, 64]},
        {**good, "n": -1},
        {**good, "n": "two"},
        {**good, "seed": 1.5},
        {**good, "num_inference_steps": 10**30},
        {**good, "true_cfg_scale": "high"},
        {**good, "no_such_key": 1},
        {**good, "output_format": "gif"},
    ]
    kind = rng.choice(["random bytes", "random JSON", "wrong value", "too large", "gzip", "no JSON", "deep", "empty"])
    headers = dict(JSON)
    if kind == "random bytes":
        body = rng.randbytes(rng.randrange(1, 4000))
    elif kind == "random JSON":
        body = json.dumps(random_json(rng, 4)).encode()
    elif kind == "wrong value":
        body = json.dumps(rng.choice(wrong)).encode()
    elif kind == "too large":
        body = b" " * (3 << 20)
    elif kind == "gzip":
        body, headers["Content-Encoding"] = json.dumps(good).encode(), "gzip"
    elif kind == "no JSON":
        body, headers["Content-Type"] = b"prompt=a", "application/x-www-form-urlencoded"
    elif kind == "deep":
        body = b'{"prompt":' + b"[" * 50_000
    else:
        body = b""
    return kind, body, headers


def random_json(rng: random.Random, depth: int):
    """Any value but an object with a prompt or messages."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        keys = ["size", "n", "seed", "user", "extra_body", "x", ""]
        return {rng.choice(keys): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [None, True, rng.uniform(-1e9, 1e9), "\u7ea2\0a"[: rng.randrange(4)]][kind]


class Soak:
    def __init__(self, url: str, process: int, seconds: float) -> None:
        parts = urllib.parse.urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.process = process
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.counts: collections.Counter = collections.Counter()
        self.problems: collections.Counter = collections.Counter()
        self.samples: dict[str, list[float]] = {kind: [] for kind in TOLERANCE}
        self.health: list[float] = []

    # What clients do.

    def count(self, *names: str) -> None:
        with self.lock:
            self.counts[names] += 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems[text] += 1
            if sum(self.problems.values()) <= 20:
                print(f"problem after {self.seconds - self.left():.0f} s: {text}", flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def connect(self, timeout: float = LONGEST_ANSWER) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.connect()
        except OSError as error:
            raise AssertionError(f"no connection: {type(error).__name__}") from error
        return connection

    def ask(self, method: str, path: str, body: bytes | None, headers: dict, timeout: float = LONGEST_ANSWER):
        """Sends a request on a new connection, and returns the status, the headers and the whole content."""
        with contextlib.closing(self.connect(timeout)) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # The server may answer before it has read a body that is too large.
                connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def good(self, rng: random.Random) -> None:
        request = good_request(rng)
        body = json.dumps(request.body).encode()
        while True:
            status, headers, content = self.ask("POST", request.path, body, JSON)
            seconds = wait_asked(status, headers)
            if seconds is None:
                break
            self.count("good", request.name, f"{status}, sent again")
            time.sleep(rng.uniform(0.1, min(seconds, 2)))
        assert status == 200, f"{request.name}: {status} {content[:300]}"
        files = images_of(request.name, content)
        assert [png_size(file) for file in files] == [request.size] * request.count, "another size"
        self.count("good", request.name, "right")

    def hang_up(self, rng: random.Random) -> None:
        request = good_request(rng)
        body = json.dumps(request.body).encode()
        place = rng.choice(["in the head", "in the body", "while generating", "in the answer"])
        if place == "while generating":
            body = json.dumps({"prompt": "a", "num_inference_steps": 50}).encode()
        if place == "in the answer":
            request = Good("", "/v1/images/generations", {}, (0, 0))
            body = json.dumps({"prompt": "a", "num_inference_steps": 20, "stream": True, "partial_images": 3}).encode()
        head = f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        if place == "in the head":
            message = message[: rng.randrange(1, len(head))]
        if place == "in the body":
            message = message[: -rng.randrange(1, len(body))]
        with contextlib.closing(self.connect()) as connection:
            connection.sock.sendall(message)
            if place == "in the answer":
                connection.sock.recv(rng.randrange(1, 2000))
            time.sleep(rng.uniform(0, 0.5))
            if rng.random() < 0.5:
                # Closes with RST.
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.count("hung up", place, "closed")

    def idle(self, rng: random.Random) -> None:
        kind = rng.choice(["nothing sent", "half a head", "kept alive"])
        with contextlib.closing(self.connect()) as connection:
            if kind == "half a head":
                connection.sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-a")
            if kind == "kept alive":
                for _ in range(3):
                    connection.request("GET", "/health")
                    answer = connection.getresponse()
                    answer.read()
                    assert answer.status == 200, f"/health: {answer.status}"
            connection.sock.settimeout(max(0.1, min(rng.uniform(1, 20), self.left())))
            outcome = "closed by the server"
            try:
                connection.sock.recv(1000)
            except TimeoutError:
                outcome = "closed by the client"
            except ConnectionResetError:
                pass
            self.count("idle", kind, outcome)

    def bad(self, rng: random.Random) -> None:
        kind, body, headers = bad_bodies(rng)
        path = rng.choice(["/v1/images/generations", "/v1/chat/completions", "/sdapi/v1/txt2img"])
        if path.startswith("/sdapi") and kind in ("random JSON", "wrong value"):
            # There, a body without a prompt is a good one, and unknown keys are ignored.
            path = "/v1/images/generations"
        status, _, content = self.ask("POST", path, body, headers)
        assert 400 <= status < 500 and status != 429, f"{kind} to {path}: {status} {content[:80]}"
        message = json.loads(content)["error"]["message"]
        assert message, f"{kind} to {path}: no message"
        self.count("bad", kind, str(status))

    def poll(self, rng: random.Random) -> None:
        path = rng.choice(["/health", "/health/live", "/health/ready", "/metrics", "/v1/models", "/sdapi/v1/progress"])
        status, _, content = self.ask("GET", path, None, {})
        assert status == 200 and content, f"{path}: {status}"
        self.count("poll", path, "200")

    def client(self, number: int) -> None:
        rng = random.Random(number)
        actions = [self.good] * 3 + [self.hang_up] * 3 + [self.idle] * 2 + [self.bad] * 3 + [self.poll] * 2
        while self.left() > 0:
            action = rng.choice(actions)
            try:
                action(rng)
            except TimeoutError:
                self.problem(f"{action.__name__}: no answer in {LONGEST_ANSWER} s")
            except (OSError, http.client.HTTPException) as error:
                self.problem(f"{action.__name__}: {type(error).__name__}")
                time.sleep(0.1)
            except AssertionError as error:
                self.problem(f"{action.__name__}: {error}")
                time.sleep(0.1)
            except Exception:
                self.problem(f"{action.__name__}: {traceback.format_exc(limit=-2)}")

    # What is watched meanwhile.

    def watch_health(self) -> None:
        while self.left() > 0:
            started = time.monotonic()
            try:
                status, _, _ = self.ask("GET", "/health", None, {}, timeout=10)
                assert status == 200, f"{status}"
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.problem(f"/health: {type(error).__name__}: {error}")
            took = time.monotonic() - started
            self.health.append(took)
            if took > LONGEST_HEALTH:
                self.problem("/health took more than a second")
            time.sleep(0.2)

    def sample(self) -> dict[str, float]:
        with open(f"/proc/{self.process}/status") as lines:
            status = dict(line.split(":", 1) for line in lines)
        return {
            "memory in MiB": int(status["VmRSS"].split()[0]) / 1024,
            "descriptors": len(os.listdir(f"/proc/{self.process}/fd")),
            "threads": int(status["Threads"]),
        }

    def watch_process(self) -> None:
        while self.left() > 0:
            try:
                for kind, value in self.sample().items():
                    self.samples[kind].append(value)
            except (OSError, KeyError):
                self.problem("the server's process has ended")
            time.sleep(min(2, self.seconds / 50))

    def jobs(self) -> float:
        status, _, content = self.ask("GET", "/metrics", None, {})
        assert status == 200, f"/metrics: {status}"
        lines = [line.rsplit(" ", 1) for line in content.decode().splitlines() if not line.startswith("#")]
        numbers = {name: float(value) for name, value in lines}
        return numbers["kiln_requests_running"] + numbers["kiln_requests_waiting"]

    def settle(self, before: dict[str, float]) -> None:
        """Waits until nothing of the clients is left in the server."""
        for _ in range(300):
            jobs, now = self.jobs(), self.sample()
            if jobs == 0 and now["descriptors"] <= before["descriptors"] + 4:
                return
            time.sleep(0.1)
        self.problem(f"30 s later there are {jobs:.0f} jobs, and {now['descriptors']} descriptors")

    def run(self) -> None:
        before = self.sample()
        threads = [threading.Thread(target=self.client, args=[number]) for number in range(CLIENTS)]
        threads += [threading.Thread(target=self.watch_health), threading.Thread(target=self.watch_process)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            self.settle(before)
        except (OSError, http.client.HTTPException, AssertionError) as error:
            self.problem(f"afterwards: {type(error).__name__}: {error}")
        for kind, samples in self.samples.items():
            if growth := level(kind, samples):
                self.problem(growth)
        if not any(names[0] == "good" and names[2] == "right" for names in self.counts):
            self.problem("no good request was answered")

    def report(self) -> None:
        print(f"{CLIENTS} clients, {self.seconds:.0f} s:")
        for (action, kind, outcome), count in sorted(self.counts.items()):
            print(f"  {action:8} {kind:20} {outcome:22} {count:8}")
        for kind, samples in self.samples.items():
            thirds = [samples[len(samples) * part // 3 : len(samples) * (part + 1) // 3] for part in range(3)]
            medians = ", ".join(f"{statistics.median(third):.0f}" for third in thirds if third)
            print(f"  {kind}: medians of the three thirds {medians}; at most {max(samples, default=0):.0f}")
        health = sorted(self.health)
        print(f"  /health: median {health[len(health) // 2] * 1e3:.1f} ms, longest {health[-1] * 1e3:.1f} ms")
        for text, count in self.problems.most_common(20):
            print(f"  problem ({count} times): {text}")
        print("  no problems" if not self.problems else f"  {sum(self.problems.values())} problems")


def main() -> None:
    url, process, *minutes = sys.argv[1:]
    soak = Soak(url, int(process), float(minutes[0] if minutes else 30) * 60)
    soak.run()
    soak.report()
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
