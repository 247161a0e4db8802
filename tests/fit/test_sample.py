"""Texts of an environment as data: what is compared, what is drawn again, and what is written."""

import json
from dataclasses import replace

import fakes
import gymnasium as gym
import numpy as np
import pytest
from tasks import MODES, toy

from tokenenv.agents import PPO, LMPolicy
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.fit.data import read_examples
from tokenenv.fit.examples import Skipped
from tokenenv.fit.sample import SampleConfig, draw, sample
from tokenenv.fit.sample_folder import facts_of, write_folder
from tokenenv.fit.sample_rows import ranked
from tokenenv.rewards.rule import Rule

IDS = ("Negation", "PlantedPhrase", "Dialogue", "Twenty", "Reviews", "PyDocs", "Arithmetic")
SHORT = {
    "PyDocs": {"max_new_tokens": 24},
    "PlantedPhrase": {"vocab_size": 5, "max_new_tokens": 4, "num_decoys": 3},
    "Reviews": {"max_new_tokens": 24},
}


def right(prompt, response, answer):
    """A number that the prompt, every token of the response and the answer change."""
    return answer * (len(prompt) / 8 + sum(response) / 100)


PROMPTS = [[20], [20], [21, 22], [23, 24], [25]]
"""The first two are the same prompt, with different answers."""
TABLE = [{"answer": 10 * (i + 1)} for i in range(len(PROMPTS))]


def made(num_envs=8, mode="SameStep", changes=None, turns=None, **options):
    """A toy whose score is a token model's, and whose gold is a number of words."""
    task = replace(toy(turns=turns), **(changes or {}))
    return TokenVectorEnv(num_envs, task=task, autoreset_mode=mode, **options)


def rescored(envs, rows, name):
    """What the env gives each text of a column, with what belongs to its prompt."""
    own = "own" if name == "response" else f"{name}_own"
    return envs.unwrapped.score_episodes(
        [row["prompt_ids"] for row in rows],
        [row[f"{name}_ids"] for row in rows],
        own=[row[own] for row in rows] if own in rows[0] else None,
        truncated=None if own not in rows[0] else [cut(row, name) for row in rows],
        columns=(
            {"answer": [r["columns"]["answer"] for r in rows]} if "columns" in rows[0] else None
        ),
    )


def cut(row, name):
    """Whether this text of a row was cut."""
    both = row["truncated"]
    return both[name == "rejected"] if isinstance(both, list) else both


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("name", IDS)
def test_the_chosen_text_of_every_id_has_the_higher_gold(name):
    envs = gym.make_vec(
        f"tokenenv/{name}-v0", num_envs=32, autoreset_mode="SameStep", **SHORT.get(name, {})
    )
    found = draw(envs, SampleConfig(num_examples=6))
    assert len(found.rows) == 6
    assert found.prompts >= 6 + found.ties
    for text in ("chosen", "rejected"):
        gold = rescored(envs, found.rows, text).gold
        np.testing.assert_allclose([row[f"{text}_score"] for row in found.rows], gold, rtol=1e-6)
    for row in found.rows:
        assert row["chosen_score"] > row["rejected_score"]
        assert ("chosen_own" in row) == (name in ("Dialogue", "Twenty"))


