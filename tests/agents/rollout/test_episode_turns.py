"""Texts that an environment writes into, as agents collect them, hold them and learn from them: the
policy's tokens alone count, and models read the others."""

import functools
import json
from contextlib import nullcontext
from dataclasses import asdict, replace

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
import turn_tasks
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import TransformObservation
from runs import Recorder, same

from tokenenv.agents import GRPO, KLQ, PPO, BestOfN, LMPolicy, VinePPO
from tokenenv.agents.algorithms.vine_ppo import state_before
from tokenenv.agents.episodes import Episode, EpisodeBatch, summary, turn_summary
from tokenenv.agents.learning.kl_rewards import with_penalty
from tokenenv.agents.learning.learner import FrozenLM, outputs, state_values, token_logprobs
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector, Prefix
from tokenenv.agents.rollout.finite import running_texts
from tokenenv.agents.rollout.pairing import Pairing
from tokenenv.agents.rollout.replay import Replay
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.agents.run.export import padded, write_episodes
from tokenenv.agents.run.export import read_episodes as read_exported
from tokenenv.agents.run.failures import write_failures
from tokenenv.agents.run.show import read_episodes as read_page
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import ContractError, InvalidArgument, NotFinite
from tokenenv.models.bigram import Bigram
from tokenenv.models.encoding import decode_pairs
from tokenenv.rewards import Rule
from tokenenv.turns import Reply, TextSoFar, segments_of
from tokenenv.types import Task
from tokenenv.wrappers import ActionMask

SAME_STEP = AutoresetMode.SAME_STEP


def make(num_envs=3, mode=SAME_STEP, **options):
    return tasks.make_vec(num_envs, mode, **{"turns": "fixed", **options})


def one_by_one(**options):
    single = functools.partial(gym.make, tasks.TOY, turns="fixed", **options)
    return SyncVectorEnv([single] * 3, autoreset_mode=SAME_STEP)


ENVS = {
    **{mode.value: functools.partial(make, mode=mode) for mode in AutoresetMode},
    "torch": functools.partial(make, array="torch"),
    "one by one": one_by_one,
}


@functools.cache
def model():
    return fakes.causal_lm(seed=3, num_hidden_layers=1)


def collector_of(envs, seed=1):
    return Collector(envs, Actor(LMPolicy(model(), frozen=True), seed=seed), seed=5)


@functools.cache
def some_episodes():
    """Of texts that are cut without a score, so that some bootstrap."""
    return collector_of(make(score_truncated=False, reward="delta")).collect(120)


