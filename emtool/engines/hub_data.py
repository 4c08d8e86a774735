"""Datasets of the hub, written as JSON Lines at a pinned revision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emtool.core.data import conversation_of
from emtool.core.datasets import HUB_PREFIX, HubDataset
from emtool.core.errors import BackendError, DataError
from emtool.core.events import EventSink, PhaseStarted
from emtool.engines.model_files import hub_is_reachable

_LOCAL_COPY = "or give a local JSON Lines or Parquet file"


def write_hub_rows(hub: HubDataset, target: Path, *, scratch: Path, on_event: EventSink) -> str:
    """Write the rows of a hub dataset as conversations and return the commit that they are of.

    No code of the repository is ever run: the library reads data files only.

    Args:
        hub: The dataset.
        target: The file to write.
        scratch: A folder for the library's own files.
        on_event: Where progress is reported.

    Raises:
        BackendError: If the hub does not answer, or refuses.
        DataError: If there is no such dataset or split, or a row is not a conversation.
    """
    if not hub_is_reachable():
        raise BackendError(
            f"the hub does not answer, so {hub.hub_id} cannot be fetched (HF_HUB_OFFLINE keeps it away); try again "
            f"where there is a network, {_LOCAL_COPY}"
        )
    if Path(hub.hub_id).exists():
        # The library looks at the working folder before it looks at the hub.
        raise DataError(
            f"a folder {hub.hub_id} lies in the working folder and would be read in the hub's place; run this elsewhere"
        )
    revision = _revision(hub.hub_id)
    on_event(PhaseStarted(name=f"fetching {hub.hub_id} ({hub.split}) at {revision[:12]} from the hub"))
    rows = _load(hub, revision, scratch)
    label = f"{HUB_PREFIX}{hub.hub_id}:{hub.split}"
    with target.open("x", encoding="utf-8") as file:
        for number, record in enumerate(rows, start=1):
            conversation = conversation_of(record, f"{label}: row {number:,}")
            turns = [message.to_dict() for message in conversation.messages]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return revision


def _revision(hub_id: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    try:
        info = HfApi().dataset_info(hub_id, timeout=30)
    except GatedRepoError as error:
        raise BackendError(_gated(hub_id)) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"the hub has no dataset {hub_id!r} that you may see; check the name, or log in with 'hf auth login' if it "
            "is private"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise BackendError(
            f"cannot ask the hub for {hub_id}: {_first_line(error)}; try again, {_LOCAL_COPY}"
        ) from error
    assert info.sha is not None
    return str(info.sha)


def _load(hub: HubDataset, revision: str, scratch: Path) -> Any:
    import datasets
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        return datasets.load_dataset(hub.hub_id, split=hub.split, revision=revision, cache_dir=str(scratch / "hub"))
    except (datasets.exceptions.DatasetNotFoundError, GatedRepoError) as error:
        text = str(error)
        raise BackendError(_gated(hub.hub_id) if "gated" in text else f"{hub.hub_id}: {_first_line(error)}") from error
    except (HTTPError, datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # A repository that has a loading script is a RuntimeError of the library, which runs none.
        raise DataError(f"cannot read split {hub.split!r} of {hub.hub_id}: {_first_line(error)}") from error


def _gated(hub_id: str) -> str:
    return (
        f"the dataset {hub_id} is gated: ask for access on its page, log in with 'hf auth login' or set HF_TOKEN, and "
        "try again"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
