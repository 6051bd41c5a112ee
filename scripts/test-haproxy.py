"""Three servers behind HAProxy with packaging/haproxy.cfg: what is lost when they are killed, ended and restarted."""

import argparse
import contextlib
import csv
import http.client
import io
import itertools
import json
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from waiting import free_ports, wait_until

CONFIGURATION = Path(__file__).parent.parent / "packaging" / "haproxy.cfg"

# HAProxy without any try after the first, and with its own default: only refused connections are tried again.
NO_TRIES = {"retries 5": "retries 0", "option redispatch 1": "", "retry-on conn-failure empty-response 503": ""}
CONNECTIONS_ONLY = {"retry-on conn-failure empty-response 503": "retry-on conn-failure"}

TRIALS = ["with_retries", "without_retries", "streams", "rolling_restart", "client_that_leaves"]

# The servers' time to be out of HAProxy's list: several of its checks.
SHUTDOWN_DELAY = 3


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return None, ""
    finally:
        connection.close()


class Kiln:
    """A server, which can be started again on its port."""

    def __init__(self, binary, folder, name, port):
        self.binary, self.name, self.port = binary, name, port
        self.log = Path(folder) / f"{name}.log"
        self.process = None

    def start(self, *arguments):
        command = [self.binary, "serve", "demo", "--port", str(self.port), "--instance", self.name, "--no-warm-up"]
        with self.log.open("ab") as log:
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "RAYON_NUM_THREADS": "1",
                # With a line for each request that is accepted.
                "RUST_LOG": "info,kiln::server::generation=debug",
            }
            self.process = subprocess.Popen([*command, *arguments], stderr=log, env=environment)

    def wait_until_ready(self):
        wait_until(f"{self.name} is not ready", lambda: get(self.port, "/health/ready")[0] == 200)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds=60):
        code = self.process.wait(seconds)
        assert code == 0, f"{self.name} ended with {code}"

    def accepted(self):
        """Ids of the requests in the log."""
        return set(re.findall(r'request_id="([^"]+)"', self.log.read_text()))

    def metric(self, name):
        for line in get(self.port, "/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return None

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def close(self):
        if self.is_running():
            self.kill()


class Proxy:
    """HAProxy with packaging/haproxy.cfg, on other ports and with `changes`."""

    def __init__(self, folder, servers, changes):
        self.port, self.status_port = free_ports(2)
        text = CONFIGURATION.read_text()
        for old, new in {"bind :8080": f"bind 127.0.0.1:{self.port}", "127.0.0.1:8404": f"127.0.0.1:{self.status_port}",
                         **changes}.items():
            assert old in text, old
            text = text.replace(old, new)
        for server in servers:
            text, count = re.subn(rf"(server {server.name}) \S+", rf"\1 127.0.0.1:{server.port}", text)
            assert count == 2, server.name
        path = Path(folder) / "haproxy.cfg"
        path.write_text(text)
        self.log = Path(folder) / f"haproxy-{self.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["haproxy", "-db", "-f", path], stdout=log, stderr=subprocess.DEVNULL)
        wait_until("HAProxy does not answer", lambda: get(self.status_port, "/")[0] == 200)

    def state(self, server):
        """The line of a server in HAProxy's statistics."""
        lines = csv.DictReader(io.StringIO(get(self.status_port, "/;csv")[1].removeprefix("# ")))
        return next(line for line in lines if line["pxname"] == "kiln" and line["svname"] == server.name)

    def wait_until_up(self, *servers):
        for server in servers:
            wait_until(f"{server.name} is not in use", lambda one=server: self.state(one)["status"] == "UP")

    def close(self):
        self.process.kill()
        self.process.wait()


@dataclass
class Result:
    id: str
    began: float
    ended: float = 0.0
    problem: str | None = None
    server: str | None = None

    @property
    def seconds(self):
        return self.ended - self.began


@dataclass
class Load:
    """Clients that send one request after the other, on connections that they keep."""

    port: int
    clients: int
    stream: bool = False
    # A client that asks again after a failure, as OpenAI's SDKs do.
    asks_again: bool = False
    results: list[Result] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        # Unlike those of other trials in the same logs.
        trial = secrets.token_hex(3)
        self.ids = (f"{trial}-{number}" for number in itertools.count())
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client, args=[seed]) for seed in range(self.clients)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def client(self, seed):
        connection = None
        while not self.stop.is_set():
            with self.lock:
                result = Result(next(self.ids), time.monotonic())
            for _ in range(5 if self.asks_again else 1):
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
                try:
                    result.problem = self.request(connection, result, seed)
                except (OSError, http.client.HTTPException) as error:
                    result.problem = type(error).__name__
                if result.problem is None:
                    break
                connection.close()
                connection = None
            result.ended = time.monotonic()
            self.results.append(result)

    def request(self, connection, result, seed):
        body = {"prompt": "a red circle", "size": "128x128", "num_inference_steps": 12, "seed": seed}
        headers = {"Content-Type": "application/json", "X-Request-Id": result.id}
        body["stream"] = self.stream
        connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
        response = connection.getresponse()
        result.server = response.headers["x-kiln-instance"]
        content = response.read().decode()
        if response.status != 200:
            return f"status {response.status}"
        if response.headers["x-request-id"] != result.id:
            return "another id"
        if self.stream:
            return None if "image_generation.completed" in content else "a stream without its end"
        return None if json.loads(content)["data"][0]["b64_json"] else "no image"

    def lost(self):
        return [result for result in self.results if result.problem]


