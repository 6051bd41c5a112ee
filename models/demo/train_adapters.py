# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.15.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2", "safetensors", "numpy", "pillow"
# ]
# ///
"""Trains two LoRA adapters of the demo model's transformer.

    python models/demo/train_adapters.py stripes      # writes lora/stripes.safetensors
    python models/demo/train_adapters.py lightning    # writes lora/lightning-4steps.safetensors and its recipe

`stripes` changes the style: shapes are cut into horizontal bands. `lightning` makes the model generate in
four steps without guidance what it generates in twenty with it. The checkpoint beside this file is not
changed. Checkpoints of the training are in --work, and an interrupted run resumes; delete that folder to
start over. `stripes` takes about ten minutes on two CPU cores, `lightning` about an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from scenes import TRAINED, Scene, caption, render
from train import BUCKETS, EMPTY_PROMPTS, Progress, Training, encode_prompts, fold_to_2d, pack, save, to_pixels

# The linears of a block. Those of modulation are trained by `stripes` only.
ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
MODULATION = ["img_mod.1", "txt_mod.1"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One cycle of the learning rate."""

    steps: int
    batch: int
    rate: float


STRIPES_RANK = STRIPES_ALPHA = 8
STRIPES = Phase(1200, 32, 2e-3)

# As in Lightning of lightx2v, alpha is an eighth of the rank.
LIGHTNING_RANK, LIGHTNING_ALPHA = 20, 2.5
RECIPE = {"steps": 4, "shift": 3.0, "true_cfg_scale": 1.0}
LIGHTNING = Phase(200, 12, 4e-3)

# Embeddings, and the mask of those that are not padding.
Prompts = tuple[torch.Tensor, torch.Tensor]


