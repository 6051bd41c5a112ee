# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate==1.15.0", "diffusers==0.42.1", "lycoris-lora==4.1.3", "numpy==2.4.6", "peft==0.21.2",
#   "pillow==13.0.0", "safetensors==0.8.0", "torch==2.15.0", "transformers==5.23.0",
# ]
# ///
"""Creates the adapters of the tests and what diffusers and peft generate with them.

Needs the checkpoints that make_fixtures.py makes. CPU only, no network, about one minute:

    python tests/reference/make_lora_fixtures.py [--out tests/fixtures] [--only CASE ...]

Writes to tests/fixtures/lora:

- adapters/: one file, or folder of PEFT, for each adapter, under the names that its trainer writes.
- adapters.json: what each file means: the names of the factors of a module and the scale of the change.
- cases/ and cases.json: the stages of one run for each case, as make_fixtures.py records them.

Each change of a weight is about as large as the weight, and every case checks that its latents differ from
those of the base model by more than 1e-2 of the largest magnitude. Where diffusers or peft can load a
file, the reference is their run of the adapter beside the base weights. Otherwise it is diffusers with
weights that the change, computed in f64, is added to. In f32 the two ways are compared with each other
for every adapter, so that a wrong meaning in adapters.json stops this script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from lycoris.functional import loha, lokr
from make_fixtures import REAL_SCHEDULER, Case, Tensors, load, run, write_json
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"

ATTENTION = [f"attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)]  # fmt: skip
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
MODULATION = ["img_mod.1", "txt_mod.1"]
OUTSIDE = ["img_in", "txt_in", "proj_out"]
NORM_OUT = ["norm_out.linear"]
TIME = [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
# One linear layer of each shape.
SOME = ["attn.to_q", "attn.add_k_proj", "img_mlp.net.2", "txt_mlp.net.0.proj"]

# ---------------------------------------------------------------------------------------------
# Adapters


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter file.

    `factors` names the tensors of one module: `{path}` stands for the module's path in the checkpoint,
    `{under}` for the same with underscores. `scales` is what multiplies the product of the factors, by
    module where it differs from `scale`. `make` writes the file. `how` loads it for the reference:
    "diffusers", "peft" or "merged".
    """

    name: str
    file: str
    make: Callable[[Adapter, Path, torch.nn.Module], None]
    factors: dict[str, str]
    scale: float = 1.0
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    how: str = "diffusers"
    checkpoint: str = "base"
    modules: tuple[str, ...] = ()
    seed: int = 0
    rank: int = 4
    dtype: torch.dtype = torch.float32
    alpha: float | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self.file,
            "checkpoint": self.checkpoint,
            "factors": self.factors,
            "scale": self.scale,
            "scales": self.scales,
        }


def in_blocks(*layers: str, blocks: int = 2) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{block}.{layer}" for block in range(blocks) for layer in layers)


def sizes(transformer: torch.nn.Module, path: str) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    layer = transformer.get_submodule(path)
    return layer.in_features, layer.out_features


def low_rank(
    generator: torch.Generator, transformer: torch.nn.Module, path: str, rank: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors down and up; the change, times `scale`, is about as large as a weight of make_fixtures.py."""
    d_in, d_out = sizes(transformer, path)
    down = torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in)
    up = torch.randn(d_out, rank, generator=generator) / math.sqrt(rank) / scale
    return down, up


def under(path: str) -> str:
    return path.replace(".", "_")


def write(adapter: Adapter, file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors in the adapter's type; scalars keep theirs."""
    kept = {name: t.to(adapter.dtype) if t.ndim == 2 else t for name, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in sorted(kept.items())}, file, metadata)


