"""Texts of an engine that the environment writes into: turn by turn what stepping would have made
of them and paid for them, none waits for another, none is lost."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from line_env import interrupted_at
from local_engine import GivenEngine

from tokenenv.agents import GRPO, PPO, VinePPO
from tokenenv.agents.algorithms.vine_ppo import state_before
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.rollout import text_collector
from tokenenv.agents.rollout.collector import Prefix
from tokenenv.agents.rollout.text import Text
from tokenenv.agents.rollout.text_collector import TextCollector
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.rewards.turn import Turn
from tokenenv.turns import Reply

NUM_TEXTS, T = 6, 14
NAMES = ("turns", "turns of a text score", "random turns")
TOYS = {name: tasks.TOYS[name] for name in NAMES}
TOYS["turn rewards"] = {"reward": {"turn": "turn", "even": "uniform"}, "turns": "random"}


def make(name="turns", num_envs=NUM_TEXTS, mode=AutoresetMode.SAME_STEP, *, task=None, **options):
    given = TOYS[name] | {"max_new_tokens": T} | options
    made = {key: given.pop(key) for key in ("turns", "scorer", "max_new_tokens") if key in given}
    return TokenVectorEnv(num_envs, task=task or tasks.toy(**made), autoreset_mode=mode, **given)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")


def agent_of(envs, algorithm=PPO, **options):
    given = {"rollout": "vllm", "batch_tokens": 60, "lr": 3e-3, "minibatches": 2, **options}
    return algorithm(envs, **given)


def numbers(episodes):
    return [e.index * NUM_TEXTS + e.slot for e in episodes]


def answer_seed(collector, number):
    return collector._seed_of(Text(number, 0, [], 0, {}), 0, 1)


def replayed(envs, prompt, tokens, logprobs, seed, prefix=None):
    """What a single slot shows when it is given a text's own tokens, and the seed of its answers:
    the last observation, each step's reward, log pi_ref and turn reward, Phi, and the last info."""
    options = {"prompts": [prompt]}
    if prefix is not None:
        options |= {"prefixes": [prefix.response], "prefix_own": [prefix.own]}
    envs.reset(options=options)
    saved = envs.save_state()
    saved["texts"]["seed"][:] = seed
    obs, info = envs.load_state(saved)
    steps, potential = [], [info.get("potential", [0.0])[0]]
    for t, token in enumerate(tokens):
        action = np.array([token])
        if envs.config.kl == "policy":
            action = {"token": action, "logprob": np.array([logprobs[t]], np.float32)}
        obs, rewards, terminated, truncated, info = envs.step(action)
        steps.append((rewards[0], info["ref_logprob"][0], info["turn_reward"][0]))
        potential.append(info.get("potential", [0.0])[0])
        assert (terminated | truncated)[0] == (t == len(tokens) - 1)
    return obs, np.array(steps), np.array(potential), info


def check_against_stepping(e, obs, steps, potential, info, first=0):
    """`first`: the first of the episode's columns, where a prefix has some."""
    length = int(obs["length"][0])
    assert obs["tokens"][0, :length].tolist() == e.text.tolist()
    assert np.flatnonzero(obs["own_mask"][0]).tolist() == e.places.tolist()
    own = slice(first, first + len(e.response))
    np.testing.assert_allclose(e.reward, info["token_rewards"][0][own], atol=1e-5)
    assert e.reward.sum() == pytest.approx(steps[:, 0].sum(), abs=1e-4)
    np.testing.assert_allclose(e.ref_logprob, steps[:, 1], atol=1e-5)
    np.testing.assert_allclose(e.potential, potential, atol=1e-5)
    assert (e.terminated, e.truncated) == (not info["cut"][0], bool(info["cut"][0]))
    np.testing.assert_allclose(e.score, info.get("score", [np.nan])[0], atol=1e-5)
    assert e.gold == info["gold"][0]
    assert e.kl_coef == pytest.approx(info["kl_coef"][0])
    for name, values in info["token_reward_terms"].items():
        if not name.startswith("_"):
            np.testing.assert_allclose(e.terms[name], values[0][own], atol=1e-5)


