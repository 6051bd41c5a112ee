# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "diffusers==0.42.1", "transformers==5.23.0", "safetensors", "numpy"]
# ///
"""Trains the demo model: a small Qwen-Image that generates one coloured shape on a coloured background.

    python models/demo/train.py                # writes the checkpoint beside this file

First the VAE, then the text encoder and the transformer together, by flow matching. The
images, captions and noise of a step are seeded by its number, so an interrupted run resumes with the same
result. Checkpoints of the training are in --work; delete that folder to start over. Takes about three
hours on two CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from scenes import COLOURS, SCENES, SHAPES, TRAINED, Scene, caption, render, render_shape

SIDE = 128
# Training sizes, [height, width]: the number of images of each, as a multiple of the number of trained
# scenes, and its share of the steps.
BUCKETS = {
    (SIDE, SIDE): (2.0, 0.8),
    (96, 160): (0.5, 0.05),
    (160, 96): (0.5, 0.05),
    (128, 192): (0.5, 0.05),
    (192, 128): (0.5, 0.05),
}

VAE = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
VAE_STEPS, VAE_BATCH, VAE_SIDE, VAE_RATE = 2400, 8, 64, 5e-4

TRANSFORMER = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=5, attention_head_dim=32,
    num_attention_heads=4, joint_attention_dim=96, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
TEXT = dict(
    hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
)  # fmt: skip
# Qwen-Image's scheduler, shifted further towards noise. Size, shape and place of flat scenes are visible
# up to a sigma of 0.9, so they are decided above it. With Qwen-Image's own shift (0.5 to 0.9) too few
# training steps are there: after 3,000 steps places were still random.
SCHEDULER = dict(
    base_image_seq_len=256, base_shift=1.6, max_image_seq_len=8192, max_shift=2.0, shift_terminal=0.02,
    time_shift_type="exponential", use_dynamic_shifting=True,
)  # fmt: skip
BATCH, RATE, EMPTY_PROMPTS = 48, 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Phase:
    """One cycle of the learning rate over one bank of images."""

    steps: int
    # Random deviation of size and place (scenes.render).
    jitter: float
    # Number of images, as a multiple of that in BUCKETS.
    images: float


# Large deviations first, for learning sizes and places; small ones later, for sharp edges.
PHASES = (Phase(9000, 1.0, 1.0), Phase(3000, 0.3, 0.5), Phase(8000, 0.1, 1.0))

# `prompt_template_encode` of diffusers' QwenImagePipeline, and the number of tokens before the prompt.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TEMPLATE_START = 34
SPECIAL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


class Progress:
    """Prints the mean loss and the remaining time every `every` steps."""

    def __init__(self, stage: str, first: int, steps: int, every: int = 50):
        self.stage, self.first, self.steps, self.every = stage, first, steps, every
        self.losses: list[float] = []
        self.began = time.monotonic()

    def step(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            a_step = (time.monotonic() - self.began) / (step + 1 - self.first)
            left = (self.steps - step - 1) * a_step / 60
            mean = sum(self.losses) / len(self.losses)
            print(f"{self.stage}: step {step + 1} of {self.steps}, loss {mean:.4f}, "
                  f"{a_step:.2f} s a step, {left:.0f} min left", flush=True)  # fmt: skip
            self.losses.clear()


def save(path: Path, value: object) -> None:
    """Writes a file atomically: an interruption leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


