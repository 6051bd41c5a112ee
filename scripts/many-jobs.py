#!/usr/bin/env python3
"""Many jobs, some cancelled and some sent twice: each is recorded once and generated at most twice.

    scripts/many-jobs.py --kiln target/debug/kiln                     one server, jobs in a folder
    scripts/many-jobs.py --kiln target/debug/kiln --nats nats-server  two workers, jobs in JetStream

With --nats, the program starts that NATS server, a kiln of --role api and two of --role worker.
--kill ends one worker with SIGKILL at half of the jobs.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

PATH = "/v1/images/jobs"
ENDED = ("completed", "failed", "cancelled")


class Server:
    """A kiln with the demo model."""

    def __init__(self, kiln: str, folder: pathlib.Path, name: str, arguments: list[str]) -> None:
        self.log = folder / f"{name}.log"
        command = [kiln, "serve", "demo", "--port", "0", "--no-warm-up", "--instance", name]
        command += ["--max-step-tokens", "0", "--backend", "flex", *arguments]
        self.process = subprocess.Popen(command, stderr=self.log.open("w"))
        self.port = 0

    def wait(self) -> None:
        """Waits until the server is ready."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            found = re.search(r"listening on http://[^:]*:(\d+)", self.log.read_text())
            if found:
                self.port = int(found[1])
                with contextlib.suppress(OSError):
                    if self.call("GET", "/health/ready")[0] == 200:
                        return
            time.sleep(0.05)
        sys.exit(f"the server does not start:\n{self.log.read_text()}")

    def call(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            text = None if body is None else json.dumps(body)
            all_headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, text, all_headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A metric without labels."""
        text = self.call("GET", "/metrics")[1].decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def end(self) -> None:
        """Ends the server, and waits for that."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=90)


def start_nats(program: str, folder: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """A NATS server with JetStream on a free port, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder / "nats")]
    process = subprocess.Popen(command, stderr=(folder / "nats.log").open("w"))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process, f"nats://127.0.0.1:{port}"
        time.sleep(0.05)
    sys.exit("the NATS server does not start")


def request(number: int, steps: int) -> dict:
    """The body of a job."""
    return {"prompt": "a red circle", "seed": number, "size": "64x64", "num_inference_steps": steps}


def submit(api: Server, number: int, steps: int) -> tuple[int, str]:
    """Sends a job until it is accepted. Status and id."""
    headers = {"Idempotency-Key": f"job-{number}"}
    while True:
        with contextlib.suppress(OSError):
            status, body = api.call("POST", PATH, request(number, steps), headers)
            if status in (200, 202):
                return status, json.loads(body)["id"]
            if status not in (429, 503):
                sys.exit(f"{status}: {body!r}")
        time.sleep(0.2)


def list_all(api: Server) -> list[dict]:
    """All jobs, from the pages of the list."""
    jobs: list[dict] = []
    after = ""
    while True:
        page = json.loads(api.call("GET", f"{PATH}?limit=100{after}")[1])
        jobs += page["data"]
        if not page["has_more"]:
            return jobs
        after = f"&after={page['last_id']}"


def run(arguments: argparse.Namespace, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Runs the trial and prints its figures."""
    if arguments.nats:
        nats, url = start_nats(arguments.nats, folder)
        stack.callback(nats.wait)
        stack.callback(nats.terminate)
        jobs = ["--jobs", url]
        api = Server(arguments.kiln, folder, "api", [*jobs, "--role", "api"])
        workers = [
            Server(arguments.kiln, folder, f"worker-{index}", [*jobs, "--role", "worker"])
            for index in range(2)
        ]
        servers = [api, *workers]
    else:
        api = Server(arguments.kiln, folder, "all", ["--jobs", str(folder / "jobs")])
        workers = servers = [api]
    for server in servers:
        stack.callback(server.end)
    for server in servers:
        server.wait()

    chance = random.Random(arguments.seed)
    numbers = list(range(arguments.count))
    twice = set(chance.sample(numbers, arguments.count // 10))
    cancelled = set(chance.sample(numbers, arguments.count // 10))
    ids: dict[int, str] = {}
    answers: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()

    def one(number: int) -> None:
        sends = 2 if number in twice else 1
        with concurrent.futures.ThreadPoolExecutor(sends) as pool:
            outcomes = list(pool.map(lambda _: submit(api, number, arguments.steps), range(sends)))
        statuses = sorted(status for status, _ in outcomes)
        expected = [200, 202] if sends == 2 else [202]
        if statuses != expected or len({job for _, job in outcomes}) != 1:
            sys.exit(f"job {number}: {outcomes}")
        with lock:
            ids[number] = outcomes[0][1]
        if number in cancelled:
            time.sleep(chance.random() * 0.3)
            status, body = api.call("DELETE", f"{PATH}/{ids[number]}")
            if status != 200:
                sys.exit(f"cancel of {number}: {status} {body!r}")
            with lock:
                # A job that has ended is deleted.
                answers["deleted" if b'"deleted"' in body else "cancelled"] += 1

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for outcome in [pool.submit(one, number) for number in numbers]:
            outcome.result()
    submitted = time.monotonic() - begin

    killed = False
    while True:
        jobs_now = list_all(api)
        ended = sum(job["status"] in ENDED for job in jobs_now)
        if arguments.kill and not killed and ended >= arguments.count // 2 and len(workers) > 1:
            workers[1].process.send_signal(signal.SIGKILL)
            killed = True
        if ended == len(jobs_now):
            break
        time.sleep(0.5)
    whole = time.monotonic() - begin

    jobs_now = list_all(api)
    outcomes = collections.Counter(job["status"] for job in jobs_now)
    expected = arguments.count - answers["deleted"]
    if len(jobs_now) != expected or len({job["id"] for job in jobs_now}) != expected:
        sys.exit(f"{len(jobs_now)} jobs are recorded, not {expected}")
    if outcomes["cancelled"] != answers["cancelled"] or outcomes["failed"]:
        sys.exit(f"outcomes {outcomes}, answers to cancels {answers}")
    attempts = collections.Counter(job["attempt"] for job in jobs_now)
    finished: collections.Counter[str] = collections.Counter()
    for worker in workers:
        for line in worker.log.read_text().splitlines():
            if "finished in" in line and (found := re.search(r"job-[0-9a-f]{24}", line)):
                finished[found[0]] += 1
    generated = collections.Counter(finished.values())
    if max(attempts) > 2 or (generated and max(generated) > 2):
        sys.exit(f"attempts {attempts}, times generated {generated}")
    by_seed = {job["seed"]: job for job in jobs_now if job["status"] == "completed"}
    for number in chance.sample(sorted(by_seed), min(50, len(by_seed))):
        job = by_seed[number]
        content = api.call("GET", f"{PATH}/{job['id']}/content")[1]
        if hashlib.sha256(content).hexdigest() != job["files"][0]["sha256"]:
            sys.exit(f"the file of {job['id']} is not the recorded one")
    print(
        f"{arguments.count} jobs, {len(twice)} sent twice, {len(cancelled)} cancelled: "
        f"{dict(outcomes)}, {answers['deleted']} deleted after their end\n"
        f"submitted in {submitted:.1f} s, ended in {whole:.1f} s: {arguments.count / whole:.1f} jobs/s\n"
        f"jobs by attempts {dict(attempts)}, by times generated {dict(generated)}"
    )


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kiln", required=True, help="the program")
    parser.add_argument("--nats", help="the program nats-server")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill", action="store_true", help="SIGKILL one of two workers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        try:
            run(arguments, folder, stack)
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
