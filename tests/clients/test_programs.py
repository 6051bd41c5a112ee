"""Tests a running `kiln serve --enable-sdapi` with the demo model with the calls that Open WebUI, SillyTavern
and Dify make to generate images, and with the package webuiapi.

Usage: python test_programs.py URL KEY

The calls are those of Open WebUI 0.12.4 (open_webui/routers/images.py of the package on PyPI), of Dify's tool Stable
Diffusion (tools/stablediffusion of langgenius/dify-official-plugins), and of SillyTavern 1.19.0
(src/endpoints/stable-diffusion.js and public/scripts/extensions/stable-diffusion/index.js of the
package on npm). Names in parentheses are the functions that make the calls.
"""

import base64
import json
import sys
import threading
import time
import urllib.parse

import requests
import webuiapi

import support

SERVER, KEY = sys.argv[1:]
PROMPT = 'a large red "circle"\non a blue background 红'


def png_size(data: str) -> tuple[int, int]:
    return support.png_size(base64.b64decode(data, validate=True))


def basic(typed: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(typed.encode()).decode()}"}


def open_webui_openai() -> None:
    """The engine `openai` (image_generations). The models are built in, one of them is the default;
    requests for models named gpt-image-… have no response_format."""
    for model, size, settings in [
        ("dall-e-2", "512x512", {}),
        ("dall-e-3", "96x64", {"num_inference_steps": 2}),
        ("gpt-image-1", "auto", {"num_inference_steps": 2, "quality": "low"}),
        ("gpt-image-1.5", "96x64", {"num_inference_steps": 2}),
    ]:
        data = {"model": model, "prompt": PROMPT, "n": 2, "size": size}
        if not model.startswith("gpt-image"):
            data["response_format"] = "b64_json"
        if not settings:
            settings = {"num_inference_steps": 1}
        answer = requests.post(
            f"{SERVER}/v1/images/generations",
            json={**data, **settings},
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        answer.raise_for_status()
        images = answer.json()["data"]
        # Open WebUI fetches a url if there is one, and otherwise uses b64_json.
        assert len(images) == 2 and not any(image.get("url") for image in images), answer.json()
        expected = (128, 128) if size == "auto" else tuple(map(int, size.split("x")))
        assert [png_size(image["b64_json"]) for image in images] == [expected] * 2


def open_webui_automatic1111() -> None:
    """The engine `automatic1111`, with two values of the setting AUTOMATIC1111_API_AUTH."""
    for typed in [f"kiln:{KEY}", KEY]:
        headers = {"authorization": basic(typed)["Authorization"]}
        options = f"{SERVER}/sdapi/v1/options"
        # The button beside the address (verify_connection).
        requests.get(options, headers=headers).raise_for_status()
        # The list of models (get_models), and the one in use (get_image_model).
        models = requests.get(f"{SERVER}/sdapi/v1/sd-models", headers=headers).json()
        choices = [{"id": model["title"], "name": model["model_name"]} for model in models]
        assert choices == [{"id": "demo", "name": "demo"}], choices
        current = requests.get(options, headers=headers).json()
        assert current["sd_model_checkpoint"] == "demo"
        # Choosing a model (set_image_model) sends all options back.
        chosen = {**current, "sd_model_checkpoint": "left over from another engine"}
        requests.post(options, json=chosen, headers=headers).raise_for_status()
        # An image request of a chat (image_generations): with the default settings except the
        # steps, and with every setting.
        everything = {"steps": 2, "negative_prompt": "", "cfg_scale": 4, "sampler_name": "Euler a"}
        for size, count, extra in [(512, 1, {"steps": 1}), (64, 2, everything)]:
            data = {"prompt": PROMPT, "batch_size": count, "width": size, "height": size}
            answer = requests.post(
                f"{SERVER}/sdapi/v1/txt2img", json={**data, **extra}, headers=headers
            ).json()
            assert [png_size(image) for image in answer["images"]] == [(size, size)] * count
            # Open WebUI stores `info` with the file.
            assert json.loads(answer["info"])["prompt"] == PROMPT
    # Version 0.6 shows the value of this key.
    refused = requests.post(
        f"{SERVER}/sdapi/v1/txt2img", json={"prompt": "", "width": 1}, headers=basic(KEY)
    ).json()
    assert "width" in refused["error"]["message"], refused
    assert requests.get(options, headers=basic("")).status_code == 401


class SillyTavern:
    """The source "Stable Diffusion Web UI (AUTOMATIC1111)", named `auto`."""

    def __init__(self, typed: str) -> None:
        self.auth = typed
        self.headers = basic(typed)

    def get(self, path: str):
        answer = requests.get(f"{SERVER}/sdapi/v1/{path}", headers=self.headers)
        # SillyTavern checks `ok` of the response.
        assert answer.ok, answer.text
        return answer.json()

    def connect(self) -> None:
        """validateAutoUrl, then loadSettingOptions."""
        self.get("options")
        assert [sampler["name"] for sampler in self.get("samplers")] == ["Euler"]
        assert self.get("options")["sd_model_checkpoint"] == "demo"
        assert [model["title"] for model in self.get("sd-models")] == ["demo"]
        upscalers = [upscaler["name"] for upscaler in self.get("upscalers")]
        upscalers[1:1] = [mode["name"] for mode in self.get("latent-upscale-modes")]
        assert upscalers == ["None"]
        assert [scheduler["name"] for scheduler in self.get("schedulers")] == ["automatic"]
        assert [vae["model_name"] for vae in self.get("sd-vae")] == []
        # Requested at the same time; only Forge has this route.
        assert requests.get(f"{SERVER}/sdapi/v1/sd-modules", headers=self.headers).status_code == 404

    def choose_model(self) -> None:
        """onModelChange."""
        chosen = {"sd_model_checkpoint": "demo"}
        answer = requests.post(f"{SERVER}/sdapi/v1/options", json=chosen, headers=self.headers)
        assert answer.ok, answer.text
        progress = self.get("progress")
        assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0, progress

    def generate(self, **settings) -> requests.Response:
        """generateAutoImage with the default settings, then /generate."""
        assert "forge_preset" not in self.get("options")
        body = {
            "url": SERVER,
            "auth": self.auth,
            "prompt": PROMPT,
            "negative_prompt": "lowres, bad anatomy",
            "sampler_name": "DDIM",
            "scheduler": "normal",
            "steps": 20,
            "cfg_scale": 7,
            "width": 512,
            "height": 512,
            "restore_faces": False,
            "enable_hr": False,
            "hr_upscaler": "Latent",
            "hr_scale": 1,
            "hr_additional_modules": [],
            "denoising_strength": 0.7,
            "hr_second_pass_steps": 0,
            "override_settings": {"CLIP_stop_at_last_layers": 1},
            "override_settings_restore_afterwards": True,
            "clip_skip": 1,
            "save_images": True,
            "send_images": True,
            "do_not_save_grid": False,
            "do_not_save_samples": False,
            **settings,
        }
        return requests.post(f"{SERVER}/sdapi/v1/txt2img", json=body, headers=self.headers)

    def generate_and_abort(self) -> None:
        """The user aborts: SillyTavern's server sends an interrupt."""
        answers = []
        thread = threading.Thread(target=lambda: answers.append(self.generate(steps=1000)))
        thread.start()
        progress = self.get("progress")
        while not progress["current_image"]:
            assert thread.is_alive(), answers
            time.sleep(0.02)
            progress = self.get("progress")
        assert 0 < progress["progress"] < 1 and progress["eta_relative"] > 0, progress
        png_size(progress["current_image"])
        requests.post(f"{SERVER}/sdapi/v1/interrupt", headers=self.headers).raise_for_status()
        thread.join(timeout=60)
        assert [answer.status_code for answer in answers] == [409], answers
        assert self.get("progress")["state"]["job_count"] == 0


def silly_tavern() -> None:
    program = SillyTavern(f"kiln:{KEY}")
    program.connect()
    program.choose_model()
    answer = program.generate(steps=2, seed=7)
    assert answer.ok, answer.text
    # SillyTavern shows the first image, as PNG.
    assert png_size(answer.json()["images"][0]) == (512, 512)
    assert answer.json()["parameters"]["seed"] == 7
    # ADetailer, an extension of the web UI, is not supported.
    scripts = {"ADetailer": {"args": [True, True, {"ad_model": "face_yolov8n.pt"}]}}
    refused = program.generate(alwayson_scripts=scripts)
    assert refused.status_code == 400 and "alwayson_scripts" in refused.json()["detail"]
    program.generate_and_abort()


def dify() -> None:
    """The tool Stable Diffusion: bodies of JSON without a Content-Type, and its own parameters beside those of the
    web UI. It has no setting for a key, but its HTTP client reads one in the URL."""
    url = SERVER.replace("://", f"://kiln:{KEY}@") + "/sdapi/v1"

    def post(path: str, body: dict) -> requests.Response:
        answer = requests.post(f"{url}/{path}", data=json.dumps(body))
        assert "Content-Type" not in answer.request.headers
        return answer

    # The choices of the parameters, and the check of the settings.
    models = requests.get(f"{url}/sd-models").json()
    assert [model["model_name"] for model in models] == ["demo"]
    assert [sampler["name"] for sampler in requests.get(f"{url}/samplers").json()] == ["Euler"]
    off = ["subseed_strength", "refiner_switch_at", "firstphase_width", "firstphase_height", "hr_resize_x"]
    off += ["hr_resize_y", "hr_second_pass_steps"]
    body = {
        **{key: 0 for key in off},
        **{key: -1 for key in ["seed", "subseed", "seed_resize_from_h", "seed_resize_from_w"]},
        **{key: "" for key in ["refiner_checkpoint", "hr_prompt", "hr_negative_prompt"]},
        **{key: False for key in ["do_not_save_samples", "do_not_save_grid", "disable_extra_networks"]},
        **{"enable_hr": False, "hr_scale": 2, "script_args": [], "alwayson_scripts": {}},
        **{"send_images": True, "save_images": False, "batch_size": 1, "n_iter": 1, "cfg_scale": 7},
        **{"override_settings_restore_afterwards": True, "sampler_name": "DPM++ 2M"},
        # The tool's own parameters, with its defaults but for the size and the steps.
        **{"prompt": PROMPT, "negative_prompt": "bad art, ugly, deformed", "steps": 2, "width": 96, "height": 64},
    }
    for model in ["", "demo"]:
        assert post("options", {"sd_model_checkpoint": model or "demo"}).status_code == 200
        chosen = {"model": model, "lora": "", "override_settings": {"sd_model_checkpoint": model}}
        answer = post("txt2img", {**body, **chosen})
        assert answer.status_code == 200, answer.text
        [image] = answer.json()["images"]
        assert png_size(image) == (96, 64)
    refused = post("txt2img", {**body, "lora": "<lora:style:1>"})
    assert refused.status_code == 400 and "lora" in refused.json()["detail"], refused.text


def webuiapi_package() -> None:
    """A client that sends every field that the web UI has."""
    url = urllib.parse.urlsplit(SERVER)
    api = webuiapi.WebUIApi(host=url.hostname, port=url.port, username="kiln", password=KEY)
    result = api.txt2img(
        prompt=PROMPT, negative_prompt="blurry", steps=2, width=96, height=64, seed=5, batch_size=2
    )
    assert [image.size for image in result.images] == [(96, 64)] * 2
    assert result.info["all_seeds"] == [5, 5], result.info
    assert api.util_get_model_names() == ["demo"]
    api.util_set_model("demo")
    assert api.util_get_current_model() == "demo"
    assert api.get_progress()["state"]["job_count"] == 0
    try:
        api.txt2img(prompt=PROMPT, steps=0)
    except RuntimeError as error:
        assert "num_inference_steps must be" in str(error), error
    else:
        raise AssertionError("no error")


def main() -> None:
    for test in [open_webui_openai, open_webui_automatic1111, silly_tavern, dify, webuiapi_package]:
        started = time.monotonic()
        test()
        print(f"programs: {test.__name__} ok ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
