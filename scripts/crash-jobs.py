#!/usr/bin/env python3
"""Kills `kiln serve demo --jobs DIR` at random moments, and checks that no accepted job is lost.

    scripts/crash-jobs.py [--kills N] [--seed N] [KILN]

Clients submit jobs all the time, with idempotency keys, and repeat what was not answered. After the last
kill, every job that was accepted must be completed, and each of its files must be equal to the byte to
the file of the same request on a server that nobody kills.

A job fails when its server was killed during each of three attempts, as it should: the script waits with
a kill that would be the third one of a job.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

# Attempts after which a job fails.
MAX_ATTEMPTS = 3
# Jobs that wait or run at one time.
OPEN_JOBS = 8
# Seconds after which the script gives up on whatever it waits for.
PATIENCE = 600
# Without the proxy of the environment.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A `kiln serve` process that keeps its jobs in a folder."""

    running = set()

    def __init__(self, kiln, folder):
        self.url = None
        self.log = []
        command = [kiln, "serve", "demo", "--port", "0", "--jobs", folder]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        Server.running.add(self)

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on http://" in line:
                self.url = "http://" + line.split("listening on http://")[1].strip()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self._ended()
        return self.log

    def stop(self):
        self.process.terminate()
        self._ended()

    def _ended(self):
        self.process.wait(60)
        self.reader.join()
        Server.running.discard(self)

    def call(self, path, body=None, headers=None, raw=False):
        """The status and the body of an answer; raises OSError if there is none, or the server is starting."""
        if self.url is None:
            raise ConnectionError("not listening")
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with OPENER.open(request, timeout=20) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        except (urllib.error.URLError, EOFError, ValueError) as error:
            raise ConnectionError(str(error)) from error
        except Exception as error:  # http.client's errors for cut answers
            raise ConnectionError(repr(error)) from error
        if status == 503:
            raise ConnectionError("the server is starting")
        return status, content if raw else json.loads(content)

    def open_jobs(self):
        """Jobs that have not ended."""
        jobs = []
        for status in ("in_progress", "queued"):
            code, page = self.call(f"/v1/images/jobs?limit=100&status={status}")
            if code != 200:
                raise ConnectionError(f"{code}: {page}")
            jobs += page["data"]
        return jobs


def body_of(number, rng):
    """A request. Two of three have a seed; for the others the server chooses it."""
    body = {
        "prompt": rng.choice(["a red circle", "a blue square", "a green triangle on white"]),
        "size": rng.choice(["64x64", "96x64", "128x128"]),
        "num_inference_steps": rng.choice([4, 20, 40, 80]),
        "n": rng.choice([1, 1, 2]),
        "output_format": rng.choice(["png", "png", "jpeg", "webp"]),
    }
    if number % 3:
        body["seed"] = rng.randrange(1 << 31)
    return body


class Clients:
    """Submits jobs to whatever server runs, one after the other."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.server = None
        # Id to request and first answer.
        self.accepted = {}
        self.statuses = collections.Counter()
        self.error = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        number = 0
        while not self.stopped.is_set():
            number += 1
            body = body_of(number, self.rng)
            while True:
                try:
                    # The job of an answer that was cut is submitted already.
                    headers = {"idempotency-key": f"crash {number}"}
                    status, job = self.server.call("/v1/images/jobs", body, headers)
                except OSError:
                    status, job = None, None
                self.statuses[status or "no answer"] += 1
                if status in (200, 202):
                    self.accepted[job["id"]] = (body, job)
                    break
                if status is not None:
                    self.error = f"{status}: {job}"
                    return
                time.sleep(0.02)
            self._wait_for_room()

    def _wait_for_room(self):
        while not self.stopped.is_set():
            try:
                if len(self.server.open_jobs()) < OPEN_JOBS:
                    return
            except OSError:
                pass
            time.sleep(0.02)


def until(what, check):
    """Waits until `check` returns something; a server that does not answer is asked again."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            found = check()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.02)
    raise SystemExit(f"waited {PATIENCE} s for {what}")


def lost(job):
    """Attempts whose server was killed, if one more kill comes."""
    return job["attempt"] + (job["status"] == "queued")


def may_be_lost(job):
    return lost(job) >= MAX_ATTEMPTS


