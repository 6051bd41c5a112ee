"""Tests a running `kiln serve` with the demo model behind the proxy of LiteLLM, asked by the openai package.

Usage: python test_litellm.py URL KEY LITELLM

LITELLM is the program of the package litellm on PyPI.
"""

import base64
import json
import sys
import tempfile
import time
from pathlib import Path

import openai
import requests

from support import data_url, free_port, png_size, running

SERVER, KEY, LITELLM = sys.argv[1:]
PROMPT = "a large red circle"
STEPS = {"num_inference_steps": 2}


def config() -> dict:
    """One model name for each API."""
    server = {"api_base": f"{SERVER}/v1", "api_key": KEY}
    models = {
        "image": {"model": "openai/demo"},
        # LiteLLM only reads answers whose content is a text.
        "chat": {"model": "openai/demo", "modalities": ["image", "text"]},
    }
    return {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {**parameters, **server},
                "model_info": {"mode": "chat" if name == "chat" else "image_generation"},
            }
            for name, parameters in models.items()
        ],
        "general_settings": {"master_key": "sk-proxy"},
    }


def models(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["chat", "image"]


def health(client: openai.OpenAI) -> None:
    """LiteLLM's check sends a request to each model."""
    url = str(client.base_url).replace("/v1/", "/health")
    answer = requests.get(url, headers={"Authorization": f"Bearer {client.api_key}"}, timeout=120).json()
    assert (answer["healthy_count"], answer["unhealthy_count"]) == (2, 0), answer


def images(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="image", prompt=PROMPT, n=2, size="96x64", extra_body=STEPS)
    files = [base64.b64decode(image.b64_json) for image in answer.data]
    assert [png_size(file) for file in files] == [(96, 64)] * 2
    # A literal `extra_body` in the request, which LiteLLM hands on.
    nested = {"extra_body": {**STEPS, "seed": 5, "size": "64x96"}}
    answers = [client.images.generate(model="image", prompt=PROMPT, extra_body=nested) for _ in range(2)]
    [first, second] = [base64.b64decode(answer.data[0].b64_json) for answer in answers]
    assert png_size(first) == (64, 96) and first == second, "the seed was not read"


def images_url(client: openai.OpenAI) -> None:
    """LiteLLM refuses `response_format` for images, but hands it on here."""
    nested = {"extra_body": {**STEPS, "response_format": "url"}}
    answer = client.images.generate(model="image", prompt=PROMPT, extra_body=nested)
    assert png_size(data_url(answer.data[0].url)) == (128, 128)


def chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": PROMPT}], temperature=0.5, max_tokens=10,
        extra_body={**STEPS, "size": "96x64", "n": 2, "top_k": 5},
    )
    message = answer.choices[0].message
    images = message.model_extra["images"]
    assert [png_size(data_url(image["image_url"]["url"])) for image in images] == [(96, 64)] * 2
    assert not message.content and answer.usage.total_tokens > 0


def chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": PROMPT}], stream=True,
        stream_options={"include_usage": True}, extra_body={**STEPS, "size": "512x512"},
    )
    text, images, finish, usage = "", [], None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            images += (choice.delta.model_extra or {}).get("images") or []
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert [png_size(data_url(image["image_url"]["url"])) for image in images] == [(512, 512)]
    assert text == "" and finish == "stop" and usage.total_tokens > 0, (text[:200], finish, usage)


def errors(client: openai.OpenAI) -> None:
    """An error keeps its status, and the message that names the value."""
    for call in [
        lambda: client.images.generate(model="image", prompt=PROMPT, size="17x4"),
        lambda: client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": PROMPT}], extra_body={"size": "17x4"}
        ),
    ]:
        try:
            call()
        except openai.BadRequestError as error:
            assert "height must be" in str(error), error
        else:
            raise AssertionError("no error")


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        # JSON is YAML.
        path.write_text(json.dumps(config()))
        command = [LITELLM, "--config", str(path), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        started = time.monotonic()
        with running(command, f"{url}/health/liveliness", LITELLM_LOCAL_MODEL_COST_MAP="True"):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-proxy", max_retries=0)
            print(f"LiteLLM has started ({time.monotonic() - started:.1f} s)")
            for test in [models, health, images, images_url, chat, chat_stream, errors]:
                started = time.monotonic()
                test(client)
                print(f"LiteLLM: {test.__name__} ok ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
