# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.15.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2", "safetensors", "numpy"
# ]
# ///
"""Trains a LoRA adapter of the demo model's transformer, which cuts shapes into horizontal bands.

    python models/demo/train_adapters.py    # writes lora/stripes.safetensors beside this file

The checkpoint beside this file is not changed. Checkpoints of the training are in --work, and an
interrupted run resumes; delete that folder to start over. Takes about ten minutes on two CPU cores that
do nothing else.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from scenes import TRAINED, Scene, caption, render
from train import BUCKETS, EMPTY_PROMPTS, Progress, Training, encode_prompts, fold_to_2d, pack, save, to_pixels

# All linears of a block: attention, MLP and modulation.
TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    "img_mod.1", "txt_mod.1",
]  # fmt: skip
RANK = ALPHA = 8
STEPS, BATCH, RATE = 1200, 32, 2e-3
# Random deviation of size and place, as in the last phase of `train.py`.
JITTER = 0.1
# Share of the trained scenes that have an image of a size other than the first.
OTHER_SIZES = 0.25

Bank = dict[tuple[int, int], tuple[list[Scene], torch.Tensor]]


def encode_bank(pipe: QwenImagePipeline, work: Path, device: torch.device) -> Bank:
    """Striped images of the trained scenes, encoded: the scenes and their packed, normalised latents by size;
    cached in --work."""
    path = work / "stripes-bank.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    config = pipe.vae.config
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (config.latents_mean, config.latents_std))
    bank: Bank = {}
    for height, width in BUCKETS:
        rng = random.Random(f"stripes {height} {width}")
        scenes = rng.sample(TRAINED, round(len(TRAINED) * (OTHER_SIZES if bank else 1)))
        progress = Progress(f"encoding {width}x{height}", 0, math.ceil(len(scenes) / 32))
        latents = []
        for step in range(progress.steps):
            batch = scenes[step * 32 : (step + 1) * 32]
            images = [render(scene, height, width, rng, JITTER, striped=True) for scene in batch]
            with torch.no_grad():
                encoded = pipe.vae.encode(to_pixels(images, device)[:, :, None]).latent_dist.mode()[:, :, 0]
            latents.append(pack((encoded - mean) / std).cpu())
            progress.step(step, math.nan)
        bank[height, width] = scenes, torch.cat(latents)
    save(path, bank)
    return bank


def train(pipe: QwenImagePipeline, bank: Bank, work: Path, device: torch.device) -> None:
    """Flow matching as in `train.py`; only the adapter is trained."""
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    training = Training(work / "stripes.pt", torch.nn.ParameterList(trained), trained, RATE, STEPS, save_every=100)
    progress = Progress("stripes", training.first, STEPS)
    scheduler = pipe.scheduler.config
    for step in range(training.first, STEPS):
        rng = random.Random(f"stripes {step}")
        torch.manual_seed(step)
        height, width = rng.choices(list(BUCKETS), [share for _, share in BUCKETS.values()])[0]
        scenes, latents = bank[height, width]
        picked = rng.sample(range(len(scenes)), BATCH)
        clean = latents[picked].to(device)
        prompts = [
            rng.choice(("", " ")) if rng.random() < EMPTY_PROMPTS else caption(scenes[i], rng) for i in picked
        ]
        noise = torch.randn(clean.shape, device=device)
        mu = calculate_shift(
            clean.shape[1], scheduler.base_image_seq_len, scheduler.max_image_seq_len, scheduler.base_shift,
            scheduler.max_shift,
        )  # fmt: skip
        sigma = pipe.scheduler.time_shift(mu, 1.0, torch.rand(BATCH, device=device).clamp(1e-4, 1))
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with torch.no_grad():
            embeddings, mask = encode_prompts(pipe.text_encoder.model.language_model, pipe.tokenizer, prompts)
        velocity = pipe.transformer(
            noisy, embeddings, mask, sigma, img_shapes=[[(1, height // 16, width // 16)]] * BATCH, return_dict=False
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        training.step(step, loss)
        progress.step(step, loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--model", type=Path, default=here, help="checkpoint of the demo model")
    parser.add_argument("--out", type=Path, default=here / "lora", help="folder for the adapter")
    parser.add_argument("--work", type=Path, default=Path("target/demo-training"), help="folder for the state of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    pipe = QwenImagePipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    fold_to_2d(pipe.vae)
    train(pipe, encode_bank(pipe, args.work, device), args.work, device)
    tensors = {name: t.detach().cpu().bfloat16().contiguous() for name, t in get_peft_model_state_dict(pipe.transformer).items()}
    metadata = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        args.out, tensors, weight_name="stripes.safetensors", transformer_lora_adapter_metadata=metadata
    )


if __name__ == "__main__":
    main()
