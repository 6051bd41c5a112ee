"""Servers that share jobs in NATS: what becomes of the jobs when servers of both kinds are killed."""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from waiting import free_ports, wait_until

BODY = {"prompt": "a large red circle on a blue background", "size": "128x128"}


class Process:
    """A program that can be killed and started again."""

    process = None

    def spawn(self, command, log, environment=None):
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self):
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
            self.process = None


class Nats(Process):
    """A NATS server, alone or in a cluster. Version 2.10 and later sync each message to the disk."""

    def __init__(self, program, folder, name, port, route=None, routes=(), monitor=None):
        self.port, self.monitor, self.name = port, monitor, name
        self.program, self.log = program, folder / f"{name}.log"
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = re.search(r"v(\d+)\.(\d+)\.(\d+)", version).groups()
        sync = "  sync_interval: always\n" if tuple(map(int, self.version)) >= (2, 10, 0) else ""
        text = f'server_name: {name}\nlisten: "127.0.0.1:{port}"\nhttp: "127.0.0.1:{monitor}"\n'
        text += f'jetstream {{\n  store_dir: "{folder / name}"\n{sync}}}\n'
        if route:
            others = ", ".join(f'"nats://127.0.0.1:{other}"' for other in routes)
            text += f'cluster {{\n  name: c\n  listen: "127.0.0.1:{route}"\n  routes: [{others}]\n}}\n'
        self.configuration = folder / f"{name}.conf"
        self.configuration.write_text(text)

    def start(self):
        self.spawn([self.program, "-c", str(self.configuration)], self.log)

    def information(self):
        """JetStream's streams, by name."""
        connection = http.client.HTTPConnection("127.0.0.1", self.monitor, timeout=5)
        try:
            connection.request("GET", "/jsz?streams=1")
            account = json.loads(connection.getresponse().read()).get("account_details") or [{}]
            return {stream["name"]: stream for stream in account[0].get("stream_detail") or []}
        except (OSError, ValueError):
            return {}
        finally:
            connection.close()


class Kiln(Process):
    def __init__(self, program, folder, name, port, jobs, role):
        self.program, self.log, self.name, self.port = program, folder / f"{name}.log", name, port
        self.jobs, self.role = jobs, role

    def start(self):
        command = [self.program, "serve", "demo", "--port", str(self.port), "--instance", self.name, "--no-warm-up"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1"}
        self.spawn([*command, "--jobs", self.jobs, "--role", self.role], self.log, environment)

    def request(self, method, path, body=None, headers=(), timeout=30):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body)
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, content, {**kind, **dict(headers)})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def json(self, method, path, body=None, headers=()):
        """Status and JSON; no status if the server is gone."""
        try:
            status, head, content = self.request(method, path, body, headers)
            return status, head, json.loads(content)
        except (OSError, http.client.HTTPException, ValueError):
            return None, {}, {}

    def wait_until_ready(self):
        wait_until(f"{self.name} is not ready, see {self.log}", lambda: self.json("GET", "/health/ready")[0] == 200)