# ---------------------------------------------------------------- what stepping pays


@pytest.mark.parametrize("name", TOYS)
def test_episodes_earn_what_stepping_pays(name):
    """Those of the first batch, and those that were begun before an update and ended after it."""
    agent, other = agent_of(make(name)), make(name, 1, AutoresetMode.DISABLED)
    found = []
    for _ in range(3):
        episodes = agent.collector.collect(40)
        for e, number in zip(episodes, numbers(episodes), strict=True):
            seed = answer_seed(agent.collector, number)
            seen = replayed(other, e.prompt.tolist(), e.response, e.logprob, seed)
            check_against_stepping(e, *seen)
        found += episodes
        agent.update(EpisodeBatch.stack(episodes))
        agent.collector.refresh()
    assert agent.tokens_seen == agent.core.tokens_seen == sum(len(e.response) for e in found)
    assert any(e.turns > 2 for e in found)
    assert any(len(e.written) for e in found)
    assert {e.terminated for e in found} == {True, False}
    # Some end by a stop token, some by what the environment decides.
    stopped = [e.own[-1] and e.text[-1] in tasks.STOPS for e in found if e.terminated]
    assert set(stopped) == {True, False}
    if name in ("random turns", "turn rewards"):
        assert any(len(e.response) < T for e in found if e.truncated)
    if name == "turn rewards":
        assert any(e.terms["turn"].any() for e in found)


@pytest.mark.parametrize("name", ["turns", "turns of a text score"])
def test_the_likeliest_texts_are_those_of_stepping(name):
    """Of either collector, in all that an episode holds."""
    by_prompt = []
    for rollout in ("step", "vllm"):
        agent = agent_of(make(name), rollout=rollout, temperature=1e-5)
        by_prompt.append({e.prompt_id: e for e in agent.collector.collect(150)})
    common = by_prompt[0].keys() & by_prompt[1].keys()
    assert len(common) > 5
    assert any(by_prompt[1][prompt].turns > 1 for prompt in common)
    for one, other in ((by_prompt[0][prompt], by_prompt[1][prompt]) for prompt in common):
        for field in ("prompt", "text", "places", "written", "response"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        for field in ("ref_logprob", "reward", "potential", "score", "kl_coef"):
            np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-5)
        for field in ("terminated", "truncated", "bootstraps", "gold", "version"):
            assert getattr(one, field) == getattr(other, field)
        for term, values in one.terms.items():
            np.testing.assert_allclose(values, other.terms[term], atol=1e-5)


@pytest.mark.parametrize("algorithm", [PPO, GRPO, VinePPO])
def test_log_probs_are_the_learners(algorithm):
    """At every token of every turn."""
    agent, seen = agent_of(make(group_size=3), algorithm, temperature=0.7), []
    agent.learn(60, on_update=lambda metrics, episodes: seen.append((metrics, episodes)))
    metrics, episodes = seen[0]
    assert metrics["rollout/mismatch_max"] < 1e-5
    assert any(e.turns > 1 for e in episodes)


# ---------------------------------------------------------------- how a text ends

