"""The report in a real browser: it draws every figure, fetches nothing, fits a phone and paper."""

import shutil
from pathlib import Path

import pytest

from tests.study.helpers import save_tiny_model
from tl_entity.study.reproduce import reproduce
from tl_entity.study.settings import GROUPS, Settings

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PAPER = 718
"""Width of the text on A4 with usual margins, in CSS pixels."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    settings = Settings(
        # A name that would be a picture, and run code, if it were not escaped.
        base=str(save_tiny_model(folder / "a<img src=x onerror=alert(1)>", seed=1)),
        tuned=str(save_tiny_model(folder / "tuned", seed=2)),
        prompts=6,
        boxes=2,
        sizes=dict.fromkeys(GROUPS, 2),
        random_circuits=1,
        mask_pairs=8,
        draws=1,
        all_pairs=True,
        png=False,
    )
    reproduce(settings, folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser, report: Path, viewport: dict[str, int], **settings):
    """The page, and what was said on the console or asked for elsewhere."""
    page = browser.new_context(viewport=viewport, **settings).new_page()
    trouble: list[str] = []
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: (
            trouble.append(request.url)
            if not request.url.startswith(("file:", "data:", "blob:"))
            else None
        ),
    )
    page.goto(report.as_uri())
    page.wait_for_function(
        "[...document.querySelectorAll('div.plot')]"
        ".every(figure => figure.querySelector('.trace path, .hm image')"
        " || (figure.data && figure.data.length === 0))",
        timeout=60_000,
    )
    return page, trouble


def test_every_figure_is_drawn_and_nothing_goes_wrong(browser, report):
    page, trouble = opened(browser, report, WIDE)
    figures = page.query_selector_all("div.plot")
    assert len(figures) > 15
    for figure in figures:
        box = figure.bounding_box()
        assert box["width"] > 300 and box["height"] > 100
    assert trouble == []


def test_links_within_the_page_lead_somewhere(browser, report):
    page, _ = opened(browser, report, WIDE)
    broken = page.evaluate(
        """() => [...document.querySelectorAll('a[href^="#"]')]
            .map(link => link.getAttribute('href').slice(1))
            .filter(id => !document.getElementById(id))"""
    )
    assert broken == []
    assert page.evaluate("document.querySelectorAll('a[href^=\"#\"]').length") > 5


def test_names_are_text(browser, report):
    page, trouble = opened(browser, report, WIDE)
    assert page.evaluate("document.querySelectorAll('img[onerror]').length") == 0
    assert "a<img src=x onerror=alert(1)>" in page.inner_text("body")
    assert trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_sideways_scrolling(browser, report, scheme):
    page, trouble = opened(browser, report, PHONE, color_scheme=scheme)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    assert trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, report, scheme):
    page, _ = opened(browser, report, WIDE, color_scheme=scheme)
    ink, ground = page.evaluate(
        """() => {
            const numbers = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
            const style = getComputedStyle(document.querySelector('main p, body p'));
            let node = document.querySelector('main p, body p'), ground;
            do {
                ground = getComputedStyle(node).backgroundColor;
                node = node.parentElement;
            } while (node && /, 0\\)|transparent/.test(ground));
            if (/, 0\\)|transparent/.test(ground)) ground = 'rgb(255, 255, 255)';
            return [numbers(style.color), numbers(ground)];
        }"""
    )

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_long_titles_are_whole_on_a_phone(browser, report):
    page, _ = opened(browser, report, PHONE)
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot')].filter(figure => {
            const title = figure.querySelector('.gtitle');
            return title && title.getBoundingClientRect().right
                > figure.getBoundingClientRect().right;
        }).map(figure => figure.id)"""
    )
    assert cut == []


def test_on_paper_everything_is_there_and_nothing_is_cut(browser, report, tmp_path):
    page, trouble = opened(browser, report, WIDE)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER, "height": 1000})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "[...document.querySelectorAll('.js-plotly-plot .main-svg')]"
        f".every(drawn => drawn.getBoundingClientRect().right <= {PAPER})"
    )
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot, table')]
            .filter(part => !part.closest('details'))
            .filter(part => part.getBoundingClientRect().height === 0
                || part.getBoundingClientRect().right > innerWidth + 1)
            .map(part => part.id || part.innerText.slice(0, 60))"""
    )
    assert cut == []
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.set_viewport_size(WIDE)
    page.wait_for_function(
        "document.querySelector('.js-plotly-plot .main-svg').getBoundingClientRect().width > 800"
    )
    assert trouble == []