def may_be_lost_twice(job):
    return lost(job) + 1 >= MAX_ATTEMPTS


def kill(server):
    for line in server.kill():
        if "panicked" in line or " ERROR " in line:
            print(line, end="")


def files_of(server, job):
    """The files of a completed job; checks them against the record."""
    files = []
    for file in job["files"]:
        status, content = server.call(file["url"], raw=True)
        if status != 200 or hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise SystemExit(f"{job['id']}: {status}: not the file of the record")
        files.append(content)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kiln", nargs="?", default="target/debug/kiln")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(args, rng, folder)
        finally:
            for server in Server.running:
                server.process.kill()
                server.process.wait()


def run(args, rng, folder):
    begin = time.monotonic()
    jobs_folder = os.path.join(folder, "jobs")
    clients = Clients(args.seed)
    clients.server = Server(args.kiln, jobs_folder)
    clients.thread.start()
    kills, while_starting, running = 0, 0, 0
    while kills < args.kills:
        server = clients.server
        is_early = rng.random() < 0.2 and kills + 2 <= args.kills
        risk = may_be_lost_twice if is_early else may_be_lost
        until("an open job", server.open_jobs)
        time.sleep(rng.uniform(0, 1.5))
        until("jobs that survive a kill", lambda: not any(map(risk, server.open_jobs())))
        running += any(job["status"] == "in_progress" for job in server.open_jobs())
        if is_early:
            kill(server)
            server = clients.server = Server(args.kiln, jobs_folder)
            time.sleep(rng.uniform(0, 0.6))
            kills += 1
            while_starting += 1
        kill(server)
        kills += 1
        clients.server = Server(args.kiln, jobs_folder)
        if kills % 10 == 0:
            print(f"{kills} kills, {len(clients.accepted)} jobs accepted", flush=True)
    clients.stopped.set()
    clients.thread.join(PATIENCE)
    if clients.error:
        raise SystemExit(f"a job was refused: {clients.error}")
    server = clients.server
    until("the end of all jobs", lambda: not server.open_jobs())
    killed = time.monotonic() - begin
    check(args, folder, clients, server)
    total = sum(clients.statuses.values())
    print(
        f"{kills} kills in {killed:.0f} s, {running} with a job in progress and {while_starting} "
        f"while the server started; {len(clients.accepted)} jobs accepted in {total} tries "
        f"{dict(clients.statuses)}: all completed, all files equal"
    )


def check(args, folder, clients, server):
    ends = {}
    attempts = collections.Counter()
    for id, (_, first) in clients.accepted.items():
        status, job = server.call(f"/v1/images/jobs/{id}")
        if status != 200 or job["status"] != "completed":
            raise SystemExit(f"{id} was accepted and is lost: {status} {job}")
        if job["seed"] != first["seed"]:
            raise SystemExit(f"{id}: the seed was {first['seed']} and is {job['seed']}")
        attempts[job["attempt"]] += 1
        ends[id] = (job, files_of(server, job))
    folders = set(os.listdir(os.path.join(folder, "jobs", "results")))
    server.stop()
    if folders != set(ends):
        raise SystemExit(f"folders without a job, or jobs without: {folders ^ set(ends)}")
    reference = Server(args.kiln, os.path.join(folder, "reference"))
    ids = {}
    for id, (body, _) in clients.accepted.items():
        body = {**body, "seed": ends[id][0]["seed"]}
        status, job = until("the reference", lambda b=body: reference.call("/v1/images/jobs", b))
        if status != 202:
            raise SystemExit(f"{status}: {job}")
        ids[id] = job["id"]
    until("the jobs of the reference", lambda: not reference.open_jobs())
    bytes_compared = 0
    for id, (_, files) in ends.items():
        _, expected = reference.call(f"/v1/images/jobs/{ids[id]}")
        if files_of(reference, expected) != files:
            raise SystemExit(f"{id}: other files than those of {ids[id]}: {expected['request']}")
        bytes_compared += sum(map(len, files))
    reference.stop()
    print(f"jobs by number of attempts: {dict(sorted(attempts.items()))}; {bytes_compared} bytes compared")


if __name__ == "__main__":
    sys.exit(main())