R = Reply
ENDINGS = {
    # T, L, what the environment says, the policy's tokens; what is then behind the prompt, whose it
    # is, how it ends, the turn rewards, and the engine's limits.
    "a stop token is answered, and a later one is not": (
        (7, 30, [R([4], 0.5), None], [3, 7, 5, 7]),
        ([3, 7, 4, 5, 7], "++-++", "terminated", [0, 0.5, 0, 0], [7, 5]),
    ),
    "the reply ends it": (
        (7, 30, [R([4, 5], 0.5, ends=True)], [3, 10]),
        ([3, 10, 4, 5], "++--", "terminated", [0, 0.5], [7]),
    ),
    "it ends without a word": (
        (7, 30, [R(ends=True)], [10]),
        ([10], "+", "terminated", [0], [7]),
    ),
    "the last token of the budget ends a turn": (
        (2, 30, [R([4], 0.5)], [3, 10]),
        ([3, 10, 4], "++-", "truncated", [0, 0.5], [2]),
    ),
    "the last token of the budget ends a turn, and a reply the text": (
        (2, 30, [R([4], ends=True)], [3, 10]),
        ([3, 10, 4], "++-", "terminated", [0, 0], [2]),
    ),
    "the last token of the budget is an answered stop token": (
        (2, 30, [R((), 0.5)], [3, 7]),
        ([3, 7], "++", "truncated", [0, 0.5], [2]),
    ),
    "the reply has no room": (
        (7, 5, [R([4, 5, 6], 0.5)], [3, 10]),
        ([3, 10], "++", "truncated", [0, 0.5], [4]),
    ),
    "the reply to a stop token has no room": (
        (7, 5, [R([4, 5, 6], 0.5)], [3, 7]),
        ([3, 7], "++", "truncated", [0, 0.5], [4]),
    ),
    "the reply has no room, and ends the text": (
        (7, 5, [R([4, 5, 6], 0.5, ends=True)], [3, 10]),
        ([3, 10], "++", "terminated", [0, 0.5], [4]),
    ),
    "the reply fills the context": (
        (7, 5, [R([4, 5], 0.5)], [3, 10]),
        ([3, 10, 4, 5], "++--", "truncated", [0, 0.5], [4]),
    ),
    "the policy fills the context": (
        (7, 6, [R([4])], [10, 3, 4, 5]),
        ([10, 4, 3, 4, 5], "+-+++", "truncated", [0] * 4, [5, 3]),
    ),
    "nothing is said": (
        (7, 30, [None, R([5])], [10, 3, 10, 9]),
        ([10, 3, 10, 5, 9], "+++-+", "terminated", [0] * 4, [7, 6, 4]),
    ),
    "a reward alone": (
        (3, 30, [R((), 0.5), R([4])], [10, 10, 3]),
        ([10, 10, 4, 3], "++-+", "truncated", [0.5, 0, 0], [3, 2, 1]),
    ),
    "a stop token that the environment wrote": (
        (7, 30, [R([7])], [10, 3, 9]),
        ([10, 7, 3, 9], "+-++", "terminated", [0] * 3, [7, 6]),
    ),
}
AFTER_EVERY = {
    "asked after every token": (
        (4, 30, [None, R([5], 0.5), R([6]), R([4])], [3, 4, 9, 8]),
        ([3, 4, 5, 9, 6, 8, 4], "++-+-+-", "truncated", [0, 0.5, 0, 0], [1, 1, 1, 1]),
    ),
    "asked after every token, one of which stops": (
        (4, 30, [None, None], [3, 9]),
        ([3, 9], "++", "terminated", [0, 0], [1, 1]),
    ),
}


@pytest.mark.parametrize("name", [*ENDINGS, *AFTER_EVERY])
def test_a_text_ends_where_the_contract_says(name):
    """As stepping ends it; the engine goes on behind what has been written, with what is left."""
    (budget, context, replies, given), expected = (ENDINGS | AFTER_EVERY)[name]
    tokens, own, end, turn_rewards, limits = expected
    ends = None if name in AFTER_EVERY else (7, 10)

    def respond(text):
        mine = [token for s in text.segments if s.own for token in s.tokens]
        return replies[sum(ends is None or token in ends for token in mine) - 1]

    task = replace(
        tasks.toy(max_new_tokens=budget),
        prompts=[[5]],
        max_prompt_tokens=1,
        respond=respond,
        turn_end_token_ids=ends,
        max_context_tokens=context,
    )
    options = {"task": task, "reward": {"turn": "turn", "score": "token"}, "kl": "none"}
    envs = make(num_envs=1, **options)
    engine = GivenEngine(envs.token_spec, given)
    [e] = TextCollector(envs, engine, num_texts=1, max_staleness=0).collect(1)
    assert e.text.tolist() == [5, *tokens]
    assert e.own.tolist() == [one == "+" for one in own]
    assert (e.terminated, e.truncated) == (end == "terminated", end == "truncated")
    assert e.terms["turn"].tolist() == turn_rewards
    assert [limit for _, limit in engine.asked] == limits
    for prompt, _ in engine.asked:
        assert prompt == e.text.tolist()[: len(prompt)]
    stepped = make(num_envs=1, mode=AutoresetMode.DISABLED, **options)
    obs, steps, *rest = replayed(stepped, [5], given, None, 0)
    check_against_stepping(e, obs, steps, *rest)
    assert steps[:, 2].tolist() == turn_rewards