class Training:
    """AdamW on some of a model's weights over one cycle of the learning rate, with its state in a file."""

    def __init__(
        self, path: Path, model: torch.nn.Module, trained: list[torch.nn.Parameter], rate: float, steps: int,
        save_every: int,
    ):  # fmt: skip
        self.path, self.trained, self.steps, self.save_every = path, trained, steps, save_every
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.first = 0
        if path.exists():
            state = torch.load(path, map_location=trained[0].device)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.first = state["step"]

    def step(self, step: int, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.parts["optimizer"].step()
        self.parts["schedule"].step()
        self.parts["optimizer"].zero_grad()
        if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
            save(self.path, {name: part.state_dict() for name, part in self.parts.items()} | {"step": step + 1})


def to_pixels(images: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Converts uint8 images [height, width, 3] to values in [-1, 1], [n, 3, height, width]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------
# VAE


def new_vae() -> AutoencoderKLQwenImage:
    """A VAE with initial weights. An image is one frame, which only the last temporal slice of a causal
    kernel reads: that slice is initialised like a 2-D convolution, the others are zero."""
    vae = AutoencoderKLQwenImage(**VAE)
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            fan_in = math.prod(module.weight.shape[1:]) // module.weight.shape[2]
            with torch.no_grad():
                module.weight.zero_()
                module.weight[:, :, -1].uniform_(-1, 1).div_(math.sqrt(fan_in))
                module.bias.zero_()
    with torch.no_grad():
        vae.quant_conv.bias[VAE["z_dim"] :] = -6.0  # start with a posterior of small variance
    return vae


def fold_to_2d(vae: AutoencoderKLQwenImage) -> None:
    """Makes the causal convolutions compute with their last temporal slice only, which is equivalent for
    one frame and three times faster."""

    def fold(conv: QwenImageCausalConv3d):
        padding = (conv._padding[2], conv._padding[0])
        stride = conv.stride[1:]

        def forward(x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
            return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, stride, padding)[:, :, None]

        return forward

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = fold(module)


def vae_scene(rng: random.Random) -> np.ndarray:
    """A shape of random size and place, often cut by the border."""
    background, colour = rng.sample(sorted(COLOURS), 2)
    box = rng.uniform(0.2, 0.9) * VAE_SIDE
    x, y = rng.uniform(0, VAE_SIDE), rng.uniform(0, VAE_SIDE)
    return render_shape(rng.choice(SHAPES), colour, background, x, y, box, VAE_SIDE, VAE_SIDE)


def train_vae(work: Path, device: torch.device) -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    vae = new_vae().to(device)
    fold_to_2d(vae)
    trained = [p for name, p in vae.named_parameters() if "time_conv" not in name]
    training = Training(work / "vae.pt", vae, trained, VAE_RATE, VAE_STEPS, save_every=200)
    progress = Progress("VAE", training.first, VAE_STEPS)
    for step in range(training.first, VAE_STEPS):
        rng = random.Random(f"vae {step}")
        torch.manual_seed(step)
        pixels = to_pixels([vae_scene(rng) for _ in range(VAE_BATCH)], device)
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        # Calls the decoder itself, as `decode` clamps its output, and clamped values have no gradient.
        vae.clear_cache()
        latents = vae.post_quant_conv(posterior.sample())
        decoded = vae.decoder(latents, feat_cache=vae._feat_map, feat_idx=[0])[:, :, 0]
        difference = decoded - pixels
        loss = difference.abs().mean() + 0.5 * difference.square().mean()
        training.step(step, loss + 1e-5 * posterior.kl().mean() / latents[0].numel())
        progress.step(step, loss.item())
    return vae.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Text encoder and transformer


def new_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Qwen2's byte-level tokenizer with a small vocabulary, in which every word of the prompt template
    and of the captions is one token: the template's start then has Qwen-Image's 34 tokens."""
    if not folder.exists():
        rng = random.Random("tokenizer")
        texts = [part for scene in SCENES for text in (caption(scene, rng), "")
                 for part in re.split(r"<\|\w+\|>", TEMPLATE.format(text))]  # fmt: skip
        splitter = Qwen2Tokenizer().backend_tokenizer
        tokenizer = Tokenizer(BPE())
        tokenizer.normalizer, tokenizer.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
        trainer = BpeTrainer(vocab_size=1024, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        qwen = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=131072)
        qwen.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": SPECIAL_TOKENS})
        qwen.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    assert len(tokenizer(TEMPLATE.split("{}")[0]).input_ids) == TEMPLATE_START
    return tokenizer


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ["<|endoftext|>", *SPECIAL_TOKENS]}
    vision = dict(
        depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, window_size=8,
        fullatt_block_indexes=[0], out_hidden_size=TEXT["hidden_size"],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=TEXT | dict(vocab_size=math.ceil(len(tokenizer) / 64) * 64, tie_word_embeddings=True,
                                bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"]),
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def encode_prompts(
    model: torch.nn.Module, tokenizer: Qwen2Tokenizer, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes the prompts like the pipeline, with the text encoder's language model. Returns the embeddings
    and the mask of those that are not padding.

    The keys and values of the template's prefix are the same for all prompts and computed once. Padding is
    on the right and attention is causal, so the encoder needs no mask.
    """
    device = model.device
    start, end = TEMPLATE.split("{}")
    start_ids = tokenizer(start, return_tensors="pt").input_ids.to(device)
    padded = tokenizer([prompt + end for prompt in prompts], padding=True, padding_side="right", return_tensors="pt")
    ids, mask = padded.input_ids.to(device), padded.attention_mask.bool().to(device)
    cache = model(start_ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    positions = torch.arange(start_ids.shape[1], start_ids.shape[1] + ids.shape[1], device=device)
    hidden = model(
        ids, past_key_values=cache, position_ids=positions.expand(3, len(prompts), -1), use_cache=True
    ).last_hidden_state
    return hidden, mask


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [n, channels, height, width] as tokens of 2×2: [n, height/2 · width/2, channels · 4]."""
    n, channels, height, width = latents.shape
    tokens = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(n, height * width // 4, channels * 4)


Bank = dict[tuple[int, int], tuple[list[Scene], torch.Tensor]]


def encode_bank(work: Path, number: int, vae: AutoencoderKLQwenImage, device: torch.device) -> Bank:
    """Renders the trained scenes of a phase at every size and encodes them. Returns the scenes and their
    latents, [n, channels, height/8, width/8]; cached in --work."""
    path, phase = work / f"bank-{number}.pt", PHASES[number]
    if path.exists():
        return torch.load(path, weights_only=False)
    bank = {}
    for (height, width), (copies, _) in BUCKETS.items():
        rng = random.Random(f"bank {number} {height} {width}")
        copies *= phase.images
        scenes = rng.sample(TRAINED * math.ceil(copies), round(copies * len(TRAINED)))
        progress = Progress(f"encoding {width}x{height}", 0, math.ceil(len(scenes) / 32))
        latents = []
        for step in range(progress.steps):
            images = [render(scene, height, width, rng, phase.jitter) for scene in scenes[step * 32 : (step + 1) * 32]]
            with torch.no_grad():
                encoded = vae.encode(to_pixels(images, device)[:, :, None]).latent_dist.mode()[:, :, 0]
            latents.append(encoded.cpu())
            progress.step(step, math.nan)
        bank[height, width] = scenes, torch.cat(latents)
    save(path, bank)
    return bank


def measure_latents(vae: AutoencoderKLQwenImage, bank: Bank) -> None:
    """Writes the mean and the standard deviation of each channel of the latents into the VAE's config."""
    latents = bank[SIDE, SIDE][1]
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.register_to_config(latents_mean=[round(v, 4) for v in mean.tolist()],
                           latents_std=[round(v, 4) for v in std.tolist()])  # fmt: skip


def normalised(bank: Bank, vae: AutoencoderKLQwenImage) -> Bank:
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    return {size: (scenes, (latents - mean) / std) for size, (scenes, latents) in bank.items()}


def train_transformer(
    work: Path,
    vae: AutoencoderKLQwenImage,
    tokenizer: Qwen2Tokenizer,
    scheduler: FlowMatchEulerDiscreteScheduler,
    device: torch.device,
) -> tuple[Qwen2_5_VLForConditionalGeneration, QwenImageTransformer2DModel]:
    """Flow matching: the transformer learns the velocity from image to noise, `noise - latents`."""
    torch.manual_seed(1)
    text_encoder = new_text_encoder(tokenizer).to(device)
    transformer = QwenImageTransformer2DModel(**TRANSFORMER).to(device)
    models = torch.nn.ModuleList([text_encoder.model.language_model, transformer])
    for number in range(len(PHASES)):
        train_phase(number, work, vae, models, tokenizer, scheduler, device)
    return text_encoder, transformer


def train_phase(
    number: int,
    work: Path,
    vae: AutoencoderKLQwenImage,
    models: torch.nn.ModuleList,
    tokenizer: Qwen2Tokenizer,
    scheduler: FlowMatchEulerDiscreteScheduler,
    device: torch.device,
) -> None:
    language_model, transformer = models
    steps = PHASES[number].steps
    path = work / f"transformer-{number}.pt"
    training = Training(path, models, list(models.parameters()), RATE, steps, save_every=250)
    bank = normalised(encode_bank(work, number, vae, device), vae)
    progress = Progress(f"transformer, phase {number + 1} of {len(PHASES)}", training.first, steps)
    before = sum(phase.steps for phase in PHASES[:number])
    for step in range(training.first, steps):
        rng = random.Random(f"transformer {before + step}")
        torch.manual_seed(before + step)
        sizes = list(BUCKETS)
        height, width = rng.choices(sizes, [BUCKETS[size][1] for size in sizes])[0]
        scenes, latents = bank[height, width]
        picked = rng.sample(range(len(scenes)), BATCH)
        clean = pack(latents[picked]).to(device)
        prompts = [
            rng.choice(("", " ")) if rng.random() < EMPTY_PROMPTS else caption(scenes[i], rng) for i in picked
        ]
        mu = calculate_shift(
            clean.shape[1], SCHEDULER["base_image_seq_len"], SCHEDULER["max_image_seq_len"],
            SCHEDULER["base_shift"], SCHEDULER["max_shift"],
        )  # fmt: skip
        sigma = scheduler.time_shift(mu, 1.0, torch.rand(BATCH, device=device).clamp(1e-4, 1))
        noise = torch.randn(clean.shape, device=device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        embeddings, mask = encode_prompts(language_model, tokenizer, prompts)
        velocity = transformer(
            noisy, embeddings, mask, sigma, img_shapes=[[(1, height // 16, width // 16)]] * BATCH, return_dict=False
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        training.step(step, loss)
        progress.step(step, loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("target/demo-training"), help="folder for the state of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    vae = train_vae(args.work, device)
    measure_latents(vae, encode_bank(args.work, 0, vae, device))
    tokenizer = new_tokenizer(args.work / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    text_encoder, transformer = train_transformer(args.work, vae, tokenizer, scheduler, device)
    transformer.register_to_config(sample_size=SIDE // vae.spatial_compression_ratio)
    pipe = QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    pipe.to(dtype=torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
