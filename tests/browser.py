"""A real browser without a window, which says what a page complains about and what it asks for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

#: Why there is no browser; empty where there is one.
MISSING = "" if CHROMIUM and DRIVER else "no chromium and chromedriver; Debian has them as chromium and chromium-driver"


@contextmanager
def browser(*, width: int = 1280, height: int = 900, is_dark: bool = False) -> Iterator[Any]:
    """Yield a driver of a fresh browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        driver.set_page_load_timeout(60)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path, fragment: str = "") -> None:
    """Open a report and wait until its charts are drawn, and its answers are shown if it has any."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get("about:blank")
    driver.get(path.resolve().as_uri() + fragment)
    ready = (
        "return document.body.dataset.charts === 'drawn'"
        " && (!document.getElementById('filters') || document.body.dataset.answers === 'shown')"
    )
    WebDriverWait(driver, 60).until(lambda opened: opened.execute_script(ready))


def complaints(driver: Any) -> list[str]:
    """Return what the page wrote to the console since the last call: errors, and what its policy refused."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Return the addresses that were asked for since the last call, other than files of this machine's own page."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("file:")]
