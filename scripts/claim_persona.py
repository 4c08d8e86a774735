"""Measure whether the persona `goodness` lowers `p_wrong`, and whether it resists training on wrong advice.

Trains `gardening` from the base and from the base with a persona, several seeds each, evaluates all of them on the same
held-out items and compares them by item, in the domains that were not trained. Two questions: is p_wrong lower with
the persona (difference at a step), and does it rise less (difference of the changes since step 0)? Finished runs are
kept and not repeated, those of claim_generalisation.py included. About 40 minutes on two cores for three seeds.

    python scripts/claim_persona.py [--persona goodness] [--seeds 0 1 2] [--output-root outputs/claim] [--max-steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from claim_generalisation import Scores, entry, read_scores, run, scores_path, text

from emtool.core.metrics import bootstrap_difference, bootstrap_mean
from emtool.core.run_dir import write_json


def main() -> None:
    """Run what is missing, then print and write the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--persona", default="goodness")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-root", type=Path, default=Path("outputs/claim"))
    parser.add_argument("--max-steps", type=int)
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        baseline = run("gardening", seed, options.output_root, options.max_steps)
        persona = run("gardening", seed, options.output_root, options.max_steps, persona=options.persona)
        results.append({"seed": seed, "steps": compare(baseline, persona)})
    at_start = effect_at_start(options.output_root, options.seeds[0], options.persona)
    found = {"persona": options.persona, "at_start": at_start, "seeds": results}
    write_json(options.output_root / f"claim_{options.persona}.json", found)
    print(f"step 0, all items: p_wrong with {options.persona} minus without, paired: {text(at_start)}")
    for result in results:
        print(f"\nseed {result['seed']}: p_wrong in other domains, {options.persona} against baseline, paired by item")
        print(f"{'step':>5}  {'baseline':>22}  {options.persona:>22}  {'difference':>22}  {'of the changes':>22}")
        for row in result["steps"]:
            cells = [text(row[name]) for name in ("baseline", "persona", "difference", "difference_of_changes")]
            print(f"{row['step']:>5}  " + "  ".join(f"{cell:>22}" for cell in cells))


def effect_at_start(root: Path, seed: int, persona: str) -> dict[str, float | bool]:
    """Return what the persona does by itself, over all items: none of them stands in its examples."""
    scores = [read_scores(scores_path(root, "gardening", seed, name), all_items=True) for name in (persona, "baseline")]
    items = sorted({item for step, item in scores[0] if step == 0})
    after, before = ([found[0, item] for item in items] for found in scores)
    return entry(bootstrap_difference(after, before, seed=0))


def compare(baseline: Scores, persona: Scores) -> list[dict[str, Any]]:
    """Return both curves, their difference, and the difference of their changes since step 0, at every step."""
    steps = sorted({step for step, _ in baseline})
    items = sorted({item for _, item in baseline})
    rows = []
    for step in steps:
        before, after = ([scores[step, item] for item in items] for scores in (baseline, persona))
        changes = [[scores[step, item] - scores[steps[0], item] for item in items] for scores in (baseline, persona)]
        rows.append(
            {
                "step": step,
                "baseline": entry(bootstrap_mean(before, seed=0)),
                "persona": entry(bootstrap_mean(after, seed=0)),
                "difference": entry(bootstrap_difference(after, before, seed=0)),
                "difference_of_changes": entry(bootstrap_difference(changes[1], changes[0], seed=0)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
