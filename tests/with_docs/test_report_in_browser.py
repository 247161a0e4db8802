"""The page of `tokenenv report` in a real browser, headless: wide, narrow, dark, on paper; legends,
copying, no network. It is here, with the site, because a browser takes half a minute of one core."""

import pytest
from benches import EVIL, TEXT, made, with_credit
from test_show_in_browser import BROWSER, browser, contrast  # noqa: F401

from tokenenv.report import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; set BROWSER_PATH to one")
LONG = "a design whose name is so long that it has to be wrapped, and_a_word_of_it_" + "x" * 40


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    designs = {"end": "terminal", EVIL: "oracle", LONG: "delta"}
    envs = {"key": "tokenenv/DelayedKey-v0", "words": {"env": "tokenenv/Negation-v0"}}
    folder = made(tmp_path_factory.mktemp("bench") / "b", designs=designs, envs=envs, about=EVIL)
    text = TEXT | {"tokens": [EVIL, "word" * 20, "a"] * 20, "prompt": EVIL * 9}
    columns = [name for name in text if name.startswith("token_") and name != "token_terms"]
    text |= {name: text[name] * 20 for name in columns}
    return write_report(with_credit(folder, text))


@pytest.fixture
def show(browser, report):  # noqa: F811
    """Opens the page; afterwards nothing may have failed, or left the machine."""
    problems = []

    def open_page(**context):
        page = browser.new_context(**context).new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith("file:") else problems.append(request.url)
            ),
        )
        page.goto(report.as_uri())
        return page

    yield open_page
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window_and_can_be_read(show, width, scheme):
    page = show(color_scheme=scheme, viewport={"width": width, "height": 900})
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing but a table is wider than its box.
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1"
        " && getComputedStyle(e).overflowX !== 'visible').map(e => e.className)"
    )
    assert {name.split()[0] for name in wide if isinstance(name, str) and name} <= {"box"}
    words = ("h1", "p.dim", "td", "thead th", "a", ".legend button", ".text i", ".command p")
    for name in words:
        assert contrast(page.locator(name).first) > 4.5, name
    for cell in page.locator(".text i[style]").all()[:9]:
        assert contrast(cell) > 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_lines_stand_out_from_the_page(show, scheme):
    page = show(color_scheme=scheme)
    # An element of text in the colour of a line has the line's contrast.
    for row in range(8):
        page.evaluate(f"document.querySelector('h1').style.color = 'var(--row{row})'")
        assert contrast(page.locator("h1")) >= 3.0
    figures = page.locator("figure > svg")
    assert figures.count() == 2 * 9 + 1
    seen = figures.evaluate_all("all => all.map(e => e.getBoundingClientRect().height)")
    assert min(seen) > 60
    label = page.locator("figure > svg text").first
    assert label.evaluate("e => getComputedStyle(e).fill") != (
        "rgb(0, 0, 0)" if scheme == "dark" else "rgb(255, 255, 255)"
    )


def test_letters_of_figures_keep_their_size_on_a_telephone(show):
    page = show(viewport={"width": 390, "height": 844})
    heights = page.locator("#learning-curves figure > svg text").evaluate_all(
        "all => all.filter(e => !e.getAttribute('transform')?.includes('rotate(-90'))"
        ".map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) > 10


def test_a_row_of_the_legend_is_seen_alone_in_all_figures(show):
    page = show()
    marks = page.locator(".panels g[class^=row-]")
    faded = page.locator(".panels g.faded")
    key = page.locator("#learning-curves .legend button").nth(1)
    key.click()
    ours = page.locator(".panels g.row-1").count()
    assert faded.count() == marks.count() - ours > 0
    assert page.locator(".legend [aria-pressed=true]").count() == page.locator(".legend").count()
    page.locator("#regret .legend button").nth(1).click()
    assert faded.count() == 0


def test_a_command_is_copied_or_selected(show):
    page = show(permissions=["clipboard-read", "clipboard-write"])
    page.locator("#commands summary").first.click()
    command = page.locator("#commands .command").nth(1)
    command.locator("button").click()
    page.wait_for_function("document.querySelectorAll('.command button')[1].textContent != 'copy'")
    told = page.evaluate("getSelection().toString()")
    assert told == command.locator("code").text_content()
    assert told.startswith("printf %s '{")


def test_hostile_words_are_words(show):
    page = show()
    assert page.locator("img").count() == 0
    assert "</script><img src=x onerror=alert(1)>" in page.locator("header").inner_text()
    assert page.title() == "grid"
    assert page.locator(".prompt").first.inner_text().startswith("</script>")


def test_it_can_be_printed(show):
    page = show(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("nav").is_hidden()
    assert page.locator(".command button").first.is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert contrast(page.locator("h1")) > 4.5
    assert page.locator(".box").first.evaluate("e => getComputedStyle(e).overflowX") == "visible"
    assert page.pdf(format="A4")[:4] == b"%PDF"
