"""The page of `tokenenv show` in a real browser, headless: colours, sorting, hovering, keys, 10,000
tokens, no network. It is here, with the site, because a browser takes half a minute of one core."""

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


def strengths(page, of=".token"):
    """How strong the colour of each element is, 0 to 0.9, below 0 where it is the colour of
    negative numbers."""
    colours = page.locator(of).evaluate_all(
        "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    return [
        round(alpha(colour) * (1 if colour.startswith(UP) else -1), 2) if alpha(colour) else 0.0
        for colour in colours
    ]


def alpha(colour):
    parts = colour[colour.index("(") + 1 : -1].split(",")
    return float(parts[3]) if len(parts) == 4 else 1.0


UP = "rgba(230"
VALUES = [-1.0, -0.5, 0.0, 0.5, 1.0]
FIVE = episode(
    tokens=[" a", " b", " c", " d", "<eos>"], token_rewards=VALUES, token_kl=[0.0] * 4 + [2.0]
)
TERMS = {"praise": VALUES, "length": [0.5] * 5, "kl": [-2.0] * 5}
CHAT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def buttons(page):
    return page.locator("#colours button").evaluate_all("all => all.map(b => b.lastChild.data)")


def test_tokens_are_coloured_by_what_is_clicked(show):
    page = show([FIVE | {"token_terms": {"token": VALUES, "kl": [0.0] * 5}}])
    assert strengths(page) == [-0.9, -0.45, 0.0, 0.45, 0.9]
    assert page.locator("#low").inner_text() == "-1"
    page.get_by_role("button", name="KL", exact=False).nth(1).click()
    assert strengths(page) == [0.0] * 4 + [0.9]
    assert page.locator("#scale").inner_text().split() == ["0", "2", "nats"]
    page.keyboard.press("1")
    assert strengths(page) == [-0.9, -0.45, 0.0, 0.45, 0.9]


def test_the_terms_of_the_reward_come_first_and_without_the_kl(show):
    numbers = {"token_values": [0.5] * 5, "token_watched": {"surprise": VALUES}}
    rewards = {"token_rewards": [v - 1.5 for v in VALUES], "token_terms": TERMS}
    page = show([FIVE | rewards | numbers])
    assert buttons(page) == [
        "all terms",
        "praise",
        "length",
        "reward with KL",
        "KL",
        "value",
        "watch: surprise",
    ]
    assert page.locator("#colours [aria-pressed=true]").inner_text().endswith("all terms")
    assert strengths(page) == [-0.45, 0.0, 0.45, 0.9, 0.9]
    assert "KL term -10" in page.locator("#detail").inner_text()
    assert page.locator("#list b").inner_text() == "0"  # the score; the rest is not known


@pytest.mark.parametrize(
    ("terms", "shown"),
    [({"praise": VALUES}, ["praise", "KL"]), ({}, ["reward", "KL"]), (None, ["reward", "KL"])],
    ids=["one", "none", "old"],
)
def test_no_two_buttons_show_the_same(show, terms, shown):
    line = FIVE | {"token_terms": terms}
    page = show([line if terms is not None else {k: line[k] for k in line if k != "token_terms"}])
    assert buttons(page) == shown
    assert strengths(page) == [-0.9, -0.45, 0.0, 0.45, 0.9]


def test_where_only_the_end_is_paid_the_text_has_its_colour(show):
    def of(number):
        values = [0.0] * 199 + [number]
        return episode(tokens=["x"] * 200, token_terms={"right": values}, terminated=False)

    page = show([of(-0.03), of(0.03)])
    assert strengths(page)[:199] == [0.0] * 199
    assert strengths(page)[199] == -0.9
    assert strengths(page, ".response") == [-0.28]
    assert "comes at the end" in page.locator("#what").inner_text()
    assert page.locator("#high").inner_text() == "0.03 reward"
    assert "cut" in page.locator(".card .end").inner_text()
    assert "✂" in page.locator("#list li").first.text_content()
    page.keyboard.press("ArrowDown")
    assert strengths(page, ".response") == [0.28]
    page.get_by_role("button", name="KL").click()
    assert strengths(page, ".response") == [0.0]


def test_pointing_at_a_token_tells_everything(show):
    page = show([FIVE])
    assert "whole text" in page.locator("#detail").inner_text()
    page.locator(".token").nth(1).hover()
    told = page.locator("#detail").inner_text().replace("\n", " ")
    for word in ('" b"', "token 2 of 5", "reward with KL -0.5", "token -0.5", "KL 0"):
        assert word in told
    page.keyboard.press("ArrowRight")
    assert '" c"' in page.locator("#detail").inner_text()


