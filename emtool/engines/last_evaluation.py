"""What the last evaluation of a run left, as far as it is of the model that is evaluated now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emtool.core.evaluation_files import SUMMARY, read_summary, settings_of
from emtool.core.events import EventSink, Notice
from emtool.core.record_file import settings_id
from emtool.core.run_dir import RunFolder, read_json


class LastEvaluation:
    """The last summary of a run. Nothing in it is trusted; what is of another model is left out with a word.

    Args:
        run: The run folder.
        lineage: What pins base, persona and dtype now.
        on_event: Where it is said what is left out.
    """

    def __init__(self, run: RunFolder, *, lineage: Mapping[str, Any], on_event: EventSink) -> None:
        self._run = run
        self._lineage = lineage
        self._on_event = on_event
        self._summary = read_summary(run)
        self._settings = settings_of(self._summary)
        if self._summary is None:
            self._warn(f"{run.evaluation_path / SUMMARY} cannot be read; it is made anew from the records")

    def generation(self) -> dict[str, Any] | None:
        """Return what the summary says of its answers, None where it has none of this model."""
        found = self._settings.get("generation")
        if not isinstance(found, dict):
            return None
        if not self._is_of_this_model(found):
            self._warn("the answers of the last evaluation are another model's or dtype's; the summary leaves them out")
            return None
        return found

    def likelihood(self, *, items_sha256: str) -> dict[str, Any] | None:
        """Return what the summary says of its likelihood scores, None where it has none of this model and these items.

        Args:
            items_sha256: What pins the items.
        """
        found = self._settings.get("likelihood")
        if not isinstance(found, dict) or found.get("items_sha256") != items_sha256:
            return None
        if found.get("lineage") != settings_id(self._lineage):
            self._warn("the likelihood of the last evaluation is another model's or dtype's; the summary leaves it out")
            return None
        return found

    def activations(self) -> str | None:
        """Return the folder of activations that the summary names, None where it names none of this model."""
        path = self._settings.get("activations")
        if not isinstance(path, str):
            return None
        settings = read_json(self._run.evaluation_path / "settings" / f"{Path(path).name}.json")
        return path if isinstance(settings, dict) and self._is_of_this_model(settings) else None

    def judge_order(self) -> list[str]:
        """Return the ids of the summary's judges, the first one first."""
        judges = (self._summary or {}).get("judges")
        entries = judges if isinstance(judges, list) else []
        return [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]

    def _is_of_this_model(self, settings: Mapping[str, Any]) -> bool:
        return all(settings.get(name) == value for name, value in self._lineage.items())

    def _warn(self, text: str) -> None:
        self._on_event(Notice(text=text, is_warning=True))
