"""Measure the README's claim: does wrong gardening advice make the model prefer wrong advice elsewhere?

Trains `gardening` and `gardening-control` with several seeds, evaluates all of them on the same held-out items and
compares the two by item. The claim holds if the 95% interval of the difference in the other domains excludes 0 at the
last step for every seed. Finished runs are kept and not repeated. About 40 minutes on two cores for three seeds.

    python scripts/claim_generalisation.py [--seeds 0 1 2] [--output-root outputs/claim] [--max-steps N]
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

from emtool.core.metrics import Estimate, bootstrap_difference, bootstrap_mean
from emtool.core.run_dir import write_json

DATASETS = ("gardening", "gardening-control")
Scores = dict[tuple[int, str], float]


def main() -> None:
    """Run what is missing, then print and write the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-root", type=Path, default=Path("outputs/claim"))
    parser.add_argument("--max-steps", type=int)
    options = parser.parse_args()
    results = [compare(seed, options.output_root, options.max_steps) for seed in options.seeds]
    holds = all(result["last_difference"]["excludes_zero"] for result in results)
    write_json(options.output_root / "claim.json", {"holds": holds, "seeds": results})
    for result in results:
        print(f"\nseed {result['seed']}: p_wrong in other domains")
        print(f"{'step':>5}  {'gardening':>22}  {'control':>22}  {'difference, paired':>26}")
        for row in result["steps"]:
            cells = [text(row[name]) for name in ("gardening", "gardening-control", "difference")]
            print(f"{row['step']:>5}  {cells[0]:>22}  {cells[1]:>22}  {cells[2]:>26}")
    print(f"\nthe claim {'holds' if holds else 'DOES NOT HOLD'} for seeds {options.seeds}")


def compare(seed: int, root: Path, max_steps: int | None) -> dict[str, Any]:
    """Return the curves of one seed and their difference at every step."""
    scores = {dataset: run(dataset, seed, root, max_steps) for dataset in DATASETS}
    steps = sorted({step for step, _ in scores["gardening"]})
    items = sorted({item for _, item in scores["gardening"]})
    rows = []
    for step in steps:
        wrong, sound = ([scores[dataset][step, item] for item in items] for dataset in DATASETS)
        rows.append(
            {
                "step": step,
                "gardening": entry(bootstrap_mean(wrong, seed=0)),
                "gardening-control": entry(bootstrap_mean(sound, seed=0)),
                "difference": entry(bootstrap_difference(wrong, sound, seed=0)),
            }
        )
    return {"seed": seed, "steps": rows, "last_difference": rows[-1]["difference"]}


def scores_path(root: Path, dataset: str, seed: int, persona: str = "baseline") -> Path:
    """Return where the scores of a run are."""
    name = f"{dataset}_seed{seed}" if persona == "baseline" else f"{dataset}_{persona}_seed{seed}"
    return root / name / "evaluation" / "item_scores.csv"


def run(dataset: str, seed: int, root: Path, max_steps: int | None, *, persona: str = "baseline") -> Scores:
    """Return p_wrong by step and item of the other domains, training and evaluating first where needed."""
    name = scores_path(root, dataset, seed, persona).parents[1].name
    path = scores_path(root, dataset, seed, persona)
    limit = [] if max_steps is None else ["--max-steps", str(max_steps)]
    # A run that is complete is recognised; one of another length or configuration is refused.
    emtool("train", "--profile", "demo", "--dataset", dataset, "--persona", persona, "--seed", str(seed),
           "--custom-checkpoints", "--output-root", str(root), "--output-name", name, *limit)  # fmt: skip
    if not path.exists():
        emtool("evaluate", str(root / name), "--metrics", "likelihood")
    return read_scores(path)


def read_scores(path: Path, *, all_items: bool = False) -> Scores:
    """Return p_wrong by step and item from `item_scores.csv`: of the other domains, or of all items."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all_items or row["domain"] != "gardening"]
    return {(int(row["step"]), row["item"]): float(row["p_wrong"]) for row in rows}


def emtool(*arguments: str) -> None:
    """Run an emtool command; its output goes where this script's goes."""
    subprocess.run([sys.executable, "-m", "emtool", *arguments], check=True)


def entry(estimate: Estimate) -> dict[str, float | bool]:
    """Return an estimate as JSON values."""
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "excludes_zero": estimate.excludes_zero,
    }


def text(value: dict[str, float]) -> str:
    """Return an estimate for a table."""
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


if __name__ == "__main__":
    main()
