"""Where the numbers of a run can be shown beside its folder, by an integration of transformers."""

from __future__ import annotations

import importlib.util

from emtool.core.errors import MissingDependencyError

NO_REPORTER, WANDB, TRACKIO, TENSORBOARD = "none", "wandb", "trackio", "tensorboard"
#: The default comes first. Each of the others is the name of a package and of the extra that installs it.
REPORTERS = (NO_REPORTER, WANDB, TRACKIO, TENSORBOARD)
#: What a run's project is called where it is shown.
PROJECT = "emtool"


def check_reporter(name: str) -> None:
    """Refuse a reporter whose package is not installed.

    Args:
        name: One of `REPORTERS`.

    Raises:
        MissingDependencyError: If its package is not there.
    """
    if name == NO_REPORTER:
        return
    spec = importlib.util.find_spec(name)
    # wandb leaves a folder of that name wherever it runs, which Python takes for a package without an origin.
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"--report-to {name} needs the package {name}: pip install 'emtool[{name}]', or use --report-to none"
        )
