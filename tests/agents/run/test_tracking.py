"""The run folder: what TensorBoard gets, what a line of episodes.jsonl holds, and Weights &
Biases."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import fakes
import gymnasium as gym
import numpy as np
import pytest
from runs import FakeWandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tokenenv  # noqa: F401
from tokenenv.agents import PPO
from tokenenv.agents.episodes import Episode
from tokenenv.agents.run.tracking import DETAILED, RunFolder, WandbRun, by_position, histograms
from tokenenv.cli import main
from tokenenv.errors import MissingDependency
from tokenenv.models.chats import Chats
from tokenenv.models.pieces import TokenPieces


def episode(reward, advantage=None, **changes):
    length = len(reward)
    return Episode(
        prompt=np.array([1]),
        response=np.arange(length),
        logprob=np.zeros(length, np.float32),
        ref_logprob=np.zeros(length, np.float32),
        reward=np.array(reward, np.float32),
        kl_coef=0.0,
        terminated=True,
        truncated=False,
        score=0.0,
        gold=float("nan"),
        prompt_id=0,
        slot=0,
        potential=np.zeros(length + 1, np.float32),
        index=0,
        advantage=None if advantage is None else np.array(advantage, np.float32),
        **changes,
    )


def test_histograms_show_in_which_quarter_the_reward_sits():
    found = histograms(
        [episode([0, 0, 0, 8]), episode([1, 2, 3, 4, 5, 6, 7, 8], advantage=[0.5] * 8)]
    )
    np.testing.assert_array_equal(found["tokens/reward"], [0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(found["tokens/reward_quarter_1"], [0, 1, 2])
    np.testing.assert_array_equal(found["tokens/reward_quarter_4"], [8, 7, 8])
    np.testing.assert_array_equal(found["tokens/advantage"], [0.5] * 8)
    quarters = np.concatenate([found[f"tokens/reward_quarter_{q}"] for q in (1, 2, 3, 4)])
    np.testing.assert_array_equal(np.sort(quarters), np.sort(found["tokens/reward"]))
    assert set(histograms([episode([2.0])])) == {"tokens/reward", "tokens/reward_quarter_1"}
    assert histograms([episode([np.nan])]) == {}


def test_watched_numbers_have_a_histogram_and_a_column(tmp_path):
    seen = [
        episode([0, 1], watched={"a": np.array([0.5, np.nan], np.float32)}),
        episode([2], watched={"a": np.array([3], np.float32), "b": np.array([np.inf])}),
    ]
    found = histograms(seen)
    np.testing.assert_array_equal(found["tokens/watch_a"], [0.5, 3])
    assert "tokens/watch_b" not in found
    folder = RunFolder(tmp_path, None, None)
    folder({"time/tokens": 3, "time/updates": 1}, seen)
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line["token_watched"] for line in lines] == [
        {"a": [0.5, None]},
        {"a": [3], "b": [None]},
    ]
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert events.Histograms("tokens/watch_a")[0].histogram_value.sum == 3.5


def test_the_picture_draws_the_mean_by_position():
    reward, advantage = by_position([episode([1, 3]), episode([3], advantage=[2])]).axes
    np.testing.assert_array_equal(reward.lines[0].get_ydata(), [2, 3])
    np.testing.assert_array_equal(advantage.lines[0].get_ydata(), [2])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, and the episodes that listeners were given."""
    folder, seen = tmp_path_factory.mktemp("runs") / "x", []
    envs = gym.make_vec(
        "tokenenv/Reviews-v0", num_envs=16, autoreset_mode="SameStep", max_new_tokens=6
    )
    agent = PPO(envs, run_dir=folder, batch_tokens=300)
    agent.learn(900, on_update=lambda metrics, episodes: seen.append(episodes))
    return folder, seen, TokenPieces(envs.unwrapped.token_spec.tokenizer)


