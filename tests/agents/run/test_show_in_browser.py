"""The page of `tokenenv show` in a real browser, headless: colours, sorting, hovering, keys, 10,000
tokens, no network."""

import os
import shutil
import time

import pytest
from runs import episode, write

from tokenenv.agents.run.show import write_page

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = (
    os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; set BROWSER_PATH to one")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of some episodes; afterwards nothing may have failed, or left the machine."""
    problems = []

    def open_page(episodes, **context):
        page = browser.new_context(**context).new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on(
            "request",
            lambda request: (
                problems.append(request.url) if not request.url.startswith("file:") else None
            ),
        )
        page.goto(write_page(write(tmp_path / "x", episodes)).as_uri())
        return page

    yield open_page
    assert problems == []


def background(page, token):
    return page.locator(".token").nth(token).evaluate("e => getComputedStyle(e).backgroundColor")


def alpha(colour):
    parts = colour[colour.index("(") + 1 : -1].split(",")
    return float(parts[3]) if len(parts) == 4 else 1.0


VALUES = [-1.0, -0.5, 0.0, 0.5, 1.0]
FIVE = episode(
    tokens=[" a", " b", " c", " d", "<eos>"], token_rewards=VALUES, token_kl=[0.0] * 4 + [2.0]
)


def test_tokens_are_coloured_by_what_is_clicked(show):
    page = show([FIVE])
    down, weak, none, _, up = (background(page, i) for i in range(5))
    assert alpha(none) == 0.0
    assert alpha(down) == pytest.approx(0.9, abs=0.01)
    assert alpha(weak) == pytest.approx(0.45, abs=0.01)
    assert down.split(",")[:3] == weak.split(",")[:3] != up.split(",")[:3]
    page.get_by_role("button", name="KL", exact=False).first.click()
    assert alpha(background(page, 0)) == 0.0
    assert alpha(background(page, 4)) == pytest.approx(0.9, abs=0.01)
    page.keyboard.press("1")
    assert background(page, 0) == down


def test_where_few_tokens_are_paid_they_set_the_scale(show):
    page = show(
        [episode(tokens=["x"] * 200, token_rewards=[0.0] * 199 + [-0.03], terminated=False)]
    )
    assert alpha(background(page, 0)) == 0.0
    assert alpha(background(page, 199)) == pytest.approx(0.9, abs=0.01)
    assert page.locator("#high").inner_text() == "0.03"
    assert "cut" in page.locator("#text .end").inner_text()
    assert "✂" in page.locator("#list li").first.text_content()


def test_pointing_at_a_token_tells_everything(show):
    page = show([FIVE])
    page.locator(".token").nth(1).hover()
    told = page.locator("#detail").inner_text().replace("\n", " ")
    for word in ('" b"', "token 2 of 5", "reward -0.5", "term: token", "KL 0"):
        assert word in told
    page.keyboard.press("ArrowRight")
    assert '" c"' in page.locator("#detail").inner_text()


def test_watched_numbers_are_a_colour_and_told(show):
    watched = {"surprise": [0.0, 1.0, 2.0, None, 2.0]}
    page = show([FIVE | {"token_watched": watched}])
    page.get_by_role("button", name="watch: surprise").click()
    strengths = [alpha(background(page, i)) for i in range(5)]
    assert strengths == pytest.approx([0.0, 0.45, 0.9, 0.0, 0.9], abs=0.01)
    page.locator(".token").nth(2).hover()
    assert "watch: surprise 2" in page.locator("#detail").inner_text().replace("\n", " ")


def test_sorting_filtering_and_keys(show):
    page = show([episode(i, tokens=[f" word{i}"]) for i in (3, 1, 2)])
    first = page.locator("#list li").first
    assert "word2" in first.text_content()
    page.select_option("#sort", "score, high first")
    assert "word3" in first.text_content()
    page.select_option("#sort", "score, low first")
    assert "word1" in first.text_content()
    page.locator("#list").focus()
    first.click()
    page.keyboard.press("ArrowDown")
    assert "word2" in page.locator("#text").inner_text()
    page.keyboard.press("/")
    page.keyboard.type("word3")
    assert page.locator("#list li").count() == 1
    assert "word3" in page.locator("#text").inner_text()
    page.fill("#filter", "nothing")
    assert "No text matches" in page.locator("#list").text_content()


def test_hostile_tokens_are_shown_not_run(show):
    evil = "</script><img src=x onerror=\"document.title='hacked'\">"
    page = show(
        [
            episode(
                tokens=[evil, "\n", "\u202elive\x00", "  ", "\u061c\xad\ufeff\U000e0041\ud800!"],
                prompt="<b>bold</b>",
            )
        ]
    )
    assert evil in page.locator("#text").inner_text()
    assert "<b>bold</b>" in page.locator("#text").inner_text()
    assert "↵" in page.locator(".token").nth(1).inner_text()
    assert page.title() == "x"
    assert [page.locator(".token").nth(i).inner_text() for i in (2, 3, 4)] == [
        "·live·",
        "␣␣",
        "·····!",
    ]
    page.locator(".token").nth(2).hover()
    assert page.locator("#detail b").inner_text() == '"\\u202elive\\u0000"'
    page.locator(".token").nth(4).hover()
    assert page.locator("#detail b").inner_text() == '"\\u061c\\u00ad\\ufeff\\u{e0041}\\ud800!"'


def test_ten_thousand_tokens_and_hundreds_of_episodes_are_quick(show):
    long = episode(400, tokens=[f" w{i % 97}" for i in range(10_000)])
    start = time.monotonic()
    page = show([*(episode(i) for i in range(400)), long])
    assert page.locator(".token").count() == 10_000
    page.keyboard.press("2")
    page.keyboard.press("ArrowRight")
    assert "token 1 of 10,000" in page.locator("#detail").inner_text()
    assert time.monotonic() - start < 10.0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_its_window_and_can_be_read(show, scheme, width):
    page = show(
        [FIVE, episode(1, tokens=["verylongword" * 30])],
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("ArrowDown")
    for token in (0, 4):
        assert contrast(page, token) > 4.5


CONTRAST = """e => {
    const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const linear = v => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const page = rgba(getComputedStyle(document.body).backgroundColor);
    const own = rgba(getComputedStyle(e).backgroundColor);
    const mixed = own.slice(0, 3).map((v, i) => v * own[3] + page[i] * (1 - own[3]));
    const both = [light(mixed), light(rgba(getComputedStyle(e).color))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""
"""WCAG 2 contrast of an element's text on its colour over the page."""


def contrast(page, token):
    return page.locator(".token").nth(token).evaluate(CONTRAST)
