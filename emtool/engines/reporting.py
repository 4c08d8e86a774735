"""Showing a run's numbers beside its folder: transformers' integrations do it, here they are told where and as what.

A run is one curve there as well: a run that goes on is continued under its name and identity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from emtool.core.errors import BackendError
from emtool.core.reporters import PROJECT, TENSORBOARD, WANDB
from emtool.core.run_dir import RunFolder


@contextlib.contextmanager
def reporting(report_to: str) -> Iterator[None]:
    """Check that there is somebody to report to, and close what was begun there when the block ends.

    Args:
        report_to: One of `REPORTERS`, whose package is installed.

    Raises:
        BackendError: If nobody is logged in.
    """
    if report_to != WANDB:
        yield
        return
    import wandb

    try:
        wandb.login()  # its answer says nothing: it is no in offline mode, and an error without a key
    except wandb.Error as error:
        raise _refusal(error) from error
    is_ours = wandb.run is None
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if is_ours and wandb.run is not None:
            wandb.finish(exit_code=exit_code)


def begin_report(report_to: str, trainer: Trainer, run: RunFolder, *, run_id: str) -> None:
    """Put what a reporter writes on this machine into the run folder, and continue the curve of a run that goes on.

    What the reporter's own environment variables say wins. Trackio keeps its runs in a database of its own.

    Args:
        report_to: One of `REPORTERS`.
        trainer: The Trainer, before it trains.
        run: The run folder, which exists.
        run_id: The run's identity.

    Raises:
        BackendError: If the reporter cannot be reached.
    """
    if report_to == TENSORBOARD:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(run.path / "tensorboard")
    if report_to == WANDB:
        import wandb

        if wandb.run is not None:
            return  # begun by whoever calls emtool as a library
        environment = os.environ
        try:
            wandb.init(
                project=environment.get("WANDB_PROJECT", PROJECT),
                name=environment.get("WANDB_NAME", run.path.name),
                dir=environment.get("WANDB_DIR", str(run.path.absolute())),
                id=environment.get("WANDB_RUN_ID", run_id),
                resume="allow",
            )
        except wandb.Error as error:
            raise _refusal(error) from error


def _refusal(error: Exception) -> BackendError:
    text = str(error).strip().rstrip(".")
    return BackendError(f"wandb: {text}; log in with 'wandb login', or set WANDB_MODE=offline")
