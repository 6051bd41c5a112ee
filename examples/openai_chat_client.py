#!/usr/bin/env python3
"""Generates images with the chat API. Needs only the package `requests`.

    python openai_chat_client.py --prompt 'a fox that says "hi"' --output fox.png

Exits with code 1 if there is no image. As a module, it provides `generate_images`.
"""

import argparse
import base64
import binascii
import os
import sys
from pathlib import Path
from typing import Any

import requests

TIMEOUT_SECONDS = 300


class GenerationError(Exception):
    """Human-readable reason why there is no image."""


def generate_images(
    prompt: str,
    server_url: str = "http://localhost:8091",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    true_cfg_scale: float | None = None,
    seed: int | None = None,
    negative_prompt: str | None = None,
    num_outputs_per_prompt: int = 1,
    api_key: str | None = None,
) -> list[bytes]:
    """Generates one or more images and returns them as files.

    The server chooses a parameter that is None.
    """
    parameters = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "true_cfg_scale": true_cfg_scale,
        "seed": seed,
        "negative_prompt": negative_prompt or None,
    }
    extra_body = {name: value for name, value in parameters.items() if value is not None}
    extra_body["num_outputs_per_prompt"] = num_outputs_per_prompt
    try:
        response = requests.post(
            f"{server_url.rstrip('/')}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": prompt}], "extra_body": extra_body},
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        raise GenerationError(f"no answer from {server_url}: {error}") from error
    if not response.ok:
        raise GenerationError(f"status {response.status_code}: {message_of(response)}")
    try:
        return images_of(response.json())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise GenerationError(f"Unexpected response format: {response.text[:500]}") from error


def message_of(response: requests.Response) -> str:
    """The message of an error response, or the beginning of its body."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return response.text[:500]


def images_of(completion: dict[str, Any]) -> list[bytes]:
    """The image files in a chat completion; there is at least one."""
    content = completion["choices"][0]["message"]["content"]
    if not isinstance(content, list):
        raise ValueError("the content is not a list")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    if not urls:
        raise ValueError("there is no image")
    return [decode(url) for url in urls]


def decode(data_url: str) -> bytes:
    head, comma, data = data_url.partition(",")
    if not (head.startswith("data:image/") and comma and data):
        raise ValueError("there is no image")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError("an image cannot be decoded") from error


def output_paths(output: Path, count: int) -> list[Path]:
    """The path itself for one image; out-0.png, out-1.png and so on for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Generates images with the chat API.")
    parser.add_argument("--prompt", "-p", default="a cup of coffee on the table", help="what the image should show")
    parser.add_argument("--output", "-o", type=Path, default=Path("qwen_image_output.png"))
    parser.add_argument("--server", "-s", default="http://localhost:8091", help="URL of the server")
    parser.add_argument("--height", type=int, default=1024, help="in pixels")
    parser.add_argument("--width", type=int, default=1024, help="in pixels")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--num-images", "-n", type=int, default=1)
    parser.add_argument(
        "--api-key", default=os.environ.get("API_KEY"), help="by default the variable API_KEY"
    )
    args = parser.parse_args()

    print(f"Generating image for: {args.prompt}")
    try:
        files = generate_images(
            args.prompt,
            server_url=args.server,
            height=args.height,
            width=args.width,
            steps=args.steps,
            true_cfg_scale=args.cfg_scale,
            seed=args.seed,
            negative_prompt=args.negative,
            num_outputs_per_prompt=args.num_images,
            api_key=args.api_key,
        )
    except GenerationError as error:
        print(f"Error: {error}", file=sys.stderr)
        print("Failed to generate image", file=sys.stderr)
        return 1
    for path, file in zip(output_paths(args.output, len(files)), files, strict=True):
        path.write_bytes(file)
        print(f"Image saved to: {path}")
        print(f"Size: {len(file) / 1024:.1f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
