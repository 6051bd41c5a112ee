"""Tests the official openai package with a running `kiln serve` with the demo model.

Usage: python test_openai.py URL KEY
"""

import base64
import struct
import sys

import openai


def png_size(file: bytes) -> tuple[int, int]:
    assert file.startswith(b"\x89PNG"), file[:16]
    return struct.unpack(">II", file[16:24])


def data_url(url: str) -> bytes:
    head, data = url.split(",", 1)
    assert head == "data:image/png;base64", head
    return base64.b64decode(data)


def chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "a large red circle on a blue background"}],
        extra_body={
            "height": 64,
            "width": 96,
            "num_inference_steps": 4,
            "true_cfg_scale": 4.0,
            "negative_prompt": " ",
            "seed": 42,
            "num_outputs_per_prompt": 2,
        },
    )
    parts = answer.choices[0].message.content
    assert len(parts) == 2
    for part in parts:
        assert png_size(data_url(part["image_url"]["url"])) == (96, 64)
    images = answer.choices[0].message.model_extra["images"]
    assert [image["image_url"] for image in images] == [part["image_url"] for part in parts]
    assert answer.usage.prompt_tokens > 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["seed"] == 42
    assert answer.model_extra["size"] == "96x64"


def chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [{"type": "text", "text": "a green square"}]}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"num_inference_steps": 4, "preview_every": 2},
    )
    stages, parts, text, finish, usage = [], [], "", None, None
    for chunk in stream:
        progress = (chunk.model_extra or {}).get("progress")
        if progress:
            stages.append(progress["stage"])
        for choice in chunk.choices:
            text += choice.delta.content or ""
            parts += (choice.delta.model_extra or {}).get("images", [])
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert stages[0] == "queued", stages
    assert stages.count("step") == 4, stages
    assert stages.count("preview") == 1, stages
    assert [png_size(data_url(part["image_url"]["url"])) for part in parts] == [(128, 128)]
    assert text == ""
    assert finish == "stop"
    assert usage.completion_tokens == 64


def images(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="demo",
        prompt="a small yellow square on a purple background",
        n=2,
        size="auto",
        quality="low",
        background="opaque",
        user="tests",
        extra_body={"num_inference_steps": 4, "seed": 1},
    )
    assert [png_size(base64.b64decode(image.b64_json)) for image in answer.data] == [(128, 128)] * 2
    assert answer.size == "128x128"
    assert answer.usage.output_tokens == 128
    webp = client.images.generate(
        model="demo", prompt="a square", output_format="webp", output_compression=80,
        size="96x64", extra_body={"num_inference_steps": 1},
    )
    assert base64.b64decode(webp.data[0].b64_json).startswith(b"RIFF")


def images_stream(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        model="demo", prompt="a white triangle", stream=True, partial_images=2,
        extra_body={"num_inference_steps": 6},
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    for event in events:
        png_size(base64.b64decode(event.b64_json))
    assert events[-1].usage.output_tokens == 64


def models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def errors(client: openai.OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], call) -> openai.APIStatusError:
        try:
            call()
        except kind as error:
            return error
        raise AssertionError(f"not a {kind.__name__}")

    error = refused(
        openai.BadRequestError,
        lambda: client.images.generate(model="demo", prompt="a cat", size="17x4"),
    )
    assert error.param == "size" and error.status_code == 400, error
    error = refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "a cat"}],
            extra_body={"height": 64, "extra_body": {"height": 32}},
        ),
    )
    assert error.param == "height", error
    refused(openai.NotFoundError, lambda: client.models.retrieve("other"))
    stranger = client.with_options(api_key="wrong")
    refused(openai.AuthenticationError, lambda: stranger.models.list())


def main() -> None:
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0)
    for test in [chat, chat_stream, images, images_stream, models, errors]:
        test(client)
        print(f"openai {openai.__version__}: {test.__name__} ok")


if __name__ == "__main__":
    main()
