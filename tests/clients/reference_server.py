"""A fake server whose chat completions and image responses have the form of vLLM-Omni's.

Its `mode` sets the response: "images", a status code, or "text" for the completion without an image
that vLLM-Omni sends with status 200. `bodies` has the bodies of all requests.
"""

import base64
import http.server
import json
import struct
import threading
import zlib

MESSAGES = {429: "the queue is full", 500: "the device is on fire"}


def png(width: int, height: int, grey: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + bytes([grey]) * width) * height
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def chat(body: dict) -> dict:
    parameters = {**body, **body.get("extra_body", {})}
    size = parameters.get("size") or f"{parameters['width']}x{parameters['height']}"
    width, height = map(int, size.split("x"))
    parts = []
    for index in range(parameters["num_outputs_per_prompt"]):
        data = base64.b64encode(png(width, height, index)).decode()
        url = f"data:image/png;base64,{data}"
        image = {"type": "image_url", "image_url": {"url": url}}
        parts.append({**image, "stage_durations": {}, "peak_memory_mb": 1.5})
    return completion(parts)


def completion(content) -> dict:
    nothing = dict.fromkeys(["refusal", "annotations", "audio", "function_call", "reasoning"])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **nothing},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
    }
    usage = {"prompt_tokens": 4, "total_tokens": 5, "completion_tokens": 1}
    return {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1766000000,
        "model": "Qwen/Qwen-Image",
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {**usage, "prompt_tokens_details": None, "completion_tokens_details": None},
        **dict.fromkeys(["prompt_logprobs", "prompt_token_ids", "kv_transfer_params", "metrics"]),
    }


def images(body: dict) -> dict:
    width, height = map(int, body["size"].split("x"))
    files = [png(width, height, index) for index in range(body["n"])]
    data = [
        {"b64_json": base64.b64encode(file).decode(), "url": None, "revised_prompt": None}
        for file in files
    ]
    return {"created": 1766000000, "data": data, "output_format": "png", "size": body["size"]}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        mode = self.server.mode
        if isinstance(mode, int):
            kind = "BadRequestError" if mode == 500 else "RateLimitError"
            error = {"message": MESSAGES[mode], "type": kind, "param": None, "code": mode}
            self.answer(mode, {"error": error})
        elif self.path == "/v1/images/generations":
            self.answer(200, images(body) if mode == "images" else {"created": 0, "data": []})
        elif mode == "images":
            self.answer(200, chat(body))
        else:
            text = "Image generation completed but no images were produced."
            self.answer(200, completion(text))

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


class ReferenceServer(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode: int | str = "images"
        self.bodies: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()
