"""Real runs of the tiny model whose weights are looked at while they train, and how evaluation rebuilds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from emtool.core.config import resolve_train_config
from emtool.core.events import Event, ignore_events
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.engines import fitting, training
from emtool.engines.lineage import read_lineage, rebuild_model
from emtool.engines.modeling import adapter_state, attach_adapter
from tests.tiny import logits


class Watch(TrainerCallback):
    """Keeps the logits of the model as it is trained, at step 0 and at the end, and its last adapter."""

    def __init__(self) -> None:
        self.model: Any = None
        self.logits: dict[int, torch.Tensor] = {}
        self.adapter: Mapping[str, torch.Tensor] = {}

    def _look(self, step: int) -> None:
        is_training = self.model.training
        self.logits[step] = logits(self.model.eval())
        self.model.train(is_training)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)
        self.adapter = {name: tensor.detach().clone() for name, tensor in adapter_state(self.model).items()}


def train_watched(
    monkeypatch: pytest.MonkeyPatch, base: Path, dataset: Path, root: Path, *, resume: bool = False, **changes: Any
) -> tuple[RunFolder, Watch]:
    """Train a run of 6 steps and return it with what was seen of its model."""
    watch = Watch()
    real = fitting.build_trainer

    def watched(model: Any, *, callbacks: Sequence[TrainerCallback], **kwargs: Any) -> Any:
        watch.model = model
        return real(model, callbacks=[*callbacks, watch], **kwargs)

    monkeypatch.setattr(training, "build_trainer", watched)
    overrides = {
        "model": str(base),
        "dataset": str(dataset),
        "max_steps": 6,
        "checkpoints": "init, 3",
        "learning_rate": 1e-2,
        "output_root": root,
        "layers_to_transform": "all",
        **changes,
    }
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    return training.train(plan, rows, command=[], resume=resume).run, watch


def rebuilt(run: RunFolder, step: int, *, dtype: str = "float32", events: list[Event] | None = None) -> Any:
    """Return the model of a milestone as evaluation rebuilds it."""
    lineage, trained_dtype = read_lineage(run, run.read_manifest())
    composed = rebuild_model(
        lineage,
        trained_dtype=trained_dtype,
        device="cpu",
        dtype=dtype,
        sample_path=run.merged_sample_path,
        on_event=ignore_events if events is None else events.append,
    )
    return composed.with_persona(attach_adapter(composed.model, run.checkpoint_path(step))).eval()


MODES = ["baseline", "merged", "stacked"]


def persona_options(mode: str, persona: Path) -> dict[str, Any]:
    return {} if mode == "baseline" else {"persona_adapter": str(persona), "persona_mode": mode}