def logprobs_of(model, episode):
    """log p of each of the policy's tokens, by a plain forward over the whole text."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(episode.text)[None]).logits[0]
    return torch.log_softmax(logits.float(), -1)[episode.places - 1, episode.response].numpy()


def answered(episode, limit):
    """What policy and task write together, asked again: the tokens behind the prompt, and whose
    they are."""
    tokens, own = [], []
    for token in episode.response.tolist():
        tokens, own = [*tokens, token], [*own, True]
        asked = token in (7, *turn_tasks.ENDS)
        segments = segments_of(tokens, np.array(own))
        text = TextSoFar(episode.prompt.tolist(), segments, tasks.tokenizer())
        reply = turn_tasks.answers(text) if asked else None
        if reply and len(episode.prompt) + len(tokens) + len(reply.tokens) <= limit:
            tokens, own = [*tokens, *reply.tokens], [*own, *[False] * len(reply.tokens)]
    return tokens, own


@pytest.mark.parametrize("name", ENVS)
def test_episodes_are_what_policy_and_environment_wrote_in_every_mode(name):
    reward = {"dense": "token", "moves": "delta"}
    collector = collector_of(ENVS[name](reward=reward, kl_coef=0.2))
    episodes, core = collector.collect(60), make(reward=reward, kl_coef=0.2)
    assert {e.own[-1] for e in episodes} == {True, False}
    assert max(e.turns for e in episodes) > 2
    for e in episodes:
        assert (e.after_prompt.tolist(), e.own.tolist()) == answered(e, core.token_spec.max_length)
        np.testing.assert_array_equal(e.text[e.places], e.response)
        np.testing.assert_allclose(e.logprob, logprobs_of(model(), e), atol=1e-5)
        ref_logprob = logprobs_of(tasks.reference(), e)
        np.testing.assert_allclose(e.ref_logprob, ref_logprob, atol=1e-5)
        # What an environment writes costs no KL.
        np.testing.assert_allclose(e.terms["kl"], 0.2 * ref_logprob, atol=1e-5)
    whole = [([e.prompt.tolist(), e.after_prompt.tolist()], e.own.tolist()) for e in episodes]
    texts, own = zip(*whole, strict=True)
    cut = [e.truncated for e in episodes]
    scores = core.score_episodes(*map(list, zip(*texts, strict=True)), own=own, truncated=cut)
    for row, e in enumerate(episodes):
        count = len(e.response)
        np.testing.assert_allclose(e.reward, scores.token_rewards[row, :count], atol=1e-5)
        np.testing.assert_allclose(e.potential, scores.potentials[row, : count + 1], atol=1e-5)
        assert e.score == pytest.approx(scores.score[row], abs=1e-5)
    running = int(collector.recorder.age.sum())
    assert collector.tokens_seen == sum(len(e.response) for e in episodes) + running


def test_a_batch_gives_its_episodes_back_and_so_does_all_that_keeps_them():
    episodes = some_episodes()
    batch = EpisodeBatch.stack(episodes)
    assert int(batch.mask_BT.sum()) == sum(len(e.response) for e in episodes)
    for b, e in enumerate(episodes):
        assert batch.tokens_BL[b, : batch.length_B[b]].tolist() == e.text.tolist()
        ends = [*e.places.tolist(), len(e.text)]
        assert batch.position_BT1[b, : len(ends)].tolist() == ends
    replay, pairing = Replay(10**6), Pairing(3, 2)
    replay.add(episodes)
    pairing.take({2 * n: e for n, e in enumerate(episodes)})
    other_replay, other_pairing = Replay(10**6), Pairing(3, 2)
    other_replay.load_state_dict(replay.state_dict())
    other_pairing.load_state_dict(pairing.state_dict())
    kept = batch.unstack(), list(other_replay.episodes), list(other_pairing.waiting.values())
    for again in kept:
        assert same([asdict(e) for e in again], [asdict(e) for e in episodes])


def test_where_nothing_is_written_nothing_is_kept():
    # The same L: another would round otherwise.
    silent = replace(tasks.toy(turns="silent"), max_context_tokens=None)
    plain, silent = (
        collector_of(TokenVectorEnv(3, task=task, autoreset_mode=SAME_STEP)).collect(60)
        for task in (tasks.toy(), silent)
    )
    assert same([asdict(e) for e in plain], [asdict(e) for e in silent])
    for e in plain:
        assert e.position is None
        assert e.text.tolist() == [*e.prompt, *e.response]
    batch = EpisodeBatch.stack(plain)
    default = replace(batch, position_BT1=None)
    assert same(default.position_BT1, batch.position_BT1)


def critic():
    policy = LMPolicy(model(), frozen=True)
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def test_learners_read_the_states_before_the_policys_tokens_and_the_texts_last_one():
    policy, episodes = critic(), some_episodes()
    batch = EpisodeBatch.stack(episodes)
    logprob_BT = token_logprobs(policy, batch, 60)
    torch.testing.assert_close(logprob_BT * batch.mask_BT, batch.logprob_BT, atol=1e-5, rtol=0)
    values_BT1 = state_values(policy, batch, 60)
    assert any(e.bootstraps and not e.own[-1] for e in episodes)
    for b, e in enumerate(episodes):
        with torch.no_grad():
            states = policy.states(torch.as_tensor(e.text)[None], np.array([len(e.text)]))[1][0]
            expected = policy.value(states[np.append(e.places, len(e.text)) - 1])
        found = values_BT1[b, : len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_the_full_kl_is_that_of_the_states_where_the_policy_chose():
    policy, reference = critic(), tasks.reference()
    episodes = some_episodes()[:6]
    batch, frozen = EpisodeBatch.stack(episodes), FrozenLM(reference, policy.vocab_size)
    out = outputs(policy, batch, np.arange(len(batch)), reference=frozen)
    expected = []
    for e in episodes:
        with torch.no_grad():
            text = torch.as_tensor(e.text)[None]
            ours, theirs = (
                torch.log_softmax(m(input_ids=text).logits[0, e.places - 1].float(), -1)
                for m in (policy.model, reference)
            )
        expected.append((ours.exp() * (ours - theirs)).sum(-1))
    torch.testing.assert_close(out.ref_kl, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_mask_belongs_to_a_token_of_the_policys():
    envs = ActionMask(make(mode=AutoresetMode.NEXT_STEP), top_p=0.9)
    episodes = collector_of(envs).collect(60)
    assert any(len(e.written) for e in episodes)
    batch = EpisodeBatch.stack(episodes)
    assert batch.action_mask_BTM.shape[:2] == batch.mask_BT.shape
    for e in episodes:
        allowed = np.unpackbits(e.action_mask, axis=1)[np.arange(len(e.response)), e.response]
        assert allowed.all()
    again = token_logprobs(LMPolicy(model(), frozen=True), batch, 60) * batch.mask_BT
    torch.testing.assert_close(again, batch.logprob_BT, atol=1e-5, rtol=0)


def test_no_loss_reaches_what_the_environment_wrote(monkeypatch):
    """A written token has no log-prob, entropy or value in the losses: the states that it would
    have been chosen in get no gradient."""
    policy, batch = critic(), EpisodeBatch.stack(some_episodes())
    seen, states = [], policy.states

    def noted(tokens_BL, lengths):
        seen.append([s.detach().requires_grad_() for s in states(tokens_BL, lengths)])
        return seen[-1]

    monkeypatch.setattr(policy, "states", noted)
    out = outputs(policy, batch, np.arange(len(batch)))
    assert len(out.logprob) == int(batch.mask_BT.sum())
    (out.logprob.sum() + out.entropy.sum() + out.value.sum()).backward()
    for b, e in enumerate(some_episodes()):
        touched = sum(s.grad[b].abs().sum(-1) for s in seen[0])
        assert touched.nonzero()[:, 0].tolist() == (e.places - 1).tolist()


def test_the_kl_of_a_text_is_that_of_the_policys_tokens():
    episodes = some_episodes()
    batch = EpisodeBatch.stack(episodes)
    ratios = [logprobs_of(model(), e) - logprobs_of(tasks.reference(), e) for e in episodes]
    kl = np.mean([ratio.sum() for ratio in ratios])
    assert summary(episodes)["objective/kl"] == pytest.approx(kl, abs=1e-4)
    beta = episodes[0].kl_coef
    penalised = with_penalty(batch.reward_BT, batch, env_pays_all=False).sum(1)
    for total, e, ratio in zip(penalised, episodes, ratios, strict=True):
        assert float(total) == pytest.approx(e.terms["delta"].sum() - beta * ratio.sum(), abs=1e-4)
    found = turn_summary(episodes)
    written = np.mean([len(e.text) - len(e.prompt) - len(e.response) for e in episodes])
    assert found["episode/written"] == pytest.approx(written)
    turns = [
        1 + sum(b - a != 1 for a, b in zip(e.places, e.places[1:], strict=False)) for e in episodes
    ]
    assert found["episode/turns"] == pytest.approx(np.mean(turns))


AGENTS = {
    "ppo": (PPO, {"lambda_turn": 0.9, "importance_cap": 2.0}, {}),
    "grpo": (GRPO, {}, {"group_size": 3}),
    "klq": (KLQ, {}, {}),
    "vineppo": (VinePPO, {"segments": 2, "rollouts": 2}, {}),
}


@pytest.mark.parametrize("name", AGENTS)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(name, tmp_path):
    kind, settings, options = AGENTS[name]

    def envs():
        return make(6, turns="random", scorer="sequence", reward="delta", **options)

    def four_updates(agent, **where):
        recorder = Recorder(agent, **where)

        def on_update(metrics, episodes):
            recorder(metrics, episodes)
            if agent.updates == 4:
                agent.stop()

        agent.learn(10_000, on_update=on_update)
        return recorder

    settings = {"batch_tokens": 40, "lr": 1e-3, **settings}
    first = four_updates(kind(envs(), **settings), save_to=tmp_path / "c")
    second = four_updates(kind.load(tmp_path / "c", envs()))
    assert len(second.metrics) == 2
    assert same(first.metrics[2:], second.metrics)
    count = len(second.episodes)
    assert same([asdict(e) for e in first.episodes[-count:]], [asdict(e) for e in second.episodes])
    assert any(len(e.written) for e in second.episodes)
    assert all(m["episode/turns"] >= 1 and m["episode/written"] > 0 for m in first.metrics)


# ---------------------------------------------------------------- continuations


def test_continuations_begin_with_what_the_environment_had_written():
    """The rewards of a continuation are those that its tokens have in the whole text."""
    envs = make(6, reward={"dense": "token", "even": "uniform"})
    collector = collector_of(envs)
    states = [state_before(e, len(e.response) // 2) for e in collector.collect(60) if e.turns > 2]
    assert sum(s.own is not None for s in states) > 2
    played = collector.play_on(states, 3)
    for n, e in enumerate(played):
        prompt, response, own = states[n // 3]
        own = np.ones(len(response), bool) if own is None else own
        np.testing.assert_array_equal(e.prompt, [*prompt, *response])
        assert own.sum() + len(e.response) <= tasks.T
        whole = envs.score_episodes(
            [prompt.tolist()],
            [[*response.tolist(), *e.after_prompt.tolist()]],
            own=[[*own, *e.own]],
            truncated=[e.truncated],
        )
        dense = whole.token_reward_terms["dense"][0, own.sum() :][: len(e.response)]
        np.testing.assert_allclose(e.terms["dense"], dense, atol=1e-5)
        assert e.score == pytest.approx(whole.score[0], abs=1e-5)


V, LIMIT, BEFORE = 4, 3, 0.3
"""Tokens: 0 stops, 1 ends a turn, which is answered with 2 or 3."""


def chance(text: TextSoFar) -> Reply:
    return Reply([2 if text.rng().random() < BEFORE else 3])


def earned(prompt, response):
    """Depends on every token of the text, whoever wrote it."""
    return float(np.sin(sum((place + 1) * (token + 1) for place, token in enumerate(response))))


class TablePolicy:
    """A `Policy` without weights."""

    def __init__(self, model):
        self.slots, self.head, self.vocab_size = model.slots, model.head, model.vocab_size

    def autocast(self):
        return nullcontext()

    def parameters(self):
        return [torch.zeros(1)]


def exact_value(table, response, own):
    """The expected score of a text that goes on from here, over everything that may be written."""
    if sum(own) == LIMIT or (own and own[-1] and response[-1] == 0):
        return earned(None, response)
    row = response[-1] if response else V
    total = 0.0
    for token, prob in enumerate(table[row]):
        ends = [(1.0, [])] if token != 1 else [(BEFORE, [2]), (1 - BEFORE, [3])]
        for share, reply in ends:
            more = [*response, token, *reply], [*own, True, *[False] * len(reply)]
            total += prob * share * exact_value(table, *more)
    return total


def test_monte_carlo_values_are_unbiased_where_answers_are_drawn():
    """Every state of some length, each with continuations whose answers are drawn apart."""
    table = np.random.default_rng(4).dirichlet([2.0] * V, V + 1)
    table[:, 1] += 1.0
    table /= table.sum(1, keepdims=True)
    task = Task(
        tokenizer=None,
        reference=Bigram(table),
        prompts=[[2]],
        max_prompt_tokens=1,
        max_new_tokens=LIMIT,
        max_context_tokens=1 + 2 * LIMIT,
        stop_token_ids=(0,),
        respond=chance,
        turn_end_token_ids=(1,),
    )
    rollouts = 1500
    envs = TokenVectorEnv(
        3 * rollouts, task=task, reward=Rule(earned, "tokens"), kl="none", autoreset_mode=SAME_STEP
    )
    collector = Collector(envs, Actor(TablePolicy(task.reference), seed=1), seed=7)
    texts = [
        ([], []),
        ([1, 3], [True, False]),
        ([3, 1, 2], [True, True, False]),
        ([1, 2, 1, 3], [True, False] * 2),
    ]
    states = [
        Prefix(np.array([2]), np.array(tokens, np.int64), np.array(own, bool))
        for tokens, own in texts
    ]
    collector.reset()
    played = collector.play_on(states, rollouts)
    scores = np.array([e.score for e in played]).reshape(len(states), rollouts)
    exact = [exact_value(table, *text) for text in texts]
    errors = (scores.mean(1) - exact) * np.sqrt(rollouts) / scores.std(1)
    assert np.abs(errors).max() < 3.5
    # The answers after the same first token differ from one continuation to another.
    answers = [e.after_prompt[1] for e in played[:rollouts] if e.response[0] == 1]
    assert np.mean(np.array(answers) == 2) == pytest.approx(BEFORE, abs=0.06)


# ---------------------------------------------------------------- using the policy


def test_an_evaluation_plays_whole_texts_and_draws_the_answers_of_each_anew():
    envs = make(4, turns="random", scorer="sequence", reward="terminal")
    found = evaluate(LMPolicy(model(), frozen=True), envs, num_texts=10, best_of=3)
    assert found.written == pytest.approx(np.mean([len(e.written) for e in found.episodes]))
    assert found.written > 0
    assert found.turns == pytest.approx(np.mean([e.turns for e in found.episodes]))
    one = evaluate(LMPolicy(model(), frozen=True), envs, num_texts=10)
    assert found.score > one.score
    assert [e.prompt.tolist() for e in found.episodes] == [e.prompt.tolist() for e in one.episodes]
    plain = evaluate(LMPolicy(model(), frozen=True), tasks.make_vec(2, SAME_STEP), num_texts=2)
    assert np.isnan(plain.turns)
    assert np.isnan(plain.written)


def test_the_best_of_n_texts_do_not_share_what_was_drawn_for_them():
    """A policy that has one way to write: what is left to chance is the environment's."""
    envs = make(2, turns="random", scorer="sequence", reward="terminal", stops=())
    greedy = [
        evaluate(LMPolicy(model(), frozen=True), envs, num_texts=2, temperature=0, best_of=n)
        for n in (1, 6)
    ]
    assert greedy[1].score > greedy[0].score


