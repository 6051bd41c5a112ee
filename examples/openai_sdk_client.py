#!/usr/bin/env python3
"""Generates images with the official openai package, with its images or its chat API.

    pip install openai
    python openai_sdk_client.py --prompt "a red fox in the snow" --output fox.png
    python openai_sdk_client.py --api chat --size 512x512 --steps 20 --negative " "

Parameters that OpenAI's API does not have go into `extra_body`. Exits with code 1 if there is no image.
"""

import argparse
import base64
import os
import sys
from pathlib import Path
from typing import Any

import openai


def generate_with_images(client: openai.OpenAI, args: argparse.Namespace) -> list[bytes]:
    answer = client.images.generate(
        model=args.model,
        prompt=args.prompt,
        n=args.num_images,
        size=args.size,
        response_format="b64_json",
        extra_body=parameters(args),
    )
    return [base64.b64decode(image.b64_json, validate=True) for image in answer.data]


def generate_with_chat(client: openai.OpenAI, args: argparse.Namespace) -> list[bytes]:
    answer = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": args.prompt}],
        extra_body={
            "size": args.size,
            "num_outputs_per_prompt": args.num_images,
            **parameters(args),
        },
    )
    # The package declares the content as text; here it is a list of parts with one image each.
    content: Any = answer.choices[0].message.content
    if not isinstance(content, list):
        raise ValueError(f"the answer is text: {content}")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    if not all(url.startswith("data:image/") for url in urls):
        raise ValueError("an image is not a data URL")
    return [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters that OpenAI's APIs do not have. The server chooses those that are None."""
    values = {
        "num_inference_steps": args.steps,
        "true_cfg_scale": args.cfg_scale,
        "seed": args.seed,
        "negative_prompt": args.negative,
    }
    return {name: value for name, value in values.items() if value is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description="Generates images with the openai package.")
    parser.add_argument("--api", choices=["images", "chat"], default="images")
    parser.add_argument("--prompt", "-p", default="a cup of coffee on the table", help="what the image should show")
    parser.add_argument("--output", "-o", type=Path, default=Path("qwen_image_output.png"))
    parser.add_argument("--server", "-s", default="http://localhost:8091", help="URL of the server")
    parser.add_argument("--model", default="Qwen/Qwen-Image")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--num-images", "-n", type=int, default=1)
    parser.add_argument("--retries", type=int, default=2, help="number of retries if the queue is full or the server fails")
    args = parser.parse_args()

    client = openai.OpenAI(
        base_url=f"{args.server.rstrip('/')}/v1",
        # The package requires a key even if the server does not.
        api_key=os.environ.get("API_KEY") or "none",
        max_retries=args.retries,
    )
    generate = {"images": generate_with_images, "chat": generate_with_chat}[args.api]
    try:
        files = generate(client, args)
        if not files:
            raise ValueError("the answer has no image")
    except openai.OpenAIError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except (ValueError, LookupError, TypeError) as error:
        print(f"Error: unexpected answer: {error}", file=sys.stderr)
        return 1
    for index, file in enumerate(files):
        path = args.output
        if len(files) > 1:
            path = path.with_name(f"{path.stem}-{index}{path.suffix}")
        path.write_bytes(file)
        print(f"Image saved to: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
