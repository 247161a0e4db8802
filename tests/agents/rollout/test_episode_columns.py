"""What belongs to a prompt, in agents: every episode is scored by its own row's answer, however its
text was written, and keeps the row in batches, checkpoints and run folders."""

import json
from dataclasses import replace

import fakes
import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tokenenv.agents import GRPO, PPO, BestOfN, LMPolicy, VinePPO
from tokenenv.agents.episodes import EpisodeBatch, summary
from tokenenv.agents.rollout import text_collector
from tokenenv.agents.run.evaluate import best_of_n_kl, evaluate
from tokenenv.env.single_env import TokenEnv
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.rewards import Rule

PROMPTS = [[20], [20], [21, 22], [23]]
"""The first two are the same prompt, with different answers."""
TABLE = [{"answer": 10 * (i + 1), "tags": [i, "tag"]} for i in range(len(PROMPTS))]


def right(prompt, response, answer):
    return answer * (len(prompt) / 8 + sum(response) / 100)


RULE = Rule(right, "tokens")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")


def task():
    scored = tasks.toy(scorer=None, gold=False)
    return replace(scored, prompts=PROMPTS, columns=TABLE, gold=RULE)


def make(num_envs=4, mode="SameStep", reward=RULE, **options):
    return TokenVectorEnv(num_envs, task=task(), reward=reward, autoreset_mode=mode, **options)


def check(episodes, prefix=0):
    """Each text by the rule itself, with the answer of its own row."""
    assert episodes
    for e in episodes:
        response = [*e.prompt[len(e.prompt) - prefix :], *e.response] if prefix else e.response
        start = e.prompt[: len(e.prompt) - prefix] if prefix else e.prompt
        expected = right(start, [int(token) for token in response], e.columns["answer"])
        assert e.score == pytest.approx(expected, rel=1e-5)
        assert e.gold == e.score
        if e.prompt_id >= 0:
            assert e.columns == TABLE[e.prompt_id]
    return {e.columns["answer"] for e in episodes}


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("reward", [RULE, {"dense": Rule(right, "tokens", dense=True)}])
def test_stepped_texts_have_the_row_of_their_prompt(mode, reward):
    array = "torch" if mode == AutoresetMode.NEXT_STEP else "numpy"
    envs = make(6, mode, reward, group_size=3, array=array)
    agent = GRPO(envs, batch_tokens=40)
    episodes = agent.collector.collect(120)
    assert check(episodes) >= {10, 20}
    assert check(EpisodeBatch.stack(episodes).unstack()) >= {10, 20}
    one_by_one = SyncVectorEnv([lambda: TokenEnv(task=task(), reward=RULE)] * 2)
    policy = LMPolicy(envs.model)
    assert evaluate(policy, one_by_one, num_texts=4).score > 0


def test_a_run_that_goes_on_scores_waiting_texts_by_their_rows(tmp_path):
    agent = GRPO(make(8, group_size=4), batch_tokens=50, lr=1e-3, seed=1)

    def learn(agent, total):
        found = []
        agent.learn(total, on_update=lambda metrics, episodes: found.extend(episodes))
        return found

    check(learn(agent, 120))
    total = next(n for n in range(150, 600, 30) if learn(agent, n) and agent.collector.waiting)
    agent.save(tmp_path / "checkpoint")
    on = learn(GRPO.load(tmp_path / "checkpoint", make(8, group_size=4)), total + 120)
    straight = learn(agent, total + 120)
    check(on)
    assert [(e.score, e.columns) for e in on] == [(e.score, e.columns) for e in straight]


@pytest.mark.parametrize("rollout", ["step", "vllm"])
def test_continuations_are_scored_by_the_row_of_their_text(rollout):
    agent = VinePPO(make(4), rollout=rollout, batch_tokens=40, segments=2, rollouts=2)
    found, play_on = [], agent.collector.play_on

    def noted(states, rollouts, columns):
        played = play_on(states, rollouts, columns)
        found.extend(zip(played, [s for s in states for _ in range(rollouts)], strict=True))
        return played

    agent.collector.play_on = noted
    learned = []
    agent.learn(60, on_update=lambda metrics, episodes: learned.extend(episodes))
    check(learned)
    assert {len(state.response) for _, state in found} > {0}
    answers = {check([e], prefix=len(state.response)).pop() for e, state in found}
    assert len(answers) > 1


@pytest.mark.parametrize("rollout", ["step", "vllm"])
def test_a_default_holds_in_continuations_and_in_an_engine(rollout):
    """Where another text's row has the column."""
    light = Rule(lambda prompt, response, answer=7: float(answer), "tokens")
    some = replace(task(), gold=None, columns=[TABLE[0], {}] * 2)
    envs = TokenVectorEnv(8, task=some, reward=light, kl="none", autoreset_mode="SameStep")
    agent = VinePPO(envs, rollout=rollout, batch_tokens=40, segments=2, rollouts=2)
    found, play_on = [], agent.collector.play_on
    agent.collector.play_on = lambda *given: found.append(play_on(*given)) or found[-1]
    agent.learn(60, on_update=lambda metrics, episodes: found.append(episodes))
    scores = [(e.score, e.columns.get("answer", 7)) for some in found for e in some]
    assert {score for score, _ in scores} == {7.0, 10.0}
    assert all(score == answer for score, answer in scores)


