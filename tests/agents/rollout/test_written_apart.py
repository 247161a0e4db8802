"""Texts that are scored while an engine in another process writes others: the same episodes, in the
same order, as where a batch is scored at once."""

import fakes
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from line_env import interrupted_at

from tokenenv.agents import GRPO, PPO, VinePPO
from tokenenv.agents.rollout import text_collector
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import NotFinite
from tokenenv.models.heads import make_scorer
from tokenenv.rewards.scaling import Scaled
from tokenenv.rewards.term import RewardTerm
from tokenenv.types import Task

NUM_TEXTS = 6


def make(*, gold=None, **options):
    """Tiny random models; a text has 1 to 10 tokens."""
    task = Task(
        tokenizer=fakes.tokenizer(),
        reference=fakes.causal_lm(num_hidden_layers=1),
        prompts=[[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]],
        max_prompt_tokens=4,
        max_new_tokens=10,
        stop_token_ids=(fakes.EOS, 7, 9, 11, 20),
        scorer=make_scorer(fakes.reward_model("token", num_hidden_layers=1)),
        gold=gold,
    )
    mode = AutoresetMode.SAME_STEP
    return TokenVectorEnv(NUM_TEXTS, task=task, autoreset_mode=mode, **options)


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    monkeypatch.setitem(text_collector.ENGINES, "vllm apart", "local_engine:EngineInRounds")


def agent_of(envs, algorithm=PPO, *, apart=True, **options):
    given = {"batch_tokens": 150, "lr": 1e-2, "epochs": 1, "minibatches": 2}
    where = {"rollout": "vllm", "rollout_options": {"own_process": apart}}
    return algorithm(envs, **{**given, **where, **options})


def numbers(episodes):
    return [e.index * NUM_TEXTS + e.slot for e in episodes]


def ahead_of(agent):
    """The numbers of texts in each scoring before the batch was whole, from now on."""
    scores, noted = agent.collector.scores, []
    plain = scores.score_ahead

    def noting(texts):
        noted.append([text.number for text in texts])
        plain(texts)

    scores.score_ahead = noting
    return noted


def assert_same(episodes, others):
    assert numbers(episodes) == numbers(others)
    for e, other in zip(episodes, others, strict=True):
        for name in ("prompt", "response", "logprob"):
            np.testing.assert_array_equal(getattr(e, name), getattr(other, name))
        for name in ("reward", "ref_logprob", "potential"):
            np.testing.assert_allclose(getattr(e, name), getattr(other, name), atol=1e-5)
        names = ("terminated", "truncated", "kl_coef", "prompt_id", "version", "bootstraps")
        assert [getattr(e, name) for name in names] == [getattr(other, name) for name in names]
        assert (e.score, e.gold) == pytest.approx((other.score, other.gold), abs=1e-5, nan_ok=True)


def schedule(tokens_seen):
    return 0.5 + tokens_seen / 100


REWARDS = {
    "token": {"reward": {"dense": ("token", schedule), "shaped": "delta"}, "kl_coef": 0.3},
    "terminal": {"reward": "terminal", "score_truncated": False},
    "policy": {"reward": "token", "kl": "policy", "kl_coef": 0.3},
}


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("reward", REWARDS)
def test_a_batch_is_the_one_that_is_scored_at_once(reward, max_staleness):
    """Two batches under the same weights: the schedule goes by the tokens of whole batches."""
    agents = [
        agent_of(
            make(gold=lambda prompt, response: float(len(response)), **REWARDS[reward]),
            apart=apart,
            max_staleness=max_staleness,
        )
        for apart in (True, False)
    ]
    noted = ahead_of(agents[0])
    for _ in range(2):
        episodes, others = (agent.collector.collect(150) for agent in agents)
        assert_same(episodes, others)
        assert agents[0].core.tokens_seen == agents[1].core.tokens_seen
        assert agents[0].collector.has_potential == agents[1].collector.has_potential
    early = [number for some in noted for number in some]
    assert len(set(early)) == len(early)
    assert len(early) > len(episodes)  # of the two batches
    asked = [texts for texts, _ in agents[0].collector.engine.rounds]
    assert max(asked) == NUM_TEXTS // 2
    assert max(map(len, noted)) <= NUM_TEXTS


def test_an_engine_has_texts_to_begin_with_while_others_are_scored():
    """As many as end meanwhile; at the end of a batch no more run than side by side."""
    agent = agent_of(make())
    engine, queued = agent.collector.engine, []
    ended = engine.ended

    def noting():
        queued.append(len(engine.running) - NUM_TEXTS)
        assert engine.asked_for[0] <= max(1, queued[-1])
        return ended()

    engine.ended = noting
    agent.collector.collect(300)
    assert max(queued) == NUM_TEXTS
    assert min(queued) == queued[-1] == 0
    assert len(agent.collector._running) < NUM_TEXTS


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_text_is_older_than_allowed_and_none_is_lost(max_staleness, group_size):
    envs = make(group_size=group_size)
    agent = agent_of(
        envs, GRPO if group_size > 1 else PPO, max_staleness=max_staleness, batch_tokens=60
    )
    found = []

    def on_update(logged, episodes):
        assert all(0 <= agent.updates - 1 - e.version <= max_staleness for e in episodes)
        assert max_staleness > 0 or not agent.collector._running
        found.extend(episodes)

    agent.learn(500, on_update=on_update)
    collector = agent.collector
    unfinished = [
        *collector._running,
        *collector._waiting,
        *(text.number for text in collector._ready),
    ]
    assert sorted([*numbers(found), *unfinished]) == list(range(collector._begun))
    assert agent.core.tokens_seen == sum(len(e.response) for e in found)


