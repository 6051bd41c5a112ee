"""Tests a running `kiln serve --enable-sdapi` with the demo model with the server of Open WebUI.

Usage: python test_open_webui.py URL KEY OPEN_WEBUI

OPEN_WEBUI is the program of the package open-webui on PyPI, unchanged. It runs in its slim mode, which needs no
embedding model and no vector database. Over its HTTP API the test does what its page does: it signs up, adds
the server as a connection, chats, and generates images with both engines of the image settings.
"""

import re
import sys
import time
import uuid

import requests

from support import free_port, png_size, running

SERVER, KEY, OPEN_WEBUI = sys.argv[1:]
PROMPT = 'a large red "circle"\non a blue background'


class OpenWebUI:
    """A user of Open WebUI, the first of its server and so an administrator."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        account = {"name": "test", "email": "test@example.com", "password": "A-long-passw0rd"}
        token = self.post("/api/v1/auths/signup", account)["token"]
        self.session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str):
        answer = self.session.get(self.url + path, timeout=120)
        assert answer.ok, (path, answer.status_code, answer.text)
        return answer.json()

    def post(self, path: str, body: dict):
        answer = self.session.post(self.url + path, json=body, timeout=120)
        assert answer.ok, (path, answer.status_code, answer.text)
        return answer.json()

    def file(self, path: str) -> bytes:
        answer = self.session.get(self.url + path, timeout=60)
        assert answer.ok and answer.headers["Content-Type"] == "image/png", (path, answer.headers)
        return answer.content

    def chat(self, prompt: str, stream: bool, parameters: dict, before: dict | None = None) -> dict:
        """Sends a message in a new chat, or as the next one after the answer `before`, and returns the answer
        as Open WebUI has stored it."""
        asked, answered = str(uuid.uuid4()), str(uuid.uuid4())
        parent = before["id"] if before else None
        message = {"id": asked, "parentId": parent, "childrenIds": [], "role": "user", "content": prompt}
        history = [{"role": "assistant", "content": before["content"]}] if before else []
        body = {
            "model": "demo",
            "stream": stream,
            "messages": [*history, {"role": "user", "content": prompt}],
            # The advanced parameters of a chat; custom ones go into the request as they are.
            "params": {"temperature": 0.8, "custom_params": parameters},
            "parent_id": parent,
            "id": answered,
            "session_id": "none",
            "user_message": {**message, "timestamp": int(time.time()), "models": ["demo"]},
            "stream_options": {"include_usage": True},
        }
        if before:
            body["chat_id"] = before["chat_id"]
        chat = self.post("/api/chat/completions", body)["chat_id"]
        for _ in range(600):
            messages = self.get(f"/api/v1/chats/{chat}")["chat"]["history"]["messages"]
            if messages[answered].get("done") or messages[answered].get("error"):
                return {**messages[answered], "chat_id": chat}
            time.sleep(0.1)
        raise AssertionError(f"no answer: {messages[answered]}")


def connection(user: OpenWebUI) -> None:
    """The connection in the settings: its button, and the models that it adds."""
    user.post("/openai/verify", {"url": f"{SERVER}/v1", "key": KEY})
    assert [model["id"] for model in user.get("/api/models")["data"]] == ["demo", "stripes"]


def chat_stream(user: OpenWebUI) -> None:
    """A chat shows the image of the answer, and no text in its place."""
    small = {"num_inference_steps": 2, "size": "96x64"}
    answer = user.chat(PROMPT, True, small)
    assert answer["content"] == "", answer["content"][:200]
    assert "base64" not in str(answer), str(answer)[:1000]
    [image] = answer["files"]
    assert image["type"] == "image", image
    assert png_size(user.file(image["url"])) == (96, 64)
    # Its file has the prompt in its metadata, and is much longer than a line that a client may read.
    answer = user.chat("another circle", True, {**small, "size": "512x512", "n": 2}, before=answer)
    files = [user.file(image["url"]) for image in answer["files"]]
    assert [png_size(file) for file in files] == [(512, 512)] * 2
    assert all(b"another circle" in file for file in files) and files[0] != files[1]
    assert answer["content"] == "" and answer["usage"]["total_tokens"] > 0, answer


def chat_error(user: OpenWebUI) -> None:
    """A chat shows the message of an error."""
    for stream in [True, False]:
        answer = user.chat(PROMPT, stream, {"size": "17x4"})
        assert "height must be" in answer["error"]["content"], answer


def images(user: OpenWebUI, engine: str, settings: dict) -> list[bytes]:
    """Sets an engine in the image settings, and generates two images with it."""
    before = user.get("/api/v1/images/config")
    chosen = {"ENABLE_IMAGE_GENERATION": True, "IMAGE_GENERATION_ENGINE": engine, **settings}
    user.post("/api/v1/images/config/update", {**before, **chosen})
    answer = user.post("/api/v1/images/generations", {"prompt": PROMPT, "n": 2})
    assert all(re.fullmatch(r"/api/v1/files/[-0-9a-f]+/content", image["url"]) for image in answer)
    return [user.file(image["url"]) for image in answer]


def images_openai(user: OpenWebUI) -> None:
    for model, size, parameters, expected in [
        ("dall-e-3", "96x64", {"num_inference_steps": 2}, (96, 64)),
        # Requests for models of this name have no response_format.
        ("gpt-image-1", "auto", {"num_inference_steps": 2, "quality": "low"}, (128, 128)),
    ]:
        files = images(
            user,
            "openai",
            {
                "IMAGES_OPENAI_API_BASE_URL": f"{SERVER}/v1",
                "IMAGES_OPENAI_API_KEY": KEY,
                "IMAGES_OPENAI_API_PARAMS": parameters,
                "IMAGE_GENERATION_MODEL": model,
                "IMAGE_SIZE": size,
                "IMAGE_STEPS": 2,
            },
        )
        assert [png_size(file) for file in files] == [expected] * 2


def images_automatic1111(user: OpenWebUI) -> None:
    user.post("/api/v1/images/verify", {"engine": "automatic1111", "url": SERVER, "key": f"kiln:{KEY}"})
    files = images(
        user,
        "automatic1111",
        {
            "AUTOMATIC1111_BASE_URL": SERVER,
            "AUTOMATIC1111_API_AUTH": f"kiln:{KEY}",
            "AUTOMATIC1111_PARAMS": {"cfg_scale": 4, "sampler_name": "Euler a"},
            "IMAGE_GENERATION_MODEL": "demo",
            "IMAGE_SIZE": "64x96",
            "IMAGE_STEPS": 2,
        },
    )
    assert [png_size(file) for file in files] == [(64, 96)] * 2
    assert user.get("/api/v1/images/models") == [{"id": "demo", "name": "demo"}]


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [OPEN_WEBUI, "serve", "--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "USE_SLIM_DOCKER": "true",
        "OFFLINE_MODE": "true",
        "DATA_DIR": ".",
        "WEBUI_SECRET_KEY": "test",
        "ENABLE_OLLAMA_API": "false",
        "OPENAI_API_BASE_URL": f"{SERVER}/v1",
        "OPENAI_API_KEY": KEY,
    }
    started = time.monotonic()
    with running(command, f"{url}/health", **settings):
        user = OpenWebUI(url)
        print(f"Open WebUI has started ({time.monotonic() - started:.1f} s)")
        for test in [connection, chat_stream, chat_error, images_openai, images_automatic1111]:
            started = time.monotonic()
            test(user)
            print(f"Open WebUI: {test.__name__} ok ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