@pytest.mark.parametrize("by", ["gold", "score"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("turns", [None, "random"])
def test_texts_are_compared_by_gold_or_by_score_in_every_mode(mode, by, turns):
    group = {"group_size": 2, "array": "torch"} if mode.value == "NextStep" else {}
    envs = made(mode=mode, turns=turns, **group)
    rows = sample(envs, "ranking", 12, by=by, seed=3)
    for text in ("chosen", "rejected"):
        own = [row[f"{text}_score"] for row in rows]
        np.testing.assert_allclose(own, getattr(rescored(envs, rows, text), by), atol=1e-5)
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_a_pair_is_two_texts_of_one_prompt_and_prompts_are_the_envs():
    envs = made()
    rows = sample(envs, "ranking", 20, by="score")
    prompts = [row["prompt_ids"] for row in rows]
    assert all(prompt in envs.prompts for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) > 10


def test_what_belongs_to_a_prompt_reaches_gold_and_the_row():
    changes = {"prompts": PROMPTS, "columns": TABLE, "gold": Rule(right, "tokens")}
    envs = made(changes=changes)
    rows = sample(envs, "ranking", 24)
    answers = {row["columns"]["answer"] for row in rows if row["prompt_ids"] == [20]}
    assert answers == {10, 20}
    for row in rows:
        for text in ("chosen", "rejected"):
            wanted = right(row["prompt_ids"], row[f"{text}_ids"], row["columns"]["answer"])
            assert row[f"{text}_score"] == pytest.approx(wanted)


def test_ties_are_drawn_again_and_counted():
    envs = gym.make_vec("tokenenv/Twenty-v0", num_envs=32, autoreset_mode="SameStep")
    found = draw(envs, SampleConfig(num_examples=5))
    assert found.ties > 5
    assert found.prompts == found.ties + 5
    assert [row["chosen_score"] for row in found.rows] == [1.0] * 5


def test_what_never_differs_is_an_error_that_says_what_to_change():
    envs = gym.make_vec("tokenenv/Arithmetic-v0", num_envs=64, autoreset_mode="SameStep")
    with pytest.raises(InvalidArgument, match=r"by='gold': in 501 of 501 draws all texts of a"):
        sample(envs, "ranking", 4, temperature=0)


def test_an_env_without_the_score_says_so():
    envs = made(changes={"gold": None})
    for kind in ("ranking", "scores", "values"):
        with pytest.raises(InvalidArgument, match=r"by='gold': the env gives a text no gold"):
            sample(envs, kind, 4, continuations=2)
    assert len(sample(envs, "texts", 4)) == 4


def test_a_text_that_was_cut_has_its_score_whether_or_not_it_is_paid():
    rows = sample(made(score_truncated=False), "scores", 12, by="score")
    assert any(row["truncated"] for row in rows)
    assert rows == sample(made(), "scores", 12, by="score")


# ---------------------------------------------------------------- rankings


def test_without_noise_a_ranking_is_strict_and_the_best_is_first():
    rng = np.random.default_rng(0)
    scores = np.array([2.0, 5.0, 2.0, 7.0])
    assert ranked(scores, 0.0, rng).tolist() == [3, 1, 0]


def test_with_noise_a_pair_is_bradley_terry_and_a_ranking_plackett_luce():
    rng, scores, draws = np.random.default_rng(0), np.array([0.0, 1.0, 3.0]), 4000
    first = [int(ranked(scores[:2], 0.5, rng)[0] == 1) for _ in range(draws)]
    share = 1 / (1 + np.exp(-1 / 0.5))
    assert abs(np.mean(first) - share) < 4 * np.sqrt(share * (1 - share) / draws)
    best = np.mean([ranked(scores, 2.0, rng)[0] == 2 for _ in range(draws)])
    share = np.exp(1.5) / np.exp(scores / 2.0).sum()
    assert abs(best - share) < 4 * np.sqrt(share * (1 - share) / draws)


def test_more_than_two_texts_are_lists_the_best_first():
    envs = made(12)
    (row, *_) = sample(envs, "ranking", 4, by="score", texts_per_prompt=4)
    assert len(row["responses"]) == len(row["responses_ids"]) == len(row["truncated"]) == 4
    assert row["scores"] == sorted(row["scores"], reverse=True)
    (row, *_) = sample(envs, "ranking", 4, by="score", texts_per_prompt=4, noise=100.0, seed=1)
    assert "scores" not in row
    assert row["true_scores"] != sorted(row["true_scores"], reverse=True)


@pytest.mark.parametrize("turns", [None, "fixed"])
@pytest.mark.parametrize("kind", ["ranking", "scores", "values", "texts"])
@pytest.mark.parametrize("size", [2, 3])
def test_fit_reads_what_was_sampled(kind, size, turns):
    envs = made(12, turns=turns)
    options = {"by": "score", "texts_per_prompt": size, "continuations": 2}
    rows = sample(envs, kind, 6, **options)
    skipped = Skipped()
    found = read_examples(
        rows, kind, envs.token_spec.tokenizer, vocab_size=fakes.VOCAB_SIZE, skipped=skipped
    )
    assert not skipped.places
    texts = [text for example in found for text in example.texts]
    ids = [
        tokens
        for row in rows
        for tokens in row.get("responses_ids")
        or [row[name] for name in ("response_ids", "chosen_ids", "rejected_ids") if name in row]
    ]
    assert [text.response.tolist() for text in texts] == ids
    if turns:
        assert any(not text.own_mask.all() for text in texts)
    if kind == "values":
        for row, text in zip(rows, texts, strict=True):
            assert len(text.target) == len(text.response)
            np.testing.assert_array_equal(np.isnan(text.target), ~text.own_mask)
            assert text.target[text.own_mask][-1] == np.float32(row["score"])


# ---------------------------------------------------------------- who writes


def test_a_policy_an_agent_and_its_run_folder_write_the_same(tmp_path):
    options = {"num_envs": 8, "autoreset_mode": "SameStep"}
    envs = gym.make_vec("tokenenv/Arithmetic-v0", **options)
    agent = PPO(envs, run_dir=tmp_path / "run", batch_tokens=32, epochs=1, lr=0.01)
    agent.learn(64)
    by_agent = sample(envs, "texts", 8, policy=agent)
    assert sample(envs, "texts", 8, policy=agent.policy) == by_agent
    assert sample(envs, "texts", 8, policy=tmp_path / "run") == by_agent
    assert sample(envs, "texts", 8, policy=str(tmp_path / "run" / "checkpoint")) == by_agent
    assert sample(envs, "texts", 8) != by_agent
    agent.policy.save_pretrained(tmp_path / "model", tokenizer=envs.unwrapped.token_spec.tokenizer)
    assert sample(envs, "texts", 8, policy=tmp_path / "model") == by_agent


def test_a_policy_with_other_tokens_is_refused(tmp_path):
    envs = gym.make_vec("tokenenv/Arithmetic-v0", num_envs=2)
    fakes.saved(fakes.causal_lm(), tmp_path)
    with pytest.raises(ModelError, match="the tokenizer of the policy differs"):
        sample(envs, "texts", 2, policy=tmp_path)
    with pytest.raises(InvalidArgument, match="policy has 61 tokens"):
        sample(envs, "texts", 2, policy=LMPolicy(fakes.causal_lm(), frozen=True))


def test_the_tokens_of_a_text_without_a_tokenizer_are_all_there_is():
    rows = sample(made(changes={"tokenizer": None, "gold": None}), "ranking", 3, by="score")
    assert "chosen" not in rows[0]
    assert rows[0]["chosen_ids"]


def test_texts_have_no_stop_token_and_ids_have():
    rows = sample(made(), "texts", 30)
    ended = [row for row in rows if not row["truncated"]]
    assert ended
    assert all(row["response_ids"][-1] in (fakes.EOS, 7, 9) for row in ended)
    alone = [row for row in ended if len(row["response_ids"]) == 1]
    assert all(row["response"] == "" for row in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pairs"}, "kind='pairs'"),
        ({"num_examples": 0}, "num_examples=0 must be a whole number, 1 or more"),
        ({"texts_per_prompt": 1}, "texts_per_prompt=1 must be a whole number, 2 or more"),
        ({"noise": -1.0}, r"noise=-1.0 must be finite and 0 or more"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"by": "reward"}, "by='reward'"),
        ({"kind": "values", "continuations": 9}, "continuations=9 do not fit into 8 slots"),
        ({"kind": "values", "every": 0}, "every=0 must be a whole number, 1 or more"),
        ({"kind": "values", "beta": 0.0}, "beta=0.0 must be finite and above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    given = {"kind": "ranking", "num_examples": 2} | changes
    with pytest.raises(InvalidArgument, match=message):
        sample(made(), given.pop("kind"), given.pop("num_examples"), **given)


# ---------------------------------------------------------------- the folder


def test_the_same_seed_gives_the_same_file_byte_for_byte(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = SampleConfig(num_examples=8, by="score", seed=seed)
        envs = made()
        write_folder(draw(envs, config), config, tmp_path / name)
    files = [(tmp_path / name / "data.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]
    assert len(files[0].splitlines()) == 8


@pytest.mark.parametrize("kind", ["ranking", "scores", "texts"])
def test_a_folder_holds_rows_tokenizer_and_a_card_with_the_figures(tmp_path, kind):
    envs, config = made(), SampleConfig(kind=kind, num_examples=5, by="score")
    found = draw(envs, config)
    out = tmp_path / "data"
    write_folder(found, config, out, tokenizer=envs.token_spec.tokenizer, env="my/Toy-v0")
    assert [json.loads(line) for line in (out / "data.jsonl").open()] == found.rows
    examples = read_examples(out, kind, envs.token_spec.tokenizer, vocab_size=61, skipped=Skipped())
    assert len(examples) == 5
    card = (out / "README.md").read_text()
    assert "of my/Toy-v0" in card
    facts = facts_of(found, config)
    assert all(f"- {name}: {value}\n" in card for name, value in facts.items())
    name = "chosen" if kind == "ranking" else "response"
    lengths = [len(row[f"{name}_ids"]) for row in found.rows]
    shown = "chosen texts" if kind == "ranking" else "texts"
    assert facts[f"Mean length of {shown}"] == f"{np.mean(lengths):.4g} tokens"
    if kind != "texts":
        scores = [row["chosen_score" if kind == "ranking" else "score"] for row in found.rows]
        assert facts[f"Mean score of {shown}"] == f"{np.mean(scores):.4g}"
