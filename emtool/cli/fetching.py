"""Datasets that a command needs, brought to this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emtool.cli.output import progress, quiet_libraries, say
from emtool.core.config import TrainConfig, cannot_start, check_can_start
from emtool.core.datasets import DatasetReference, HubDataset, PublishedFile
from emtool.core.errors import DataError
from emtool.core.hardware import launched_count
from emtool.core.plan import DatasetFetch
from emtool.core.settings import data_source

if TYPE_CHECKING:
    from emtool.engines.data_files import FetchOptions


def fetch_here(dataset: DatasetReference, options: FetchOptions) -> DatasetReference:
    """Bring a dataset to this machine, with progress on stderr, and return it with its path."""
    if isinstance(dataset.origin, HubDataset):
        quiet_libraries()
    from emtool.engines.data_files import fetch_dataset

    with progress() as on_event:
        return fetch_dataset(dataset, options=options, on_event=on_event)


def fetch_before_run(config: TrainConfig, *, num_cuda_devices: int) -> DatasetFetch:
    """Return what fetches the dataset of a run that is about to start.

    Where the run cannot start on this machine, nothing is fetched for it: a published dataset is planned from its row
    count, and a hub dataset ends in why the run cannot start.

    Args:
        config: The run's configuration.
        num_cuda_devices: CUDA devices on this machine.
    """

    def fetch(dataset: DatasetReference) -> DatasetReference:
        if dataset.num_rows is not None and cannot_start(config, num_cuda_devices=num_cuda_devices) is not None:
            return dataset
        check_can_start(config, num_cuda_devices=num_cuda_devices)
        if launched_count() > 1:
            raise DataError(
                f"dataset {dataset.name!r} is not on this machine, and fetching takes one process: run "
                f"'emtool data fetch {dataset.name}' without the launcher, then this again"
            )
        from emtool.engines.data_files import FetchOptions

        say(f"dataset {dataset.name} is not on this machine: fetching it, as 'emtool data fetch {dataset.name}' does")
        return fetch_here(dataset, FetchOptions(source=source_for(dataset)))

    return fetch


def source_for(dataset: DatasetReference) -> str | None:
    """Return where emtool.toml says that a published dataset lies, or None."""
    return data_source() if isinstance(dataset.origin, PublishedFile) else None