def test_terms_that_learn_are_taught_in_the_order_of_whole_batches():
    """Nothing is scored before its batch is whole: what a text is paid depends on the others."""
    options = {"reward": {"scaled": Scaled("token"), "end": "terminal"}}
    agents = [agent_of(make(**options), apart=apart) for apart in (True, False)]
    noted = ahead_of(agents[0])
    for _ in range(2):
        assert_same(*(agent.collector.collect(150) for agent in agents))
    assert not noted
    saved = [agent.core.save_statistics() for agent in agents]
    np.testing.assert_equal(*saved)
    assert agents[0].core.learns_from_texts
    assert not make().learns_from_texts


def test_what_could_not_be_scored_ahead_is_scored_with_the_batch(monkeypatch):
    """And where it fails again, the texts wait, as they do where a batch is scored at once."""
    agent, other = agent_of(make()), agent_of(make(), apart=False)

    asked = []

    def down(*args, **kwargs):
        asked.append(args)
        raise ConnectionError("down")

    with monkeypatch.context() as patch:
        patch.setattr(agent.core, "score_episodes", down)
        with pytest.raises(ConnectionError):
            agent.collector.collect(150)
    assert len(asked) == 2  # ahead once, and with the batch
    assert agent.core.tokens_seen == 0
    running = list(agent.collector._running)
    ready = [text.number for text in agent.collector._ready]
    episodes = agent.collector.collect(1)
    assert numbers(episodes) == ready
    assert list(agent.collector._running) == running
    assert_same(episodes, other.collector.collect(150))
    assert agent.core.tokens_seen == other.core.tokens_seen


class NanAtLastToken(RewardTerm):
    """Pays NaN where a whole text has as many tokens as it may have, else 1."""

    name, kind = "nan", "causal"

    def reward(self, batch):
        full = batch.after.step == 10
        return torch.where(full, torch.nan, 1.0)


def test_texts_at_fault_go_and_the_others_stay():
    """The same ones, whether or not others of the batch were scored ahead."""
    left, named, early = [], [], []
    for apart in (True, False):
        agent = agent_of(make(reward=NanAtLastToken(), group_size=2), GRPO, apart=apart)
        early.append(ahead_of(agent))
        with pytest.raises(NotFinite) as error:
            agent.collector.collect(150)
        left.append([text.number for text in agent.collector._ready])
        named.append(sorted(text.number for text in error.value.texts))
    assert left[0] == left[1]
    assert named[0] == named[1]
    assert left[0]
    assert named[0]
    assert not {number // 2 for number in named[0]} & {number // 2 for number in left[0]}
    assert set(left[0]) & {number for some in early[0] for number in some}


FILES = "text_collector.py", "text_scores.py", "local_engine.py"


@pytest.mark.parametrize("place", [200, 700, 1300, 2000, 3500])
def test_ctrl_c_anywhere_leaves_nothing_broken(place):
    """Wherever it falls, the run goes on: no text twice, none lost, each paid as it would be."""
    other, whole = agent_of(make()), {}
    for _ in range(3):
        found = other.collector.collect(100)
        whole |= dict(zip(numbers(found), found, strict=True))
    agent = agent_of(make())
    with interrupted_at(place, *FILES) as raised:
        agent.collector.collect(100)
    assert raised
    found = agent.collector.collect(100)
    seen = numbers(found)
    assert len(set(seen)) == len(seen)
    common = [(e, whole[number]) for number, e in zip(seen, found, strict=True) if number in whole]
    assert len(common) > NUM_TEXTS
    for e, as_it_was in common:
        np.testing.assert_array_equal(e.response, as_it_was.response)
        np.testing.assert_allclose(e.reward, as_it_was.reward, atol=1e-5)
    collector = agent.collector
    left = [text.number for text in collector._unfinished()] + list(collector._waiting)
    assert sorted([*seen, *left]) == list(range(collector._begun))
    assert agent.core.tokens_seen == sum(len(e.response) for e in found)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """A checkpoint in the middle of a batch holds texts that were scored ahead as ended ones."""

    def end(agent, updates):
        while agent.updates < updates:
            agent.learn(agent.tokens_seen + 1)
        return [weight.detach().clone() for weight in agent.policy.parameters()]

    agent = agent_of(make(), max_staleness=0)
    expected = end(agent, 3)
    agent = agent_of(make(), max_staleness=0)
    end(agent, 1)
    agent.save(tmp_path / "c")
    resumed = PPO.load(
        tmp_path / "c", make(), rollout="vllm", rollout_options={"own_process": True}
    )
    for one, other in zip(expected, end(resumed, 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_continuations_are_written_beside_an_engines_queue():
    agent = agent_of(make(), VinePPO, batch_tokens=60)
    agent.learn(120)
    assert agent.updates