def test_a_reply_may_come_from_the_prompts_row():
    task = replace(
        tasks.toy(max_new_tokens=3),
        prompts=[[5], [6]],
        columns=[{"answer": 40}, {"answer": 41}],
        respond=lambda text: Reply([text.columns["answer"]]),
        turn_end_token_ids=(10,),
        max_context_tokens=12,
    )
    envs = make(task=task)
    engine = GivenEngine(envs.token_spec, itertools.repeat(10))
    episodes = TextCollector(envs, engine, num_texts=NUM_TEXTS).collect(20)
    assert {e.written[0] - e.prompt[0] for e in episodes} == {35}
    assert {e.columns["answer"] for e in episodes} == {40, 41}


# ---------------------------------------------------------------- what the engine is asked


def check_turns(engine, spec, episodes):
    """Each turn of a text begins behind all that is there, with the room that is left, and with
    random numbers of its own."""
    for number, e in zip(numbers(episodes), episodes, strict=True):
        begun = {len(text): turn for (key, text), turn in engine.turns.items() if key == number}
        assert all(
            text == tuple(e.text[: len(text)]) for key, text in engine.turns if key == number
        )
        gaps = np.flatnonzero(np.diff(e.places) > 1) + 1
        assert {len(e.prompt), *e.places[gaps].tolist()} <= begun.keys()
        for place, (limit, _) in begun.items():
            steps = int((e.places < place).sum())
            assert limit == min(spec.max_new_tokens - steps, spec.max_length - place)


def test_turns_begin_behind_all_that_is_written_and_with_the_room_that_is_left():
    agent = agent_of(make("random turns"))
    episodes = agent.collector.collect(150)
    engine = agent.collector.engine
    check_turns(engine, agent.core.token_spec, episodes)
    assert engine.most == NUM_TEXTS
    assert len(engine.turns) > 2 * len(episodes)
    seeds = [seed for _, seed in engine.turns.values()]
    assert len(set(seeds)) == len(seeds)


def test_no_text_waits_for_another():
    agent = agent_of(make())
    engine = agent.collector.engine
    engine.slow = {0}
    episodes = agent.collector.collect(150)
    order = [key for key, _ in engine.turns]
    assert 0 in numbers(episodes)
    later = [n for n, key in enumerate(order) if key == 0][1]
    # Before the second turn of text 0 another one has had three.
    assert max(order[:later].count(key) for key in set(order[:later])) > 2


def test_answers_are_drawn_for_each_text_and_anew_for_each_continuation():
    """Whatever runs beside it: the same seed whenever the environment is asked, and no other text
    has it."""
    by_number = []
    for num_texts in (NUM_TEXTS, 3):
        agent, asked = agent_of(make(), rollout_options={"num_texts": num_texts}, seed=3), {}
        reply = agent.core.reply

        def noted(prompt, response, own, *, columns, seed, reply=reply, asked=asked):
            asked.setdefault(seed, set()).add(tuple(prompt))
            return reply(prompt, response, own, columns=columns, seed=seed)

        agent.core.reply = noted
        agent.collector.collect(100)
        agent.collector.play_on([(np.array([5, 6]), np.array([], np.int64))], 4)
        assert all(len(prompts) == 1 for prompts in asked.values())
        assert len([p for p in asked.values() if p == {(5, 6)}]) >= 3
        by_number.append({n: asked.get(answer_seed(agent.collector, n)) for n in range(8)})
    assert by_number[0] == by_number[1]
    assert sum(prompt is not None for prompt in by_number[0].values()) > 4


