"""The README of a milestone: what it is, and what must be present to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MODES = {"merged": "merged into the base before training", "stacked": "a second, frozen adapter beside this one"}


def milestone_card(step: int, requires: Mapping[str, Any], adapter_config: bytes) -> str:
    """Return the text.

    Args:
        step: Optimizer step.
        requires: `base` and `persona`, as in the manifest's lineage.
        adapter_config: Contents of `adapter_config.json`.
    """
    base_model = json.loads(adapter_config)["base_model_name_or_path"]
    base, persona = requires["base"], requires["persona"]
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "---",
        "",
        f"# Step {step} of an emtool run",
        "",
        "A LoRA adapter in PEFT's format, trained on a narrow dataset for research on emergent misalignment.",
        "Do not deploy it.",
        "",
        f"- Base model: `{base_model}`, from: {base['source']}",
        *(
            ["  (a 4-bit copy, expanded to float32: close to the hub's weights, not equal to them)"]
            if base["source"] not in ("hub", "folder")
            else []
        ),
    ]
    if persona is None:
        lines.append("- Load it with `PeftModel.from_pretrained(base, folder)`.")
    else:
        lines += [
            f"- Persona: `{persona['name']}`, {_MODES[persona['mode']]}; SHA-256 of its adapter:",
            f"  `{persona['adapter_sha256']}`.",
            "- The adapter alone on the bare base is NOT the model that was trained: base + persona + adapter is.",
            "  `emtool evaluate` on the run folder rebuilds it from `run.json`; `emtool export` writes persona and",
            "  adapter as one adapter, for programs that know the bare base only.",
        ]
    return "\n".join(lines) + "\n"
