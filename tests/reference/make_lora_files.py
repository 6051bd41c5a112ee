"""Saves small adapters with the libraries that people train with, and the changes that they make.

Needs the pinned versions in requirements.txt. CPU only, no network, about ten seconds:

    python tests/reference/make_lora_files.py [--out tests/fixtures/lora/saved]

Every adapter is made for the transformer of tests/fixtures/checkpoints/base, filled with random values and
saved by the library's own function. `expected/NAME.safetensors` has, by path of the layer, the change of
its weight that the library computes, in f64, rounded to f32.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
LAYERS = [
    "img_in",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.1.attn.to_q",
]
# As a regular expression of whole names, for PEFT.
TARGETS = "|".join(LAYERS).replace(".", r"\.")


def transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel.from_pretrained(FIXTURES / "checkpoints/base/transformer")
    return model.requires_grad_(False)


def fill(parameters: list[tuple[str, torch.Tensor]], seed: int) -> None:
    """Random values, none of them near 0 in all places as untrained factors are."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)


def save_expected(out: Path, name: str, changes: dict[str, torch.Tensor]) -> None:
    assert sorted(changes) == sorted(LAYERS), (name, sorted(changes))
    assert all(change.abs().max() > 0.05 for change in changes.values()), name
    folder = out / "expected"
    folder.mkdir(exist_ok=True)
    changes = {path: change.float().contiguous() for path, change in changes.items()}
    save_file(changes, folder / f"{name}.safetensors")


def peft_changes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The change of every adapted layer by PEFT, in f64."""
    model.double()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default") for name, layer in layers.items()
    }


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, it) for name, it in model.named_parameters() if it.requires_grad]


def peft(out: Path, name: str, config: Any, expected: bool = True) -> None:
    """A folder by `save_pretrained`."""
    model = get_peft_model(transformer(), config)
    fill(trainable(model), seed=len(name))
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink(missing_ok=True)
    # The path of the base model differs between machines.
    path = out / name / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if expected:
        save_expected(out, name, peft_changes(model))


def diffusers(out: Path, name: str, config: LoraConfig) -> None:
    """A file by `save_lora_weights`, with the configuration in its header."""
    model = transformer()
    model.add_adapter(config)
    fill(trainable(model), seed=len(name))
    QwenImagePipeline.save_lora_weights(
        out,
        transformer_lora_layers=get_peft_model_state_dict(model),
        weight_name=f"{name}.safetensors",
        **_collate_lora_metadata({"transformer": model}),
    )
    save_expected(out, name, peft_changes(model))


def lycoris(
    out: Path,
    name: str,
    algo: str,
    dim: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    expected: bool = True,
    **options: Any,
) -> None:
    """A file by `save_weights`, in the names of LyCORIS."""
    LycorisNetwork.apply_preset({"target_module": [], "target_name": LAYERS, "use_fnmatch": False})
    model = transformer()
    network = create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=alpha, algo=algo, **options)
    network.apply_to()
    fill(list(network.named_parameters()), seed=len(name))
    network.to(dtype)
    network.save_weights(str(out / f"{name}.safetensors"), dtype, {})
    if not expected:
        return
    network.double()
    model.double()
    changes = {}
    for layer in network.loras:
        path = next(path for path in LAYERS if layer.lora_name == f"lycoris_{path.replace('.', '_')}")
        linear = model.get_submodule(path)
        # What the layer adds to the outputs of unit vectors. `get_diff_weight` multiplies LoHa and LoKr by
        # their scale twice.
        inputs = torch.eye(linear.in_features, dtype=torch.float64)
        with torch.no_grad():
            changes[path] = (linear(inputs) - layer.org_forward(inputs)).T
    save_expected(out, name, changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURES / "lora/saved")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    patterns = dict(
        r=4,
        lora_alpha=6,
        rank_pattern={"transformer_blocks.1.attn.to_q": 3},
        alpha_pattern={r"transformer_blocks\.\d+\.attn\.add_k_proj": 5, "to_q": 2},
    )
    peft(out, "peft_lora", LoraConfig(target_modules=TARGETS, **patterns))
    peft(out, "peft_rslora", LoraConfig(target_modules=TARGETS, use_rslora=True, **patterns))
    peft(out, "peft_dora", LoraConfig(target_modules=TARGETS, r=2, use_dora=True), expected=False)
    peft(out, "peft_bias", LoraConfig(target_modules=TARGETS, r=2, lora_bias=True), expected=False)
    peft(out, "peft_lokr", LoKrConfig(target_modules=TARGETS, r=2, alpha=3, decompose_both=True))
    peft(out, "peft_lokr_whole", LoKrConfig(target_modules=TARGETS, r=16, alpha=4))
    peft(out, "peft_loha", LoHaConfig(target_modules=TARGETS, r=3, alpha=4))
    diffusers(out, "diffusers_lora", LoraConfig(target_modules=TARGETS, **patterns))
    diffusers(out, "diffusers_rslora", LoraConfig(target_modules=TARGETS, r=4, lora_alpha=3, use_rslora=True))
    lycoris(out, "lycoris_lora", "locon", 3, 2)
    lycoris(out, "lycoris_lora_bf16", "locon", 3, 2, torch.bfloat16)
    lycoris(out, "lycoris_lokr", "lokr", 2, 1, factor=4)
    lycoris(out, "lycoris_lokr_products", "lokr", 1, 3, factor=4, decompose_both=True)
    lycoris(out, "lycoris_lokr_whole", "lokr", 2, 1, factor=4, full_matrix=True)
    lycoris(out, "lycoris_lokr_scalar", "lokr", 2, 1, factor=4, use_scalar=True)
    lycoris(out, "lycoris_loha", "loha", 3, 2)
    lycoris(out, "lycoris_dora", "locon", 2, 1, dora_wd=True, expected=False)
    lycoris(out, "lycoris_whole", "full", 1, 1, expected=False)


if __name__ == "__main__":
    main()
