"""Characters that steer or hide are seen, in one way everywhere; keys do not leave the process."""

import sys
import unicodedata

import pytest

from tokenenv.safety.shown import HIDDEN, javascript_class, visible, without_secrets, without_user

NAMED = [
    "\u061c",
    "\xad",
    "\ufeff",
    "\U000e0001",
    "\U000e0041",
    "\ud800",
    "\udfff",
    "\u200d",
    "\u2066",
    "\x1b",
    "\ufe0f",
    "\u3164",
]


@pytest.mark.parametrize("character", NAMED, ids=lambda c: f"U+{ord(c):04X}")
def test_each_is_a_dot(character):
    assert visible(f"a{character}b") == "a·b"


def test_all_of_unicodes_control_format_and_half_characters_are_dots_but_line_feed_and_tab():
    steering = {
        c
        for c in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    }
    shown = {c for c in steering if visible(c) == c}
    assert shown == {"\n", "\t"}


def test_text_is_left_as_it_is():
    text = "Straße, naïve, 日本語, العربية, हिन्दी, 😀\n\t|<>&[red]"
    assert visible(text) == text


def test_the_page_has_the_same_characters():
    assert javascript_class().count("-") == len(HIDDEN)
    assert "\\u{e0000}-\\u{e0fff}" in javascript_class()
    assert all(first <= last for first, last in HIDDEN)


def test_keys_and_passwords_are_taken_out_of_what_is_kept():
    values = {
        "rollout": "http://me:pass@word@host:8000/v1",
        "rollout_options": {
            "api_key": "k",
            "hf_token": "t",
            "timeout": 3,
            "deep": [{"password": "p", "x": 1}],
        },
        "max_new_tokens": 4,
        "stop_token_ids": (1, 2),
    }
    assert without_secrets(values) == {
        "rollout": "http://host:8000/v1",
        "rollout_options": {"timeout": 3, "deep": [{"x": 1}]},
        "max_new_tokens": 4,
        "stop_token_ids": (1, 2),
    }
    assert without_user("ask http://a:b@c/d or me@home") == "ask http://c/d or me@home"
