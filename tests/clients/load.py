"""Overloads a running `kiln serve`: no request may get lost or hang, and no memory may leak.

Usage: python load.py URL PID [SECONDS]. For a server with the demo model and --max-queue 8, on Linux,
as the memory of the process PID is read from /proc. Needs only Python.

64 concurrent clients request images of various sizes and steps; half of the requests are cancelled
midway. Every other request must end with 200 or 429, /health/live must answer within 100 ms
throughout, and afterwards the server must have no job and about as much memory as before.
"""

import collections
import http.client
import json
import random
import sys
import threading
import time
import urllib.parse

CLIENTS = 64
REQUESTS = [
    {"size": "128x128", "num_inference_steps": 4},
    {"size": "128x128", "num_inference_steps": 20, "negative_prompt": " "},
    {"size": "256x192", "num_inference_steps": 10},
    {"size": "64x64", "num_inference_steps": 2, "n": 2},
]

server = urllib.parse.urlsplit(sys.argv[1])
process = int(sys.argv[2])
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 60
outcomes: collections.Counter = collections.Counter()
problems: list[str] = []
health: list[float] = []
lock = threading.Lock()
end = 0.0


def connect(timeout: float = 120) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.hostname, server.port, timeout=timeout)


def get(path: str) -> str:
    connection = connect()
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def metrics() -> dict[str, float]:
    lines = [line for line in get("/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def status() -> dict[str, str]:
    with open(f"/proc/{process}/status") as lines:
        return dict(line.split(":", 1) for line in lines)


def memory() -> float:
    """Resident memory in MiB."""
    return int(status()["VmRSS"].split()[0]) / 1024


def threads_of_server() -> int:
    return int(status()["Threads"])


def client(number: int) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
        body = dict(rng.choice(REQUESTS), prompt="a large red circle", seed=rng.randrange(2**32))
        cancels = rng.random() < 0.5
        connection = connect()
        try:
            connection.request(
                "POST", "/v1/images/generations", json.dumps(body),
                {"Content-Type": "application/json"},
            )
            if cancels:
                connection.sock.settimeout(rng.uniform(0.01, 0.3))
            answer = connection.getresponse()
            content = json.loads(answer.read())
            with lock:
                outcomes[answer.status] += 1
                if answer.status == 429:
                    if not 1 <= int(answer.headers["Retry-After"]) <= 3600:
                        problems.append(f"Retry-After: {answer.headers['Retry-After']}")
                elif answer.status != 200 or len(content["data"]) != body.get("n", 1):
                    problems.append(f"{answer.status}: {str(content)[:200]}")
            if answer.status == 429:
                time.sleep(rng.uniform(0.05, 0.3))
        except TimeoutError:
            with lock:
                outcomes["cancelled"] += 1
            if not cancels:
                problems.append("no answer in two minutes")
        except OSError as error:
            problems.append(f"connection: {error}")
        finally:
            connection.close()


def watch_health() -> None:
    connection = connect()
    while time.monotonic() < end:
        started = time.monotonic()
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        answer.read()
        health.append(time.monotonic() - started)
        if answer.status != 200:
            problems.append(f"/health/live: {answer.status}")
        time.sleep(0.02)


def run(duration: float) -> None:
    global end
    end = time.monotonic() + duration
    threads = [threading.Thread(target=client, args=[number]) for number in range(CLIENTS)]
    threads.append(threading.Thread(target=watch_health))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def settle() -> float:
    """Waits until the server has no job, and returns the seconds."""
    started = time.monotonic()
    while time.monotonic() < started + 30:
        numbers = metrics()
        if numbers["kiln_requests_running"] + numbers["kiln_requests_waiting"] == 0:
            return time.monotonic() - started
        time.sleep(0.01)
    problems.append("the server still has jobs after 30 s")
    return float("nan")


def main() -> None:
    # Warms up, so that reused buffers and threads exist before memory is measured.
    run(min(10, seconds / 3))
    settle()
    before, threads_before = memory(), threads_of_server()
    outcomes.clear()
    health.clear()
    counted = metrics()
    run(seconds)
    free_after = settle()
    time.sleep(1)
    after, numbers = memory(), metrics()
    step = numbers["kiln_step_seconds_sum"] / numbers["kiln_step_seconds_count"]
    health.sort()
    print(f"{sum(outcomes.values())} requests in {seconds:.0f} s: {dict(outcomes)}")
    for name in sorted(numbers):
        if name.startswith("kiln_requests_total"):
            print(f"{name} +{numbers[name] - counted[name]:.0f}")
    print(f"the device is idle {free_after:.3f} s after the last client; a step takes {step:.4f} s")
    print(f"/health/live: median {health[len(health) // 2] * 1e3:.1f} ms, "
          f"99 % {health[len(health) * 99 // 100] * 1e3:.1f} ms, longest {health[-1] * 1e3:.1f} ms")
    print(f"memory {before:.0f} MiB, then {after:.0f}; threads {threads_before}, then {threads_of_server()}")
    if not outcomes[200] or not outcomes[429] or not outcomes["cancelled"]:
        problems.append("the load did not have all three outcomes: 200, 429 and cancelled")
    if after > before * 1.2 + 20:
        problems.append("memory has grown")
    if health[len(health) * 99 // 100] > 0.1:
        problems.append("/health/live is slow")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
