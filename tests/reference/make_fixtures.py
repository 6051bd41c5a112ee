"""Creates the small Qwen-Image checkpoints and the reference stages of the parity tests.

Needs the pinned versions in requirements.txt (torch 2.15.0, diffusers 0.42.1, transformers 5.23.0);
other versions may round differently. CPU only, no network, about ten seconds:

    python tests/reference/make_fixtures.py [--out tests/fixtures] [--only CASE ...]

Every checkpoint is built from diffusers' and transformers' classes with random weights, saved in the
layout of the Hub, loaded again with `QwenImagePipeline.from_pretrained` and run unmodified; hooks record
the stages. Every tensor affects the image: norm weights are near but not equal to 1, and biases are not
0, so a tensor that is read wrongly changes the image.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

Tensors = dict[str, torch.Tensor]

# ---------------------------------------------------------------------------------------------
# Tokenizer: 256 byte symbols, a few merges learned from the sentences below, special tokens.

SENTENCES = [
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
    "system\n", "user\n", "assistant\n",
    "A red fox in the snow, watercolor painting with soft light and a quiet mood",
    "an old town in the rain at night, neon signs, reflections on the street, highly detailed",
    "The cat's hat isn't blurry; there are 12 birds over the sea.",
    "雪中的红狐，水彩画，柔和的光线，宁静的气氛", "红色的灯笼，安静的小街，中国水墨画的风格",
    "红狐，红狐，水彩，小街，小街，安静，雪，雪，中，中，A photo of the image, in the style of, with the",
]  # fmt: skip
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
PLAIN_ADDED_TOKENS = ["<tool_call>", "</tool_call>"]
MERGES = 120


def byte_symbols() -> list[str]:
    """The 256 byte symbols of GPT-2's alphabet in vocabulary order: printable bytes first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(sentences: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: merges the most frequent pair, the smallest one of equals, `count` times."""
    splitter = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    words = [list(piece) for text in sentences for piece, _ in splitter.pre_tokenize_str(text)]
    merges = []
    for _ in range(count):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def write_tokenizer(folder: Path, single_file: bool) -> dict[str, int]:
    """Writes the tokenizer with the files of the Hub (vocab.json, merges.txt and others), or as one
    tokenizer.json with its config. Returns the ids of the added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    assert sorted(symbols) == sorted(ByteLevel.alphabet())
    merges = learn_merges(SENTENCES, MERGES)
    vocab = {token: i for i, token in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    assert len(vocab) == 256 + MERGES, "two merges gave the same token"
    added = {token: len(vocab) + i for i, token in enumerate([*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS])}

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": token in SPECIAL_TOKENS} for token, i in added.items()
        },
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special = {
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "eos_token": {"content": "<|im_end|>", **flags},
        "pad_token": {"content": "<|endoftext|>", **flags},
    }
    write_json(folder / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", added)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)
    if single_file:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name not in ("tokenizer.json", "tokenizer_config.json"):
                path.unlink()
    return added


def check_tokenizer(folder: Path, added: dict[str, int]) -> None:
    """Loads the folder with both classes of transformers, and checks added tokens, merges and NFC."""
    for tokenizer in (AutoTokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder)):
        for token, i in added.items():
            assert tokenizer(token).input_ids == [i], (folder, token)
        for text in ("The cat's hat\n\n 12  雪中的红狐", "ünïcode 🦊\u200d❄️", "a<|im_end|>b"):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text and max(ids) < 256 + MERGES + len(added), (folder, text)
        assert len(tokenizer("in the image, 红狐").input_ids) < 12, "merges are not in use"
        assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids, "text is not normalised to NFC"


# ---------------------------------------------------------------------------------------------
# Checkpoints

REAL_SCHEDULER = dict(
    base_image_seq_len=256, base_shift=0.5, invert_sigmas=False, max_image_seq_len=8192, max_shift=0.9,
    num_train_timesteps=1000, shift=1.0, shift_terminal=0.02, stochastic_sampling=False,
    time_shift_type="exponential", use_beta_sigmas=False, use_dynamic_shifting=True,
    use_exponential_sigmas=False, use_karras_sigmas=False,
)  # fmt: skip
BASE_TRANSFORMER = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
BASE_TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]},
)  # fmt: skip
BASE_VAE = dict(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One small checkpoint. `text_names` and `text_config` select the names of the text encoder's tensors
    and the form of its config.json, as two namings and three forms are in use."""

    name: str
    seed: int
    transformer: dict[str, Any]
    text: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shard: str = "10GB"
    text_names: str = "new"  # "new": model.language_model.*, model.visual.*; "old": model.*, visual.*
    text_config: str = "nested"  # "nested", "flat", or "both" as transformers 4.5x wrote it
    tokenizer_json: bool = False


