"""Free ports and waiting, for the scripts that start servers."""

import contextlib
import socket
import time


def free_ports(count):
    """Different TCP ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(what, condition, seconds=60.0):
    """Ends the program if the condition does not hold in time; `what` says what is wrong then."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"after {seconds} s: {what}")
        time.sleep(0.05)
