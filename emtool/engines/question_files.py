"""Question files from an address, kept in the cache under their content's hash."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from emtool.core.cache import cache_path
from emtool.core.data import file_sha256
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.open_questions import read_question_file
from emtool.core.yaml_nodes import MAX_BYTES
from emtool.engines.download import DownloadLimits, downloaded, shown_url

URL_PREFIXES = ("http://", "https://")

_LOCAL_COPY = "give a file with --questions"


def fetch_questions(url: str, *, limits: DownloadLimits | None = None, on_event: EventSink = ignore_events) -> Path:
    """Fetch a question file and return the path of the copy that is kept.

    It is fetched anew each time, for what an address serves may change; the copy's name is the hash of its content, so
    equal files are one and none is ever overwritten by another. A file that is no question file is not kept.

    Args:
        url: Its address, http or https.
        limits: How long it may take; its size is bounded as that of any question file. None takes the usual times.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: If it cannot be fetched, is too large, or is not a question file.
    """
    folder = cache_path("questions")
    bounded = replace(limits or DownloadLimits(), max_bytes=MAX_BYTES)
    with downloaded(url, folder, limits=bounded, on_event=on_event, local_copy=_LOCAL_COPY) as path:
        read_question_file(path, label=shown_url(url))
        target = folder / f"{file_sha256(path)}.yaml"
        if not target.exists():
            staged = path.with_suffix(".new")
            shutil.copyfile(path, staged)
            staged.replace(target)
    on_event(Notice(text=f"questions of {shown_url(url)} kept as {target}"))
    return target
