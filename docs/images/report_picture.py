"""Makes docs/images/report.png and, of the same run, report.json: `python docs/images/report_picture.py`.

Needs Chromium and its driver, as the tests of the report do. A test compares the numbers of the file with the code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver

from lipbounds.models.loading import load_model
from lipbounds.report import measure, to_json, write_page
from lipbounds.report.inputs import default_inputs


HERE = Path(__file__).parent
MODEL = "digits-vit"
WIDTH, HEIGHT = 1280, 2060  # down to the curves over the radius


def main() -> None:
    """Measure, keep the numbers without the attention maps, and take the picture."""
    loaded = load_model(MODEL)
    report = measure(loaded.module, default_inputs(loaded), name=MODEL)
    numbers = json.loads(to_json(report))
    for layer in numbers["inputs"][0]["layers"]:
        layer["heads"] = []
    (HERE / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_page(report, page)
        _take(page, HERE / "report.png")


def _take(page: Path, picture: Path) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox does not start for root
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or ""))
    try:
        metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.as_uri())
        driver.save_screenshot(str(picture))
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