def test_generate_writes_one_turn_and_no_best_one():
    agent = BestOfN(make(4, group_size=2, scorer="sequence", reward="terminal"))
    with pytest.raises(InvalidArgument, match="writes one turn"):
        agent.generate([[12, 13]])
    agent = PPO(make(2))
    for response in agent.generate([[12, 13]] * 8, seed=2):
        ends = {*tasks.STOPS, *turn_tasks.ENDS}
        assert not ends & set(response[:-1])
        assert response[-1] in ends or len(response) == tasks.T


def test_agents_need_to_know_whose_tokens_are_whose():
    envs = make(2, AutoresetMode.NEXT_STEP)
    space = gym.spaces.Dict(dict(envs.single_observation_space.items()))
    del space.spaces["own_mask"]
    blind = TransformObservation(
        envs,
        lambda obs: {k: v for k, v in obs.items() if k != "own_mask"},
        single_observation_space=space,
    )
    with pytest.raises(InvalidArgument, match='a wrapper has taken "own_mask" out'):
        PPO(blind)
    wrong = TransformObservation(envs, lambda obs: obs | {"own_mask": 1 - obs["own_mask"]})
    with pytest.raises(ContractError, match=r"own_mask marks \d+ tokens .* and actions emitted"):
        collector_of(wrong).collect(20)