def test_tensorboard_has_scalars_histograms_texts_and_a_picture(run):
    folder, seen, _ = run
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    names = {
        "objective/score",
        "objective/kl",
        "policy/entropy",
        "loss/value",
        "episode/length",
        "time/tokens_per_second",
    }
    assert names <= set(tags["scalars"])
    assert {"tokens/reward", "tokens/reward_quarter_4", "tokens/advantage"} <= set(
        tags["histograms"]
    )
    assert "tokens/by_position" in tags["images"]
    assert "samples/text_summary" in tags["tensors"]
    first = events.Histograms("tokens/reward")[0].histogram_value
    assert first.num == sum(len(e.reward) for e in seen[0])
    assert first.sum == pytest.approx(sum(float(e.reward.sum()) for e in seen[0]), rel=1e-4)


def test_lines_hold_every_token_of_the_first_episodes(run):
    folder, seen, pieces = run
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert len(lines) == sum(map(len, seen))
    assert len(seen[0]) > DETAILED
    assert ["tokens" in line for line in lines[: len(seen[0])]] == [
        i < DETAILED for i in range(len(seen[0]))
    ]
    for line, e in zip(lines, seen[0][:DETAILED], strict=False):
        assert line["tokens"] == pieces(e.response)
        for name, values in {
            "token_rewards": e.reward,
            "token_values": e.value,
            "token_advantages": e.advantage,
        }.items():
            np.testing.assert_allclose(line[name], values, rtol=1e-3)
        np.testing.assert_allclose(line["token_kl"], e.logprob - e.ref_logprob, rtol=1e-3)
        assert set(line["token_terms"]) == {"token", "kl"}
        np.testing.assert_allclose(
            np.sum(list(line["token_terms"].values()), 0), e.reward, atol=2e-3
        )


