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
        mechanism_prompts=150,
        target=0.6,
        agreement=0.6,
        gate_training={"first_steps": 12, "steps": 6, "most_prices": 2, "prunings": 0},
        edges=True,
        gain_prompts=6,
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


def test_mechanisms_stand_side_by_side_ahead_of_the_groups(browser, report):
    page, _ = opened(browser, report, WIDE)
    maps = page.query_selector_all("#mechanism [id$=_mechanism_map]")
    first, second = (shown.bounding_box() for shown in maps)
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
    heights = page.evaluate(
        "['#accuracy', '#mechanism', '#circuits', '#gain']"
        ".map(id => document.querySelector(id).getBoundingClientRect().top)"
    )
    assert heights == sorted(heights)
    assert "nodes" in page.inner_text("#glance") and "of groups" in page.inner_text("#mechanism")


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


def drawn_on(page) -> set[str]:
    """The grounds that figures are drawn on."""
    return set(
        page.evaluate(
            """() => [...document.querySelectorAll('.js-plotly-plot .main-svg')]
                .map(drawn => getComputedStyle(drawn).backgroundColor)
                .filter(colour => !/, 0\\)|transparent/.test(colour))"""
        )
    )


def test_figures_follow_a_dark_screen_and_its_changes_but_not_onto_paper(browser, report):
    page, trouble = opened(browser, report, WIDE, color_scheme="dark")
    white = "rgb(255, 255, 255)"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground != white and drawn_on(page) == {ground}
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(500)
    assert drawn_on(page) == {white}
    page.emulate_media(color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(500)
    assert drawn_on(page) == {white}
    assert trouble == []


def test_what_is_wider_than_a_phone_scrolls_by_itself_and_says_so(browser, report):
    page, _ = opened(browser, report, PHONE)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.wide')]
            .filter(box => !box.closest('details'))
            .map(box => [box.scrollWidth > box.clientWidth + 1,
                /scroll/.test(getComputedStyle(box, '::before').content)])"""
    )
    assert any(is_wider for is_wider, _ in boxes) and not all(is_wider for is_wider, _ in boxes)
    assert all(is_wider == says_so for is_wider, says_so in boxes)


def test_words_of_a_diagram_do_not_cover_each_other_on_a_phone(browser, report):
    page, _ = opened(browser, report, PHONE)
    covered = page.evaluate(
        """() => [...document.querySelectorAll('[id$=_circuit] .xtick text')]
            .map(word => word.getBoundingClientRect())
            .filter((box, i, all) => i && box.left < all[i - 1].left + 5
                && box.left > all[i - 1].left).length"""
    )
    assert covered == 0


def test_the_page_begins_with_the_task_and_the_answer_in_plain_words(browser, report):
    page, _ = opened(browser, report, WIDE)
    glance = page.inner_text("#glance")
    assert "The apple is in Box E, the bell is in Box Q" in glance.replace("\n", "")
    marked = page.evaluate(
        "[...document.querySelectorAll('.prompt mark')].map(w => [w.className, w.innerText])"
    )
    assert marked == [
        ["correct_object", "bell"],
        ["previous_query_label", "Q"],
        ["query_label", "Q"],
        ["last", "the"],
        ["correct_object", "bell"],
    ]
    # No group's name or bracket stands before the answer.
    lead = page.inner_text("#glance .lead")
    assert lead and "[" not in lead and "pos_" not in lead
    above = page.evaluate(
        "document.querySelector('#verdict').getBoundingClientRect().top"
        " < document.querySelector('#accuracy').getBoundingClientRect().top"
    )
    assert above


def test_no_table_is_there_twice(browser, report):
    page, _ = opened(browser, report, WIDE)
    tables = page.evaluate(
        "[...document.querySelectorAll('table')].map(table => table.textContent.trim())"
    )
    assert len(tables) > 8 and len(set(tables)) == len(tables)


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
