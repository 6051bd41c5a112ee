"""Compares the noise of a dump with torch's for the same seed.

    kiln generate "a cat" --rng cuda --seed 5 --dtype f32 --dump run.safetensors
    python scripts/noise_against_torch.py run.safetensors 5 cuda

Exits with code 1 if a value differs by more than 2e-6: torch's own values differ in the last bits between
versions of CUDA's math library. Needs no package but torch.
"""

import json
import struct
import sys
from pathlib import Path

import torch

TOLERANCE = 2e-6


def read(path: Path, name: str) -> torch.Tensor:
    """Reads an f32 tensor of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])[name]
    assert entry["dtype"] == "F32", entry
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    return torch.frombuffer(bytearray(content[begin:end]), dtype=torch.float32).reshape(entry["shape"])


def main() -> None:
    path, seed, device = sys.argv[1:]
    noise = read(Path(path), "initial_noise")
    generator = torch.Generator(device).manual_seed(int(seed))
    expected = torch.randn(noise.shape, generator=generator, device=device, dtype=torch.float32).cpu()
    off = (noise - expected).abs()
    equal = (off == 0).float().mean().item()
    print(
        f"{noise.numel()} values of a {device} generator of torch {torch.__version__}, seed {seed}: "
        f"{100 * equal:.3f} % equal, the others off by at most {off.max().item():.1e}"
    )
    if not off.max().item() <= TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
