"""Tests that kiln and Python's huggingface_hub share one cache, in both directions, with a Hub in this
process that has the demo model.

Usage: python test_hub_cache.py KILN
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KILN = sys.argv[1]
DEMO = Path(__file__).parents[2] / "models" / "demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "own/demo"
FILES = {
    str(path.relative_to(DEMO)): path.read_bytes()
    for path in sorted(DEMO.rglob("*"))
    # The adapters are no part of the model.
    if path.suffix in [".json", ".safetensors"] and path.parent != DEMO / "lora"
}


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def etag(name: str) -> str:
    """SHA-256 of a file in Git LFS, and Git's hash of another."""
    content = FILES[name]
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listed(name: str) -> dict:
    size, tag = len(FILES[name]), etag(name)
    if is_large(name):
        lfs = {"oid": tag, "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "oid": "1" * 40, "size": size, "lfs": lfs}
    return {"type": "file", "path": name, "oid": tag, "size": size}


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does: small files itself, large ones by a redirect to a storage."""

    protocol_version = "HTTP/1.1"
    gets: list[str] = []
    # Whether answers to large files stop in the middle, and say nothing more.
    stalls = False

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        if path in [f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}"]:
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "private": False}
            return self.send_json(info | {"tags": [], "siblings": siblings})
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return self.send_json([listed(name) for name in FILES])
        for prefix in [f"/{REPO}/resolve/{COMMIT}/", f"/{REPO}/resolve/main/"]:
            if path.startswith(prefix):
                return self.send_file(path.removeprefix(prefix))
        if path.startswith("/storage/"):
            name = path.removeprefix("/storage/")
            return self.send_content(name, {"ETag": '"of the storage"'})
        self.send_error(404)

    def send_file(self, name: str):
        if name not in FILES:
            return self.send_headers(404, {"X-Error-Code": "EntryNotFound"}, 0)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(name)}"'}
        if not is_large(name):
            return self.send_content(name, headers)
        port = self.server.server_address[1]
        headers |= {"Location": f"http://localhost:{port}/storage/{name}"}
        headers |= {"X-Linked-ETag": f'"{etag(name)}"', "X-Linked-Size": str(len(FILES[name]))}
        self.send_headers(302, headers, 0)

    def send_content(self, name: str, headers: dict[str, str]):
        content, status = FILES[name], 200
        if self.command == "GET":
            Hub.gets.append(name)
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content = content[start:]
        self.send_headers(status, headers, len(content))
        if self.command == "HEAD":
            return
        if is_large(name) and Hub.stalls:
            self.wfile.write(content[: len(content) // 2])
            time.sleep(60)
        self.wfile.write(content)

    def send_json(self, value):
        body = json.dumps(value).encode()
        self.send_headers(200, {"Content-Type": "application/json"}, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def send_headers(self, status: int, headers: dict[str, str], length: int):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *arguments):
        pass


def command() -> list[str]:
    """Generates one small image with the model of the Hub."""
    arguments = ["generate", "a red circle", "--model", REPO, "--output", "out.png"]
    arguments += ["--num-inference-steps", "1", "--size", "32x32", "--backend", "flex"]
    return [KILN, *arguments]


def environment(cache: Path, endpoint: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ["PATH", "HOME", "TMPDIR"] if name in os.environ}
    return kept | {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint}


def wait_for_parts(cache: Path):
    """Waits until half of each large file is in the cache."""
    large = [name for name in FILES if is_large(name)]
    parts = {f"{etag(name)}.incomplete": len(FILES[name]) // 2 for name in large}
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = {path.name: path.stat().st_size for path in cache.rglob("*.incomplete")}
        if found == parts:
            return
        time.sleep(0.05)
    raise AssertionError(f"{found} instead of {parts}")


def generate(cache: Path, endpoint: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(),
        env=environment(cache, endpoint) | variables,
        cwd=cache.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_cache(hub, cache: Path):
    """Checks the cache with huggingface_hub, without its server."""
    folder = hub.snapshot_download(REPO, cache_dir=cache, local_files_only=True)
    for name, content in FILES.items():
        path = hub.try_to_load_from_cache(REPO, name, cache_dir=cache)
        assert path == f"{folder}/{name}", path
        assert Path(path).read_bytes() == content, name
    scan = hub.scan_cache_dir(cache)
    assert not scan.warnings, scan.warnings
    [repo] = scan.repos
    [revision] = repo.revisions
    assert (repo.repo_id, repo.repo_type) == (REPO, "model")
    assert (revision.commit_hash, revision.refs) == (COMMIT, {"main"})
    assert repo.nb_files == len(FILES)
    assert repo.size_on_disk == sum(len(content) for content in FILES.values())


def main():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import huggingface_hub as hub

    with tempfile.TemporaryDirectory() as home:
        # From Python to kiln.
        cache = Path(home) / "python" / "hub"
        hub.snapshot_download(REPO, cache_dir=cache)
        for variables in [{"HF_HUB_OFFLINE": "1"}, {}]:
            Hub.gets.clear()
            done = generate(cache, endpoint, **variables)
            assert done.returncode == 0, done.stderr
            assert not Hub.gets, Hub.gets
        done = generate(cache, "http://127.0.0.1:1")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("the copy in the cache is used") == 1, done.stderr
        check_cache(hub, cache)

        # From kiln to Python.
        cache = Path(home) / "kiln" / "hub"
        Hub.gets.clear()
        done = generate(cache, endpoint)
        assert done.returncode == 0, done.stderr
        assert f"looking up {REPO} at {endpoint}" in done.stderr, done.stderr
        assert "text_encoder/model.safetensors" in Hub.gets
        needed = [name for name in FILES if name.endswith(".safetensors")]
        assert set(needed) < set(Hub.gets), Hub.gets
        Hub.gets.clear()
        hub.snapshot_download(REPO, cache_dir=cache)
        assert not Hub.gets, Hub.gets
        check_cache(hub, cache)

        # What kiln began, Python completes.
        cache = Path(home) / "both" / "hub"
        Hub.stalls = True
        process = subprocess.Popen(command(), env=environment(cache, endpoint), cwd=home)
        wait_for_parts(cache)
        process.kill()
        process.wait()
        Hub.stalls = False
        hub.snapshot_download(REPO, cache_dir=cache)
        check_cache(hub, cache)
        done = generate(cache, endpoint, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
    print("kiln and huggingface_hub", hub.__version__, "share one cache")


main()