def pairs(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """Two factors for each module and, if the adapter has one, the same alpha for all."""
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors: Tensors = {}
    for path in adapter.modules:
        down, up = low_rank(generator, transformer, path, adapter.rank, adapter.scale)
        tensors |= {named(adapter, "down", path): down, named(adapter, "up", path): up}
        if adapter.alpha is not None:
            dtype = {1.0: torch.int64, 8.0: torch.bfloat16}.get(adapter.alpha, torch.float32)
            alpha = torch.tensor(adapter.alpha).to(dtype)
            # Both shapes are in use.
            tensors[named(adapter, "down", path).replace("lora_down.weight", "alpha")] = (
                alpha.reshape(1) if adapter.alpha == 8.0 else alpha
            )
    write(adapter, file, tensors)


def named(adapter: Adapter, factor: str, path: str) -> str:
    return adapter.factors[factor].format(path=path, under=under(path))


def mixed_ranks(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """Every module has a rank and an alpha of its own."""
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors: Tensors = {}
    for index, path in enumerate(adapter.modules):
        rank, alpha = MIXED[index]
        scale = alpha.item() / rank
        down, up = low_rank(generator, transformer, path, rank, scale)
        tensors |= {
            named(adapter, "down", path): down,
            named(adapter, "up", path): up,
            f"{path}.alpha": alpha,
        }
    write(adapter, file, tensors)


# Rank and alpha of the modules of `mixed`.
MIXED = [
    (1, torch.tensor(0.5)), (2, torch.tensor(3)), (3, torch.tensor(4.5, dtype=torch.bfloat16)),
    (5, torch.tensor(1.0, dtype=torch.float16)), (6, torch.tensor(16.0)), (4, torch.tensor(2, dtype=torch.int32)),
    (2, torch.tensor([7.0])), (1, torch.tensor(1.0, dtype=torch.float64)),
]  # fmt: skip


def fill_layers(adapter: Adapter, transformer: torch.nn.Module) -> None:
    """Fills the layers that peft has added to a transformer, and compares their scale with adapters.json."""
    generator = torch.Generator().manual_seed(adapter.seed)
    for path in adapter.modules:
        layer = transformer.get_submodule(path)
        scale = layer.scaling["default"]
        assert math.isclose(scale, adapter.scales.get(path, adapter.scale)), (path, scale)
        down, up = low_rank(generator, transformer, path, layer.r["default"], scale)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)


def peft_config(adapter: Adapter) -> LoraConfig:
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or adapter.rank,
        target_modules=list(adapter.modules),
        **PEFT_OPTIONS.get(adapter.name, {}),
    )


# Options beside rank, alpha and modules. A pattern matches the end of a module's path.
PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "header": {
        "rank_pattern": {"img_mlp.net.2": 3},
        "alpha_pattern": {"attn.to_q": 10, "transformer_blocks.1.attn.add_k_proj": 1},
    },
    "peft_rslora": {"use_rslora": True},
    "peft_patterns": {
        "rank_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 5},
        "alpha_pattern": {"1.img_mlp.net.2": 7, "to_q": 2.5},
    },
}


def saved_by_diffusers(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """As diffusers' training scripts save: with the configuration in the file's header."""
    config = peft_config(adapter)
    transformer.add_adapter(config, adapter_name="default")
    fill_layers(adapter, transformer)
    metadata = config.to_dict() | {"target_modules": sorted(adapter.modules)} if adapter.name == "header" else None
    QwenImagePipeline.save_lora_weights(
        file.parent,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        weight_name=file.name,
        transformer_lora_adapter_metadata=metadata,
    )
    if adapter.dtype != torch.float32:
        write(adapter, file, load_file(file))


def saved_by_peft(adapter: Adapter, folder: Path, transformer: torch.nn.Module) -> None:
    """The folder of `PeftModel.save_pretrained`."""
    model = PeftModel(transformer, peft_config(adapter))
    fill_layers(adapter, model.base_model.model)
    # A set, whose order changes from run to run.
    model.peft_config["default"].target_modules = sorted(adapter.modules)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)


