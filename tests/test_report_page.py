"""The report in a browser: it renders without errors and without a network, sorts, filters, fits any width.

Needs a Chromium: the one that `CRAFT_CHROMIUM` names, one on the path (`make chromium`), or one that Playwright has
downloaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_results import write_results, write_run

from craft_peft.glue.report.page import make_report, render_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
METHODS = ("craft", "craft free", "lora", "lora 8", "vera", "head")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'craft-peft[dev]' for Playwright")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = os.environ.get("CRAFT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        found = found or (own if Path(own).is_file() else None)
        if found is None:
            pytest.skip("no Chromium: `make chromium` (Debian, as root), or `.venv/bin/playwright install chromium`")
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "results", METHODS, ("rte", "stsb", "mrpc"))
    write_run(folder / "results" / "run", seed=7)
    (folder / "results" / "cut.json").write_text("{")
    path = folder / "report.html"
    path.write_text(render_page(make_report([folder / "results"], against="published")), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The page in a browser that fails the test on any message, error or request beyond the file itself."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    yield page
    page.close()
    assert [each for each in wrong if not each.startswith("data:")] == []


def column(page: Page, table: str, number: int, shown: bool = False) -> list[str]:
    """The texts of a column of the table's own rows, without small print."""
    rows = f"#{table} tbody:first-of-type tr"
    script = """(rows, [number, shown]) => rows.filter(row => !shown || !row.hidden)
        .map(row => row.cells[number].firstChild.textContent)"""
    return page.locator(rows).evaluate_all(script, [number, shown])


def test_it_renders(page: Page, tmp_path: Path) -> None:
    assert page.title() == "craft-peft report"
    assert page.locator("h1").inner_text() == "6 methods on 3 tasks"
    assert page.locator("svg").count() == 5
    for svg in page.locator("svg").all():
        box = svg.bounding_box()
        assert box is not None and box["width"] > 400 and box["height"] > 80
        assert svg.get_attribute("aria-label")
    assert "cut.json" in page.locator("#know").inner_text()
    assert len(column(page, "overview-last", 0)) == len(METHODS)
    picture = tmp_path / "report.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000


def test_ids_are_unique(page: Page) -> None:
    ids = page.locator("[id]").evaluate_all("all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))


def test_it_sorts_by_click_and_by_key(page: Page) -> None:
    before = column(page, "overview-last", 2)
    head = page.locator("#overview-last thead th").nth(2)
    head.get_by_role("button").click()
    numbers = [float(text) for text in column(page, "overview-last", 2)]
    assert head.get_attribute("aria-sort") == "descending"
    assert numbers == sorted(map(float, before), reverse=True) != [float(text) for text in before]
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, "overview-last", 2)] == numbers[::-1]
    page.locator("#overview-last thead th").first.get_by_role("button").click()
    assert column(page, "overview-last", 0) == sorted(column(page, "overview-last", 0))
    assert head.get_attribute("aria-sort") is None


def test_published_rows_stay_apart(page: Page) -> None:
    page.locator("#overview-last thead th").nth(2).get_by_role("button").click()
    assert len(column(page, "overview-last", 0)) == len(METHODS)
    apart = page.locator("#overview-last tbody.apart tr")
    assert "other models, other protocols" in apart.first.inner_text()


def test_missing_values_sort_last(page: Page) -> None:
    head = page.locator("#details thead th").nth(5).get_by_role("button")
    for _ in range(2):
        head.click()
        assert column(page, "details", 5)[-3:] == ["baseline"] * 3


def test_it_filters(page: Page) -> None:
    field = page.locator("input[aria-controls=details]")
    count = page.locator(".tools", has=field).locator(".count")
    field.fill("lora rte")
    assert column(page, "details", 1, shown=True) == ["lora (r 4)", "lora (r 8)"]
    assert count.inner_text() == "2 of 18 rows"
    field.fill("nothing like it")
    assert column(page, "details", 1, shown=True) == [] and count.inner_text() == "0 of 18 rows"
    field.fill("")
    assert len(column(page, "details", 1, shown=True)) == 18 and count.inner_text() == "18 rows"


def test_one_selection_is_shown_at_a_time(page: Page) -> None:
    shown = [page.locator(f"#overview-{name}") for name in ("last", "held-out", "best")]
    assert [table.is_visible() for table in shown] == [True, False, False]
    page.get_by_role("button", name="best epoch").first.click()
    assert [table.is_visible() for table in shown] == [False, False, True]


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.locator("button, input").evaluate_all(
        "all => all.filter(each => !each.textContent.trim() && !each.labels?.length).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window(page: Page, width: int, scheme: str, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, colour[4:-1].split(","))) > 384 for colour in (ink, paper)]
    assert light == ([True, False] if scheme == "dark" else [False, True])
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png")


def test_print_shows_all_selections_and_no_controls(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.locator("#overview-best").is_visible()
    assert not page.locator(".tools").first.is_visible()
