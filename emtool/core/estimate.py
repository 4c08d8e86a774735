"""What a checkpoint takes on disk, file by file, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emtool.core.adapter import Tensor, adapter_tensors
from emtool.core.architecture import EMBEDDING, ModelShapes
from emtool.core.file_sizes import safetensors_bytes, tensor_bytes
from emtool.core.optimizers import OPTIMIZERS, optimizer_file_bytes

if TYPE_CHECKING:
    from emtool.core.config import TrainConfig

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"

#: The small files of a milestone, rounded up from what a run writes (together about 4 KB).
SMALL_FILES: Mapping[str, int] = {"adapter_config.json": 1_300, "README.md": 1_000, "checkpoint.json": 2_700}
#: The small files that a Trainer adds.
TRAINER_FILES: Mapping[str, int] = {"scheduler.pt": 1_465, "training_args.bin": 6_000}
#: Python's, numpy's and torch's generators.
RNG_STATE_BYTES = 14_645
#: The two configs beside a whole model.
MODEL_CONFIGS: Mapping[str, int] = {"config.json": 1_500, "generation_config.json": 200}
#: A logged step in `trainer_state.json`, and the file without any.
LOGGED_STEP_BYTES = 270
TRAINER_STATE_BYTES = 800
#: A CUDA generator's state in `rng_state.pth`, with its place in the file.
CUDA_GENERATOR_BYTES = 300


@dataclass(frozen=True, kw_only=True)
class CheckpointEstimate:
    """The size of a milestone and of a resume state.

    Attributes:
        checkpoint: Bytes of each file of a milestone, without the tokenizer, which milestones share.
        resume: Bytes of each file of the state that a Trainer resumes from, at the last step.
        num_trainable_parameters: Values that are trained.
        tensor_bytes: Values of a milestone's weights, without the header of their file.
        shapes_source: Where the shapes were read.
        doubts: What could not be verified, a line each, by the file that it concerns.
        splits_tied_weights: Whether a whole module to train shares its values with one that is not trained: PEFT
            trains a copy, and the two differ from then on.
        has_own_tokenizer: Whether each checkpoint holds the tokenizer, as those of a Trainer do, rather than links.
    """

    checkpoint: Mapping[str, int]
    resume: Mapping[str, int]
    num_trainable_parameters: int
    tensor_bytes: int
    shapes_source: str
    doubts: Mapping[str, str] = field(default_factory=dict)
    splits_tied_weights: bool = False
    has_own_tokenizer: bool = False

    @property
    def weights_file(self) -> str:
        """Return the name of the file with the weights."""
        return next(name for name in (ADAPTER_FILE, MODEL_FILE) if name in self.checkpoint)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of a milestone, without the tokenizer."""
        return sum(self.checkpoint.values())

    @property
    def resume_bytes(self) -> int:
        """Return the size of a resume state, without the tokenizer."""
        return sum(self.resume.values())


def estimate_checkpoint(
    shapes: ModelShapes,
    config: TrainConfig,
    *,
    total_steps: int,
    full_finetuning: bool = False,
    keep_optimizer: bool = False,
    num_processes: int = 1,
) -> CheckpointEstimate:
    """Return the size of a milestone and of a resume state.

    Args:
        shapes: The base model's parameters.
        config: Adapter, dtypes and optimizer.
        total_steps: Optimizer steps, each of which a Trainer logs in its state.
        full_finetuning: Whether every parameter is trained, without an adapter.
        keep_optimizer: Whether milestones hold the resume state's files as well.
        num_processes: Processes that train together, each with random generators of its own.

    Raises:
        ConfigError: If a target, a block or a module to save does not exist in the model.
    """
    if full_finetuning:
        trained: Sequence[Tensor] = [
            Tensor(name=p.name, shape=p.shape, dtype=config.dtype) for p in shapes.parameters if not p.is_tied
        ]
        weights, small = MODEL_FILE, dict(MODEL_CONFIGS)
        others = dict(MODEL_CONFIGS)
    else:
        trained = adapter_tensors(shapes, config)
        weights, small = ADAPTER_FILE, dict(SMALL_FILES)
        others = {name: SMALL_FILES[name] for name in ("adapter_config.json", "checkpoint.json")}
    generator = CUDA_GENERATOR_BYTES if config.device == "cuda" else 0
    resume = {
        weights: safetensors_bytes(trained),
        **others,
        OPTIMIZER_FILE: optimizer_file_bytes(
            config.optim, trained, archive="optimizer" if full_finetuning else "archive"
        ),
        **TRAINER_FILES,
        **dict.fromkeys(random_state_names(num_processes), RNG_STATE_BYTES + generator),
        "trainer_state.json": TRAINER_STATE_BYTES + total_steps * LOGGED_STEP_BYTES,
    }
    checkpoint = {weights: safetensors_bytes(trained, dtype=config.save_dtype), **small}
    if keep_optimizer:
        checkpoint |= {name: size for name, size in resume.items() if name != weights}
    return CheckpointEstimate(
        checkpoint=checkpoint,
        resume=resume,
        num_trainable_parameters=sum(tensor.size for tensor in trained),
        tensor_bytes=tensor_bytes(trained, dtype=config.save_dtype),
        shapes_source=shapes.source,
        doubts=dict(_doubts(shapes, config, weights)),
        has_own_tokenizer=full_finetuning,
        splits_tied_weights=not full_finetuning and _splits_tied_weights(shapes, trained),
    )


def random_state_names(num_processes: int) -> list[str]:
    """Return the files in which the Trainer keeps random states: one a process."""
    return ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]


def _splits_tied_weights(shapes: ModelShapes, trained: Sequence[Tensor]) -> bool:
    if not any(p.is_tied for p in shapes.parameters):
        return False
    trained_names = {tensor.name.removeprefix("base_model.model.") for tensor in trained}
    return len({p.name in trained_names for p in shapes.parameters if p.is_tied or p.kind == EMBEDDING}) > 1


def _doubts(shapes: ModelShapes, config: TrainConfig, weights: str) -> Iterator[tuple[str, str]]:
    if not shapes.is_exact:
        yield weights, f"the shapes come from {shapes.source}, where layers are told apart by their names"
    optimizer = OPTIMIZERS[config.optim]
    if not optimizer.is_measured:
        yield OPTIMIZER_FILE, f"{config.optim}: not measured; the formula is that of {optimizer.source}"
