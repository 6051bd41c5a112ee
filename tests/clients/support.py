"""What the tests of clients share: checks of images, and processes that serve HTTP."""

import base64
import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator


def png_size(file: bytes) -> tuple[int, int]:
    """Decodes a grey or RGB image in PNG, with its checksums, and returns its width and height."""
    assert file.startswith(b"\x89PNG\r\n\x1a\n"), file[:16]
    place, kind, data = 8, b"", b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", file, place)
        content = file[place + 8 : place + 8 + length]
        [checksum] = struct.unpack_from(">I", file, place + 8 + length)
        assert zlib.crc32(kind + content) == checksum, kind
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", content)
            assert depth == 8, depth
        if kind == b"IDAT":
            data += content
        place += 12 + length
    assert place == len(file), "there is something behind the image"
    # Each row has a byte for its filter.
    assert len(zlib.decompress(data)) == height * (1 + {0: 1, 2: 3}[colour] * width)
    return width, height


def data_url(url: str) -> bytes:
    """The file in a data URL of a PNG."""
    head, data = url.split(",", 1)
    assert head == "data:image/png;base64", head
    return base64.b64decode(data, validate=True)


def variables(**others: str) -> dict[str, str]:
    """The environment of a program: UTF-8, and none of the variables that programs read."""
    kept = {name: os.environ[name] for name in ["PATH", "HOME", "TMPDIR"] if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", **others}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    """Waits until a process answers a request with a status below 400."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"ended with code {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing at {url}")


@contextlib.contextmanager
def running(command: list[str], health: str, **settings: str) -> Iterator[subprocess.Popen]:
    """Runs a server in an empty folder of its own until the block ends; shows its log if that fails.

    Begins the block when the URL `health` answers. `settings` are environment variables.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=variables(**settings), cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(health, process, seconds=300)
            yield process
        except BaseException:
            log.seek(0)
            print(log.read()[-10000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
