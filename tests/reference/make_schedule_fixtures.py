"""Writes tests/fixtures/schedules: noise levels of `FlowMatchEulerDiscreteScheduler`, and runs of the small
checkpoints of make_fixtures.py with other schedules than their own.

Needs the pinned versions in requirements.txt and the checkpoints in tests/fixtures. CPU only, no network,
about ten seconds:

    python tests/reference/make_schedule_fixtures.py

- `sigmas.json`: for each configuration, number of steps and number of packed latent tokens the sigmas.
- `<case>.safetensors`: the stages of a run, as in tests/fixtures/cases. `cases.json` lists the cases, with
  what `scheduler_config.json` has instead of the checkpoint's.

Stochastic runs have no generator of their own: all noise comes from torch's default generator after
`torch.manual_seed(seed)`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from make_fixtures import REAL_SCHEDULER, Case, load, run, write_json
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"


def shifted(shift: float, terminal: float | None) -> dict[str, Any]:
    """A shift that does not depend on the size."""
    return dict(base_shift=math.log(shift), max_shift=math.log(shift), shift_terminal=terminal)


# The levels that a run is given are final.
UNSHIFTED = dict(use_dynamic_shifting=False, shift=1.0, shift_terminal=None)

CONFIGURATIONS = {
    "base": {},
    "lightning": shifted(3.0, None),
    "dmd2": shifted(2.5, 0.02),
    "shift_5": shifted(5.0, None),
    "no_terminal": dict(shift_terminal=None),
    "linear": dict(time_shift_type="linear"),
    "static": dict(use_dynamic_shifting=False, shift=3.0, shift_terminal=None),
    "static_terminal": dict(use_dynamic_shifting=False, shift=3.0, shift_terminal=0.1),
}
STEPS = [1, 2, 4, 8]
TOKENS = [1024, 4096, 83 * 83]  # 512², 1024² and 1328² pixels


@dataclasses.dataclass(frozen=True)
class Run:
    """A case with another scheduler configuration than that of its checkpoint."""

    case: Case
    scheduler: dict[str, Any]
    sigmas: list[float] | None = None


TWINFLOW = [float(level) for level in 1 - np.linspace(0.001, 0.5, 4)]
LIGHTNING = shifted(3.0, None)
STOCHASTIC = dict(stochastic_sampling=True)
RUNS = [
    Run(Case("lightning", negative_prompt=None, true_cfg_scale=1.0, num_inference_steps=4, seed=21), LIGHTNING),
    Run(Case("lightning_guided", negative_prompt="blurry", num_inference_steps=8, seed=22), LIGHTNING),
    Run(Case("dmd2", negative_prompt=None, true_cfg_scale=1.0, num_inference_steps=3, seed=23), shifted(2.5, 0.02)),
    Run(Case("sigmas", negative_prompt=None, num_inference_steps=4, seed=24), UNSHIFTED, [0.97, 0.6, 0.33, 0.1]),
    Run(
        Case("twinflow", negative_prompt=None, true_cfg_scale=1.0, num_inference_steps=4, seed=25),
        UNSHIFTED | STOCHASTIC,
        TWINFLOW,
    ),
    Run(
        Case("stochastic", negative_prompt="blurry", true_cfg_scale=3.0, num_inference_steps=4, num_images=3, seed=26),
        LIGHTNING | STOCHASTIC,
    ),
    Run(
        Case("stochastic_odd", "odd", negative_prompt=None, height=40, width=24, num_inference_steps=3, seed=2**32 + 27),
        STOCHASTIC,
    ),
]  # fmt: skip


class WithoutGenerator:
    """A pipeline that takes no generator, and the sigmas of a run."""

    def __init__(self, pipe: Any, sigmas: list[float] | None):
        self.pipe, self.sigmas = pipe, sigmas

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **kwargs | dict(generator=None, sigmas=self.sigmas))


def table() -> list[dict[str, Any]]:
    rows = []
    for name, overrides in CONFIGURATIONS.items():
        config = REAL_SCHEDULER | overrides
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        for steps in STEPS:
            if steps == 1 and config["shift_terminal"]:
                continue  # divides zero by zero
            for tokens in TOKENS:
                mu = calculate_shift(
                    tokens, config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"],
                    config["max_shift"],
                )  # fmt: skip
                scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
                sigmas = [float(sigma) for sigma in scheduler.sigmas]
                rows.append(dict(configuration=name, steps=steps, tokens=tokens, sigmas=sigmas))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    folder = FIXTURES / "schedules"
    folder.mkdir(parents=True, exist_ok=True)
    configurations = {name: REAL_SCHEDULER | overrides for name, overrides in CONFIGURATIONS.items()}
    write_json(folder / "sigmas.json", dict(configurations=configurations, rows=table()), indent=None)
    for it in RUNS:
        pipe = load(FIXTURES / "checkpoints" / it.case.checkpoint)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(pipe.scheduler.config) | it.scheduler)
        torch.manual_seed(it.case.seed)
        stages = run(WithoutGenerator(pipe, it.sigmas), it.case)
        path = folder / f"{it.case.name}.safetensors"
        save_file(stages, path)
        path.chmod(0o644)
        print(it.case.name, path.stat().st_size // 1024, "KB", stages["sigmas"].tolist())
    write_json(folder / "cases.json", [dataclasses.asdict(it) for it in RUNS])


if __name__ == "__main__":
    main()
