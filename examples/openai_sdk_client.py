#!/usr/bin/env python3
"""Draws a prompt with the official openai package, through its images or its chat API.

    pip install openai
    python openai_sdk_client.py --prompt "a red fox in the snow" --output fox.png
    python openai_sdk_client.py --api chat --size 512x512 --steps 20 --negative " "

What OpenAI has no parameter for goes into `extra_body`. Ends with code 1 if there is no image.
"""

import argparse
import base64
import os
import sys
from pathlib import Path
from typing import Any

import openai


def draw_with_images(client: openai.OpenAI, args: argparse.Namespace) -> list[bytes]:
    answer = client.images.generate(
        model=args.model,
        prompt=args.prompt,
        n=args.num_images,
        size=args.size,
        response_format="b64_json",
        extra_body=parameters(args),
    )
    return [base64.b64decode(image.b64_json, validate=True) for image in answer.data]


def draw_with_chat(client: openai.OpenAI, args: argparse.Namespace) -> list[bytes]:
    answer = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": args.prompt}],
        extra_body={
            "size": args.size,
            "num_outputs_per_prompt": args.num_images,
            **parameters(args),
        },
    )
    # The package's types know text only: here it is a list of parts, each with an image.
    content: Any = answer.choices[0].message.content
    if not isinstance(content, list):
        raise ValueError(f"the answer is text: {content}")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    if not all(url.startswith("data:image/") for url in urls):
        raise ValueError("an image is not in the answer itself")
    return [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What OpenAI's APIs have no names for; None is left to the server."""
    values = {
        "num_inference_steps": args.steps,
        "true_cfg_scale": args.cfg_scale,
        "seed": args.seed,
        "negative_prompt": args.negative,
    }
    return {name: value for name, value in values.items() if value is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a prompt with the openai package.")
    parser.add_argument("--api", choices=["images", "chat"], default="images")
    parser.add_argument("--prompt", "-p", default="a cup of coffee on the table", help="what to draw")
    parser.add_argument("--output", "-o", type=Path, default=Path("qwen_image_output.png"))
    parser.add_argument("--server", "-s", default="http://localhost:8091", help="URL of the server")
    parser.add_argument("--model", default="Qwen/Qwen-Image")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="how strongly to steer")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--negative", help="what to steer away from")
    parser.add_argument("--num-images", "-n", type=int, default=1)
    parser.add_argument("--retries", type=int, default=2, help="after a full queue or a failure")
    args = parser.parse_args()

    client = openai.OpenAI(
        base_url=f"{args.server.rstrip('/')}/v1",
        # The package wants one, whether the server does or not.
        api_key=os.environ.get("API_KEY") or "none",
        max_retries=args.retries,
    )
    draw = {"images": draw_with_images, "chat": draw_with_chat}[args.api]
    try:
        files = draw(client, args)
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