def fused_qkv(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """One pair for q, k and v, whose outputs lie one below the other in `up`."""
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors: Tensors = {}
    for name in adapter.modules:
        block = name.rpartition(".attn.")[0]
        parts = [low_rank(generator, transformer, f"{block}.attn.to_q", adapter.rank) for _ in range(3)]
        tensors |= {
            named(adapter, "down", name): parts[0][0],
            named(adapter, "up", name): torch.cat([up for _, up in parts]),
        }
    write(adapter, file, tensors)


def split_qkv(tensors: Tensors) -> Tensors:
    """The tensors of `fused_qkv` with a pair for each of q, k and v."""
    split = {}
    for name, tensor in tensors.items():
        fused, names = (
            (".to_qkv.", ("to_q", "to_k", "to_v"))
            if ".to_qkv." in name
            else (".add_qkv_proj.", ("add_q_proj", "add_k_proj", "add_v_proj"))
        )
        parts = tensor.chunk(3) if "lora_B" in name else [tensor] * 3
        split |= {name.replace(fused, f".{part}."): t.clone() for part, t in zip(names, parts)}
    return split


def kronecker(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """LoKr with a left factor of 4 by 8. A split factor is stored as two, whose product it is."""
    generator = torch.Generator().manual_seed(adapter.seed)
    split_left, split_right = "left_a" in adapter.factors, "right_a" in adapter.factors
    tensors: Tensors = {}
    for path in adapter.modules:
        d_in, d_out = sizes(transformer, path)
        left, right = (4, 8), (d_out // 4, d_in // 8)

        def factor(name: str, shape: tuple[int, int], split: bool, size: float) -> Tensors:
            if not split:
                return {named(adapter, name, path): size * torch.randn(shape, generator=generator)}
            rank = adapter.rank
            return {
                named(adapter, f"{name}_a", path): size * torch.randn(shape[0], rank, generator=generator),
                named(adapter, f"{name}_b", path): torch.randn(rank, shape[1], generator=generator) / math.sqrt(rank),
            }

        tensors |= factor("left", left, split_left, 1.0)
        tensors |= factor("right", right, split_right, 1 / math.sqrt(d_in) / adapter.scale)
        name = next(name for name in tensors if under(path) in under(name)).rpartition(".")[0]
        tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
    write(adapter, file, tensors)


def hadamard(adapter: Adapter, file: Path, transformer: torch.nn.Module) -> None:
    """LoHa."""
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors: Tensors = {}
    for path in adapter.modules:
        d_in, d_out = sizes(transformer, path)
        rank = adapter.rank
        for index in (1, 2):
            size = 1 / math.sqrt(d_in) / adapter.scale if index == 1 else 1.0
            tensors[named(adapter, f"w{index}_a", path)] = size * torch.randn(d_out, rank, generator=generator)
            tensors[named(adapter, f"w{index}_b", path)] = (
                torch.randn(rank, d_in, generator=generator) / math.sqrt(rank)
            )
        tensors[named(adapter, "w1_a", path).replace("hada_w1_a", "alpha")] = torch.tensor(adapter.alpha)
    write(adapter, file, tensors)


DIFFUSERS = {"down": "transformer.{path}.lora_A.weight", "up": "transformer.{path}.lora_B.weight"}
PEFT = {"down": "base_model.model.{path}.lora_A.weight", "up": "base_model.model.{path}.lora_B.weight"}
COMFY = {"down": "diffusion_model.{path}.lora_A.weight", "up": "diffusion_model.{path}.lora_B.weight"}
LIGHTNING = {"down": "{path}.lora_down.weight", "up": "{path}.lora_up.weight"}
KOHYA = {"down": "lora_unet_{under}.lora_down.weight", "up": "lora_unet_{under}.lora_up.weight"}
TWELVE = in_blocks(*ATTENTION, *MLP)


def lokr_names(prefix: str, left: bool, right: bool) -> dict[str, str]:
    names = ["left_a", "left_b"] if left else ["left"]
    names += ["right_a", "right_b"] if right else ["right"]
    replaced = {"left": "lokr_w1", "right": "lokr_w2"}
    return {name: prefix + "." + replaced[(parts := name.split("_"))[0]] + "".join(f"_{p}" for p in parts[1:])
            for name in names}  # fmt: skip


def file_of(name: str) -> str:
    return f"{name}.safetensors"


def one_alpha(name: str, alpha: float, seed: int) -> Adapter:
    return Adapter(name, file_of(name), pairs, LIGHTNING, scale=alpha / 3, modules=in_blocks(*SOME), rank=3,
                   alpha=alpha, seed=seed)  # fmt: skip


ADAPTERS = [
    Adapter("twelve", file_of("twelve"), saved_by_diffusers, DIFFUSERS, modules=TWELVE, seed=1),
    Adapter("twelve_f16", file_of("twelve_f16"), saved_by_diffusers, DIFFUSERS, modules=TWELVE, seed=1,
            dtype=torch.float16),
    Adapter("twelve_bf16", file_of("twelve_bf16"), saved_by_diffusers, DIFFUSERS, modules=TWELVE, seed=1,
            dtype=torch.bfloat16),
    Adapter("second", file_of("second"), pairs, COMFY, modules=in_blocks(*ATTENTION[:6], "img_mlp.net.2"), rank=2,
            seed=2),
    one_alpha("alpha_1", 1.0, 3),
    one_alpha("alpha_8", 8.0, 4),
    one_alpha("alpha_half", 0.5, 5),
    # An alpha of 0 means the rank, as in the trainers; diffusers would multiply by 0.
    Adapter("alpha_0", file_of("alpha_0"), pairs, LIGHTNING, modules=in_blocks(*SOME), rank=3, alpha=0.0, seed=6,
            how="merged"),
    Adapter("alpha_missing", file_of("alpha_missing"), pairs, KOHYA, modules=in_blocks(*SOME), rank=3, seed=7),
    Adapter("mixed", file_of("mixed"), mixed_ranks, LIGHTNING, modules=in_blocks(*SOME), seed=8,
            scales={path: alpha.item() / rank for path, (rank, alpha) in zip(in_blocks(*SOME), MIXED)}),
    Adapter("header", file_of("header"), saved_by_diffusers, DIFFUSERS, modules=in_blocks(*SOME), rank=4, alpha=6,
            seed=9, scale=1.5,
            scales={f"transformer_blocks.{i}.img_mlp.net.2": 2.0 for i in range(2)}
            | {f"transformer_blocks.{i}.attn.to_q": 2.5 for i in range(2)}
            | {"transformer_blocks.1.attn.add_k_proj": 0.25}),
    Adapter("peft_rslora", "peft_rslora", saved_by_peft, PEFT, modules=in_blocks(*SOME), rank=4, alpha=3,
            seed=10, scale=1.5, how="peft"),
    Adapter("peft_patterns", "peft_patterns", saved_by_peft, PEFT, modules=in_blocks(*SOME), rank=4, alpha=4,
            seed=11, how="peft",
            scales={f"transformer_blocks.{i}.attn.to_q": 0.5 for i in range(2)}
            | {"transformer_blocks.1.img_mlp.net.2": 1.75}),
    Adapter("modulation", file_of("modulation"), saved_by_diffusers, DIFFUSERS,
            modules=in_blocks(*MODULATION) + tuple(NORM_OUT), rank=2, seed=12),
    Adapter("outside", file_of("outside"), saved_by_diffusers, DIFFUSERS, modules=tuple(OUTSIDE), rank=3, seed=13),
    Adapter("time", file_of("time"), saved_by_diffusers, DIFFUSERS, modules=tuple(TIME), rank=3, seed=14),
    Adapter("every_layer", file_of("every_layer"), saved_by_diffusers, DIFFUSERS, checkpoint="odd", rank=2, seed=15,
            modules=in_blocks(*ATTENTION, *MLP, *MODULATION, blocks=3) + tuple(OUTSIDE + NORM_OUT + TIME),
            dtype=torch.float16),
    Adapter("fused_qkv", file_of("fused_qkv"), fused_qkv, COMFY,
            modules=in_blocks("attn.to_qkv", "attn.add_qkv_proj"), rank=2, seed=16),
    # With both factors whole the scale is 1, whatever alpha says.
    Adapter("lokr_whole", file_of("lokr_whole"), kronecker, lokr_names("lycoris_{under}", False, False),
            modules=TWELVE, alpha=3.0, seed=17, how="merged"),
    Adapter("lokr_split_right", file_of("lokr_split_right"), kronecker, lokr_names("lora_unet_{under}", False, True),
            modules=TWELVE, rank=2, alpha=1.0, scale=0.5, seed=18, how="merged"),
    Adapter("lokr_split_both", file_of("lokr_split_both"), kronecker, lokr_names("diffusion_model.{path}", True, True),
            modules=TWELVE, rank=3, alpha=4.5, scale=1.5, seed=19, how="merged"),
    Adapter("loha", file_of("loha"), hadamard,
            {f"w{i}_{x}": f"lycoris_{{under}}.hada_w{i}_{x}" for i in (1, 2) for x in "ab"},
            modules=in_blocks(*SOME), rank=2, alpha=3.0, scale=1.5, seed=20, how="merged"),
    # The names, the type and the ratio of alpha to rank of Lightning.
    Adapter("lightning", "Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors", pairs, LIGHTNING, modules=TWELVE,
            rank=4, alpha=0.5, scale=0.125, seed=21, dtype=torch.bfloat16),
]  # fmt: skip
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}


def make(adapter: Adapter, folder: Path, pipe: QwenImagePipeline) -> None:
    path = folder / adapter.file
    if path.is_dir():
        shutil.rmtree(path)
    adapter.make(adapter, path, pipe.transformer)
    if path.is_file():
        path.chmod(0o644)


def changes(adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    """The change of each module in f64, from the file and what adapters.json says of it."""
    path = folder / adapter.file
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    modules = adapter.modules
    if adapter.make is fused_qkv:
        tensors = split_qkv(tensors)
        modules = in_blocks(*(name for name in ATTENTION if "out" not in name))
    result = {}
    for module in modules:
        f = {name: tensors[named(adapter, name, module)].double() for name in adapter.factors}
        if "down" in f:
            product = f["up"] @ f["down"]
        elif "w1_a" in f:
            product = (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
            check = loha.diff_weight(f["w1_b"], f["w1_a"], f["w2_b"], f["w2_a"], None, None, gamma=torch.tensor(1.0))
            assert torch.allclose(product, check.double()), module
        else:
            left = f["left"] if "left" in f else f["left_a"] @ f["left_b"]
            right = f["right"] if "right" in f else f["right_a"] @ f["right_b"]
            product = torch.kron(left, right)
            parts = [f.get(name) for name in ("left", "left_a", "left_b", "right", "right_a", "right_b")]
            # LyCORIS divides by a rank only if there is one.
            check = lokr.diff_weight(*parts, None, gamma=adapter.alpha if len(f) > 2 else 1.0)
            assert torch.allclose(adapter.scale * product, check.double()), module
        result[module] = adapter.scales.get(module, adapter.scale) * product
    return result


# ---------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass(frozen=True)
class LoraCase:
    """A run with adapters. `dtype` is the type of the model. `shift` replaces the schedule of the checkpoint
    by that of Lightning."""

    case: Case
    adapters: tuple[tuple[str, float], ...]
    dtype: str = "f32"
    shift: float | None = None

    def describe(self) -> dict[str, Any]:
        case = dataclasses.asdict(self.case)
        for name in ("vae_tile", "details", "brief", "num_images"):
            case.pop(name)
        adapters = [{"name": name, "scale": scale} for name, scale in self.adapters]
        return case | {"adapters": adapters, "dtype": self.dtype, "shift": self.shift}


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LIGHTNING_SCHEDULER = REAL_SCHEDULER | dict(base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None)


def lora_case(
    name: str,
    *adapters: str | tuple[str, float],
    dtype: str = "f32",
    shift: float | None = None,
    **case: Any,
) -> LoraCase:
    pairs = tuple((it, 1.0) if isinstance(it, str) else it for it in adapters)
    return LoraCase(Case(name, **case), pairs, dtype, shift)


CASES = [
    lora_case("twelve", "twelve", num_inference_steps=4, details=True),
    *(
        lora_case(f"scale_{name}", ("second", scale), seed=50)
        for name, scale in (("minus_1", -1.0), ("0_35", 0.35), ("2", 2.0))
    ),
    *(
        lora_case(name, name, seed=51)
        for name in ("alpha_1", "alpha_8", "alpha_half", "alpha_0", "alpha_missing", "mixed", "header",
                     "peft_rslora", "peft_patterns")
    ),
    lora_case("modulation", "modulation", num_inference_steps=4, details=True, seed=52),
    lora_case("modulation_one_step", "modulation", num_inference_steps=1, true_cfg_scale=1.0, shift=3.0, seed=53),
    lora_case("outside", "outside", seed=54),
    lora_case("time", "time", num_inference_steps=3, details=True, seed=55),
    lora_case("two", ("twelve", 0.7), ("second", 0.3), seed=56),
    lora_case("two_swapped", ("second", 0.3), ("twelve", 0.7), seed=56),
    lora_case("two_with_modulation", ("modulation", 0.4), ("twelve", 0.6), num_inference_steps=3, seed=57),
    lora_case("fused_qkv", "fused_qkv", seed=58),
    *(
        lora_case(f"{file}_file_{dtype}_model", f"twelve{'' if file == 'f32' else '_' + file}", dtype=dtype, seed=59,
                  true_cfg_scale=4.0 if dtype == "f32" else 1.0)
        for dtype in DTYPES for file in DTYPES if (file, dtype) != ("f32", "f32")
    ),
    lora_case("every_layer", "every_layer", checkpoint="odd", num_inference_steps=3, height=40, width=24,
              true_cfg_scale=3.0, seed=60, details=True),
    *(lora_case(name, name, seed=61) for name in ("lokr_whole", "lokr_split_right", "lokr_split_both", "loha")),
    lora_case("lightning", "lightning", num_inference_steps=4, true_cfg_scale=1.0, shift=3.0, seed=62),
]  # fmt: skip
# Stages of `details` that the tests of the base model have, or that no test reads.
DROPPED = ("rope.", "prompt_embeds", "negative_prompt_embeds", "initial_noise", "image_float", "vae_in", "vae_out",
           "sigmas")  # fmt: skip
KEPT_WITH_DETAILS = ("prompt_embeds", "negative_prompt_embeds", "initial_noise")


def open_pipe(case: LoraCase, fixtures: Path) -> QwenImagePipeline:
    pipe = load(fixtures / "checkpoints" / case.case.checkpoint, DTYPES[case.dtype])
    if case.shift is not None:
        assert case.shift == 3.0
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**LIGHTNING_SCHEDULER)
    return pipe


def beside(pipe: QwenImagePipeline, case: LoraCase, folder: Path) -> QwenImagePipeline:
    """Loads the adapters of a case beside the weights, with diffusers or peft."""
    names = []
    for name, _ in case.adapters:
        adapter = BY_NAME[name]
        path = folder / adapter.file
        if adapter.how == "peft":
            PeftModel.from_pretrained(pipe.transformer, path)
            assert [scale for _, scale in case.adapters] == [1.0]
            return pipe
        if adapter.make is fused_qkv:
            tensors = {n.replace("diffusion_model.", "transformer."): t for n, t in split_qkv(load_file(path)).items()}
            pipe.load_lora_weights(tensors, adapter_name=name)
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        names.append(name)
    pipe.set_adapters(names, adapter_weights=[scale for _, scale in case.adapters])
    return pipe


def merged(pipe: QwenImagePipeline, case: LoraCase, folder: Path) -> QwenImagePipeline:
    """Adds the adapters of a case to the weights, in f64."""
    weights: Tensors = {}
    for name, scale in case.adapters:
        for module, change in changes(BY_NAME[name], folder).items():
            weight = pipe.transformer.get_submodule(module).weight
            weights[module] = weights.get(module, weight.detach().double()) + scale * change
    for module, weight in weights.items():
        with torch.no_grad():
            pipe.transformer.get_submodule(module).weight.copy_(weight)
    return pipe


def off(stages: Tensors, others: Tensors, name: str) -> float:
    """Largest difference of a stage, relative to the largest magnitude."""
    return ((stages[name] - others[name]).abs().max() / others[name].abs().max()).item()


def reference(case: LoraCase, fixtures: Path, bases: dict[Any, Tensors]) -> Tensors:
    """The stages of a case, after the checks that the module's documentation names."""
    folder = fixtures / "lora/adapters"
    last = f"latents_step{case.case.num_inference_steps - 1}"
    by_hand = any(BY_NAME[name].how == "merged" for name, _ in case.adapters)
    load_adapters = merged if by_hand else beside
    stages = run(load_adapters(open_pipe(case, fixtures), case, folder), case.case)
    key = (dataclasses.replace(case.case, name=""), case.dtype, case.shift)
    if key not in bases:
        bases[key] = run(open_pipe(case, fixtures), case.case)
    change = off(stages, bases[key], last)
    difference = 0.0
    if case.dtype == "f32" and not by_hand:
        difference = off(run(merged(open_pipe(case, fixtures), case, folder), case.case), stages, last)
    print(f"{case.case.name:22}{change:9.1e}{difference:9.1e}", flush=True)
    assert change > 1e-2, "the adapter has too little effect"
    assert difference < 2e-5, "adapters.json or a formula is wrong"
    image = stages["image_u8"] / 255
    assert image.std() > 0.05, "the image is flat"
    return stages


def kept(stages: Tensors, case: Case) -> Tensors:
    """The stages that tests compare."""
    needed = KEPT_WITH_DETAILS if case.details else ()
    return {
        name: tensor for name, tensor in stages.items() if name in needed or not name.startswith(DROPPED)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("--only", nargs="*", help="names of cases to run; the lists always have all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out / "lora"
    for folder in ("adapters", "cases"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for adapter in ADAPTERS:
        make(adapter, out / "adapters", load(args.out / "checkpoints" / adapter.checkpoint))
    write_json(out / "adapters.json", [adapter.describe() for adapter in ADAPTERS])
    bases: dict[Any, Tensors] = {}
    print(f"{'difference from':22}{'base':>9}{'merged':>9}")
    for case in CASES:
        if args.only and case.case.name not in args.only:
            continue
        stages = kept(reference(case, args.out, bases), case.case)
        path = out / "cases" / f"{case.case.name}.safetensors"
        save_file(stages, path)
        path.chmod(0o644)
    write_json(out / "cases.json", [case.describe() for case in CASES])
    for folder in (out / "adapters", out / "cases", out):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.relative_to(args.out)}: {size // 1024} KB")


if __name__ == "__main__":
    main()
