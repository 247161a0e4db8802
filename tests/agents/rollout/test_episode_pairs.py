"""What `rollout="episode"` meets: whole texts are those that stepping writes from the same random
numbers, and are paid, learned from and versioned as those are."""

from dataclasses import replace
from typing import Any

import chat_templates
import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from test_episode_engine import agent_of, check_same, random_of
from test_text_collector import numbers

from tokenenv.agents import GRPO, VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.rollout import actor as actor_module
from tokenenv.agents.rollout.actor import Actor, invert
from tokenenv.agents.rollout.collector import Collector, Prefix, texts_of
from tokenenv.agents.rollout.text import Text
from tokenenv.rewards import Prime, Rule, progressive

STOPS = (fakes.EOS, 7, 9, 11, 20)
T = 8
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5, 15]]
ANSWERS = [3, -1, 4, 1, 5]
MOVED = ("slot", "index", "prompt_id", "version")
"""What says where and when a text was written, and of which row its prompt is."""


def answered(prompt: Any, response: Any, answer: int) -> float:
    return answer * (len(response) / 10 + sum(response) / 100)


EVEN = Rule(lambda prompt, response: response[0] % 2, on="tokens")
DENSE = Rule(answered, on="tokens", dense=True)


def make(num_envs: int = 6, mode: Any = AutoresetMode.SAME_STEP, **options: Any) -> Any:
    given = {
        "model": fakes.causal_lm(num_hidden_layers=1),
        "reward_model": fakes.reward_model("token", num_hidden_layers=1),
        "prompts": PROMPTS,
        "tokenizer": fakes.tokenizer(),
        "stop_token_ids": STOPS,
        "max_prompt_tokens": 4,
        "max_new_tokens": T,
        "kl_coef": 0.3,
        "gold": EVEN,
    } | options
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=num_envs, autoreset_mode=mode, **given
    ).unwrapped


def teacher() -> dict[str, Any]:
    return {"teacher": fakes.causal_lm(seed=5, num_hidden_layers=1)}


def prime(**options: Any) -> Prime:
    settings = {"outcome": "gold", "coef": 0.5, "mix": 0.5, "every": 6, "lr": 1e-2} | options
    return Prime(**settings)


