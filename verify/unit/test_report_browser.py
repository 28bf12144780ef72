"""The page in a real browser: headless Chromium, as Debian ships it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lipbounds.report import to_json, write_page
from verify.unit.reported import HOSTILE, tiny_report


pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
MISSING = "THE PAGE WAS NOT RENDERED: no chromium or chromedriver here; run `apt-get install chromium chromium-driver`"
CELLS = ("constant", "bound", "ratio", "g_1", "entropy", "sink_share")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(MISSING)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox does not start for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of the tiny report; what the browser complains about fails the test."""
    write_page(tiny_report(), tmp_path / "report.html")
    look(browser, 1280, "light")
    browser.get((tmp_path / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def look(browser: Any, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def report() -> Any:
    return json.loads(to_json(tiny_report()))


def every(browser: Any, selector: str) -> list[list[str]]:
    """Text and exact value of all elements that a selector finds."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => [e.textContent, e.dataset.value])"
    return browser.execute_script(script, selector)


def click(browser: Any, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def choose(browser: Any, menu: str, value: str) -> None:
    script = (
        "const m = document.getElementById(arguments[0]); m.value = arguments[1]; m.dispatchEvent(new Event('change'))"
    )
    browser.execute_script(script, menu, value)


def pair(number: dict[str, Any]) -> list[str]:
    return [number["shown"], javascript(number["value"])]


def javascript(value: float | str) -> str:
    """A number as JavaScript writes it; both write the shortest digits that read back as the same float."""
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def test_a_click_on_a_head_shows_its_attention(opened: Any) -> None:
    for layer, head in ((1, 2), (0, 1)):
        click(opened, f"#layers button[data-layer='{layer}'][data-head='{head}']")
        one = report()["inputs"][0]["layers"][layer]["heads"][head]
        assert opened.find_element("id", "head-title").text == f"Layer {layer}, head {head}"
        assert [float(value) for _, value in every(opened, "#map .p")] == [p for row in one["attention"] for p in row]
        assert [float(value) for _, value in every(opened, "#map .bar")] == one["g_1"]
        assert every(opened, "#layers button[aria-pressed='true']") == [pair(one["cells"]["constant"])]
        assert every(opened, "[data-of='Proved bound']") == [pair(one["bound"])]


def test_every_number_on_the_page_is_that_of_the_json(opened: Any) -> None:
    for number, run in enumerate(report()["inputs"]):
        click(opened, f"#input-table button[data-input='{number}']")
        assert opened.find_element("id", "summary").text == run["summary"]
        for field in CELLS:
            choose(opened, "field", field)
            cells = [head["cells"][field] for layer in run["layers"] for head in layer["heads"]]
            assert [[text, float(value)] for text, value in every(opened, "#layers button")] == [
                [cell["shown"], cell["value"]] for cell in cells
            ]
        wholes = [layer[name] for layer in run["layers"] for name in ("bound", "constant", "lower", "ratio")]
        assert every(opened, "#layers td:not(.cell)") == [pair(whole) for whole in wholes]
        for place, layer in enumerate(run["layers"]):
            click(opened, f"#layers button[data-layer='{place}']")
            methods = list(dict.fromkeys(ball["method"] for ball in layer["balls"]))
            rows = sorted(layer["balls"], key=lambda ball: methods.index(ball["method"]))  # a row for each bound
            assert every(opened, "#ball-table td") == [pair(ball) for ball in rows]
            tokens = [layer["tokens"][token] for token in layer["fragile_tokens"]]
            assert every(opened, "#fragile-tokens b") == [pair(token) for token in tokens]
        worst = [run["layers"][place["layer"]]["heads"][place["head"]] for place in run["fragile_heads"]]
        assert every(opened, "#fragile-heads b") == [pair(head["constant"]) for head in worst]


def test_the_layer_of_the_sentence_is_open_and_colours_begin_at_zero(opened: Any) -> None:
    run = report()["inputs"][0]
    layer = run["layers"][run["fragile_layer"]]
    assert opened.find_element("id", "head-title").text.startswith(f"Layer {layer['layer']}, head")
    cells = [
        head["cells"]["constant"] for one in report()["inputs"] for each in one["layers"] for head in each["heads"]
    ]
    largest = max(cells, key=lambda cell: cell["value"])
    assert opened.find_element("id", "ramp-low").text == "0"
    assert opened.find_element("id", "ramp-high").text == largest["shown"]


def test_heads_are_folded_on_a_phone(opened: Any) -> None:
    look(opened, 390, "light")
    opened.refresh()
    cell = opened.find_element("css selector", "#layers td.of-head")
    assert not cell.is_displayed()
    click(opened, "#fold")
    assert cell.is_displayed()


def test_a_fragile_head_is_one_click_away(opened: Any) -> None:
    place = report()["inputs"][0]["fragile_heads"][1]
    click(opened, "#fragile-heads li:nth-child(2) button")
    assert opened.find_element("id", "head-title").text == f"Layer {place['layer']}, head {place['head']}"


def test_names_of_strangers_are_text_and_nothing_else(opened: Any) -> None:
    assert opened.find_element("id", "model").get_attribute("textContent") == HOSTILE
    assert opened.title.startswith("</script><img")
    assert (
        opened.execute_script("return document.images.length + document.querySelectorAll('iframe, object').length") == 0
    )
    assert opened.execute_script("return document.scripts.length") == 2
    assert opened.execute_script("return document.querySelector('#map text').textContent").startswith("</script>")
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_policy_stops_markup_that_should_never_get_in(opened: Any) -> None:
    opened.execute_script(
        "document.body.insertAdjacentHTML('beforeend', `<img src='x' onerror=\"window.hacked = 1\">`)"
    )
    assert opened.execute_script("return window.hacked === undefined")
    complaints = opened.get_log("browser")
    assert complaints
    assert all("Content Security Policy" in one["message"] for one in complaints)


def test_the_map_answers_the_pointer_and_the_keyboard(opened: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    click(opened, "#layers button[data-layer='1'][data-head='0']")
    one = report()["inputs"][0]["layers"][1]["heads"][0]
    cell = opened.find_elements("css selector", "#map .p")[2 * 6 + 3]
    ActionChains(opened).move_to_element(cell).perform()
    readout = opened.find_element("id", "readout")
    assert f"Query 2, “\u2068the\u2069”: {one['attention'][2][3]} of its attention goes to key 3" in readout.text
    assert f"at most {one['g_1'][2]}." in readout.text
    opened.find_element("id", "map").send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert f"Query 1, “\u2068[CLS]\u2069”: {one['attention'][1][2]} of its attention goes to key 2" in readout.text


def test_a_head_is_chosen_by_the_keyboard(opened: Any) -> None:
    from selenium.webdriver import Keys

    opened.find_element("css selector", "#layers button[data-layer='0'][data-head='0']").send_keys(Keys.ENTER)
    assert opened.find_element("id", "head-title").text == "Layer 0, head 0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(opened: Any, width: int, scheme: str) -> None:
    from PIL import Image

    look(opened, width, scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    ink, paper = (
        colour(opened.execute_script(f"return getComputedStyle(document.body).{name}"))
        for name in ("color", "backgroundColor")
    )
    assert (luminance(paper) > luminance(ink)) == (scheme == "light")
    for element in ("body", ".quiet", "#layers button", "#layers button.strong", "#fragile-heads button"):
        assert contrast(opened, element) >= 4.5, element
    shot = opened.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
    image = Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
    assert image.width == width
    colours = {pixel for _, pixel in image.getcolors(image.width * image.height) or []}
    assert paper in colours
    assert len(colours) > 100


def contrast(browser: Any, selector: str) -> float:
    """Of the text of the first such element with what is behind it, by the formula of WCAG 2."""
    script = """
        const element = document.querySelector(arguments[0]);
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const flat = (colour) => {
          canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        let behind = element;
        while (flat(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        return [flat(getComputedStyle(element).color), flat(getComputedStyle(behind).backgroundColor)];
    """
    lights = sorted(luminance(tuple(found[:3])) for found in browser.execute_script(script, selector))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def colour(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def luminance(rgb: tuple[int, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