def report(name, load):
    problems = {}
    for result in load.lost():
        problems[result.problem] = problems.get(result.problem, 0) + 1
    seconds = sorted(result.seconds for result in load.results)
    span = max(result.ended for result in load.results) - min(result.began for result in load.results)
    lost = ", ".join(f"{count} {problem}" for problem, count in problems.items())
    print(
        f"| {name} | {len(load.results):,} in {span:.0f} s | {len(load.lost())}{f' ({lost})' if lost else ''} | "
        f"{statistics.median(seconds):.2f} s | {seconds[-1]:.1f} s |",
        flush=True,
    )


class Trial:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        ports = zip(["k1", "k2", "k3"], free_ports(3))
        self.servers = [Kiln(arguments.kiln, folder, name, port) for name, port in ports]

    def close(self):
        for server in self.servers:
            server.close()

    def start(self, *arguments):
        """Starts all servers anew."""
        self.close()
        for server in self.servers:
            server.start(*arguments)
        for server in self.servers:
            server.wait_until_ready()

    @contextlib.contextmanager
    def proxy(self, changes=None):
        proxy = Proxy(self.folder, self.servers, changes or {})
        try:
            proxy.wait_until_up(*(server for server in self.servers if server.is_running()))
            yield proxy
        finally:
            proxy.close()

    def load(self, proxy, **settings):
        return Load(proxy.port, self.arguments.clients, **settings)

    def kill_and_restart(self, proxy, seconds, *arguments):
        """Kills k1 with work to do, and starts it again. Returns when it was killed, and when it was gone."""
        k1 = self.servers[0]
        time.sleep(seconds)
        wait_until("k1 has no request", lambda: (k1.metric("kiln_requests_running") or 0) > 0)
        killed = time.monotonic()
        k1.kill()
        gone = time.monotonic()
        time.sleep(seconds)
        k1.start(*arguments)
        k1.wait_until_ready()
        proxy.wait_until_up(k1)
        return killed, gone

    def with_retries(self):
        """kill -9 of one, which comes back; SIGTERM of another, which does not."""
        self.start()
        part = self.arguments.seconds / 4
        with self.proxy() as proxy:
            with self.load(proxy) as load:
                began = time.monotonic()
                self.kill_and_restart(proxy, part)
                self.servers[1].terminate()
                self.servers[1].wait()
                time.sleep(max(0.0, began + self.arguments.seconds - time.monotonic()))
            report("the file as it is; kill -9 of k1, back later, SIGTERM of k2", load)
        assert not load.lost(), [vars(result) for result in load.lost()]
        assert {result.server for result in load.results} == {"k1", "k2", "k3"}

    def without_retries(self):
        """Only what kill -9 cut is lost, and nothing of a server that has time to leave."""
        delay = ["--shutdown-delay", str(SHUTDOWN_DELAY)]
        self.start(*delay)
        with self.proxy(CONNECTIONS_ONLY) as proxy:
            with self.load(proxy) as load:
                killed, gone = self.kill_and_restart(proxy, self.arguments.seconds / 12, *delay)
                self.servers[1].terminate()
                self.servers[1].wait()
                time.sleep(1)
            others = self.servers[1].accepted() | self.servers[2].accepted()
            # In work on k1 at kill -9, or sent to it before the system had closed its port.
            cut = [one for one in load.lost() if one.id not in others and one.began <= gone and one.ended >= killed]
            report(f"no request is sent twice, --shutdown-delay {SHUTDOWN_DELAY}; the same", load)
        # HAProxy gives a server at most four at a time, and a client that was cut may ask again at once.
        assert len(load.lost()) == len(cut) <= 8, [vars(result) for result in load.lost()]

    def streams(self):
        """A stream that has begun is cut with its server; a client that asks again gets its image."""
        self.start()
        with self.proxy() as proxy:
            with self.load(proxy, stream=True, asks_again=True) as load:
                self.kill_and_restart(proxy, self.arguments.seconds / 20)
                self.servers[1].terminate()
                self.servers[1].wait()
                time.sleep(1)
            report("streams, by clients that ask again; the same", load)
        assert not load.lost(), [vars(result) for result in load.lost()]

    def rolling_restart(self):
        """All servers one after the other, without a second try of anything."""
        delay = ["--shutdown-delay", str(SHUTDOWN_DELAY)]
        self.start(*delay)
        with self.proxy(NO_TRIES) as proxy:
            with self.load(proxy) as load:
                for server in self.servers:
                    time.sleep(0.5)
                    server.terminate()
                    server.wait()
                    server.start(*delay)
                    server.wait_until_ready()
                    proxy.wait_until_up(server)
                time.sleep(0.5)
            report(f"no second try, --shutdown-delay {SHUTDOWN_DELAY}; restart of all three", load)
        assert not load.lost(), [vars(result) for result in load.lost()]

    def client_that_leaves(self):
        """The device is free when the client of a long request has left."""
        k1, k2, k3 = self.servers
        self.start()
        k2.kill()
        k3.kill()
        with self.proxy() as proxy:
            body = json.dumps({"prompt": "a red circle", "size": "512x512", "num_inference_steps": 1000})
            head = (
                "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall((head + body).encode())
                wait_until("the request does not run", lambda: k1.metric("kiln_requests_running") == 1)
            left = time.monotonic()
            wait_until("the device works for a client that has left", lambda: k1.metric("kiln_requests_running") == 0)
            took = time.monotonic() - left
            assert k1.metric('kiln_requests_total{outcome="cancelled"}') == 1
            print(f"\nThe device was free {took:.2f} s after the client of a request had left.", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kiln", required=True, help="the binary")
    parser.add_argument("--seconds", type=float, default=60, help="time of the first trial; others take a part of it")
    parser.add_argument("--clients", type=int, default=9)
    parser.add_argument("trials", nargs="*", help=f"of {', '.join(TRIALS)}; all by default")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(arguments, folder)
        print("| configuration, and what happened | requests | lost | median | longest |")
        print("|---|---|---|---|---|", flush=True)
        try:
            for name in arguments.trials or TRIALS:
                getattr(trial, name)()
        except BaseException:
            for log in sorted(Path(folder).glob("*.log")):
                # Lines of servers that succeed are of no interest.
                is_success = re.compile(r"finished in | api kiln/\S+ \S+ 200 ")
                lines = [line for line in log.read_text().splitlines() if not is_success.search(line)]
                print(f"== {log.name}", *lines[-12:], sep="\n", file=sys.stderr)
            raise
        finally:
            trial.close()
    print(f"\nAll trials took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
