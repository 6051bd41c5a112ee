"""Tests the official openai package with a running `kiln serve` with the demo model.

Usage: python test_openai.py URL KEY KILN
"""

import base64
import hashlib
import subprocess
import sys
import threading
import urllib.request
import warnings

import openai

from support import data_url, free_port, png_size


def chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "a large red circle on a blue background"}],
        extra_body={
            "height": 64,
            "width": 96,
            "num_inference_steps": 8,
            "cache": {"mode": "dbcache", "max_warmup_steps": 2},
            "cfg_gate_step": 0.5,
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
    assert answer.model_extra["cache"] == "dbcache"
    assert answer.model_extra["computed_steps"] + answer.model_extra["skipped_steps"] == 8
    assert answer.model_extra["gated_steps"] == 4


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


def images_forms(client: openai.OpenAI) -> None:
    """Forms of parameters that clients send: URLs as in DALL-E's API, the seed -1, sizes."""
    small = {"num_inference_steps": 1}
    answer = client.images.generate(
        model="dall-e-3", prompt="a square", response_format="url", size="96x64", extra_body=small
    )
    assert answer.data[0].b64_json is None
    assert png_size(data_url(answer.data[0].url)) == (96, 64)
    # The package downloads nothing, but urllib and browsers read such a URL.
    assert png_size(urllib.request.urlopen(answer.data[0].url).read()) == (96, 64)
    seeds = set()
    for _ in range(2):
        answer = client.images.generate(
            model="demo", prompt="a square", size="64x64", extra_body={**small, "seed": -1}
        )
        seeds.add(answer.model_extra["seed"])
    assert len(seeds) == 2 and min(seeds) >= 0, seeds
    for size in ["96x64", "96X64", "96*64", "96×64"]:
        answer = client.images.generate(model="demo", prompt="a square", size=size, extra_body=small)
        assert (answer.size, png_size(base64.b64decode(answer.data[0].b64_json))) == ("96x64", (96, 64))
    for size in ["", "AUTO", "auto"]:
        answer = client.images.generate(model="demo", prompt="a square", size=size, extra_body=small)
        assert answer.size == "128x128", answer.size
    jpeg = client.images.generate(model="demo", prompt="a square", output_format="JPEG", extra_body=small)
    assert base64.b64decode(jpeg.data[0].b64_json).startswith(b"\xff\xd8\xff")
    nested = {"extra_body": {**small, "seed": 7}}
    assert client.images.generate(model="demo", prompt="a", extra_body=nested).model_extra["seed"] == 7


def chat_stream_helper(client: openai.OpenAI) -> None:
    """The package's `stream`, which joins the chunks, and writes what does not fit its types as warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with client.chat.completions.stream(
            model="demo",
            messages=[{"role": "user", "content": "a green square"}],
            extra_body={"num_inference_steps": 2, "n": 2},
        ) as stream:
            for event in stream:
                str(event)
            answer = stream.get_final_completion()
        answer.model_dump_json()
    message = answer.choices[0].message
    assert not message.content and answer.choices[0].finish_reason == "stop"
    images = message.model_extra["images"]
    assert [png_size(data_url(image["image_url"]["url"])) for image in images] == [(128, 128)] * 2


def chat_text(client: openai.OpenAI) -> None:
    """Clients for which the content of an answer is a text ask for one."""
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "a green square"}],
        modalities=["image", "text"],
        extra_body={"num_inference_steps": 1},
    )
    message = answer.choices[0].message
    assert message.content == ""
    assert png_size(data_url(message.model_extra["images"][0]["image_url"]["url"])) == (128, 128)


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


def retries(client: openai.OpenAI) -> None:
    """The package sends a request again while a server starts, and while its queue is full."""
    port = free_port()
    command = [sys.argv[3], "serve", "--port", str(port), "--max-queue", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    patient = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)

    def generate(steps: int) -> None:
        answer = patient.images.generate(
            model="demo", prompt="a square", size="64x64", extra_body={"num_inference_steps": steps}
        )
        sizes.append(png_size(base64.b64decode(answer.data[0].b64_json)))

    sizes: list[tuple[int, int]] = []
    try:
        generate(1)
        threads = [threading.Thread(target=generate, args=[20]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert sizes == [(64, 64)] * 7, sizes


def models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "stripes"]
    assert client.models.retrieve("demo").id == "demo"
    assert client.models.retrieve("stripes").model_extra["parent"] == "demo"


def adapters(client: openai.OpenAI) -> None:
    """The demo's adapter by its name as a model, in `loras`, and without it."""

    def image(model: str, **fields) -> str:
        body = {"num_inference_steps": 4, "seed": 1, **fields}
        answer = client.images.generate(model=model, prompt="a red circle", size="128x128", extra_body=body)
        return answer.data[0].b64_json

    base, adapted = image("demo"), image("stripes")
    assert base != adapted
    assert image("demo", loras=[{"name": "stripes", "scale": 0.5}]) not in (base, adapted)
    assert image("demo") == base


def jobs(client: openai.OpenAI) -> None:
    """Durable jobs, by the package's methods for routes that it does not know."""
    body = {"model": "demo", "prompt": "a large red circle", "size": "96x64", "num_inference_steps": 4, "n": 2}
    options = {"headers": {"Idempotency-Key": "openai-jobs"}}
    job = client.post("/images/jobs", body=body, options=options, cast_to=object)
    assert job["object"] == "image.job" and job["status"] in ("queued", "in_progress"), job
    again = client.post("/images/jobs", body=body, options=options, cast_to=object)
    assert (again["id"], again["seed"]) == (job["id"], job["seed"])
    path = f"/images/jobs/{job['id']}"
    while job["status"] not in ("completed", "failed", "cancelled"):
        job = client.get(f"{path}?wait=30", cast_to=object)
    assert (job["status"], job["progress"], job["error"]) == ("completed", 100, None), job
    files = [
        client.get(f"{path}/content?index={index}", cast_to=openai.HttpxBinaryResponseContent).content
        for index in range(2)
    ]
    assert [png_size(file) for file in files] == [(96, 64)] * 2
    assert [file["sha256"] for file in job["files"]] == [hashlib.sha256(file).hexdigest() for file in files]
    # The same request, generated at once, gives the same files.
    direct = client.images.generate(
        model="demo", prompt="a large red circle", size="96x64", n=2,
        extra_body={"num_inference_steps": 4, "seed": job["seed"]},
    )
    assert [base64.b64decode(image.b64_json) for image in direct.data] == files

    stranger = client.with_options(api_key="other-key")
    for call in [
        lambda: stranger.get(path, cast_to=object),
        lambda: client.get("/images/jobs/job-00c0ffee00c0ffee00c0ffee", cast_to=object),
    ]:
        try:
            call()
            raise AssertionError("not refused")
        except openai.NotFoundError as error:
            assert "no job" in error.message
    try:
        client.post("/images/jobs", body={**body, "n": 1}, options=options, cast_to=object)
        raise AssertionError("not refused")
    except openai.UnprocessableEntityError as error:
        assert error.param == "Idempotency-Key", error

    raw = client.images.with_raw_response.generate(
        model="demo", prompt="a square", extra_headers={"Prefer": "respond-async"},
        extra_body={"num_inference_steps": 1},
    )
    assert raw.status_code == 202 and raw.headers["preference-applied"] == "respond-async"
    path = raw.headers["location"].removeprefix("/v1")
    assert client.get(f"{path}?wait=30", cast_to=object)["status"] == "completed"
    assert client.delete(path, cast_to=object)["deleted"] is True
    listed = client.get("/images/jobs?limit=100", cast_to=object)
    assert job["id"] in [entry["id"] for entry in listed["data"]] and listed["object"] == "list"


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
    for test in [
        chat,
        chat_stream,
        chat_stream_helper,
        chat_text,
        images,
        images_forms,
        images_stream,
        retries,
        models,
        adapters,
        jobs,
        errors,
    ]:
        test(client)
        print(f"openai {openai.__version__}: {test.__name__} ok")


if __name__ == "__main__":
    main()
