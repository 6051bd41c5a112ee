"""Requests per second with several jobs in one step and without: python packing.py --kiln BINARY

Starts one `kiln serve` for each value of --max-step-tokens, and sends the same requests to one after the other, in
rounds whose order is reversed each time, so that a change of the machine's speed meets all. The ratios are those of the
rounds to the first value's, which is 0: no packing. All requests have guidance. Needs only Python.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

from server import arguments, machine, report, serving, table

FLAG = "--max-step-tokens"


class Round:
    """What one round of requests took."""

    def __init__(self, settings: argparse.Namespace, url: str, number: int) -> None:
        self.settings, self.url, self.number = settings, url, number
        self.latencies: list[float] = []
        self.errors: list[str] = []
        clients = [threading.Thread(target=self.client, args=[client]) for client in range(settings.clients)]
        started = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        self.seconds = time.perf_counter() - started
        if self.errors:
            raise SystemExit(f"{len(self.errors)} requests failed, the first: {self.errors[0]}")

    def client(self, client: int) -> None:
        server = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(server.hostname, server.port)
        settings = self.settings
        for index in range(settings.requests // settings.clients):
            body = {
                # No prompt comes twice, so that the cache of embeddings has none of them.
                "prompt": f"a large red circle, {self.number} {client} {index}",
                "negative_prompt": " ",
                "size": f"{settings.size}x{settings.size}",
                "num_inference_steps": settings.steps,
                "seed": 1000 * client + index,
            }
            started = time.perf_counter()
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
                answer = connection.getresponse()
                content = answer.read()
            except OSError as error:
                self.errors.append(repr(error))
                return
            if answer.status != 200:
                self.errors.append(f"{answer.status} {content[:300]!r}")
                return
            self.latencies.append(time.perf_counter() - started)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def shared(url: str) -> list[str]:
    """The image tokens that a step may have, and the part of the steps that requests shared."""
    lines = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    tokens = numbers.get("kiln_max_step_tokens", "–")
    part = float(numbers.get("kiln_shared_steps_total", "nan")) / float(numbers["kiln_steps_total"])
    return [tokens, f"{part:.0%}"]


def main() -> None:
    parser = arguments(__doc__.split(":")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="requests of a round, of all clients together")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--budgets", nargs="+", default=["0", "default"], metavar="TOKENS",
        help=f"values of {FLAG}; `default` leaves the flag out",
    )
    settings = parser.parse_args()
    if settings.requests < settings.clients:
        parser.error("--requests must be at least --clients")

    report(settings, "## Several jobs in one step, and one job in each\n")
    usage = subprocess.run([settings.kiln, "serve", "--help"], capture_output=True, text=True, check=True)
    if FLAG not in usage.stdout:
        report(settings, f"Not measured: this kiln has no `{FLAG}`.\n")
        return
    each = settings.requests // settings.clients
    report(
        settings,
        f"{machine(settings)} {settings.size}², {settings.steps} steps, guidance; {settings.clients} clients "
        f"that send {each} requests each in a round, one after the other; {settings.rounds} rounds for each value, "
        "in turn. Medians over the rounds, with the least and the most; seconds.\n",
    )
    rounds: dict[str, list[Round]] = {budget: [] for budget in settings.budgets}
    with contextlib.ExitStack() as stack:
        urls = {}
        for budget in settings.budgets:
            flag = [] if budget == "default" else [f"{FLAG}={budget}"]
            queue = f"--max-queue={max(32, settings.clients)}"
            urls[budget] = stack.enter_context(serving(settings, queue, *flag))
            # A first round that does not count: buffers are made and the speed is learnt.
            Round(settings, urls[budget], -1)
        order = list(settings.budgets)
        for number in range(settings.rounds):
            for budget in order:
                rounds[budget].append(Round(settings, urls[budget], number))
                print(f"round {number}: {budget}: {rounds[budget][-1].rate:.2f} requests/s", file=sys.stderr)
            order.reverse()
        sharing = {budget: shared(url) for budget, url in urls.items()}

    first = [measured.rate for measured in rounds[settings.budgets[0]]]
    rows = []
    for budget, measured in rounds.items():
        ratios = [one.rate / other for one, other in zip(measured, first)]
        p95 = [statistics.quantiles(one.latencies, n=20)[-1] for one in measured]
        rows.append([
            f"`{FLAG} {budget}`" if budget != "default" else "default",
            *sharing[budget],
            spread([one.rate for one in measured]),
            spread([statistics.mean(one.latencies) for one in measured]),
            spread(p95),
            spread(ratios, 3),
        ])
    head = [
        "", "tokens of a step", "shared steps", "requests/s", "latency, mean", "latency, p95",
        f"requests/s to {settings.budgets[0]}'s",
    ]
    report(settings, table(head, rows) + "\n")


if __name__ == "__main__":
    main()