class Demo:
    """The demo model, frozen, with an adapter to be trained."""

    def __init__(self, folder: Path, device: torch.device):
        self.pipe = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        for part in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        fold_to_2d(self.pipe.vae)
        self.device = device
        config = self.pipe.vae.config
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None] for values in (config.latents_mean, config.latents_std)
        )

    def add_adapter(self, rank: int, alpha: float, targets: list[str]) -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        self.pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        return [p for p in self.pipe.transformer.parameters() if p.requires_grad]

    def adapter(self) -> dict[str, torch.Tensor]:
        """The tensors of the adapter, `<module>.lora_A.weight` and `<module>.lora_B.weight`, in bf16."""
        tensors = get_peft_model_state_dict(self.pipe.transformer)
        return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}

    def encode(self, images: list[np.ndarray]) -> torch.Tensor:
        """Normalised latents of the images, packed: [n, tokens, 64]."""
        with torch.no_grad():
            latents = self.pipe.vae.encode(to_pixels(images, self.device)[:, :, None]).latent_dist.mode()[:, :, 0]
        return pack((latents - self.mean) / self.std)

    def decode(self, packed: torch.Tensor, height: int, width: int) -> list[np.ndarray]:
        latents = self.pipe._unpack_latents(packed, height, width, self.pipe.vae_scale_factor)[:, :, 0]
        with torch.no_grad():
            images = self.pipe.vae.decode((latents * self.std + self.mean)[:, :, None]).sample[:, :, 0]
        return list(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())

    def prompts(self, texts: list[str]) -> Prompts:
        with torch.no_grad():
            return encode_prompts(self.pipe.text_encoder.model.language_model, self.pipe.tokenizer, texts)

    def velocity(
        self, latents: torch.Tensor, prompts: Prompts, sigma: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        shapes = [[(1, height // 16, width // 16)]] * len(latents)
        return self.pipe.transformer(latents, *prompts, sigma, img_shapes=shapes, return_dict=False)[0]

    def velocity_loss(self, batch: Batch, sigma: torch.Tensor) -> torch.Tensor:
        """The error of the velocity from image to noise, at one sigma for each image."""
        noisy = torch.lerp(batch.clean, batch.noise, sigma[:, None, None])
        velocity = self.velocity(noisy, batch.prompts, sigma, batch.height, batch.width)
        return F.mse_loss(velocity, batch.noise - batch.clean)

    def mu(self, tokens: int) -> float:
        config = self.pipe.scheduler.config
        return calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )


Bank = dict[tuple[int, int], tuple[list[Scene], torch.Tensor]]


def encode_bank(demo: Demo, path: Path, images: tuple[float, float], jitter: float, striped: bool) -> Bank:
    """Images of the trained scenes, encoded: the scenes and their packed latents by size. `images` are the share of
    the scenes at the first size and that at each other size."""
    if path.exists():
        return torch.load(path, weights_only=False)
    bank: Bank = {}
    for height, width in BUCKETS:
        rng = random.Random(f"adapters {height} {width}")
        scenes = rng.sample(TRAINED, round(len(TRAINED) * images[len(bank) > 0]))
        progress = Progress(f"encoding {width}x{height}", 0, math.ceil(len(scenes) / 32))
        latents = []
        for step in range(progress.steps):
            batch = scenes[step * 32 : (step + 1) * 32]
            rendered = [render(scene, height, width, rng, jitter, striped) for scene in batch]
            latents.append(demo.encode(rendered).cpu())
            progress.step(step, math.nan)
        bank[height, width] = scenes, torch.cat(latents)
    save(path, bank)
    return bank


class Batch:
    """Images of one size, noise of the same shape, and the prompts of the images."""

    def __init__(self, demo: Demo, bank: Bank, rng: random.Random, count: int, empty_prompts: float):
        self.height, self.width = rng.choices(list(BUCKETS), [share for _, share in BUCKETS.values()])[0]
        scenes, latents = bank[self.height, self.width]
        picked = rng.sample(range(len(scenes)), count)
        self.clean = latents[picked].to(demo.device)
        self.prompts = demo.prompts(
            [rng.choice(("", " ")) if rng.random() < empty_prompts else caption(scenes[i], rng) for i in picked]
        )
        self.noise = torch.randn(self.clean.shape, device=demo.device)


def fit(
    name: str, phase: Phase, loss: Callable[[Batch], torch.Tensor], demo: Demo, bank: Bank,
    trained: list[torch.nn.Parameter], work: Path, empty_prompts: float,
) -> None:  # fmt: skip
    """Trains the adapter for one cycle of the learning rate."""
    adapter = torch.nn.ParameterList(trained)
    training = Training(work / f"{name}.pt", adapter, trained, phase.rate, phase.steps, save_every=25)
    progress = Progress(name, training.first, phase.steps)
    for step in range(training.first, phase.steps):
        torch.manual_seed(step)
        value = loss(Batch(demo, bank, random.Random(f"{name} {step}"), phase.batch, empty_prompts))
        training.step(step, value)
        progress.step(step, value.item())


# ---------------------------------------------------------------------------------------------
# Stripes


def train_stripes(demo: Demo, work: Path) -> None:
    """Flow matching as in `train.py`, on images of striped shapes."""
    bank = encode_bank(demo, work / "stripes-bank.pt", images=(1.0, 0.25), jitter=0.1, striped=True)
    trained = demo.add_adapter(STRIPES_RANK, STRIPES_ALPHA, ATTENTION + MLP + MODULATION)

    def loss(batch: Batch) -> torch.Tensor:
        times = torch.rand(len(batch.clean), device=demo.device).clamp(1e-4, 1)
        sigma = demo.pipe.scheduler.time_shift(demo.mu(batch.clean.shape[1]), 1.0, times)
        return demo.velocity_loss(batch, sigma)

    fit("stripes", STRIPES, loss, demo, bank, trained, work, EMPTY_PROMPTS)


def save_stripes(demo: Demo, out: Path) -> None:
    """Writes the file as diffusers does: names with the prefix `transformer.`, rank and alpha in the header."""
    config = demo.pipe.transformer.peft_config["default"]
    demo.pipe.save_lora_weights(
        out, demo.adapter(), weight_name="stripes.safetensors",
        transformer_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Four steps


def recipe_sigmas() -> list[float]:
    """The sigmas of the recipe, with the last 0: s·t / (1 + (s - 1)·t) for t = 1, 3/4, 1/2, 1/4."""
    steps, shift = RECIPE["steps"], RECIPE["shift"]
    times = [1 - i / steps for i in range(steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in times] + [0.0]


def rollout(demo: Demo, noise: torch.Tensor, prompts: Prompts, height: int, width: int) -> torch.Tensor:
    """The latents that the recipe's steps generate from the noise."""
    latents = noise
    for sigma, following in itertools.pairwise(recipe_sigmas()):
        sigmas = torch.full((len(noise),), sigma, device=demo.device)
        latents = latents + (following - sigma) * demo.velocity(latents, prompts, sigmas, height, width)
    return latents


def train_lightning(demo: Demo, work: Path) -> None:
    """Compares the result of all steps of the recipe with the image. In these scenes the prompt decides nearly
    everything, so an image is a good target for any noise; sizes and places are the nominal ones, as random
    deviations would be most of the loss."""
    bank = encode_bank(demo, work / "lightning-bank.pt", images=(0.4, 0.04), jitter=0.0, striped=False)
    trained = demo.add_adapter(LIGHTNING_RANK, LIGHTNING_ALPHA, ATTENTION + MLP)

    def loss(batch: Batch) -> torch.Tensor:
        return F.mse_loss(rollout(demo, batch.noise, batch.prompts, batch.height, batch.width), batch.clean)

    fit("lightning", LIGHTNING, loss, demo, bank, trained, work, 0.0)


def save_lightning(demo: Demo, out: Path) -> None:
    """Writes the file as Lightning's are: `lora_down`, `lora_up` and `alpha` of each module, no prefix. The
    recipe is in a JSON file of the same name."""
    tensors = {}
    for name, tensor in demo.adapter().items():
        module, half = name.rsplit(".", 2)[:2]
        tensors[f"{module}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{module}.alpha"] = torch.tensor(LIGHTNING_ALPHA, dtype=torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "lightning-4steps.safetensors", metadata={"format": "pt"})
    (out / "lightning-4steps.json").write_text(json.dumps(RECIPE) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=("stripes", "lightning"))
    here = Path(__file__).parent
    parser.add_argument("--model", type=Path, default=here, help="checkpoint of the demo model")
    parser.add_argument("--out", type=Path, default=here / "lora", help="folder for the adapters")
    parser.add_argument("--work", type=Path, default=Path("target/demo-training"), help="folder for the state of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    demo = Demo(args.model, torch.device(args.device))
    train, write = {"stripes": (train_stripes, save_stripes), "lightning": (train_lightning, save_lightning)}[args.adapter]
    train(demo, args.work)
    write(demo, args.out)


if __name__ == "__main__":
    main()
