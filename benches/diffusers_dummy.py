"""Times diffusers with random weights, for comparison with `kiln bench --load-format dummy`.

    python benches/diffusers_dummy.py                                  # Qwen-Image's shape in bf16, on CUDA
    python benches/diffusers_dummy.py --model models/demo --device cpu # a folder's shape, configurations only

The workload is that of `kiln bench` with the same options: one prompt of `--prompt-tokens` tokens, a blank
negative prompt with guidance, one warm-up run, then medians over the other runs, with the device
synchronised after each stage. diffusers runs with its defaults: no compilation, attention by torch's
scaled_dot_product_attention. Prints JSON with the names of `kiln bench --json`. Needs torch, diffusers and
transformers, and no network, as token ids are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

QWEN_IMAGE = Path(__file__).parent.parent / "src" / "checkpoint" / "qwen_image"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Number of tokens that the pipeline drops from every prompt, and number that a blank prompt keeps.
TEMPLATE_TOKENS_DROPPED = 34
NEGATIVE_PROMPT_TOKENS = 6
# The vision tower is not used, so it is minimal.
VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, fullatt_block_indexes=[0], window_size=8)
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip


def read(path: Path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}


def text_encoder(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    config = read(folder / "text_encoder" / "config.json")
    config = config.get("text_config", config)
    rope = config.get("rope_parameters") or config["rope_scaling"]
    text = {key: config[key] for key in TEXT_KEYS}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "mrope_section": rope["mrope_section"],
    }
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


class RandomTokens:
    """Replaces the tokenizer: returns random ids, of a number that does not depend on the text."""

    def __init__(self, vocab_size: int, prompt_tokens: int) -> None:
        self.vocab_size = vocab_size
        self.kept = {"prompt": prompt_tokens, "blank": NEGATIVE_PROMPT_TOKENS}

    def __call__(self, texts: list[str], **_: object) -> SimpleNamespace:
        (text,) = texts
        kept = next(kept for word, kept in self.kept.items() if word in text)
        ids = torch.randint(self.vocab_size, (1, TEMPLATE_TOKENS_DROPPED + kept))
        batch = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        batch.to = lambda device: SimpleNamespace(
            input_ids=ids.to(device), attention_mask=batch.attention_mask.to(device)
        )
        return batch


def pipeline(args: argparse.Namespace) -> QwenImagePipeline:
    folder = args.model
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[args.dtype])
    with torch.device(args.device):
        parts = dict(
            text_encoder=text_encoder(folder),
            transformer=QwenImageTransformer2DModel.from_config(read(folder / "transformer" / "config.json")),
            vae=AutoencoderKLQwenImage.from_config(read(folder / "vae" / "config.json")),
        )
    torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(read(folder / "scheduler" / "scheduler_config.json"))
    for module in parts.values():
        module.eval()
    pipe = QwenImagePipeline(scheduler=scheduler, tokenizer=None, **parts)
    pipe.prompt_template_encode = "{}"
    vocab_size = parts["text_encoder"].config.text_config.vocab_size
    object.__setattr__(pipe, "tokenizer", RandomTokens(vocab_size, args.prompt_tokens))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Clock:
    """Measures the seconds of each stage of the pipeline's calls."""

    def __init__(self, pipe: QwenImagePipeline, device: str) -> None:
        self.device = device
        self.encode = self.decode = 0.0
        self.steps: list[float] = []
        self.step_began: float | None = None
        pipe.encode_prompt = self.timed(pipe.encode_prompt, "encode")
        pipe.vae.decode = self.timed(pipe.vae.decode, "decode")
        pipe.transformer.register_forward_pre_hook(self.transformer_begins)

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, stage: str):
        def wrapper(*args, **kwargs):
            began = self.now()
            result = function(*args, **kwargs)
            setattr(self, stage, getattr(self, stage) + self.now() - began)
            return result

        return wrapper

    def transformer_begins(self, *_: object) -> None:
        # With guidance a step has two forwards; the first one begins the step.
        if self.step_began is None:
            self.step_began = self.now()

    def step_ends(self, _pipe, _index, _timestep, values: dict) -> dict:
        self.steps.append(self.now() - self.step_began)
        self.step_began = None
        return values

    def take(self) -> dict:
        total = self.encode + sum(self.steps) + self.decode
        run = {"encode": self.encode, "steps": self.steps, "decode": self.decode, "total": total}
        self.encode = self.decode = 0.0
        self.steps = []
        return run


def generate(pipe: QwenImagePipeline, clock: Clock, args: argparse.Namespace, run: int) -> dict:
    width, height = args.size
    with torch.no_grad():
        pipe(
            prompt="prompt",
            negative_prompt="blank" if args.cfg > 1 else None,
            true_cfg_scale=args.cfg,
            height=height,
            width=width,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.batch,
            generator=torch.Generator("cpu").manual_seed(run),
            output_type="pt",
            callback_on_step_end=clock.step_ends,
        )
    return clock.take()


def peak_memory(device: str) -> int | None:
    if device != "cpu":
        return torch.cuda.max_memory_reserved()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=QWEN_IMAGE, help="folder with the model's configurations")
    parser.add_argument("--size", type=size, default=(1024, 1024), metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale; no guidance at 1 and below")
    parser.add_argument("--batch", type=int, default=1, help="images of one prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    args = parser.parse_args()

    began = time.perf_counter()
    pipe = pipeline(args)
    clock = Clock(pipe, args.device)
    load_seconds = clock.now() - began
    warm_up, *runs = [generate(pipe, clock, args, run) for run in range(args.runs + 1)]
    median = {stage: statistics.median(run[stage] for run in runs) for stage in ("encode", "decode", "total")}
    median["step"] = statistics.median(seconds for run in runs for seconds in run["steps"])
    report = {
        "versions": {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": str(args.model),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": args.dtype,
        "width": args.size[0],
        "height": args.size[1],
        "images": args.batch,
        "num_inference_steps": args.steps,
        "guidance": args.cfg > 1,
        "prompt_tokens": args.prompt_tokens,
        "load_seconds": load_seconds,
        "warm_up": warm_up,
        "runs": runs,
        "median_seconds": median,
        "peak_memory_bytes": peak_memory(args.device),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
