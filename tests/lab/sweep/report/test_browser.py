"""The report in a real browser without a screen: on a phone and a desktop, in both themes.

Needs Chromium or Chrome, and pip install playwright, which brings no browser of its own.
"""

import io
import shutil

import pytest

from ipca.lab import sweep
from tests.helpers.sweep_rows import Made

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
MADE = {"windows": ("0.0", "0.5", "1.0"), "methods": ("lora", "haar"), "lrs": (1e-3, 2e-3), "comparisons": ("same",)}
LABELS = {"target": "accuracy on held-out reviews of films, books and meals, 2,000 sentences"}
CONTRAST = """() => {
  const light = color => {
    const parts = color.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const of = (element, property) => {
    const own = light(getComputedStyle(element)[property]);
    return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
  };
  const least = (selector, property) => Math.min(...[...document.querySelectorAll(selector)].map(e => of(e, property)));
  return {page: page, words: least("p, td, dd, h1, h2, summary", "color"), drawn: least("figure svg text", "fill")};
}"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=OFFLINE)
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The report on one sweep, and on two side by side."""
    root = tmp_path_factory.mktemp("reports")
    one = Made(**MADE, seeds=3, checkpoints=(5,), fails={"haar": 2e-3}, labels=LABELS).write(root / "one")
    other = Made(**MADE, seeds=2, checkpoints=(5,)).write(root / "other")
    sweep.export_report([one, other], root / "both", labels=["reviews", "a data set with a long name"], formats=["svg"])
    return {"one": sweep.write_report(one), "two": root / "both" / "report.html"}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_report_is_whole_on_a_screen(name, width, theme, browser, reports):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    faults = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
    page.goto(reports[name].as_uri())
    assert faults == []
    assert page.evaluate("document.scrollingElement.scrollWidth") == width
    contrast = page.evaluate(CONTRAST)
    assert (contrast["page"] > 0.5) == (theme == "light")
    assert contrast["words"] > 4.5
    assert contrast["drawn"] > 4
    figures = page.query_selector_all("figure svg")
    assert len(figures) == reports[name].read_text(encoding="utf-8").count("<figure>") > 10
    for figure in figures:
        assert figure.is_visible()
        box = figure.bounding_box()
        assert min(box["width"], box["height"]) > 150
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert shades(figures[0].screenshot()) > 20
    page.close()


def shades(png):
    """How many colors a picture has: a blank one has a single one."""
    from PIL import Image

    return len(set(Image.open(io.BytesIO(png)).convert("RGB").getdata()))