def test_texts_of_an_engine_are_scored_by_their_rows_and_a_run_goes_on(tmp_path):
    agent = GRPO(make(4, group_size=2), rollout="vllm", batch_tokens=40)
    assert len(check(agent.collector.collect(60))) > 1
    agent.save(tmp_path / "checkpoint")
    other = GRPO.load(tmp_path / "checkpoint", make(4, group_size=2), rollout="vllm")
    check(other.collector.collect(60))


def test_other_prompts_bring_their_columns_to_evaluate():
    envs = make(3)
    policy = LMPolicy(envs.model)
    prompts, answers = [[20], [20], [21], [22], [20]], [1, 2, 3, 4, 5]
    found = evaluate(policy, envs, prompts=prompts, columns={"answer": answers})
    check(found.episodes)
    assert [e.columns for e in found.episodes] == [{"answer": answer} for answer in answers]
    assert found.score == pytest.approx(np.mean([e.score for e in found.episodes]))
    for options, message in (
        ({"prompts": prompts}, "asks for the column 'answer'"),
        ({"prompts": prompts, "columns": {"answer": [1]}}, "must be a list of 5"),
        ({"columns": {"answer": answers}}, "columns= belong to prompts=, which are missing"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            evaluate(policy, envs, **options)


@pytest.mark.parametrize("score_truncated", [True, False])
def test_best_of_n_takes_the_best_text_of_a_rule(score_truncated):
    options = {"group_size": 4, "score_truncated": score_truncated}
    agent = BestOfN(make(8, **options), batch_tokens=40)
    other = make(8, score_truncated=score_truncated)
    chosen = evaluate(agent, other, num_texts=4, seed=3)
    check(chosen.episodes)
    drawn = evaluate(agent.policy, other, num_texts=4, seed=3).episodes
    assert [e.prompt_id for e in chosen.episodes] == [e.prompt_id for e in drawn]
    assert chosen.score > np.mean([e.score for e in drawn])
    assert chosen.kl == pytest.approx(best_of_n_kl(4), abs=1e-3)
    drawn = agent.collector.collect(60)
    agent.collector.collect = lambda tokens: drawn
    best = [max(drawn[i : i + 4], key=lambda e: e.score) for i in range(0, len(drawn), 4)]
    assert agent.collect() == best
    for answer in (1, -1):  # with the other sign the worst of the four is the best
        given = {"columns": {"answer": [answer]}, "max_new_tokens": 4}
        [text] = agent.generate([[20]], **given)
        single = [
            agent.core.score_episodes([[20]], [r], columns={"answer": [answer]}).score[0]
            for r in super(BestOfN, agent).generate([[20]] * 4, max_new_tokens=4)
        ]
        assert right([20], text, answer) == pytest.approx(max(single), rel=1e-5)


def test_best_of_n_without_one_score_says_so_instead_of_taking_the_first():
    mixed = {"a": RULE, "b": RULE}
    agent = BestOfN(make(8, reward=mixed, group_size=2))
    with pytest.raises(InvalidArgument, match="this env gives a text no score"):
        evaluate(agent, make(4, reward=mixed), num_texts=4)


@pytest.mark.parametrize("kl", ["reference", "policy", "none"])
def test_a_run_folder_has_the_score_every_term_and_the_columns(kl, tmp_path):
    envs = make(4, reward={"mine": (RULE, 0.5)}, kl=kl, kl_coef=0.3, missing_eos_penalty=2.0)
    seen = []
    agent = PPO(envs, batch_tokens=40, run_dir=tmp_path)
    agent.learn(60, on_update=lambda metrics, episodes: seen.append((metrics, episodes)))
    for metrics, episodes in seen:
        check(episodes)
        mean = {name: np.mean([f(e) for e in episodes]) for name, f in TERMS.items()}
        assert metrics["objective/score"] == pytest.approx(mean["score"], rel=1e-5)
        assert metrics["reward/mine"] == pytest.approx(mean["score"] / 2, rel=1e-5)
        assert metrics["reward/missing_eos"] == pytest.approx(-2 * mean["cut"])
        without = metrics["reward/mine"] + metrics["reward/missing_eos"]
        assert metrics["objective/reward_without_kl"] == pytest.approx(without, rel=1e-4)
        paid = without + metrics.get("reward/kl", 0.0)
        assert metrics["objective/reward"] == pytest.approx(paid, abs=1e-3)
        assert ("reward/kl" in metrics) == (kl != "none")
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").open(encoding="utf-8")]
    assert [line["columns"] for line in lines] == [e.columns for _, some in seen for e in some]
    assert [line["score"] for line in lines] == [e.score for _, some in seen for e in some]


TERMS = {"score": lambda e: e.score, "cut": lambda e: float(e.truncated)}


def test_episodes_without_columns_have_no_such_entry(tmp_path):
    envs = TokenVectorEnv(4, task=tasks.toy(), autoreset_mode="SameStep")
    PPO(envs, batch_tokens=40, run_dir=tmp_path).learn(40)
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").open(encoding="utf-8")]
    assert not any("columns" in line for line in lines)
    bare = PPO(envs, batch_tokens=40).collector.collect(40)
    unnamed = [replace(e, terms={}) for e in bare]
    assert np.isnan(summary(unnamed)["objective/reward_without_kl"])
    assert fakes.EOS in tasks.STOPS
