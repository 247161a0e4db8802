"""The built site in a real browser, from file://: wide and on a phone nothing overflows, links
resolve, nothing is asked of the net, and the search finds."""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import tokenenv
from tokenenv import agents, check, rewards, wrappers

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
BROWSER = (
    os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
]
OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (e) => {
    for (; e && e !== document.body; e = e.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  return [...document.querySelectorAll(".md-content *")]
    .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
    .map((e) => e.tagName + ": " + e.textContent.trim().slice(0, 60));
}"""
TARGETS = "() => [...document.querySelectorAll('[href], [src]')].map(e => e.href || e.src)"
PLACES = "() => [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


def opened(browser: Browser, width: int) -> tuple[Page, list[str]]:
    """A tab, and what it asks of the net."""
    tab = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    tab.on("request", lambda r: r.url.startswith("file:") or asked.append(r.url))
    return tab, asked


def go(tab: Page, page: str) -> None:
    tab.goto((SITE / page).as_uri(), wait_until="load")


def test_there_are_the_pages():
    assert {
        "index.html",
        "quickstart.html",
        "rewards.html",
        "environments/reviews.html",
        "api/agents.html",
    } <= set(PAGES)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_is_asked_of_the_net(browser, width):
    tab, asked = opened(browser, width)
    wide = {}
    for page in PAGES:
        go(tab, page)
        scrolls = tab.evaluate("() => document.documentElement.scrollWidth > innerWidth + 1")
        wide[page] = tab.evaluate(OVERFLOWING) + (["the page scrolls"] if scrolls else [])
    assert {page: found for page, found in wide.items() if found} == {}
    assert asked == []


def test_every_link_leads_to_a_file_and_a_place(browser):
    tab, _ = opened(browser, 1280)
    links, places = set(), {}
    for page in PAGES:
        go(tab, page)
        base = (SITE / page).as_uri()
        links |= {(page, urljoin(base, target)) for target in tab.evaluate(TARGETS)}
        places[SITE / page] = set(tab.evaluate(PLACES))
    broken = []
    for page, url in sorted(links):
        target, place = urldefrag(url)
        if urlsplit(target).scheme != "file" or page == "404.html":  # a server's, for any path
            continue
        path = Path(unquote(urlsplit(target).path))
        if (
            not path.is_file()
            or not path.is_relative_to(SITE)
            or (place and path in places and unquote(place) not in places[path])
        ):
            broken.append((page, url))
    assert broken == []


def test_the_search_finds_without_a_server(browser):
    tab, _ = opened(browser, 1280)
    go(tab, "index.html")
    tab.locator(".md-search__input").click()
    tab.keyboard.type("DelayedKey")
    tab.locator(".md-search-result__link").first.wait_for(state="visible", timeout=30_000)
    links = tab.locator(".md-search-result__link").evaluate_all("all => all.map(e => e.href)")
    assert any("environments/delayed-key.html" in link for link in links)


@pytest.mark.parametrize("module", [tokenenv, agents, rewards, wrappers, check])
def test_every_public_name_has_its_place_in_the_api(module):
    pages = "".join(path.read_text("utf-8") for path in (SITE / "api").glob("*.html"))
    names = [name for name in module.__all__ if callable(getattr(module, name))]
    assert [n for n in names if not re.search(rf'id="[\w.]+\.{n}"', pages)] == []