def test_groups_are_numbered_and_written_whole(tmp_path):
    size, prompts = 5, [np.array([i // 5]) for i in range(45)]
    seen = [replace(episode([1.0]), prompt=prompt) for prompt in prompts]
    folder = RunFolder(tmp_path, None, None, group_size=size)
    folder({"time/tokens": 3, "time/updates": 1}, seen)
    # One text was chosen of each group: neighbours have nothing to do with one another.
    folder({"time/tokens": 6, "time/updates": 2}, seen[::size])
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line["group"] for line in lines if "group" in line] == [i // size for i in range(35)]
    assert ["tokens" in line for line in lines] == [True] * 35 + [False] * 10 + [True] * 9


def test_a_line_has_the_last_message_and_the_special_tokens(tmp_path):
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chats, stop = Chats(tokenizer), tokenizer.eos_token_id
    roles = {"system": "the cat", "user": "a dog", "assistant": "the bird"}
    chat = [{"role": role, "content": text} for role, text in roles.items()]
    prompts = [
        chats.encode(chat, "p"),
        chats.encode("the sun", "p"),
        chats.encode(chat[2:], "p"),
        [5],
    ]
    spec = types.SimpleNamespace(tokenizer=tokenizer, chats=chats)
    folder = RunFolder(tmp_path, spec, None)
    response = np.array([5, stop, 6, stop])
    texts = [
        replace(episode([0.0] * 4), prompt=np.array(prompt), response=response)
        for prompt in prompts
    ]
    folder({"time/tokens": 3, "time/updates": 1}, texts)
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line.get("message") for line in lines] == ["a dog", "the sun", "the bird", None]
    assert [line["special"] for line in lines] == [[1, 3]] * 4


def test_numbers_that_are_none_stop_nothing(tmp_path):
    folder = RunFolder(tmp_path, None, None)
    metrics = {
        "time/tokens": 5,
        "time/updates": 1,
        "loss/policy": np.nan,
        "loss/value": np.inf,
        "objective/score": 1.0,
    }
    folder(metrics, [episode([np.nan, 1.0], advantage=[np.inf, 1.0]), episode([np.inf])])
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line["token_rewards"] for line in lines] == [[None, 1.0], [None]]
    assert [line["reward"] for line in lines] == [None, None]
    assert lines[0]["token_advantages"] == [None, 1.0]
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == [
        "time/tokens",
        "time/updates",
        "objective/score",
    ]


def test_sample_texts_are_no_markup(tmp_path):
    folder = RunFolder(tmp_path, None, None)
    folder._pieces = lambda ids: ["<eos>"] * len(ids)
    assert (
        folder._samples([episode([2.0, 1.0])])
        == "score 0, reward 3: &lt;eos&gt; **|** &lt;eos&gt;&lt;eos&gt;"
    )
    folder.close()


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    def make_envs():
        return gym.make_vec(
            "tokenenv/Reviews-v0", num_envs=8, autoreset_mode="SameStep", max_new_tokens=6
        )

    def save_first(metrics, episodes):
        if agent.updates == 2:
            agent.save(tmp_path / "checkpoint")

    agent = PPO(make_envs(), run_dir=tmp_path, batch_tokens=100)
    agent.learn(500, on_update=save_first)
    path = tmp_path / "episodes.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"tokens_seen": 200, "pro')
    # A run that was killed has not written the checkpoint of its end.
    os.replace(tmp_path / "checkpoint.previous", tmp_path / "checkpoint")
    PPO.load(tmp_path / "checkpoint", make_envs(), run_dir=tmp_path).learn(500)
    assert path.read_text() == whole
    steps = [
        event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("objective/score")
    ]
    assert steps == sorted({json.loads(line)["tokens_seen"] for line in whole.splitlines()})
    assert sorted(p.name.split(".")[0] for p in tmp_path.iterdir()) == [
        "checkpoint",
        "checkpoint",
        "config",
        "episodes",
        "events",
        "events",
        "lock",
    ]


def test_pieces_join_to_the_text():
    for name in ("Reviews", "PyDocs", "Arithmetic", "Negation"):
        spec = gym.make_vec(f"tokenenv/{name}-v0", num_envs=1).unwrapped.token_spec
        ids = [
            i for i in range(min(spec.vocab_size, 90)) if i not in spec.tokenizer.all_special_ids
        ][3:]
        joined = "".join(TokenPieces(spec.tokenizer)(ids))
        assert joined.strip() == spec.tokenizer.decode(ids).strip()
    assert TokenPieces(None)([4, 5]) == [" 4", " 5"]


def test_wandb_gets_the_same_figures(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = [
        "--num-envs",
        "8",
        "--total-tokens",
        "300",
        "--agent.batch-tokens",
        "100",
        "--options",
        "max_new_tokens",
        "6",
    ]
    main(["train", *flags, "--track", "wandb", "--run-dir", str(tmp_path / "x")])
    assert fake.options["name"] == "x"
    assert fake.options["config"]["agent"]["batch_tokens"] == 100
    assert fake.finished
    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps)
    assert steps[-1] >= 300
    assert {"objective/score", "tokens/reward"} <= set(fake.logged[0][1])


def test_wandb_that_is_missing_is_named_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match=r"pip install wandb$"):
        WandbRun(tmp_path / "x", {})
    with pytest.raises(SystemExit):
        main(["train", "--track", "wandb", "--run-dir", str(tmp_path / "x")])
    assert "needs wandb: pip install wandb" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_wandb_itself_takes_a_run_offline(tmp_path):
    pytest.importorskip("wandb")
    flags = [
        "--num-envs",
        "8",
        "--total-tokens",
        "300",
        "--agent.batch-tokens",
        "100",
        "--options",
        "max_new_tokens",
        "6",
    ]
    command = [
        sys.executable,
        "-m",
        "tokenenv.cli",
        "train",
        "--track",
        "wandb",
        "--run-dir",
        str(tmp_path / "x"),
        *flags,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    [log] = (tmp_path / "x").glob("wandb/offline-run-*/*.wandb")
    assert b"objective/score" in log.read_bytes()
