"""Tests the programs in examples/ with a running `kiln serve` with the demo model, and with a fake
server whose responses have the form of vLLM-Omni's.

Usage: python test_examples.py URL KEY KILN
"""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gradio_client

from reference_server import MESSAGES, ReferenceServer
from support import free_port, png_size, variables, wait_for

EXAMPLES = Path(__file__).parents[2] / "examples"
KILN_URL, KEY, KILN = sys.argv[1:]

# Characters that break programs that insert a prompt into other text without escaping it.
PROMPT = "a \"large\" red 'circle'\non $HOME `blue` \\n {background} 红色的圆"
NEGATIVE = "a \"small\" 'square'\n模糊"

CURL = [str(EXAMPLES / "run_curl_text_to_image.sh")]
CHAT = [sys.executable, str(EXAMPLES / "openai_chat_client.py")]
SDK_IMAGES = [sys.executable, str(EXAMPLES / "openai_sdk_client.py"), "--retries", "0"]
SDK_CHAT = [*SDK_IMAGES, "--api", "chat"]


def environment(url: str, **others: str) -> dict[str, str]:
    return variables(API_KEY=KEY, SERVER=url, **others)


def run(program: list[str], url: str, folder: Path, count: int) -> subprocess.CompletedProcess:
    """Runs a program that generates `count` small images into out.png in the folder."""
    others = {}
    arguments = ["--prompt", PROMPT, "--negative", NEGATIVE, "--output", "out.png"]
    arguments += ["--server", url, "--steps", "2", "--seed", "7", "--num-images", str(count)]
    if program is CURL:
        others = {"PROMPT": PROMPT, "NEGATIVE_PROMPT": NEGATIVE, "OUTPUT": "out.png", "SEED": "7"}
        others |= {"HEIGHT": "64", "WIDTH": "96", "STEPS": "2", "NUM_IMAGES": str(count)}
        arguments = []
    elif program is CHAT:
        arguments += ["--height", "64", "--width", "96"]
    else:
        arguments += ["--size", "96x64"]
    return subprocess.run(
        [*program, *arguments],
        env=environment(url, **others),
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def images_are_saved(program: list[str], url: str) -> None:
    for count, expected in [(1, ["out.png"]), (3, ["out-0.png", "out-1.png", "out-2.png"])]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            done = run(program, url, folder, count)
            assert done.returncode == 0, done
            assert names(folder) == expected, (names(folder), done)
            files = [(folder / name).read_bytes() for name in expected]
            assert [png_size(file) for file in files] == [(96, 64)] * count
            assert len(set(files)) == count, "the files are the same"
            for name in expected:
                assert f"Image saved to: {name}" in done.stdout, done
            if url == KILN_URL:
                # The file has the prompt in its metadata.
                assert all(PROMPT.encode() in file for file in files), "another prompt"


def errors_are_printed(program: list[str], reference: ReferenceServer) -> None:
    for mode in [429, 500, "text"]:
        reference.mode = mode
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            done = run(program, reference.url, folder, 1)
            assert done.returncode == 1, done
            assert names(folder) == [], names(folder)
            message = MESSAGES[mode] if isinstance(mode, int) else ""
            assert "Error: " in done.stderr and message in done.stderr, done
    reference.mode = "images"
    with tempfile.TemporaryDirectory() as name:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = run(program, url, Path(name), 1)
        assert done.returncode == 1 and "Error: " in done.stderr, done
        assert names(Path(name)) == [], done


def requests_have_the_expected_form(program: list[str], reference: ReferenceServer) -> None:
    reference.bodies.clear()
    images_are_saved(program, reference.url)
    body = reference.bodies[-1]
    if program is SDK_IMAGES:
        assert (body["prompt"], body["n"], body["size"]) == (PROMPT, 3, "96x64"), body
        parameters = body
    else:
        assert body["messages"] == [{"role": "user", "content": PROMPT}], body
        parameters = body if program is SDK_CHAT else body["extra_body"]
        assert parameters["num_outputs_per_prompt"] == 3, body
    assert parameters["negative_prompt"] == NEGATIVE, body
    assert (parameters["num_inference_steps"], parameters["seed"]) == (2, 7), body


def defaults_are_those_of_the_reference(reference: ReferenceServer) -> None:
    """The requests and file names of programs that are run without arguments."""
    common = {"height": 1024, "width": 1024, "true_cfg_scale": 4.0, "seed": 42}
    common["num_outputs_per_prompt"] = 1
    for program, prompt, steps, output in [
        (CURL, "a good boy in the ocean", 100, "qwen_image_output_2"),
        (CHAT, "a cup of coffee on the table", 50, "qwen_image_output.png"),
    ]:
        with tempfile.TemporaryDirectory() as name:
            server = ["--server", reference.url] if program is CHAT else []
            done = subprocess.run(
                [*program, *server], env=environment(reference.url), cwd=name, capture_output=True
            )
            assert done.returncode == 0, done
            [file] = names(Path(name))
            assert file.startswith(output) and file.endswith(".png"), file
        assert reference.bodies[-1] == {
            "messages": [{"role": "user", "content": prompt}],
            "extra_body": {**common, "num_inference_steps": steps},
        }


def server_script() -> None:
    script = str(EXAMPLES / "run_server.sh")
    for arguments, model in [([], "demo"), (["--model", "demo"], "no/such-model")]:
        port = free_port()
        process = subprocess.Popen(
            [script, "--no-warm-up", *arguments],
            env=environment("", KILN=KILN, MODEL=model, PORT=str(port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        wait_for(f"http://127.0.0.1:{port}/health", process)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
        assert process.returncode == 0, process.returncode
        assert f"Port: {port}" in stdout, stdout
    without = subprocess.run([script], env=environment("", KILN="no-such-kiln"), capture_output=True)
    assert without.returncode == 127 and b"no-such-kiln" in without.stderr, without


def gradio_demo(reference: ReferenceServer) -> None:
    for url in [KILN_URL, reference.url]:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "gradio_demo.py"), "--server", url, "--port", str(port)],
            env=environment(url),
            stdout=subprocess.DEVNULL,
        )
        try:
            page = f"http://127.0.0.1:{port}"
            wait_for(page, process)
            client = gradio_client.Client(page, verbose=False)
            request = dict(prompt=PROMPT, negative_prompt=NEGATIVE, height=256, width=320, steps=10)
            request |= dict(cfg_scale=1.0, seed=-1, api_name="/generate")
            result = client.predict(**request)
            path = result["path"] if isinstance(result, dict) else result
            assert png_size(Path(path).read_bytes()) == (320, 256)
            if url == reference.url:
                body = reference.bodies[-1]
                assert body["messages"][0]["content"] == PROMPT, body
                assert "seed" not in body["extra_body"], body
                reference.mode = 429
                try:
                    client.predict(**request)
                except gradio_client.exceptions.AppError as error:
                    assert MESSAGES[429] in str(error), error
                else:
                    raise AssertionError("no error")
                reference.mode = "images"
        finally:
            process.terminate()
            process.wait(timeout=60)


def main() -> None:
    reference = ReferenceServer()
    for name, program in [
        ("run_curl_text_to_image.sh", CURL),
        ("openai_chat_client.py", CHAT),
        ("openai_sdk_client.py", SDK_IMAGES),
        ("openai_sdk_client.py --api chat", SDK_CHAT),
    ]:
        started = time.monotonic()
        images_are_saved(program, KILN_URL)
        requests_have_the_expected_form(program, reference)
        errors_are_printed(program, reference)
        print(f"examples: {name} ok ({time.monotonic() - started:.1f} s)")
    defaults_are_those_of_the_reference(reference)
    print("examples: defaults ok")
    server_script()
    print("examples: run_server.sh ok")
    started = time.monotonic()
    gradio_demo(reference)
    print(f"examples: gradio_demo.py ok ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