def test_what_is_written_down_of_a_run_tells_the_turns(tmp_path):
    agent = PPO(make(turns="random", reward="token"), run_dir=tmp_path, batch_tokens=40)
    told = []
    agent.learn(80, on_update=lambda metrics, episodes: told.extend(episodes))
    lines = list(map(json.loads, (tmp_path / "episodes.jsonl").read_text().splitlines()))
    for line, e in zip(lines, told, strict=True):
        assert line["length"] == len(line["tokens"]) == len(line["token_kl"]) == len(e.response)
        assert ("segments" in line) == (len(e.written) > 0)
        segments = [(s["own"], s["length"]) for s in line.get("segments", ())]
        assert segments in ([], [(own, len(tokens)) for own, tokens in e.segments])
        own = "".join(s["text"] for s in line.get("segments", ()) if s["own"])
        assert own in ("", "".join(line["tokens"]))
        pair = [(e.prompt.tolist(), e.after_prompt.tolist())]
        whole = decode_pairs(pair, tasks.tokenizer(), skip_special_tokens=False)[0]
        assert (line["prompt"], line["response"]) == whole
    page = read_page(tmp_path)[0]
    assert len(page) == len(lines)
    write_episodes(tmp_path / "e.jsonl", told)
    rows = read_exported(tmp_path / "e.jsonl")
    tensors = padded(rows, pad_token_id=99)
    for row, e in enumerate(told):
        count = len(e.after_prompt)
        assert tensors["text_mask"][row].sum() == count
        assert tensors["response_ids"][row, :count].tolist() == e.after_prompt.tolist()
        mask = tensors["response_mask"][row]
        assert mask.nonzero()[:, 0].tolist() == (e.places - len(e.prompt)).tolist()
        assert tensors["logprobs"][row][mask].tolist() == e.logprob.tolist()
        assert not tensors["logprobs"][row][~mask].any()


