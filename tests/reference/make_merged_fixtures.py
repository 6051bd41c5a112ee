"""Creates the reference of merged adapters: the weights that diffusers' `fuse_lora` makes.

Needs the pinned versions in requirements.txt. CPU only, no network, a few seconds; make_fixtures.py
makes the checkpoints first:

    python tests/reference/make_merged_fixtures.py [--fixtures tests/fixtures]

For each checkpoint below it writes `merged/NAME.safetensors` with, for each linear layer `X` of the
transformer, `X.down` and `X.up` as the adapter's file has them, and `X.fused`, the weight after
`fuse_lora(lora_scale=SCALE)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

RANK = 4
SCALE = 0.7
# Size of the changes relative to the weights. diffusers rounds a change to bf16 before it adds it, so a
# change as large as the weights would be rounded twice.
CHECKPOINTS = {"base": (torch.float32, 1.0), "bf16": (torch.bfloat16, 0.003)}


def make(name: str, dtype: torch.dtype, size: float, fixtures: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file."""
    folder = fixtures / "checkpoints" / name / "transformer"
    transformer = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(7)
    layers = {path: module for path, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    state, tensors = {}, {}
    for path, layer in layers.items():
        d_out, d_in = layer.weight.shape
        down = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
        up = size * torch.randn(d_out, RANK, generator=generator) / RANK**0.5
        tensors[f"{path}.down"], tensors[f"{path}.up"] = down.to(dtype), up.to(dtype)
        state[f"transformer.{path}.lora_A.weight"] = tensors[f"{path}.down"]
        state[f"transformer.{path}.lora_B.weight"] = tensors[f"{path}.up"]
    before = {path: layer.weight.clone() for path, layer in layers.items()}
    transformer.load_lora_adapter(state, prefix="transformer")
    transformer.fuse_lora(lora_scale=SCALE)
    transformer.unload_lora()
    for path, layer in transformer.named_modules():
        if path in layers:
            tensors[f"{path}.fused"] = layer.weight.detach().contiguous()
            assert not torch.equal(layer.weight, before[path]), f"{path} is not changed"
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser()
    default = Path(__file__).parents[1] / "fixtures"
    parser.add_argument("--fixtures", type=Path, default=default)
    fixtures = parser.parse_args().fixtures
    (fixtures / "merged").mkdir(exist_ok=True)
    for name, (dtype, size) in CHECKPOINTS.items():
        path = fixtures / "merged" / f"{name}.safetensors"
        save_file(make(name, dtype, size, fixtures), path, {"scale": str(SCALE)})
        path.chmod(0o644)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