def stepped(agent: Any, envs: Any, seed: int, options: Any, columns: Any = ()) -> Any:
    """The text that one slot steps from a text's own random numbers."""
    random = iter(torch.from_numpy(random_of(seed, T)))
    collector = Collector(envs, Actor(agent.policy, reads_values=agent.actor.reads_values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            actor_module,
            "sample",
            lambda logits, temperature, _: invert(logits, temperature, next(random)[None]),
        )
        collector.reset(options, columns)
        while not (ended := collector.step()):
            pass
    return ended[0]


def by_stepping(agent: Any, envs: Any, episode: Any) -> Any:
    """A text of a run, stepped."""
    [number] = numbers([episode], agent.collector.num_texts)
    seed = agent.collector._seed_of(Text(number, 0, [], 0, {}))
    options = {"prompts": [episode.prompt.tolist()]}
    return stepped(agent, envs, seed, options, [episode.columns] if episode.columns else ())


def begun_at(agent: Any) -> dict[int, int]:
    """Tokens that the env has seen when each text is begun, as they are noted from now on."""
    noted: dict[int, int] = {}
    begin = agent.collector.engine.begin

    def noting(key: int, *rest: Any) -> None:
        noted[key] = agent.core.tokens_seen
        begin(key, *rest)

    agent.collector.engine.begin = noting
    return noted


PAID: dict[str, Any] = {
    "distill": lambda: {"reward": "distill"} | teacher(),
    "distill and kl of the policy": lambda: {"reward": "distill", "kl": "policy"} | teacher(),
    "prime": lambda: {"reward": prime()},
    "prime that lags": lambda: {"reward": prime(max_lag=2), "array": "torch"},
    "progressive": lambda: {"reward": progressive("terminal", "delta", tokens=200)},
    "scheduled": lambda: {
        "reward": {"dense": ("token", lambda seen: 0.5 + seen / 100), "even": ("uniform", 0.5)}
    },
    "columns": lambda: {
        "reward": DENSE,
        "prompts": [
            {"prompt": prompt, "answer": answer}
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ],
    },
}


SCHEDULED = ("progressive", "scheduled")


@pytest.mark.parametrize("name", PAID)
def test_texts_are_paid_as_stepping_pays_them(name: str) -> None:
    """In three batches, between which the policy and what learns in the env move on."""
    agent, other = agent_of(make(**PAID[name]())), make(1, AutoresetMode.DISABLED, **PAID[name]())
    noted, seen = begun_at(agent), []
    for _ in range(3):
        learned = agent.core.save_statistics()
        episodes = agent.collector.collect(60)
        # A text that is older was drawn by two policies.
        fresh = [e for e in episodes if e.version == agent.collector.version]
        assert len(fresh) > 3
        for e in fresh[:6]:
            other.load_statistics(learned)
            other.tokens_seen = noted[e.index * 6 + e.slot]
            seen.append((e, by_stepping(agent, other, e)))
            check_same(*seen[-1], but=MOVED)
            if name == "columns":
                assert e.columns == {"answer": ANSWERS[e.prompt_id]}
        # Texts whose weights are older than those of their batch are paid by the older ones.
        if name not in SCHEDULED:
            agent.update(EpisodeBatch.stack(episodes))
            agent.collector.refresh()
    assert {e.truncated for e, _ in seen} == {True, False}
    assert np.abs([e.reward.sum() for e, _ in seen]).min() > 1e-4
    versions = {e.reward_version for e, _ in seen}
    assert versions == ({0, 1, 2} if name == "prime" else versions)
    assert (versions == {-1}) == (not name.startswith("prime"))


@pytest.mark.parametrize(
    "options", [{"distill_coef": 0.2}, {"distill_coef": 0.2, "lora_rank": 2}], ids=str
)
def test_a_teacher_teaches_what_it_teaches_stepping(options: dict[str, Any]) -> None:
    """An update by the texts of one is that by the same texts of the other."""
    if "lora_rank" in options:
        pytest.importorskip("peft")
    agents = [
        agent_of(make(reward="distill", **teacher()), rollout=rollout, **options)
        for rollout in ("episode", "step")
    ]
    other = make(1, AutoresetMode.DISABLED, reward="distill", **teacher())
    episodes = agents[0].collector.collect(60)
    again = [
        replace(by_stepping(agents[0], other, e), slot=e.slot, index=e.index) for e in episodes
    ]
    start = [weight.clone() for weight in agents[0].policy.parameters()]
    metrics = [
        agent.update(EpisodeBatch.stack(some))
        for agent, some in zip(agents, (episodes, again), strict=True)
    ]
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[0]["loss/distill"] > 0
    weights = (agent.policy.parameters() for agent in agents)
    moved = 0.0
    for before, a, b in zip(start, *weights, strict=True):
        # AdamW divides by the size of a gradient, so that the rounding of one that is about zero
        # can be a step: what counts is the whole tensor's.
        assert float((a - b).detach().norm() - 0.01 * (a - before).detach().norm()) <= 1e-6
        moved = max(moved, float((a - before).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("name", ["distill", "prime", "columns"])
def test_texts_that_begin_with_a_prefix_are_those_of_stepping(name: str) -> None:
    agent = agent_of(make(**PAID[name]()), VinePPO)
    while agent.updates < 1 or agent.core.reward_version == 0:
        agent.learn(agent.tokens_seen + 1)
    # A step would first take the update that is due; continuations are priced by what is there.
    options = {"reward": prime(every=500)} if name == "prime" else PAID[name]()
    other = make(1, AutoresetMode.DISABLED, **options)
    learned, tokens = agent.core.save_statistics(), agent.core.tokens_seen
    states = [
        Prefix(np.array([5, 6, 7]), np.array([12, 13])),
        Prefix(np.array([8]), np.array([15])),
    ]
    columns = [{"answer": answer} for answer in (3, -1)] if name == "columns" else []
    first = agent.collector._continued
    episodes = agent.collector.play_on(states, 5, columns)
    for i, e in enumerate(episodes):
        other.load_statistics(learned)
        other.tokens_seen = tokens
        seed = agent.collector._seed_of(Text(-(first + 1 + i), 0, [], 0, {}))
        some = columns[i // 5 : i // 5 + 1]
        check_same(e, stepped(agent, other, seed, texts_of([states[i // 5]]), some), but=MOVED)
    assert len({len(e.response) for e in episodes}) > 1
    assert {e.reward_version > 0 for e in episodes} == {name == "prime"}
    # A prefix takes of the room of a response.
    assert max(len(e.response) for e in episodes if len(e.prompt) == 5) == T - 2


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "is"},
    {"role": "user", "content": "good?"},
]


@pytest.mark.parametrize("other_words", [False, True])
def test_prompts_that_are_messages_are_those_of_stepping(other_words: bool) -> None:
    """A reward model of another tokenizer reads the conversation by its own template."""
    tokenizer = chat_templates.tokenizer_of(chat_templates.CHATML)
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 256}
    theirs = chat_templates.tokenizer_of(chat_templates.MISTRAL, "legacy")
    reads = theirs if other_words else tokenizer
    options = {
        "model": fakes.causal_lm(vocab_size=len(tokenizer), **sizes),
        "tokenizer": tokenizer,
        "prompts": ["a dog", CHAT],
        "chat_template": True,
        "reward_model": fakes.reward_model("token", vocab_size=len(reads), **sizes),
        "reward_tokenizer": reads,
        "max_prompt_tokens": 90,
        "stop_token_ids": list(range(100, 160)),
        "gold": lambda prompt, response: float(len(prompt)),
    }
    agent, other = agent_of(make(**options)), make(1, AutoresetMode.DISABLED, **options)
    episodes = agent.collector.collect(60)
    for e in episodes:
        check_same(e, by_stepping(agent, other, e), but=MOVED)
    assert len({tuple(e.prompt) for e in episodes}) == 2
    assert {e.truncated for e in episodes} == {True, False}


@pytest.mark.parametrize("reward", ["token", "delta", "distill"])
def test_models_in_bfloat16_write_the_same_texts_and_pay_within_their_bound(reward: str) -> None:
    """The policy is float32: its texts are the same. What bfloat16 models say of them is rounded in
    other places in a whole text than token by token."""
    options = {"reward": reward, "frozen_dtype": "bfloat16"} | teacher()
    agent, other = agent_of(make(**options)), make(1, AutoresetMode.DISABLED, **options)
    episodes = agent.collector.collect(60)
    again = [by_stepping(agent, other, e) for e in episodes]
    rounded = ("ref_logprob", "reward", "potential", "terms", "score")
    for e, one in zip(episodes, again, strict=True):
        check_same(e, one, but=(*MOVED, *rounded))
    apart, spread = (
        {
            name: f(np.concatenate([getattr(e, name) for e in episodes]), name)
            for name in ("ref_logprob", "reward")
        }
        for f in (
            lambda all, name: np.abs(all - np.concatenate([getattr(e, name) for e in again])),
            lambda all, name: all.std(),
        )
    )
    assert apart["ref_logprob"].mean() < 0.05
    assert apart["reward"].mean() < spread["reward"] / 16


def test_a_group_has_one_prompt_its_row_and_the_version_that_prices_it() -> None:
    options = PAID["columns"]() | {
        "reward": {"dense": (DENSE, 0.5), "prime": prime(max_lag=None)},
        "group_size": 3,
    }
    agent = agent_of(make(**options), GRPO)
    agent.learn(120)
    other = make(1, AutoresetMode.DISABLED, **options | {"group_size": 1})
    learned = agent.core.save_statistics()
    episodes = agent.collector.collect(60)
    for e in (e for e in episodes if e.version == agent.collector.version):
        other.load_statistics(learned)
        check_same(e, by_stepping(agent, other, e), but=MOVED)
    for i in range(0, len(episodes), 3):
        assert len({(e.prompt_id, e.columns["answer"]) for e in episodes[i : i + 3]}) == 1
