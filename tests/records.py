"""Records that are changed and signed again, as a writer with another view would have written them."""

import json
from pathlib import Path
from typing import Any

from emtool.core.staging import RECORD_HASH, RECORD_NAME, record_sha256


def read_values(folder: Path) -> dict[str, Any]:
    """Return what a folder's record says."""
    values: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text())
    return values


def edit_record(folder: Path, **changes: Any) -> None:
    """Change values of a folder's record; its hash is right afterwards, so that only the values can be refused."""
    path = folder / RECORD_NAME
    values = {**read_values(folder), **changes}
    path.unlink()
    path.write_text(json.dumps({**values, RECORD_HASH: record_sha256(values)}))