CHECKPOINTS = [
    Checkpoint("base", 1, BASE_TRANSFORMER, BASE_TEXT, BASE_VAE, REAL_SCHEDULER),
    Checkpoint(
        "odd",
        2,
        dict(
            patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=12,
            num_attention_heads=3, joint_attention_dim=30, axes_dims_rope=(2, 6, 4),
        ),
        dict(
            hidden_size=30, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [1, 2, 2]},
        ),
        dict(
            base_dim=6, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=2, temperal_downsample=[True, False],
            latents_mean=[0.3, -0.5, 0.1, -0.2], latents_std=[1.5, 2.1, 1.2, 2.6],
        ),
        REAL_SCHEDULER | dict(base_image_seq_len=64, max_image_seq_len=2048, base_shift=0.3, max_shift=1.2,
                              shift_terminal=None),
        dtype=torch.float16,
        shard="60KB",
        text_names="old",
        text_config="both",
        tokenizer_json=True,
    ),
    Checkpoint("bf16", 3, BASE_TRANSFORMER, BASE_TEXT, BASE_VAE, REAL_SCHEDULER, dtype=torch.bfloat16,
               text_names="old", text_config="flat"),
]  # fmt: skip


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fills every tensor with random values, scaled so that activations stay of order 1."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, tensor in sorted(module.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.2 * noise
        elif "embed_tokens" in name:
            value = noise
        elif name.endswith("gamma") or tensor.ndim == 1:
            value = 1 + 0.2 * noise
        else:
            # With one frame, only one temporal slice of a causal kernel contributes.
            fan_in = math.prod(tensor.shape[1:]) / (tensor.shape[2] if tensor.ndim == 5 else 1)
            gain = 0.6 if name == "decoder.conv_out.weight" else 1.0
            value = gain * noise / math.sqrt(fan_in)
        with torch.no_grad():
            tensor.copy_(value)


def build(checkpoint: Checkpoint, folder: Path) -> None:
    """Builds the checkpoint and saves it under `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    added = write_tokenizer(folder / "tokenizer", checkpoint.tokenizer_json)
    check_tokenizer(folder / "tokenizer", added)
    text_config = checkpoint.text | dict(
        vocab_size=max(added.values()) + 2,
        bos_token_id=added["<|endoftext|>"],
        eos_token_id=added["<|im_end|>"],
    )
    vision_config = dict(
        depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, window_size=8,
        fullatt_block_indexes=[0], out_hidden_size=text_config["hidden_size"],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=added["<|image_pad|>"],
        video_token_id=added["<|video_pad|>"],
        vision_start_token_id=added["<|vision_start|>"],
        vision_end_token_id=added["<|vision_end|>"],
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    transformer = QwenImageTransformer2DModel(**checkpoint.transformer)
    vae = AutoencoderKLQwenImage(**checkpoint.vae)
    for i, module in enumerate((text_encoder, transformer, vae)):
        fill(module, 100 * checkpoint.seed + i)
        module.to(checkpoint.dtype).eval()
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**checkpoint.scheduler),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=transformer,
    )
    pipe.save_pretrained(folder, max_shard_size=checkpoint.shard)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", checkpoint.tokenizer_json)
    (folder / "text_encoder" / "generation_config.json").unlink(missing_ok=True)
    rename_text_encoder(folder / "text_encoder", checkpoint.text_names)
    rewrite_text_config(folder / "text_encoder" / "config.json", checkpoint.text_config)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # the files are saved readable for their owner only
    rope = load(folder).text_encoder.config.text_config.rope_parameters
    assert rope["rope_theta"] == checkpoint.text["rope_parameters"]["rope_theta"], "config.json was misread"


def rename_text_encoder(folder: Path, naming: str) -> None:
    """Renames the text encoder's tensors to one of the two namings in use on the Hub."""

    def rename(name: str) -> str:
        short = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if naming == "old" or short.startswith("lm_head."):
            return short
        if short.startswith("visual."):
            return "model." + short
        return "model.language_model." + short.removeprefix("model.")

    for path in folder.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        write_json(path, index)