def test_a_failed_text_is_written_down_with_what_the_environment_wrote(tmp_path):
    envs = make()
    e = max(some_episodes(), key=lambda e: len(e.written))
    obs = {"tokens": e.text[None], "length": [len(e.text)], "prompt_length": [len(e.prompt)]}
    texts = [e, *running_texts({name: np.array(v) for name, v in obs.items()}, [0])]
    write_failures(tmp_path, NotFinite("no", [0], texts), envs.token_spec, 1, 2)
    ended, running = map(json.loads, (tmp_path / "failed_episodes.jsonl").read_text().splitlines())
    assert ended["response_tokens"] == running["response_tokens"] == e.after_prompt.tolist()
    assert len(ended["tokens"]) == len(e.response)
    assert [s["own"] for s in ended["segments"]] == [own for own, _ in e.segments]


def test_an_episode_by_hand():
    """Prompt 1 2, then the policy's 3 4, a written 9 8, the policy's 5, a written 7."""
    nothing = np.zeros(3, np.float32)
    numbers = dict.fromkeys(("logprob", "ref_logprob", "reward"), nothing)
    facts = dict.fromkeys(("kl_coef", "score", "gold"), 0.0) | dict.fromkeys(
        ("prompt_id", "slot", "index"), 0
    )
    e = Episode(
        prompt=np.array([1, 2]),
        response=np.array([3, 4, 5]),
        position=np.array([2, 3, 6]),
        written=np.array([9, 8, 7]),
        terminated=True,
        truncated=False,
        potential=np.zeros(4, np.float32),
        **numbers,
        **facts,
    )
    assert e.text.tolist() == [1, 2, 3, 4, 9, 8, 5, 7]
    assert e.segments == [(True, [3, 4]), (False, [9, 8]), (True, [5]), (False, [7])]
    assert e.turns == 2
    batch = EpisodeBatch.stack([e])
    assert batch.position_BT1.tolist() == [[2, 3, 6, 8]]
    assert same(asdict(batch.unstack()[0]), asdict(e))
