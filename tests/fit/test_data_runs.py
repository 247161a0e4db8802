"""A run of `tokenenv train` as data: an agent's own episodes come back as they were."""

import json

import gymnasium as gym
import numpy as np
import pytest

from tokenenv.agents import PPO
from tokenenv.agents.run.export import write_episodes
from tokenenv.agents.run.tracking import RunFolder
from tokenenv.errors import InvalidArgument
from tokenenv.fit.data import read_examples
from tokenenv.fit.examples import Skipped
from tokenenv.fit.sample import sample


def collected(name):
    """Some episodes of the reference's, and what the env's tokens are."""
    envs = gym.make_vec(f"tokenenv/{name}-v0", num_envs=8)
    return PPO(envs).collector.collect(120), envs.unwrapped.token_spec


def written(folder, episodes, spec):
    run = RunFolder(folder, spec, None)
    run({"time/tokens": 300, "time/updates": 1}, episodes)
    run.close()
    return folder


def read(source, spec, kind="scores", tokenizer=True, skipped=None):
    skipped = Skipped() if skipped is None else skipped
    tokenizer = spec.tokenizer if tokenizer else None
    return read_examples(source, kind, tokenizer, vocab_size=spec.vocab_size, skipped=skipped)


def assert_same(examples, episodes):
    for example, episode in zip(examples, episodes, strict=True):
        [text] = example.texts
        assert text.prompt.tolist() == episode.prompt.tolist()
        assert text.response.tolist() == episode.after_prompt.tolist()
        assert text.own_mask.tolist() == episode.own.tolist()
        np.testing.assert_allclose(example.scores, [episode.score])


@pytest.mark.parametrize("name", ["Negation", "Calculator"])
def test_episodes_come_back_as_they_were(name, tmp_path):
    episodes, spec = collected(name)
    # The calculator writes into some of its texts.
    assert any(len(episode.written) for episode in episodes) == (name == "Calculator")
    folder = written(tmp_path / "run", episodes, spec)
    for source in (folder, folder / "episodes.jsonl"):
        assert_same(read(source, spec), episodes)
    assert {e.where for e in read(folder, spec)} >= {f"{folder}/episodes.jsonl:1"}
    # Without a tokenizer a run holds token ids.
    plain = written(tmp_path / "plain", episodes, None)
    assert_same(read(plain, spec, tokenizer=False), episodes)
    # Those that `tokenenv export` writes have their columns.
    write_episodes(tmp_path / "exported.jsonl", episodes, spec.tokenizer)
    assert_same(read(tmp_path / "exported.jsonl", spec), episodes)


def test_episodes_are_ranked_and_those_without_a_score_are_left_out(tmp_path):
    episodes, spec = collected("Negation")
    folder, skipped = written(tmp_path, episodes, spec), Skipped()
    path = folder / "episodes.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"score": None})
    path.write_text("\n".join(lines))
    assert_same(read(path, spec, skipped=skipped), episodes[1:])
    assert skipped.places == {"the episode has no score": [f"{path}:1"]}
    assert len(read(path, spec, "texts")) == len(episodes)
    [ranking] = read(path, spec, "ranking")
    assert ranking.scores == tuple(sorted({e.score for e in episodes[1:]}, reverse=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, r"episodes\.jsonl:1 is no episode of `tokenenv train`"),
        (
            {"prompt": "<s>", "response": " w1", "score": 1, "segments": [{"own": True}]},
            r"episodes\.jsonl:1: 'response' has a segment without 'text'",
        ),
        (
            {"prompt": [0], "response": [1], "score": 1, "segments": [{"own": 1, "length": 1}]},
            "has a segment without 'own'",
        ),
        (
            {"prompt": [0], "response": [1], "score": 1, "segments": [{"own": True, "length": 2}]},
            r"'response' has 1 tokens, and its segments 2",
        ),
        ({"prompt": [0], "response": [1], "score": 1, "segments": 7}, "'segments' is 7"),
        ({"prompt": [0], "response": [], "score": 1}, "'response_ids' is empty"),
        ({"prompt": [0], "response": [1], "score": "1"}, "'score' is '1'"),
    ],
)
def test_what_is_no_episode_is_named_with_its_line(line, message, tmp_path):
    spec = gym.make_vec("tokenenv/Negation-v0", num_envs=1).unwrapped.token_spec
    (tmp_path / "episodes.jsonl").write_text(json.dumps(line))
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path, spec)


# ---------------------------------------------------------------- data that was sampled


@pytest.mark.parametrize(
    ("name", "kind"), [("Negation", "ranking"), ("Reviews", "scores"), ("Calculator", "texts")]
)
def test_sampled_rows_are_the_same_by_their_texts_and_by_their_ids(name, kind):
    """`tokenenv sample` writes both. Where others write into a text, `own` counts its tokens."""
    rows = sample(f"tokenenv/{name}-v0", kind, 4, num_envs=8)
    spec = gym.make_vec(f"tokenenv/{name}-v0", num_envs=1).unwrapped.token_spec
    by_ids = read(rows, spec, kind)
    assert len(by_ids) == 4
    texts = [{k: v for k, v in row.items() if not k.endswith("_ids")} for row in rows]
    for example, other in zip(by_ids, read(texts, spec, kind), strict=True):
        assert example.scores == other.scores
        for text, again in zip(example.texts, other.texts, strict=True):
            assert text.ids.tolist() == again.ids.tolist()
            assert text.own_mask.tolist() == again.own_mask.tolist()
    with_ids = [{k: v for k, v in row.items() if k.endswith(("_ids", "score"))} for row in rows]
    assert len(read(with_ids, spec, kind, tokenizer=False)) == 4