def rewrite_text_config(path: Path, style: str) -> None:
    """Rewrites config.json from the nested form of transformers 5 to an older one."""
    if style == "nested":
        return
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    theta = rope["rope_theta"]
    old_type = "mrope" if style == "flat" else "default"
    text |= {"rope_theta": theta, "rope_scaling": {"type": old_type, "mrope_section": rope["mrope_section"]}}
    if style == "both":
        text["rope_scaling"]["rope_type"] = "default"
    for settings in (config, text):
        settings["torch_dtype"] = settings.pop("dtype", "float32")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    config = flat | config | ({"text_config": text} if style == "both" else {})
    write_json(path, dict(sorted(config.items())))


# ---------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One pipeline run. `details` adds the stages inside the transformer and around the VAE; `brief` omits
    the float image and all latents except those after the first and the last step."""

    name: str
    checkpoint: str = "base"
    prompt: str = "A red fox in the snow"
    negative_prompt: str | None = " "
    true_cfg_scale: float = 4.0
    height: int = 32
    width: int = 48
    num_inference_steps: int = 2
    num_images: int = 1
    seed: int = 42
    vae_tile: tuple[int, int] | None = None
    details: bool = False
    brief: bool = False


LONG_PROMPT = " ".join(
    f"In part {i} of the picture an old {what} stands in the {where}, and 小街 {i} is quiet."
    for i, (what, where) in enumerate(
        [("tower", "rain"), ("fox", "snow"), ("cat", "garden"), ("lantern", "street"), ("boat", "fog"),
         ("painter", "market"), ("tree", "light"), ("robot", "harbour"), ("violin", "library")] * 2,
        start=1,
    )
)  # fmt: skip

CASES = [
    Case("base", prompt="A red fox in the snow, watercolor", height=64, width=64, num_inference_steps=3, details=True),
    Case("odd", "odd", "an old town at night, 12 birds", "blurry, dark", 3.0, 40, 24, 4, seed=7, details=True),
    Case("landscape", height=32, width=64, num_inference_steps=3, seed=1),
    Case("portrait", height=64, width=32, seed=2),
    Case("floored", height=38, width=60, seed=3),
    Case("cfg_off", negative_prompt=None, seed=4),
    Case("scale_one", negative_prompt="blurry", true_cfg_scale=1.0, seed=5),
    Case("three_images", width=32, num_images=3, seed=6),
    Case("chinese", prompt="雪中的红狐，水彩画，安静的小街", negative_prompt="模糊", seed=8),
    Case("emoji", prompt="a family 👩‍👩‍👧‍👦 and a 🏳️‍🌈 flag, 🦊❄️!", seed=9),
    Case("long_prompt", prompt=LONG_PROMPT, negative_prompt=None, height=32, width=32, seed=10),
    Case("empty_negative", negative_prompt="", seed=11),
    Case("bf16", "bf16", seed=12, num_inference_steps=3),
    # On `odd`, as with a shift_terminal a single step divides zero by zero and gives NaN.
    Case("one_step", "odd", num_inference_steps=1, seed=13),
    Case("markup", prompt='{a} "quoted" {{0}} it\'s\n\n  <|im_end|>\n<|im_start|>user\t<not a token|>  ', seed=14),
    Case("decomposed", prompt=unicodedata.normalize("NFD", "Café Ångström, déjà vu, 한국"), seed=15),
    Case("large_seed", seed=2**63 + 12345),
    Case("tiled", height=80, width=96, vae_tile=(32, 24), seed=16),
    Case("tiled_odd", "odd", height=40, width=56, vae_tile=(24, 16), seed=17, num_inference_steps=1),
    # The last tiles are narrower than the overlap: 8 × 4 latents in tiles of 5, stride 3.
    Case("tiled_uneven", height=64, width=32, vae_tile=(40, 24), num_images=2, seed=18),
    Case("demo", "demo", "a large red circle on a blue background", height=128, width=128, num_inference_steps=20,
         seed=7, brief=True),
]
DEMO = Path(__file__).parents[2] / "models/demo"


class Recorder:
    """Records the stages of one run of an unmodified pipeline with hooks on its parts.

    With CFG the transformer runs twice per step, first for the prompt, then for the negative prompt.
    """

    def __init__(self, pipe: QwenImagePipeline, cfg: bool, details: bool):
        self.pipe, self.cfg, self.details = pipe, cfg, details
        self.stages: Tensors = {}
        self.rows: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
        self.forwards = 0
        self.undo: list[Any] = []

    def __enter__(self) -> Recorder:
        pipe, transformer = self.pipe, self.pipe.transformer
        self.undo = [transformer.register_forward_hook(self.after_forward, with_kwargs=True)]
        if self.details:
            self.row("temb", transformer.time_text_embed)
            self.row("norm_out", transformer.norm_out.linear)
            for i, block in enumerate(transformer.transformer_blocks):
                self.row(f"img_mod.{i}", block.img_mod)
                self.row(f"txt_mod.{i}", block.txt_mod)
            self.undo.append(transformer.pos_embed.register_forward_hook(self.after_rope))
            first = transformer.transformer_blocks[0]
            self.undo.append(first.register_forward_hook(self.after_first_block, with_kwargs=True))
        pipe.vae.decode = self.wrap(pipe.vae.decode, self.after_decode)
        pipe.scheduler.step = self.wrap(pipe.scheduler.step, self.after_scheduler)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.undo:
            hook.remove()
        del self.pipe.vae.decode, self.pipe.scheduler.step  # uncovers the methods of the classes

    @property
    def positive(self) -> bool:
        """Whether the current forward is that of the prompt."""
        return not self.cfg or self.forwards % 2 == 0

    def row(self, name: str, module: torch.nn.Module) -> None:
        """Collects the module's output, one row per step (the images of a batch have equal rows)."""

        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            if self.positive:
                self.rows[name].append(output[0])

        self.undo.append(module.register_forward_hook(hook))

    @staticmethod
    def wrap(function: Any, after: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            args = (args[0].clone(), *args[1:])  # protects the record from later in-place changes
            result = function(*args, **kwargs)
            after(args[0], result)
            return result

        return wrapped

    def after_forward(self, _module: object, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        if self.forwards == 0:
            self.stages["packed_noise"] = kwargs["hidden_states"]
        embeds = "prompt_embeds" if self.positive else "negative_prompt_embeds"
        self.stages.setdefault(embeds, kwargs["encoder_hidden_states"][:1])
        if self.details:
            self.stages.setdefault("transformer.out" if self.positive else "transformer.out_negative", output[0])
        self.forwards += 1

    def after_rope(self, _module: object, _args: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self.forwards == 0:
            for name, table in zip(("img", "txt"), output):
                self.stages |= {f"rope.{name}_cos": table.real, f"rope.{name}_sin": table.imag}

    def after_first_block(self, _module: object, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        if self.forwards == 0:
            self.stages |= {
                "block0.in_hidden": kwargs["hidden_states"],
                "block0.in_text": kwargs["encoder_hidden_states"],
                "block0.out_hidden": output[1],
                "block0.out_text": output[0],
            }

    def after_scheduler(self, noise_pred: torch.Tensor, _result: object) -> None:
        if self.details:
            self.stages.setdefault("noise_pred_step0", noise_pred)

    def after_decode(self, latents: torch.Tensor, result: tuple[torch.Tensor]) -> None:
        self.stages["vae_in"] = latents[:, :, 0]
        self.stages["vae_out"] = result[0][:, :, 0]


def token_ids(pipe: QwenImagePipeline, prompt: str) -> torch.Tensor:
    """The token ids of a prompt in the template, as the pipeline computes them."""
    text = pipe.prompt_template_encode.format(prompt)
    limit = pipe.tokenizer_max_length + pipe.prompt_template_encode_start_idx
    return torch.tensor(pipe.tokenizer(text, max_length=limit, truncation=True).input_ids)


def run(pipe: QwenImagePipeline, case: Case) -> Tensors:
    """Runs one case and returns its stages; floating-point stages are f32."""
    cfg = case.true_cfg_scale > 1 and case.negative_prompt is not None
    pipe.vae.use_tiling = False
    if case.vae_tile is not None:
        tile, stride = case.vae_tile
        pipe.vae.enable_tiling(tile, tile, stride, stride)

    def on_step_end(_pipe: object, step: int, _timestep: object, tensors: Tensors) -> Tensors:
        stages[f"latents_step{step}"] = tensors["latents"].clone()
        return tensors

    stages: Tensors = {"token_ids": token_ids(pipe, case.prompt)}
    if cfg:
        stages["negative_token_ids"] = token_ids(pipe, case.negative_prompt)
    with Recorder(pipe, cfg, case.details) as recorder:
        image = pipe(
            case.prompt,
            negative_prompt=case.negative_prompt,
            true_cfg_scale=case.true_cfg_scale,
            height=case.height,
            width=case.width,
            num_inference_steps=case.num_inference_steps,
            num_images_per_prompt=case.num_images,
            generator=torch.Generator("cpu").manual_seed(case.seed),
            output_type="np",
            callback_on_step_end=on_step_end,
            max_sequence_length=1024,
        ).images
    stages |= recorder.stages | {name: torch.stack(rows) for name, rows in recorder.rows.items()}

    batch, channels, height, width = stages["vae_in"].shape
    noise = torch.randn(
        (batch, 1, channels, height, width),
        generator=torch.Generator("cpu").manual_seed(case.seed),
        dtype=stages["packed_noise"].dtype,
    )
    packed = pipe._pack_latents(noise, batch, channels, height, width)
    assert torch.equal(packed, stages.pop("packed_noise")), "the initial noise of the pipeline differs"
    pixels = np.stack([np.asarray(image_u8) for image_u8 in pipe.image_processor.numpy_to_pil(image)])
    stages |= {
        "initial_noise": noise,
        "sigmas": pipe.scheduler.sigmas,
        "timesteps": pipe.scheduler.timesteps,
        "image_float": torch.from_numpy(image),
        "image_u8": torch.from_numpy(pixels),
    }
    if not case.details:
        stages.pop("vae_out")
        if case.vae_tile is None:
            stages.pop("vae_in")
    if case.brief:
        steps = case.num_inference_steps
        for name in ["image_float", *(f"latents_step{step}" for step in range(1, steps - 1))]:
            stages.pop(name)
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in stages.items()
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> QwenImagePipeline:
    """Loads a checkpoint to compute in `dtype`, whatever its weights are stored in."""
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def report(case: Case, stages: Tensors, size: int) -> None:
    """Prints one line, and checks that the image is neither flat nor saturated, which would hide errors."""
    image = stages["image_u8"] / 255
    clipped = ((image <= 0) | (image >= 1)).float().mean().item()
    shape = "x".join(map(str, image.shape))
    print(
        f"{case.name:15}{case.checkpoint:6}{shape:14}{len(stages['token_ids']):6}{case.num_inference_steps:4}"
        f"{size // 1024:6} KB{image.mean():7.3f}{image.std():7.3f}{100 * clipped:7.2f} %",
        flush=True,
    )
    assert image.std() > 0.1 and clipped < 0.05, "the image is flat or saturated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "fixtures")
    parser.add_argument("--only", nargs="*", help="names of cases to run; cases.json always lists all")
    args = parser.parse_args()
    torch.set_num_threads(1)

    (args.out / "cases").mkdir(parents=True, exist_ok=True)
    wanted = [case for case in CASES if not args.only or case.name in args.only]
    print(f"{'case':15}{'from':6}{'image':14}{'tokens':>6}{'st':>4}{'file':>9}{'mean':>7}{'std':>7}{'clipped':>9}")
    folders = {checkpoint.name: args.out / "checkpoints" / checkpoint.name for checkpoint in CHECKPOINTS}
    for checkpoint in CHECKPOINTS:
        if any(case.checkpoint == checkpoint.name for case in wanted):
            build(checkpoint, folders[checkpoint.name])
    for name, folder in (folders | {"demo": DEMO}).items():
        cases = [case for case in wanted if case.checkpoint == name]
        if not cases:
            continue
        pipe = load(folder)
        for case in cases:
            path = args.out / "cases" / f"{case.name}.safetensors"
            stages = run(pipe, case)
            save_file(stages, path)
            path.chmod(0o644)
            report(case, stages, path.stat().st_size)
    write_json(args.out / "cases.json", [dataclasses.asdict(case) for case in CASES])
    for folder in [*sorted((args.out / "checkpoints").iterdir()), args.out / "cases", args.out]:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.relative_to(args.out)}: {size // 1024} KB")


if __name__ == "__main__":
    main()
