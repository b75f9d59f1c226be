"""The report as a reader meets it: clicked through in headless Chromium.

``FEDVEIL_CHROMIUM`` names the browser; otherwise one on the path is used.
"""

import os
import re
import shutil

import pytest

from fedveil.report import write_report
from tests.report.report_material import (
    make_egress,
    make_frontier,
    make_leakage,
    make_run,
    make_sums,
    make_theft,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("FEDVEIL_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on the path and FEDVEIL_CHROMIUM is not set"
)

SIZES = {"desktop": (1200, 900), "phone": (375, 812)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    make_run(root / ("a-long-name-of-a-run-" * 5), copies=(0.4,) * 50)
    make_run(root / "plain", strategy="fedavg", copies=(0.5, 0.9), accuracy=0.95)
    make_leakage(root / "leakage")
    make_theft(root / "theft")
    make_frontier(root / "frontier")
    make_egress(root / "egress")
    make_sums(root / "sums")
    write_report([root], root / "report.html")
    return (root / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[("desktop", "light"), ("phone", "dark")], ids="-".join)
def page(request, browser, report):
    """The report at a size and in a theme; fails on any message or request it makes."""
    size, theme = request.param
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        has_touch=size == "phone",
        reduced_motion="reduce",
    )
    opened = context.new_page()
    complaints = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: r.url == report or complaints.append(r.url[:80])
              if not r.url.startswith("data:") else None)  # fmt: skip
    opened.goto(report)
    opened.theme, opened.size = theme, size
    yield opened
    assert complaints == []
    context.close()


def style(page, selector, name):
    return page.locator(selector).first.evaluate(
        f"e => getComputedStyle(e).getPropertyValue('{name}')"
    )


def test_nothing_is_wider_than_the_window(page):
    inner, whole = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert whole <= inner
    for chart in page.locator("svg.chart").all():
        box = chart.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= inner


def test_it_follows_the_theme(page):
    channels = re.findall(r"\d+", style(page, "body", "background-color"))
    assert (int(channels[0]) < 128) == (page.theme == "dark")
    assert style(page, ".chart .s0 .line", "stroke") == style(page, ".sample.s0 .line", "stroke")


def test_every_section_is_a_click_away(page):
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(link.get_attribute("href"))
        playwright.expect(target).to_be_in_viewport()


def test_the_keyboard_reaches_the_verdict_and_moves_a_slider(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    slider = page.locator(".compare input").nth(1)
    slider.focus()
    before = style(page, ".compare >> nth=1 >> img.top", "clip-path")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "70"
    assert slider.get_attribute("aria-valuetext").startswith("70 % original")
    after = style(page, ".compare >> nth=1 >> img.top", "clip-path")
    assert after != before
    assert "30%" in after
    assert style(page, ".compare >> nth=1", "outline-style") == "solid"


def test_a_slider_follows_finger_and_mouse(page):
    frame = page.locator(".compare").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    x, y = box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2
    if page.size == "phone":
        page.touchscreen.tap(x, y)
    else:
        page.mouse.move(box["x"] + box["width"] / 2, y)
        page.mouse.down()
        page.mouse.move(x, y, steps=5)
        page.mouse.up()
    assert int(frame.locator("input").input_value()) == pytest.approx(80, abs=6)


def test_details_open_and_tables_scroll_inside_themselves(page):
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    playwright.expect(
        page.get_by_role("row").filter(has_text="owner's model").first
    ).to_be_visible()


def test_paper_gets_both_pictures_and_the_settings_last(page):
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("section").last.get_attribute("aria-labelledby") == "settings"
    assert page.locator("#settings ~ details:not([open])").count() == 0
    assert page.locator("details:not([open])").count() > 0
    frame = page.locator(".compare").first
    left, right = (image.bounding_box() for image in frame.locator("img").all())
    assert right["x"] >= left["x"] + left["width"] - 1
    assert not frame.locator("input").is_visible()
    assert not page.locator("nav").is_visible()
    assert style(page, "body", "background-color") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_paper_is_five_pages_at_most(browser, report):
    """Laid out as wide as an A4 page less its margins, it is as high as five or less."""
    millimetre = 96 / 25.4
    width, height = (210 - 26) * millimetre, (297 - 26) * millimetre
    page = browser.new_page(viewport={"width": int(width), "height": int(height)})
    page.goto(report)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    whole, wide = page.evaluate(
        "[document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
    )
    assert whole < 4.7 * height  # what does not fit at a page's end goes to the next
    assert wide <= width
    page.close()


def test_on_a_phone_no_table_is_wider_than_its_place(browser, report):
    page = browser.new_page(viewport={"width": 375, "height": 812})
    page.goto(report)
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    for place in page.locator(".scroll").all():
        inner, whole = place.evaluate("e => [e.clientWidth, e.scrollWidth]")
        assert 0 < whole <= inner, place.get_attribute("aria-label")
    page.close()


def test_without_scripts_pictures_stand_side_by_side(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    one, other = (i.bounding_box() for i in page.locator(".compare").first.locator("img").all())
    assert other["x"] >= one["x"] + one["width"] - 1
    context.close()