def test_watched_numbers_are_a_colour_and_told(show):
    watched = {"surprise": [0.0, 1.0, 2.0, None, 2.0]}
    page = show([FIVE | {"token_watched": watched}])
    page.get_by_role("button", name="watch: surprise").click()
    assert strengths(page) == [0.0, 0.45, 0.9, 0.0, 0.9]
    page.locator(".token").nth(2).hover()
    assert "watch: surprise 2" in page.locator("#detail").inner_text().replace("\n", " ")


def test_special_tokens_stand_apart(show):
    page = show([FIVE | {"special": [4]}])
    assert page.locator(".special").all_inner_texts() == ["<eos>"]
    assert page.locator("#list .text").inner_text() == "a b c d"


def test_a_turn_is_a_line_and_what_was_written_after_it_is_grey_and_has_no_numbers(show):
    own, others = {"own": True}, {"own": False}
    segments = [
        own | {"length": 2, "text": " a b"},
        others | {"length": 3, "text": "\n{<42>}\n"},
        own | {"length": 3, "text": " c d<eos>"},
    ]
    page = show([FIVE | {"segments": segments, "special": [4], "length": 5}, FIVE | {"score": 0.5}])
    lines = page.locator(".open .response > div")
    assert lines.evaluate_all("all => all.map(e => [e.className, e.textContent])") == [
        ["turn", "a b"],
        ["written", "{<42>}"],
        ["turn", "c d<eos>"],
    ]
    assert strengths(page, ".open .token") == [-0.9, -0.45, 0.0, 0.45, 0.9]
    tops = lines.evaluate_all("all => all.map(e => e.getBoundingClientRect().top)")
    assert tops == sorted(set(tops))
    colours = lines.evaluate_all("all => all.map(e => getComputedStyle(e).color)")
    assert colours[0] == colours[2] != colours[1]
    assert "2 turns" in page.locator(".open > p").inner_text()
    page.locator(".token").nth(2).hover()
    assert '" c" token 3 of 5, turn 2' in " ".join(page.locator("#detail").inner_text().split())
    assert page.locator("#list .text").first.inner_text() == "a b … c d"
    page.locator("#list li").nth(1).click()
    assert "turn" not in page.locator(".open > p").inner_text()


@pytest.mark.parametrize("message", ["hello\nthere", None], ids=["kept", "from-the-text"])
def test_a_prompt_is_folded_to_the_last_message(show, message):
    kept = {} if message is None else {"message": message}
    page = show([episode(prompt=CHAT.format("hello\nthere"), **kept)])
    assert page.locator("#said").inner_text() == "hello↵\nthere"
    assert page.locator("#list .said").inner_text() == "hello there"
    page.get_by_role("button", name="whole prompt").click()
    assert page.locator("#said").inner_text().startswith("<|im_start|>system↵\nBe kind.")
    page.keyboard.press("p")
    assert page.locator("#said").inner_text() == "hello↵\nthere"


def test_a_short_prompt_is_whole_and_a_long_one_can_be_unfolded(show):
    page = show([episode(prompt="a word"), episode(1, prompt="a long story " * 99)])
    whole, said = page.locator("#whole"), page.locator("#said")
    assert said.bounding_box()["height"] < 100 < said.evaluate("e => e.scrollHeight")
    whole.click()
    assert said.bounding_box()["height"] > 100
    whole.click()
    page.keyboard.press("ArrowDown")
    assert said.inner_text() == "a word"
    assert whole.is_hidden()


def test_what_else_a_prompts_row_holds_stands_beside_it(show):
    page = show([episode(columns={"answer": "42", "level": 3}), episode(1, columns={})])
    assert page.locator("#fields").inner_text() == ""
    page.keyboard.press("ArrowDown")
    assert page.locator("#fields span").all_inner_texts() == ["answer 42", "level 3"]


def grouped(size=4):
    return [
        episode(i, tokens=[f" word{group}{i}"], tokens_seen=100, group=group, prompt=f"p{group}")
        for group in range(2)
        for i in range(size)
    ]


def test_a_groups_texts_are_side_by_side_where_there_is_room(show):
    page = show(grouped(), viewport={"width": 1440, "height": 800})
    cards = page.locator(".card")
    assert cards.evaluate_all("all => all.map(c => c.lastChild.innerText)") == [
        f"word0{i}" for i in range(4)
    ]
    boxes = [cards.nth(i).bounding_box() for i in range(4)]
    assert len({box["y"] for box in boxes}) == 1
    assert len({box["x"] for box in boxes}) == 4
    page.keyboard.press("ArrowDown")
    assert "open" in cards.nth(1).get_attribute("class")
    cards.nth(3).locator(".token").click()
    assert "word03" in page.locator("#list [aria-selected=true]").text_content()
    assert '" word03"' in page.locator("#detail").inner_text()
    assert page.locator("#list .said").all_inner_texts() == ["p0", "p1"]
    page.locator("#list li").nth(6).click()
    assert page.locator(".card.open .response").inner_text() == "word12"


