"""Take the picture of a report that the README shows: the first chart and the drift, as the page draws them.

Needs chromium and chromedriver. The README's is of the three runs of claim_direction.py.

    cd outputs/claim && emtool report gardening_seed0 gardening-control_seed0 gardening_goodness_seed0; cd ../..
    python scripts/picture_of_report.py outputs/claim/report/report.html docs/report.png
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.browser import MISSING, browser, open_page

#: Leaves the figures of these charts, and says where they are.
KEEP = """
const kept = arguments[0].map((name) => document.getElementById(`chart-${name}`).closest("figure"));
document.querySelectorAll("#curves figure").forEach((figure) => { if (!kept.includes(figure)) figure.remove(); });
const place = document.querySelector("#curves .figures").getBoundingClientRect();
return {x: place.left - 8, y: place.top + scrollY - 8, width: place.width + 16, height: place.height + 16, scale: 0.75};
"""


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    if MISSING:
        sys.exit(MISSING)
    with browser(width=1280) as driver:
        open_page(driver, options.page)
        place = driver.execute_script(KEEP, ["p_wrong_other", "drift"])
        shot = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": place}
        )
    options.picture.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