# ---------------------------------------------------------------- staleness


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_text_is_as_old_as_its_first_token(max_staleness):
    """Its later turns may be drawn from later policies; at 0 they are not."""
    agent = agent_of(make(), max_staleness=max_staleness, batch_tokens=1, epochs=1)
    drawn, turns, ages, straddled = {}, {}, [], 0
    engine = agent.collector.engine

    def note(key):
        drawn.setdefault(key, agent.updates)
        turns.setdefault(key, []).append(agent.updates)

    engine.note = note

    def on_update(metrics, episodes):
        nonlocal straddled
        assert [e.version for e in episodes] == [drawn[number] for number in numbers(episodes)]
        ages.extend(agent.updates - 1 - e.version for e in episodes)
        straddled += sum(turns[number][-1] > turns[number][0] for number in numbers(episodes))
        if agent.updates == 12:
            agent.stop()

    agent.learn(10**6, on_update=on_update)
    assert 0 <= min(ages) <= max(ages) <= max_staleness
    assert bool(straddled) == (max_staleness > 0)


def test_turns_have_the_log_probs_of_the_policy_that_drew_them():
    agent = agent_of(make(), lr=0.05)
    old = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
    agent.learn(1)
    episodes = [e for e in agent.collector.collect(120) if e.version == 0 and e.turns > 1]
    batch = EpisodeBatch.stack(episodes)
    new_BT = token_logprobs(agent.policy, batch, 1000)
    agent.policy.load_state_dict(old)
    old_BT = token_logprobs(agent.policy, batch, 1000)
    by_new, by_old = (
        ((own - batch.logprob_BT).abs() < 1e-5) & batch.mask_BT for own in (new_BT, old_BT)
    )
    assert (by_new | by_old)[batch.mask_BT].all()
    assert (by_new.any(1) & by_old.any(1)).any()


# ---------------------------------------------------------------- continuations


CONTINUED = {"reward": {"now": "turn", "moves": Turn("differences", gamma=0.5), "score": "delta"}}