def test_on_a_telephone_the_open_text_is_seen_at_once(show):
    episodes = [
        e | {"prompt": "a long story " * 99, "columns": {"a": "b" * 999}} for e in grouped()
    ]
    page = show(episodes, viewport={"width": 390, "height": 844})
    text, detail = page.locator(".card.open .token"), page.locator("#detail")
    assert text.bounding_box()["y"] + 100 < detail.bounding_box()["y"]
    page.get_by_role("button", name="next text").click()
    boxes = page.locator(".card").evaluate_all("all => all.map(c => c.getBoundingClientRect().y)")
    assert boxes[1] == min(boxes)
    assert page.locator("#place").inner_text() == "2 of 8"
    assert page.locator("#list").is_hidden()
    page.get_by_role("button", name="all texts").click()
    page.locator("#list li").nth(5).click()
    assert page.locator("#list").is_hidden()
    assert "word11" in page.locator(".card.open").inner_text()


def test_the_curve_says_what_it_is_and_where_the_text_is(show):
    page = show([episode(i) for i in (0, 1, 4)])
    assert page.locator("figcaption").inner_text() == "mean score by tokens seen: 0 → 4"
    assert float(page.locator("#curve line").get_attribute("x1")) == 100.0
    page.select_option("#sort", "earliest first")
    page.locator("#list li").nth(1).click()
    assert float(page.locator("#curve line").get_attribute("x1")) == 25.0


def test_sorting_filtering_and_keys(show):
    page = show([episode(i, tokens=[f" word{i}"]) for i in (3, 1, 2)])
    first = page.locator("#list li").first
    assert "word3" in first.text_content()
    page.select_option("#sort", "score, high first")
    assert "word3" in first.text_content()
    page.select_option("#sort", "score, low first")
    assert "word1" in first.text_content()
    page.locator("#list").focus()
    first.click()
    page.keyboard.press("ArrowDown")
    assert "word2" in page.locator("#texts").inner_text()
    page.keyboard.press("/")
    page.keyboard.type("word3")
    assert page.locator("#list li").count() == 1
    assert "word3" in page.locator("#texts").inner_text()
    page.fill("#filter", "nothing")
    assert "No text matches" in page.locator("#list").text_content()


def test_hostile_texts_are_shown_not_run(show):
    evil = "</script><img src=x onerror=\"document.title='hacked'\">"
    tokens = [evil, "\n", "\u202elive\x00", "  ", "\u061c\xad\ufeff\U000e0041\ud800!"]
    line = episode(tokens=tokens, prompt="<b>bold</b>\u202e", message=evil, columns={evil: evil})
    line["token_terms"] = {evil: [1.0] * 5, "__proto__": [1.0] * 5}
    page = show([line])
    assert evil in page.locator(".response").inner_text()
    assert page.locator("#said").inner_text() == evil
    assert page.locator("#fields").inner_text() == f"{evil} {evil}"
    assert buttons(page)[:3] == ["all terms", evil, "__proto__"]
    page.keyboard.press("p")
    assert page.locator("#said").inner_text() == "<b>bold</b>·"
    assert "↵" in page.locator(".token").nth(1).inner_text()
    assert page.title() == "x"
    assert page.locator("img").count() == 0
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
        [FIVE, episode(1, tokens=["verylongword" * 30], token_terms={"right": [1.0]})],
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in (".token", "#what", ".numbers", "#summary", "[aria-pressed=true]"):
        assert contrast(page.locator(name).first) > 4.5
    page.keyboard.press("ArrowDown")
    for token in (0, 4):
        assert contrast(page.locator(".token").nth(token)) > 4.5


CONTRAST = """e => {
    const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const linear = v => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const over = below => ([...c]) => c.slice(0, 3).map((v, i) => v * c[3] + below[i] * (1 - c[3]));
    const seen = e => { const own = rgba(getComputedStyle(e).backgroundColor); return e === document.body ? own : over(seen(e.parentElement))(own); };
    const both = [light(seen(e)), light(rgba(getComputedStyle(e).color))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""
"""WCAG 2 contrast of an element's text on all colours that it lies on."""


def contrast(element):
    return element.evaluate(CONTRAST)
