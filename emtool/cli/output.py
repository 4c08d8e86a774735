"""The two streams: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from emtool.core.architecture import ModelShapes
from emtool.core.disk import format_bytes
from emtool.core.events import CheckpointSaved, Event, Notice, PhaseStarted, StepFinished
from emtool.core.hardware import launched_rank, limit_threads
from emtool.core.models import ModelReference

if TYPE_CHECKING:
    from rich.progress import Progress


def data() -> Console:
    """Return the console for results; of several processes that train together, the first has one."""
    return Console(highlight=False, emoji=False, quiet=launched_rank() > 0)


def talk() -> Console:
    """Return the console for everything else, in the first process."""
    return Console(stderr=True, highlight=False, emoji=False, quiet=launched_rank() > 0)


def say(text: str) -> None:
    """Write a line to stderr, wrapped by the terminal only."""
    talk().print(text, markup=False, soft_wrap=True)


def one_line(text: str) -> str:
    """Return a text as one line without control characters: names and messages may come from anywhere."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def print_json(value: object) -> None:
    """Write one JSON document to stdout."""
    if launched_rank() > 0:
        return
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not is_unicode, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress(*, planned_steps: tuple[int, ...] = ()) -> Iterator[Callable[[Event], None]]:
    """Draw an engine's events on stderr while the block runs: a bar in a terminal, lines elsewhere.

    Args:
        planned_steps: Steps that will be saved, so that the next one can be named.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = talk()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[done]}"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    with bar:
        yield _Drawer(console, bar, planned_steps)


class _Drawer:
    def __init__(self, console: Console, bar: Progress, planned_steps: tuple[int, ...]) -> None:
        self._console = console
        self._bar = bar
        self._planned = planned_steps
        self._task = bar.add_task("", visible=False, done="", detail="")
        self._unit, self._total, self._begun = "steps", 0, time.monotonic()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseStarted(name=name, total=total, unit=unit):
                self._console.print(f"[dim]{escape(one_line(name))}[/]", soft_wrap=True)
                label = name.split(" ", 1)[0]
                self._unit, self._total, self._begun = unit, total or 0, time.monotonic()
                self._bar.reset(
                    self._task,
                    total=total,
                    visible=total is not None,
                    description=label,
                    done=self._done(0),
                    detail="",
                )
            case StepFinished(step=step, loss=loss, tokens=tokens):
                detail = self._detail(step, loss) if tokens is None else self._rate(tokens)
                self._bar.update(self._task, completed=step, done=self._done(step), detail=detail)
            case CheckpointSaved(path=path, seconds=seconds):
                self._console.print(f"  saved {escape(path.name)}, training waited {seconds:.2f} s", soft_wrap=True)
            case Notice(text=text, is_warning=is_warning):
                style = "yellow" if is_warning else "dim"
                prefix = "warning: " if is_warning else ""
                self._console.print(f"[{style}]{prefix}{escape(one_line(text))}[/]", soft_wrap=True)

    def _done(self, step: int) -> str:
        if self._unit == "bytes":
            return f"{format_bytes(step)} of {format_bytes(self._total)}"
        return f"{step}/{self._total}"

    def _rate(self, tokens: int) -> str:
        seconds = time.monotonic() - self._begun
        return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""

    def _detail(self, step: int, loss: float | None) -> str:
        if loss is None:
            return ""
        following = next((planned for planned in self._planned if planned > step), None)
        upcoming = f"  next checkpoint {following}" if following is not None else ""
        return f"loss {loss:.3f}{upcoming}"


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices off the terminal, and their threads to the CPUs that there are."""
    import warnings

    limit_threads()

    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


def shapes_by_library(model: ModelReference) -> ModelShapes | None:
    """Return a model's shapes from its class, without its weights: slow, so it says so."""
    say(
        f"{model.name}: its family is not in the catalogue and no weights are here; asking its class, which loads torch"
    )
    quiet_libraries()
    from emtool.engines.empty_model import empty_shapes

    return empty_shapes(model)
