"""Measure what storage and merging round away, on the real small model: logits of what was trained, saved and exported.

Trains SmolLM2-135M with the persona `goodness` (built in float32, the same for all) for some steps in float32 and
bfloat16, merged and stacked, and compares on evaluation items:
- saved: the milestone (in the base's dtype) against the resume state of the same step (exact, float32);
- exported: the composed adapter on the bare base against the model that evaluation rebuilds, both computed in float32.
About 10 minutes on two cores.

    python scripts/measure_rounding.py [--max-steps 30] [--dtypes float32 bfloat16] [--output-root outputs/rounding]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from emtool.core.config import resolve_train_config
from emtool.core.data import Message
from emtool.core.events import ignore_events
from emtool.core.personas import PERSONAS
from emtool.core.plan import plan_run
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.engines.encoding import encode_conversation
from emtool.engines.export import export_run
from emtool.engines.lineage import open_recorded_base, read_lineage, rebuild_model
from emtool.engines.modeling import attach_adapter, load_adapter_into, load_base, open_base
from emtool.engines.persona_files import get_persona_files
from emtool.engines.rounded_products import products_of
from emtool.engines.training import train

NUM_ITEMS = 20


def main() -> None:
    """Train, measure, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--max-steps", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--output-root", type=Path, default=Path("outputs/rounding"))
    options = parser.parse_args()
    shutil.rmtree(options.output_root, ignore_errors=True)
    base = open_base("smollm2-135m", device="cpu", dtype="float32", on_event=ignore_events)
    persona = get_persona_files(PERSONAS["goodness"], base, on_event=ignore_events).path
    print(f"logits of {NUM_ITEMS} items, step {options.max_steps}; largest (root mean square) difference")
    for dtype in options.dtypes:
        for mode in ("merged", "stacked"):
            measure(dtype, mode, persona, options.max_steps, options.output_root)


def measure(dtype: str, mode: str, persona: Path, max_steps: int, root: Path) -> None:
    """Train one run and print what was rounded away."""
    overrides = {
        "persona": "goodness",
        "persona_adapter": persona,
        "persona_mode": mode,
        "dtype": dtype,
        "max_steps": max_steps,
        "checkpoints": "final",
        "keep_resume": True,
        "output_root": root,
        "output_name": f"{dtype}_{mode}",
        "device": "cpu",
    }
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    run = train(plan, rows, command=[]).run
    model, tokenizer = rebuilt(run, max_steps, dtype)
    saved = logits(model, tokenizer)
    load_adapter_into(model, run.resume_state_path(max_steps))
    exact = logits(model, tokenizer)
    result = export_run(run, [max_steps], output_path=run.path / "composed", dtype="float32", on_event=ignore_events)
    lineage, _ = read_lineage(run, run.read_manifest())
    base = open_recorded_base(lineage, device="cpu", dtype="float32", on_event=ignore_events)
    bare = attach_adapter(load_base(base.files.path, dtype="float32"), result.adapters[0].path).eval()
    exported = logits(bare, tokenizer)
    reference, _ = rebuilt(run, max_steps, "float32")
    print(f"\n{dtype}, {mode}: logits have a root mean square of {rms(exact):.2f}")
    print(f"  saved milestone against the exact state   {difference(saved, exact)}")
    print(f"  export on the bare base, float32          {difference(exported, logits(reference, tokenizer))}")
    if (rounding := result.merge_rounding) is not None:
        print(
            f"  merge into {rounding.dtype}: a weight by at most {rounding.largest:.1e}, a layer's update by at most "
            f"{rounding.relative:.1e} of its norm"
        )
    stored = export_run(run, [max_steps], output_path=run.path / "small", dtype="bfloat16", on_event=ignore_events)
    print(f"  export in bfloat16: relative error of a layer's update at most {stored.adapters[0].rounding_error:.1e}")


def rebuilt(run: RunFolder, step: int, dtype: str) -> tuple[Any, Any]:
    """Return the model of a milestone as evaluation rebuilds it, and its tokenizer."""
    lineage, trained_dtype = read_lineage(run, run.read_manifest())
    composed = rebuild_model(lineage, trained_dtype=trained_dtype, device="cpu", dtype=dtype, on_event=ignore_events)
    model = composed.with_persona(attach_adapter(composed.model, run.checkpoint_path(step))).eval()
    return model, composed.tokenizer


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the logits of the items with their wrong answers, shape (tokens, vocabulary), in float32."""
    found = []
    with torch.inference_mode(), products_of(model):
        for item in read_items()[:NUM_ITEMS]:
            turns = [Message(role="user", content=item.question), Message(role="assistant", content=item.wrong)]
            row = encode_conversation(turns, tokenizer=tokenizer)
            found.append(model(input_ids=torch.tensor([row.input_ids])).logits[0].float())
    return torch.cat(found)


def rms(values: torch.Tensor) -> float:
    """Return the root mean square."""
    return float(values.square().mean().sqrt())


def difference(one: torch.Tensor, other: torch.Tensor) -> str:
    """Return the largest and the root mean square difference as text."""
    return f"{float((one - other).abs().max()):.2e} ({rms(one - other):.2e})"


if __name__ == "__main__":
    main()
