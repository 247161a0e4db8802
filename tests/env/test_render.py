"""What `render` shows: each token on the colour of the reward it was paid, in strings, pictures and
videos."""

import re

import gymnasium as gym
import numpy as np
import pytest

import tokenenv  # noqa: F401
from tokenenv.env import render
from tokenenv.env.render import FULL, RunningText, ansi, colour, picture

ANSI = re.compile(r"\x1b\[48;2;(\d+);(\d+);(\d+)m\x1b\[38;2;0;0;0m(.*?)\x1b\[0m", re.S)


def text(pieces=(" good", " bad"), rewards=(0.5, -0.5), prompt="the food was", score=1.0):
    return RunningText(prompt, list(pieces), list(rewards), score)


def play(envs, steps, seed=0):
    """Steps with random tokens and returns the last result of each row's present text, paid so
    far."""
    rng, paid = np.random.default_rng(seed), [[] for _ in range(envs.num_envs)]
    envs.reset(seed=seed)
    for _ in range(steps):
        _, rewards, terminations, truncations, _ = envs.step(rng.integers(3, 50, envs.num_envs))
        for row, reward in enumerate(rewards):
            paid[row] = [] if terminations[row] or truncations[row] else [*paid[row], float(reward)]
    return paid


def test_colours_tell_sign_and_size():
    assert colour(0.0) == (255, 255, 255)
    assert colour(FULL) == colour(5 * FULL) == render.UP
    assert colour(-FULL) == render.DOWN
    assert colour(float("nan")) == (128, 128, 128)
    mild = np.array(colour(0.5 * FULL))
    np.testing.assert_allclose(mild, (np.array(render.UP) + 255) / 2, atol=1)


@pytest.mark.parametrize("env_id", ["tokenenv/Reviews-v0", "tokenenv/Negation-v0"])
def test_strings_hold_every_token_on_the_colour_of_what_was_paid(env_id):
    options = (
        {"max_new_tokens": 5, "reward": "token"} if "Reviews" in env_id else {"max_new_tokens": 5}
    )
    envs = gym.make_vec(
        env_id, num_envs=3, render_mode="ansi", autoreset_mode="SameStep", **options
    )
    paid = play(envs, 3)
    shown = envs.render()
    assert len(shown) == 3
    for string, rewards, ids in zip(shown, paid, envs.unwrapped.responses(), strict=True):
        tokens = ANSI.findall(string)
        assert [tuple(map(int, token[:3])) for token in tokens] == [colour(r) for r in rewards]
        assert len(tokens) == len(ids) == len(rewards)
        assert f"reward {sum(rewards):.2f}" in string
        decoded = envs.unwrapped.token_spec.tokenizer.decode(ids)
        assert "".join(token[3] for token in tokens).strip() == decoded.strip()


def test_what_the_env_wrote_is_dim_and_paid_nothing():
    envs = gym.make_vec(
        "tokenenv/Dialogue-v0", num_envs=2, render_mode="ansi", autoreset_mode="Disabled", noise=0.0
    )
    envs.reset(seed=0)
    words = envs.unwrapped.token_spec.tokenizer.convert_tokens_to_ids(["kind1", ".", "w1"])
    paid = np.stack([envs.step(np.full(2, word))[1] for word in words], 1)
    for string, rewards in zip(envs.render(), paid, strict=True):
        assert [token[3].strip() for token in ANSI.findall(string)] == ["kind1", ".", "w1"]
        assert [tuple(map(int, t[:3])) for t in ANSI.findall(string)] == [
            colour(r) for r in rewards
        ]
        assert re.findall(r"\033\[2m ?(\S+?)\033", string) == ["<s>", "oh", "mood2"]
        assert "3 tokens" in string
    wrote = RunningText("", [" a", " b"], [0.5, None], None)
    assert [part[2:] for _, part in render._placed(wrote)][-2:] == [
        (colour(0.5), "black"),
        (None, render.GREY),
    ]