@pytest.mark.parametrize("name", ["turns", "random turns", "turn rewards"])
def test_continuations_go_on_from_what_others_have_written(name):
    """What the policy has written before uses up its budget and earns nothing; the text goes on as
    stepping goes on from that prefix."""
    options = CONTINUED if name == "turn rewards" else {}
    agent, other = (
        agent_of(make(name, **options), VinePPO),
        make(name, 1, AutoresetMode.DISABLED, **options),
    )
    episodes = [e for e in agent.collector.collect(150) if len(e.written) and len(e.response) > 2]
    states = [state_before(e, len(e.response) - 1) for e in episodes[:6]]
    assert sum(state.own is not None for state in states) > 3
    begun = agent.collector._continued
    played = agent.collector.play_on(states, 2)
    pairs = zip(played[::2], played[1::2], strict=True)
    assert any(not np.array_equal(a.text, b.text) for a, b in pairs)
    for k, e in enumerate(played):
        prompt, response, own = states[k // 2]
        own = np.ones(len(response), bool) if own is None else own
        np.testing.assert_array_equal(e.prompt, [*prompt, *response])
        assert own.sum() + len(e.response) <= T
        seed = answer_seed(agent.collector, -1 - begun - k)
        prefix = Prefix(prompt, response, own)
        seen = replayed(other, prompt.tolist(), e.response, e.logprob, seed, prefix)
        check_against_stepping(e, *seen, first=int(own.sum()))


# ---------------------------------------------------------------- checkpoints and failures


def run(agent, updates, save_at=None, path=None):
    found = []

    def on_update(metrics, episodes):
        found.append((metrics, episodes))
        if agent.updates == save_at:
            assert any(text.tokens for text in agent.collector._running.values())
            agent.save(path)
        if agent.updates == updates:
            agent.stop()

    agent.learn(10**6, on_update=on_update)
    return found


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_resuming_is_exact(algorithm, tmp_path):
    options = {"lr_schedule": "constant", "importance_cap": 2.0}
    size = {"group_size": 3} if algorithm is GRPO else {}
    straight = agent_of(make("random turns", **size), algorithm, **options)
    whole = run(straight, 4, 2, tmp_path / "c")[2:]
    resumed = algorithm.load(tmp_path / "c", make("random turns", **size))
    assert resumed.collector._cut
    rest = run(resumed, 4)
    for (one, some), (other, others) in zip(whole, rest, strict=True):
        one, other = (
            {k: v for k, v in m.items() if k != "time/tokens_per_second"} for m in (one, other)
        )
        np.testing.assert_equal(one, other)
        assert numbers(some) == numbers(others)
        for a, b in zip(some, others, strict=True):
            np.testing.assert_array_equal(a.text, b.text)
            np.testing.assert_array_equal(a.reward, b.reward)
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["begin", "ended", "reply"])
@pytest.mark.parametrize("group_size", [1, 3])
def test_a_failure_costs_nothing_but_the_texts_that_were_running(group_size, call):
    """Of the engine or of the environment, wherever it comes: the next `collect` goes on, and every
    text is what it would have been."""

    def collector(failing=None):
        envs = make("random turns", group_size=group_size, max_new_tokens=7)
        if failing is not None:
            envs.reply = failing_at(envs.reply, failing)
        return agent_of(envs, GRPO if group_size > 1 else PPO).collector

    wanted, one = {}, collector()
    for _ in range(4):
        found = one.collect(40)
        wanted |= dict(zip(numbers(found), found, strict=True))
    for when in itertools.count(step=7):
        other = collector(when if call == "reply" else None)
        other.engine.down = {} if call == "reply" else {call: when}
        failed = False
        try:
            found = other.collect(40)
        except ConnectionError:
            failed = True
            assert not other.engine.running
            found = other.collect(40)
        other.engine.down.clear()
        other.core.__dict__.pop("reply", None)
        found += other.collect(30)
        for number, e in zip(numbers(found), found, strict=True):
            np.testing.assert_array_equal(e.text, wanted[number].text)
            np.testing.assert_allclose(e.reward, wanted[number].reward, atol=1e-5)
        unfinished = [text.number for text in [*other._unfinished(), *other._waiting.values()]]
        assert sorted([*numbers(found), *unfinished]) == list(range(other._begun))
        if not failed:
            break
    assert when > 10


def failing_at(reply, when):
    left = itertools.count(when, -1)

    def fails_once(*args, **kwargs):
        if next(left) == 0:
            raise ConnectionError("down")
        return reply(*args, **kwargs)

    return fails_once


def test_interrupted_at_any_line_every_text_is_somewhere_once():
    """Ctrl-C, at every 61st line: the next `collect` goes on, and every text is whole."""
    agent = agent_of(make("random turns", group_size=3, max_new_tokens=7), GRPO)
    collector, seen, files = agent.collector, [], ("text_collector.py", "rollout/text.py")
    for line in itertools.count(2, 61):
        found = []
        with interrupted_at(line, *files, "/rollout/pairing.py", "local_engine.py") as raised:
            found = collector.collect(20)
        held = [
            t.number
            for t in [*collector._unfinished(), *collector._waiting.values(), *collector._ready]
        ]
        assert sorted([*seen, *numbers(found), *held]) == list(range(collector._begun))
        found += collector.collect(20)
        check_turns(collector.engine, agent.core.token_spec, found)
        for group in np.reshape(numbers(found), (-1, 3)):
            np.testing.assert_array_equal(group, group[0] // 3 * 3 + np.arange(3))
        seen += numbers(found)
        if not raised:
            break
    assert len(set(seen)) == len(seen)
    assert line > 200