class Setting:
    """NATS servers, servers of the role api, and workers."""

    def __init__(self, arguments, folder, nats, apis=2, workers=2):
        folder.mkdir()
        self.steps = arguments.steps
        ports = free_ports(3 * nats + apis + workers)
        clients, routes, monitors = ports[:nats], ports[nats : 2 * nats], ports[2 * nats : 3 * nats]
        self.nats = [
            Nats(
                arguments.nats,
                folder,
                f"n{index + 1}",
                clients[index],
                routes[index] if nats > 1 else None,
                [route for route in routes if route != routes[index]],
                monitors[index],
            )
            for index in range(nats)
        ]
        jobs = "nats://" + ",".join(f"127.0.0.1:{port}" for port in clients)
        rest = ports[3 * nats :]
        make = lambda name, port, role: Kiln(arguments.kiln, folder, name, port, jobs, role)  # noqa: E731
        self.apis = [make(f"api{index + 1}", rest[index], "api") for index in range(apis)]
        self.workers = [make(f"worker{index + 1}", rest[apis + index], "worker") for index in range(workers)]
        self.accepted = {}  # id -> seed
        self.cancelled = set()
        self.refused = 0
        self.longest = 0.0
        self.lock = threading.Lock()

    def __enter__(self):
        for server in self.nats:
            server.start()
        for server in [*self.apis, *self.workers]:
            server.start()
        for server in [*self.apis, *self.workers]:
            server.wait_until_ready()
        wait_until("the streams are not there", lambda: self.stream("KILN"))
        return self

    def __exit__(self, *_):
        for server in [*self.apis, *self.workers, *self.nats]:
            server.kill()

    def stream(self, name):
        for server in self.nats:
            if server.process is not None and (found := server.information().get(name)):
                return found
        return None

    def submit(self, seed, seconds=60.0):
        """Stores a job. Repeats the request, with its key, until a server accepts it, as a client should."""
        body = {**BODY, "seed": seed, "num_inference_steps": self.steps}
        begin = time.monotonic()
        tries = 0
        while True:
            api = self.apis[(seed + tries) % len(self.apis)]
            status, headers, job = api.json("POST", "/v1/images/jobs", body, {"Idempotency-Key": f"seed-{seed}"})
            tries += 1
            if status in (200, 202):
                with self.lock:
                    self.accepted[job["id"]] = seed
                    self.longest = max(self.longest, time.monotonic() - begin)
                return job["id"]
            assert status in (None, 503), (status, job)
            if status == 503:
                assert headers["Retry-After"], headers
                with self.lock:
                    self.refused += 1
            assert time.monotonic() < begin + seconds, f"seed {seed} is not accepted after {seconds} s"
            time.sleep(0.2)

    def submit_all(self, seeds, pause=0.0):
        for seed in seeds:
            self.submit(seed)
            time.sleep(pause)

    def job(self, job_id):
        for api in self.apis:
            status, _, job = api.json("GET", f"/v1/images/jobs/{job_id}")
            if status == 200:
                return job
        return None

    def of_status(self, status):
        found, _, page = self.apis[0].json("GET", f"/v1/images/jobs?limit=100&status={status}")
        return page["data"] if found == 200 else []

    def kill_busy_worker(self):
        """kill -9 of a worker that runs a job."""
        running = []

        def found():
            running[:] = self.of_status("in_progress")
            return running

        wait_until("no job runs", found)
        worker = next(worker for worker in self.workers if worker.name == running[0]["instance"])
        worker.kill()
        return worker

    def cancel(self, job_id):
        def done():
            status, _, job = self.apis[0].json("POST", f"/v1/images/jobs/{job_id}/cancel")
            # It may have been completed meanwhile.
            if status == 200 and job["status"] == "cancelled":
                self.cancelled.add(job_id)
            return status == 200

        wait_until(f"{job_id} is not cancelled", done)

    def finished(self, seconds=900.0):
        """Waits for the end of all jobs, and returns them."""
        jobs = {}

        def done():
            for job_id in self.accepted.keys() - jobs.keys():
                job = self.job(job_id)
                if job and job["status"] in ("completed", "failed", "cancelled"):
                    jobs[job_id] = job
            return jobs.keys() == self.accepted.keys()

        wait_until("some jobs have not ended", done, seconds)
        return jobs

    def check(self, name, reference, began):
        """Every accepted job has ended as it must, and its file is that of its seed."""
        jobs = self.finished()
        again = 0
        for job_id, job in jobs.items():
            expected = "cancelled" if job_id in self.cancelled else "completed"
            assert job["status"] == expected, job
            again += job["attempt"] > 1
            if expected == "completed":
                file = self.content(job_id)
                assert hashlib.sha256(file).hexdigest() == job["files"][0]["sha256"], job
                reference.check(self.accepted[job_id], self.steps, file)
        wait_until("messages are left in the queue", lambda: self.stream("KILN")["state"]["messages"] == 0)
        completed = len(jobs) - len(self.cancelled)
        print(
            f"{name}: {len(jobs)} accepted, {completed} completed, {len(self.cancelled)} cancelled, 0 lost; "
            f"{again} begun more than once; {self.refused} times 503, longest wait of a client {self.longest:.1f} s; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def content(self, job_id):
        for _ in range(50):
            for api in self.apis:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, _, content = api.request("GET", f"/v1/images/jobs/{job_id}/content")
                    if status == 200:
                        return content
            time.sleep(0.2)
        raise SystemExit(f"{job_id} has no file")


class Reference:
    """The files of a server without jobs, by seed."""

    def __init__(self, arguments, folder):
        self.files = {}
        self.kiln = Kiln(arguments.kiln, folder, "reference", free_ports(1)[0], str(folder / "jobs"), "all")
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir()
        self.kiln.start()
        self.kiln.wait_until_ready()
        return self

    def __exit__(self, *_):
        self.kiln.kill()

    def check(self, seed, steps, file):
        if (seed, steps) not in self.files:
            body = {**BODY, "seed": seed, "num_inference_steps": steps, "response_format": "file"}
            status, _, content = self.kiln.request("POST", "/v1/images/generations", body, timeout=300)
            assert status == 200, content
            self.files[seed, steps] = content
        assert self.files[seed, steps] == file, f"the file of seed {seed} differs"


def kill_servers(arguments, folder, reference):
    """kill -9 of a busy worker, of a server of the role api and of the NATS server, and cancellations, under load."""
    began = time.monotonic()
    with Setting(arguments, folder / "one", 1) as here:
        client = threading.Thread(target=here.submit_all, args=(range(arguments.jobs), 0.1))
        client.start()
        worker = here.kill_busy_worker()
        time.sleep(1)
        here.apis[1].kill()
        for one in here.of_status("queued")[:2]:
            here.cancel(one["id"])
        worker.start()
        here.apis[1].start()
        time.sleep(1)
        here.nats[0].kill()
        time.sleep(2)
        here.nats[0].start()
        client.join()
        for one in here.of_status("in_progress")[:1]:
            here.cancel(one["id"])
        here.check(f"NATS {'.'.join(here.nats[0].version)}, kill -9 of a worker, an api and NATS", reference, began)


def restart_with_queue(arguments, folder, reference):
    """kill -9 of the NATS server with jobs that wait; no worker runs meanwhile."""
    began = time.monotonic()
    with Setting(arguments, folder / "queue", 1) as here:
        for worker in here.workers:
            worker.stop()
        here.submit_all(range(arguments.jobs))
        here.nats[0].kill()
        status, headers, _ = here.apis[0].json("POST", "/v1/images/jobs", {**BODY, "num_inference_steps": 2})
        assert status == 503 and headers["Retry-After"], (status, headers)
        here.nats[0].start()
        for worker in here.workers:
            worker.start()
        here.check(f"kill -9 of NATS with {arguments.jobs} jobs queued", reference, began)


def cluster(arguments, folder, reference):
    """Three NATS servers: kill -9 of a worker, of the stream's leader, then of two of three."""
    began = time.monotonic()
    with Setting(arguments, folder / "three", 3) as here:
        wait_until("the stream has no three replicas", lambda: here.stream("KILN").get("cluster", {}).get("leader"))
        # The rate of the load leaves the workers behind.
        client = threading.Thread(target=here.submit_all, args=(range(arguments.jobs), 0.3))
        client.start()
        time.sleep(2)
        worker = here.kill_busy_worker()
        time.sleep(1)
        worker.start()
        leader = here.stream("KILN")["cluster"]["leader"]
        killed = next(server for server in here.nats if server.name == leader)
        killed.kill()
        time.sleep(8)
        killed.start()
        client.join()
        here.check(f"three NATS servers, kill -9 of a worker and of the leader {leader}", reference, began)
        began = time.monotonic()
        here.refused, here.longest = 0, 0.0
        here.submit_all(range(arguments.jobs, arguments.jobs + 10))
        lost = random.sample(here.nats, 2)
        for server in lost:
            server.kill()
        status, headers, answer = here.apis[0].json("POST", "/v1/images/jobs", {**BODY, "num_inference_steps": 2})
        assert status == 503 and headers["Retry-After"], (status, answer)
        time.sleep(5)
        client = threading.Thread(target=here.submit_all, args=(range(arguments.jobs + 10, arguments.jobs + 15),))
        client.start()
        time.sleep(2)
        for server in lost:
            server.start()
        client.join()
        here.check("two of three NATS servers gone for 7 s", reference, began)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kiln", required=True, help="the binary")
    parser.add_argument("--nats", default=os.environ.get("NATS_SERVER") or shutil.which("nats-server") or "/usr/sbin/nats-server")
    parser.add_argument("--jobs", type=int, default=12, help="jobs of a trial")
    parser.add_argument("--steps", type=int, default=60, help="denoising steps of a job")
    parser.add_argument("--long", action="store_true", help="all trials, with 60 jobs of 150 steps")
    parser.add_argument("--trial", action="append", choices=["kill", "queue", "cluster"], help="only this trial")
    arguments = parser.parse_args()
    if not Path(arguments.nats).exists():
        print("skipped: nats-server is not installed")
        return
    if arguments.long:
        arguments.jobs, arguments.steps = 60, 150
    trials = {"kill": kill_servers, "queue": restart_with_queue, "cluster": cluster}
    names = arguments.trial or (list(trials) if arguments.long else ["kill"])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            with Reference(arguments, folder / "reference") as reference:
                for name in names:
                    trials[name](arguments, folder, reference)
        except BaseException:
            for log in sorted(folder.rglob("*.log")):
                print(f"== {log}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