def test_a_picture_has_one_size_and_the_tokens_colours():
    short, long = picture(text()), picture(text(pieces=[" word"] * 900, rewards=[0.1] * 900))
    assert short.dtype == np.uint8
    assert short.shape == long.shape
    for pieces in (text(), text(rewards=(0.0, 0.0))):
        found = {tuple(pixel) for pixel in picture(pieces)[40:].reshape(-1, 3)}
        assert {colour(r) for r in pieces.rewards} <= found
    assert colour(0.5) not in {
        tuple(pixel) for pixel in picture(text(rewards=(0.0, 0.0)))[40:].reshape(-1, 3)
    }


def test_a_long_text_shows_its_end():
    ends = [
        picture(text(pieces=[*[" word"] * 900, piece], rewards=[0.0] * 901))
        for piece in (" one", " two")
    ]
    assert (ends[0] != ends[1]).any()
    starts = [
        picture(text(prompt=p, pieces=[" word"] * 900, rewards=[0.0] * 900)) for p in ("one", "two")
    ]
    assert (starts[0] == starts[1]).all()


def test_line_breaks_and_words_longer_than_a_line():
    lines = [
        line
        for line, _ in render._placed(
            text(pieces=["a\n", "b", "x" * 200], rewards=[0, 0, 0], prompt="p")
        )
    ]
    assert lines == [0, 0, 1, 2, 3, 4]
    assert "↵" in ansi(text(pieces=["a\n"], rewards=[0.0]))


def test_control_characters_neither_steer_the_terminal_nor_stop_the_drawing():
    evil = text(
        pieces=[
            "\x1b[2J",
            "\r\x08\x00",
            "\u202e\u2028",
            "a\tb\n",
            "\u061cx\ufe0fy\ud800\U000e0041",
        ],
        rewards=[0.0] * 5,
        prompt="\x1b]0;x\x07p",
    )
    tokens = [token[3] for token in ANSI.findall(ansi(evil))]
    assert tokens == ["·[2J", "···", "··", "a    b↵\n", "·x·y··"]
    assert "\x1b[2m·]0;x·p\x1b[0m" in ansi(evil)
    assert picture(evil).shape == picture(text()).shape


def test_the_header_tells_the_kl_term_apart():
    envs = gym.make_vec(
        "tokenenv/Reviews-v0",
        num_envs=2,
        render_mode="ansi",
        reward="token",
        autoreset_mode="Disabled",
    )
    envs.reset(seed=0)
    paid = [envs.step(np.array([20, 41]))[4]["reward_terms"] for _ in range(3)]
    kl, token = (np.sum([terms[name] for terms in paid], 0) for name in ("kl", "token"))
    for row, string in enumerate(envs.render()):
        assert string.startswith(
            f"score {token[row]:.2f}   reward {kl[row] + token[row]:.2f}, of which kl "
            f"{kl[row]:.2f}   3 tokens"
        )
    assert " kl " not in ansi(text())


def test_every_mode_on_one_text(capsys):
    shown = {}
    for mode in (None, "ansi", "rgb_array", "human"):
        env = gym.make("tokenenv/Reviews-v0", render_mode=mode, max_new_tokens=5)
        env.reset(seed=0)
        env.step(20)
        shown[mode] = env.render() if mode else None
        assert env.unwrapped.render_mode == mode
    assert isinstance(shown["ansi"], str)
    assert shown["rgb_array"].shape[2] == 3
    assert shown["human"] is None
    assert capsys.readouterr().out.count("tokens") == 3  # after reset, after step, and when asked


def test_frames_are_the_callers_own():
    env = gym.make("tokenenv/Reviews-v0", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    first[:] = 0
    assert env.render().any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vector", [False, True], ids=["single", "vector"])
def test_gymnasium_records_a_video(tmp_path, vector):
    pytest.importorskip("moviepy")
    if vector:
        envs = gym.make_vec(
            "tokenenv/Reviews-v0", num_envs=4, render_mode="rgb_array", max_new_tokens=4
        )
        recorder = gym.wrappers.vector.RecordVideo(
            envs, str(tmp_path), episode_trigger=lambda i: i == 0, video_length=3
        )
        action = np.full(4, 20)
    else:
        env = gym.make("tokenenv/Reviews-v0", render_mode="rgb_array", max_new_tokens=4)
        recorder, action = (
            gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda i: True),
            20,
        )
    recorder.reset(seed=0)
    for _ in range(4):
        recorder.step(action)
    recorder.close()
    [video] = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 1000
