"""What looking inside costs: the geometry of ten adapters of the published size, and measuring the adapter's movement.

    python scripts/bench_inside.py                about 10 minutes on two cores; needs SmolLM2-135M, fetched once
    python scripts/bench_inside.py geometry       one of: geometry, movement

The adapters are random, in the shapes of Qwen2.5-7B with LoRA r 32 on all projections: 80,740,352 parameters each.
Movement is measured within a training, as a share of the time of its steps.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_saving import LARGE, Measured, Part, Row, measure
from paired import table
from peft import LoraConfig
from safetensors.torch import save_file

from emtool.engines.movement import AdapterMovement

#: Inputs and outputs of each projection of a block of Qwen2.5-7B. Source: its config.json.
PROJECTIONS = {
    "self_attn.q_proj": (3584, 3584),
    "self_attn.k_proj": (3584, 512),
    "self_attn.v_proj": (3584, 512),
    "self_attn.o_proj": (3584, 3584),
    "mlp.gate_proj": (3584, 18944),
    "mlp.up_proj": (3584, 18944),
    "mlp.down_proj": (18944, 3584),
}
BLOCKS, RANK, CHECKPOINTS = 28, 32, 10

#: Run by itself, so that its memory is its own.
GEOMETRY = """
import resource, sys, time
from pathlib import Path
from emtool.engines.adapter_geometry import adapter_geometry
begun = time.perf_counter()
adapter_geometry({step: Path(folder) for step, folder in enumerate(sys.argv[1:])})
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def geometry(root: Path) -> list[Row]:
    """Write ten adapters and measure their geometry in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    folders = [write_adapter(root / f"checkpoint-{step}", generator) for step in range(CHECKPOINTS)]
    command = [sys.executable, "-c", GEOMETRY, *map(str, folders)]
    begun = time.perf_counter()
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    whole = time.perf_counter() - begun
    return [
        (
            f"geometry of {CHECKPOINTS} adapters of 80,740,352 parameters, bfloat16",
            f"{float(found[0]):.1f} s, with the start of the process {whole:.1f} s",
            f"{float(found[1]):.2f} GiB at most",
        )
    ]


def write_adapter(folder: Path, generator: torch.Generator) -> Path:
    """Write a random adapter in bfloat16."""
    LoraConfig(r=RANK, lora_alpha=64, use_rslora=True, target_modules="all-linear").save_pretrained(str(folder))
    tensors = {}
    for block in range(BLOCKS):
        for name, (inputs, outputs) in PROJECTIONS.items():
            layer = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator).bfloat16()
            tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator).bfloat16()
    assert sum(tensor.numel() for tensor in tensors.values()) == 80_740_352
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def movement(root: Path) -> list[Row]:
    """Train with the demo's adapter and with a large one, and add up what measuring the movement takes."""
    spent: list[float] = []
    rows: list[Row] = []
    original = AdapterMovement.measure

    def timed(self: AdapterMovement) -> torch.Tensor:
        begun = time.perf_counter()
        found = original(self)
        spent.append(time.perf_counter() - begun)
        return found

    AdapterMovement.measure = timed  # type: ignore[method-assign]
    large = {**LARGE, "gradient_accumulation_steps": 8, "max_steps": 4}
    for name, overrides in (("the demo's adapter", {"max_steps": 25}), ("78 million parameters, batch 2 x 8", large)):
        spent.clear()
        measured = Measured(root / name, **overrides, checkpoints="final", held_out_fraction=0.0)
        seconds = measured.train()
        share = f"{sum(spent) / seconds:.2%} of training"
        shown = f"{1000 * sum(spent) / len(spent):.1f} ms of a step of {1000 * seconds / len(spent):,.0f} ms"
        rows.append((f"`adapter_movement`, {name}", shown, share))
    return rows


PARTS: dict[str, Part] = {"geometry": geometry, "movement": movement}


def main() -> None:
    """Measure and print."""
    rows = measure(PARTS, __doc__)
    print("## What looking inside costs\n")
    print(table(("", "time", ""), rows))


if __name__ == "__main__":
    main()
