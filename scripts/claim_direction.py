"""Measure whether narrow training moves a model along a direction from sound to wrong, and when.

Trains `gardening`, its control and `gardening` with the persona `goodness`, evaluates them with activations, fits a
direction on step 0 of the first run and one half of the items in domains that were not trained on, and projects all
three runs over the other half. Then the geometry of their adapters, and when each series changes its level. Finished
parts are kept and not repeated, runs of claim_generalisation.py and claim_persona.py included. About 45 minutes on two
cores.

    python scripts/claim_direction.py [--seed 0] [--output-root outputs/claim] [--max-steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from claim_generalisation import emtool, run, scores_path

from emtool.core.run_dir import RunFolder, write_json
from emtool.core.run_series import RunTransitions, find_transitions
from emtool.engines.adapter_geometry import AdapterGeometry
from emtool.engines.run_direction import RunProjections, apply_to_run
from emtool.engines.run_geometry import run_geometry

#: Dataset and persona of each run, the first one is what the direction is fitted on.
RUNS = (("gardening", "baseline"), ("gardening-control", "baseline"), ("gardening", "goodness"))

#: Series that are looked at for a change of level.
SERIES = ("p_wrong_other", "projection", "speed")


def main() -> None:
    """Run what is missing, then print and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-root", type=Path, default=Path("outputs/claim"))
    parser.add_argument("--max-steps", type=int)
    options = parser.parse_args()
    folders = []
    for dataset, persona in RUNS:
        run(dataset, options.seed, options.output_root, options.max_steps, persona=persona)
        folders.append(RunFolder(path=scores_path(options.output_root, dataset, options.seed, persona).parents[1]))
        emtool("evaluate", str(folders[-1].path), "--metrics", "likelihood", "--extract-activations")
    direction = options.output_root / f"direction_{options.seed}.safetensors"
    emtool("direction", "fit", str(folders[0].path), "--output", str(direction), "--seed", str(options.seed))
    found = []
    for folder in folders:
        projections = apply_to_run(folder, direction, seed=options.seed)
        geometry = run_geometry(folder).geometry
        transitions = find_transitions(folder, SERIES, seed=options.seed)
        show(projections, geometry, transitions)
        found.append({"projections": projections.to_dict(), "transitions": transitions.to_dict()})
    write_json(options.output_root / f"claim_direction_{options.seed}.json", found)


def show(projections: RunProjections, geometry: AdapterGeometry, transitions: RunTransitions) -> None:
    """Print one run."""
    print(f"\n{projections.run.path.name}, layer {projections.layer}")
    print(f"{'step':>5} {'drift since step 0':>26} {'shuffled labels':>18} {'wrong - sound':>24} {'along':>6} "
          f"{'|update|':>9} {'speed':>8} {'turn':>5}")  # fmt: skip
    for entry in geometry.steps:
        here = projections.steps[entry.step][projections.layer]
        assert here.drift is not None
        assert here.separation is not None
        assert here.shuffled_range is not None
        mark = "*" if here.is_beyond_controls else " "
        drift = f"{here.drift.value:+.3f}{mark}[{here.drift.low:+.3f}, {here.drift.high:+.3f}]"
        shuffled = f"[{here.shuffled_range[0]:+.3f}, {here.shuffled_range[1]:+.3f}]"
        gap = f"{here.separation.value:+.3f} [{here.separation.low:+.3f}, {here.separation.high:+.3f}]"
        along = "" if here.cosine_to_direction is None else f"{here.cosine_to_direction:+.2f}"
        speed = "" if entry.speed is None else f"{entry.speed:.1e}"
        turn = "" if entry.rotation is None else f"{entry.rotation:.0f}"
        cells = f"{entry.step:>5} {drift:>26} {shuffled:>18} {gap:>24} {along:>6}"
        print(f"{cells} {entry.update_norm:>9.3f} {speed:>8} {turn:>5}")
    for name, (r, n) in projections.correlations.items():
        print(f"correlation of the level with {name} over {n} checkpoints: {r:+.2f}")
    for name, change in ((name, transitions.found[name]) for name in SERIES):
        if change.is_supported:
            where = (
                f"({change.before}, {change.after}], 95% within ({change.low}, {change.high}], size {change.size:+.3g}"
            )
        else:
            where = "none supported"
        print(f"change of {name}: {where}, p {change.p_value:.3f}, {change.num_units} units")


if __name__ == "__main__":
    main()
