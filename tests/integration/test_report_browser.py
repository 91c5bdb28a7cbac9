"""The page in a real browser, offline: nothing asked for, nothing complained about, nothing wider than the screen."""

import json
import shutil
import time
from pathlib import Path

import pytest
from report_folder import VISIBLE, write_report_folder

from dmpo_dist.report.gather import gather
from dmpo_dist.report.page import render

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra [dev])")
pytestmark = pytest.mark.integration

BROWSERS, DRIVER = ("chromium", "chromium-browser", "google-chrome"), "chromedriver"
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip
SIZES = """return [...document.querySelectorAll("figure svg.chart")].map(svg => {
    const box = svg.getBoundingClientRect();
    const text = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    return {width: box.width, height: box.height, letters: Math.min(...text.map(t => t.height)),
            inside: text.every(t => t.left >= box.left - 1 && t.right <= box.right + 1)};
})"""
COLUMN = "return [...document.querySelectorAll('table.sortable tbody')[0].rows].map(row => row.cells[1].dataset.key)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which(DRIVER)
    if binary is None or driver is None:
        pytest.skip(f"no headless browser here: needs {BROWSERS[0]} and {DRIVER} (chromium-driver) on the PATH")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_bytes(render(gather([write_report_folder(folder / "world")])))
    return folder / "report.html"


def show(browser, page: Path, width: int, scheme: str) -> None:
    """Open the page, everything unfolded, and forget what the browser logged before."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_opens_offline_and_fits(browser, page, width, scheme):
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    charts = browser.execute_script(SIZES)
    assert len(charts) == page.read_text().count("<figure>") >= 30
    for chart in charts:
        assert chart["width"] > 250
        assert chart["height"] > 40
        assert chart["letters"] >= 10
        assert chart["inside"]
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_titles_are_text_tables_sort_and_print_unfolds(browser, page):
    show(browser, page, 1280, "light")
    assert browser.title == "world \u2013 dmpo report"
    shown = browser.execute_script("return [...document.querySelectorAll('bdi')].map(b => b.textContent)")
    assert set(VISIBLE) - {VISIBLE[-1]} <= set(shown)  # the last has a control character, which browsers may drop
    before = [float(value) for value in browser.execute_script(COLUMN)]
    button = browser.find_elements("css selector", "table.sortable thead button")[1]
    for order in (True, False):
        browser.execute_script("arguments[0].click()", button)
        after = [float(value) for value in browser.execute_script(COLUMN)]
        assert after == sorted(before, reverse=order)
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = false")
    browser.execute_cdp_cmd("Page.printToPDF", {})
    folded = "return document.querySelectorAll('details[open]').length"
    assert browser.execute_script(folded) == 0  # unfolded for the printer alone
    assert browser.get_log("browser") == []


STAYS = """const nav = document.querySelector("nav").getBoundingClientRect();
const link = document.querySelector("nav a[aria-current]"), box = link.getBoundingClientRect();
const inside = box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight;
return {top: nav.top, left: nav.left, width: nav.width, now: link.hash, inside}"""
FIRST_COLUMN = """const box = document.querySelector("#results .scroll");
const left = (part) => box.querySelector(part).getBoundingClientRect().left;
const note = () => getComputedStyle(box.nextElementSibling, "::before").content;
const before = left("tbody th"), told = note();
box.scrollLeft = 1e6;
await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
return {wider: box.scrollWidth > box.clientWidth, before, after: left("tbody th"), head: left("thead th"), told,
        end: note()}"""


@pytest.mark.parametrize("width", [390, 1440])
def test_the_contents_stay_and_tell_where_the_reader_is(browser, page, width):
    show(browser, page, width, "light")
    for section in ("results", "training", "data"):
        browser.execute_script(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        seen = browser.execute_script(STAYS)
        assert (seen["top"], seen["left"], seen["now"], seen["inside"]) == (0, 0, f"#{section}", True)
        assert seen["width"] == width if width < 500 else 200 < seen["width"] < 300
    wide = browser.execute_script("return document.querySelector('main').getBoundingClientRect().width")
    assert wide > 0.8 * width


def test_on_a_phone_the_first_column_stays_and_the_table_says_that_it_goes_on(browser, page):
    show(browser, page, 390, "light")
    browser.execute_script("document.getElementById('results').scrollIntoView()")
    seen = browser.execute_script(f"return (async () => {{ {FIRST_COLUMN} }})()")
    assert seen["wider"]
    assert seen["before"] == seen["after"] == seen["head"] >= 0
    assert "Scroll for more columns" in seen["told"]
    assert "The last column" in seen["end"]


def test_a_table_is_saved_by_its_link(browser, page, tmp_path):
    show(browser, page, 1440, "light")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for link in browser.find_elements("css selector", "#results .files a")[:2]:
        browser.execute_script("arguments[0].click()", link)
    wanted = {f"01-all-models-on-80-test-requests-1-4-candidates.{ending}" for ending in ("csv", "tex")}
    for _ in range(100):
        if {file.name for file in tmp_path.iterdir()} == wanted:
            break
        time.sleep(0.1)
    assert {file.name for file in tmp_path.iterdir()} == wanted
    assert (tmp_path / min(wanted)).read_text().startswith("model,")
    assert browser.get_log("browser") == []
