"""The collector cuts the same true episodes out of every autoreset mode; batches and summaries of
them."""

import copy
import functools

import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from toy_env import GOOD, STOP, P, T, ToyEnv, tiny_lm

from tokenenv.agents import LMPolicy
from tokenenv.agents.episodes import EpisodeBatch, mean_of, summary
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.run.evaluate import distinct_bigrams, evaluate, standard_error
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument


class SingleToy(gym.Env):
    """One row of `ToyEnv` as an ordinary env."""

    def __init__(self):
        self.row = ToyEnv(1, AutoresetMode.DISABLED, kl_coef=0.1)
        self.observation_space, self.action_space = (
            self.row.single_observation_space,
            self.row.single_action_space,
        )

    def reset(self, *, seed=None, options=None):
        obs, _ = self.row.reset(seed=seed)
        return {key: value[0] for key, value in obs.items()}, {}

    def step(self, action):
        obs, reward, terminated, truncated, infos = self.row.step(np.array([action]))
        info = {
            k: v[0]
            for k, v in infos.items()
            if not k.startswith("_") and infos.get(f"_{k}", [True])[0]
        }
        return (
            {k: v[0] for k, v in obs.items()},
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            info,
        )


class TorchToy(ToyEnv):
    """The same env with tensors for arrays, on a device."""

    def _torch(self, value):
        if isinstance(value, dict):
            return {key: self._torch(item) for key, item in value.items()}
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self._torch(obs), info

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        return tuple(self._torch(value) for value in super().step(actions.numpy()))


def prefixed(env):
    """The env with the first response token already given at reset, as a prefix is."""
    begin = env._begin

    def with_prefix(rows):
        begin(rows)
        for i in np.flatnonzero(rows):
            env.state["tokens"][i, env.state["length"][i]] = 9
            env.state["length"][i] += 1

    env._begin = with_prefix
    return env


MAKERS = {
    "same-step": lambda: ToyEnv(3, AutoresetMode.SAME_STEP, kl_coef=0.1),
    "next-step": lambda: ToyEnv(3, AutoresetMode.NEXT_STEP, kl_coef=0.1),
    "disabled": lambda: ToyEnv(3, AutoresetMode.DISABLED, kl_coef=0.1),
    "torch": lambda: TorchToy(3, AutoresetMode.SAME_STEP, kl_coef=0.1),
    "prefix": lambda: prefixed(ToyEnv(3, AutoresetMode.SAME_STEP, kl_coef=0.1)),
    "gymnasium-same-step": lambda: SyncVectorEnv(
        [SingleToy] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    ),
    "gymnasium-next-step": lambda: SyncVectorEnv(
        [SingleToy] * 3, autoreset_mode=AutoresetMode.NEXT_STEP
    ),
}


def sync(mode=AutoresetMode.SAME_STEP, **options):
    return SyncVectorEnv([lambda: gym.make(tasks.TOY, **options)] * 2, autoreset_mode=mode)


def ending_lm():
    """Of the toy task's vocabulary; it ends one token in nine."""
    model = copy.deepcopy(tasks.reference())
    model.lm_head = torch.nn.Linear(
        model.config.hidden_size, model.config.vocab_size
    ).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.zero_()[STOP] = 2.0
    return model


ENDS = {
    **{mode.value: functools.partial(tasks.make_vec, 3, mode) for mode in AutoresetMode},
    "torch": functools.partial(tasks.make_vec, 3, array="torch"),
    "one by one": sync,
    "one by one, next step": functools.partial(sync, AutoresetMode.NEXT_STEP),
    "statistics": lambda **options: RecordEpisodeStatistics(
        tasks.make_vec(3, AutoresetMode.SAME_STEP, **options)
    ),
    "time limit": functools.partial(sync, max_episode_steps=4),
    "time limit at the end": functools.partial(sync, max_episode_steps=tasks.T),
}


def true_logprobs(model, episode, prefix=()):
    """log p of each response token by the model's plain forward."""
    text = torch.as_tensor(np.concatenate([episode.prompt, episode.response]))[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=text).logits[0], -1)
    start = len(episode.prompt)
    return logprobs[range(start - 1, text.shape[1] - 1), text[0, start:]].numpy()


@pytest.mark.parametrize("name", MAKERS)
def test_episodes_are_true_in_every_mode(name):
    """Every number of an episode is computed again from its text."""
    policy = LMPolicy(tiny_lm(seed=3))
    envs = MAKERS[name]()
    collector = Collector(envs, Actor(policy, seed=1), seed=5)
    episodes = collector.collect(150)
    assert sum(len(e.response) for e in episodes) >= 150
    limit = T - 1 if name == "prefix" else T
    for e in episodes:
        assert 1 <= len(e.prompt) <= P + (name == "prefix")
        assert e.terminated == (e.response[-1] == STOP)
        assert e.truncated == (len(e.response) == limit and not e.terminated)
        assert STOP not in e.response[:-1]
        np.testing.assert_allclose(e.logprob, true_logprobs(policy.model, e), atol=1e-5)
        reference = tiny_lm()
        ref_logprob = true_logprobs(reference, e)
        np.testing.assert_allclose(e.ref_logprob, ref_logprob, atol=1e-5)
        assert e.kl_coef == pytest.approx(0.1)
        np.testing.assert_allclose(e.reward, (e.response == GOOD) + 0.1 * ref_logprob, atol=1e-5)
        assert e.score == (e.response == GOOD).sum()
        assert np.isnan(e.gold)
        assert e.prompt_id == -1
    for slot in range(3):
        assert [e.index for e in episodes if e.slot == slot] == list(
            range(int(collector.finished[slot]))
        )
    running = int(collector.recorder.age.sum())
    assert collector.tokens_seen == sum(len(e.response) for e in episodes) + running


@pytest.mark.parametrize(
    ("cut", "scored"), [("terminated", True), ("terminated", False), ("truncated", True)]
)
@pytest.mark.parametrize("name", ENDS)
def test_a_cut_is_a_cut_whichever_flag_says_so(name, cut, scored):
    """And the value of the last state counts only where nothing was paid for the text as a
    whole."""
    envs = ENDS[name](stops=(STOP,), kl="none", cut=cut, score_truncated=scored)
    limit = 4 if name == "time limit" else tasks.T
    episodes = Collector(envs, Actor(LMPolicy(ending_lm()), seed=1), seed=5).collect(50)
    assert {e.truncated for e in episodes} == {True, False}
    for e in episodes:
        assert e.truncated == (len(e.response) == limit and e.response[-1] != STOP)
        assert e.terminated == (not e.truncated)
        # One text at a time there is no word of what is scored: then Gymnasium's meaning counts,
        # and a truncation is no end.
        ended = (
            scored
            and limit == tasks.T
            and (cut == "terminated" or isinstance(envs.unwrapped, TokenVectorEnv))
        )
        assert e.bootstraps == (e.truncated and not ended)


def test_rewards_come_from_token_rewards_where_the_env_places_them():
    class Placing(ToyEnv):
        def step(self, actions):
            result = super().step(actions)
            infos = result[-1]["final_info"] if "final_info" in result[-1] else result[-1]
            infos["token_rewards"] = np.arange(3 * T, dtype=np.float32).reshape(3, T)
            infos["_token_rewards"] = self.state["ended"] | np.array([True, True, False])
            return result

    for e in Collector(Placing(3), Actor(LMPolicy(tiny_lm(seed=3)))).collect(60):
        placed = e.slot * T + np.arange(len(e.response))
        stepped = (e.response == GOOD).astype(float)
        np.testing.assert_array_equal(e.reward, stepped if e.slot == 2 else placed)


def test_episodes_keep_the_log_probs_they_were_sampled_with():
    policy = LMPolicy(tiny_lm(seed=3))
    old = policy.model.state_dict()["lm_head.weight"].clone()
    actor = Actor(policy, seed=1)
    collector = Collector(ToyEnv(4), actor, seed=5)
    for _ in range(3):
        collector.step()
    ages = collector.recorder.age.copy()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3.0)
    actor.refresh()
    straddling = []
    while len(straddling) < (ages > 0).sum():
        straddling += [
            e
            for e in collector.step()
            if e.index == collector.finished[e.slot] - 1 and ages[e.slot]
        ]
    first = next(e for e in straddling if len(e.response) > ages[e.slot])
    age = ages[first.slot]
    after = true_logprobs(policy.model, first)
    with torch.no_grad():
        policy.model.lm_head.weight.copy_(old)
    before = true_logprobs(policy.model, first)
    np.testing.assert_allclose(
        first.logprob, np.concatenate([before[:age], after[age:]]), atol=1e-5
    )
    assert not np.allclose(before, after, atol=1e-2)


def test_kl_policy_env_gets_its_logprobs():
    class Asking(ToyEnv):
        def __init__(self, *args):
            super().__init__(*args)
            logprob = gym.spaces.Box(-np.inf, 0.0, (), np.float32)
            self.single_action_space = gym.spaces.Dict(
                {"token": self.single_action_space, "logprob": logprob}
            )

        def step(self, actions):
            self.seen = actions["logprob"]
            return super().step(actions["token"])

    envs = Asking(3)
    collector = Collector(envs, Actor(LMPolicy(tiny_lm(seed=3))))
    for _ in range(4):
        collector.step()
        assert isinstance(envs.seen, np.ndarray)
        np.testing.assert_array_equal(
            envs.seen, collector.recorder._ring[collector.recorder._clock, 0].numpy()
        )


def test_batch_is_padded_and_aligned():
    episodes = Collector(ToyEnv(4, kl_coef=0.2), Actor(LMPolicy(tiny_lm(seed=3)))).collect(60)
    batch = EpisodeBatch.stack(episodes)
    assert len(batch) == len(episodes)
    for b, e in enumerate(episodes):
        length, width = len(e.prompt) + len(e.response), len(e.response)
        assert batch.tokens_BL[b, :length].tolist() == [*e.prompt, *e.response]
        assert batch.length_B[b] == length
        assert batch.response_length_B[b] == width == batch.mask_BT[b].sum()
        for padded, own in [
            (batch.logprob_BT, e.logprob),
            (batch.ref_logprob_BT, e.ref_logprob),
            (batch.reward_BT, e.reward),
        ]:
            np.testing.assert_array_equal(padded[b, :width].numpy(), own)
            assert padded[b, width:].abs().sum() == 0
    assert batch.reward_BT.dtype == torch.float32
    figures = summary(episodes)
    assert figures["episode/length"] == pytest.approx(np.mean([len(e.response) for e in episodes]))
    assert figures["objective/kl"] == pytest.approx(
        np.mean([(e.logprob - e.ref_logprob).sum() for e in episodes]), rel=1e-5
    )
    assert np.isnan(figures["objective/gold"])
    assert mean_of([1.0, float("nan"), 3.0]) == 2.0


def test_evaluation_takes_as_many_texts_from_each_slot():
    policy = LMPolicy(tiny_lm(seed=3))
    result = evaluate(policy, ToyEnv(4), num_texts=42, seed=1)
    assert [(e.index, e.slot) for e in result.episodes] == [(n // 4, n % 4) for n in range(42)]
    scores = [float((e.response == GOOD).sum()) for e in result.episodes]
    assert result.num_texts == 42
    assert result.score == pytest.approx(np.mean(scores))
    assert result.score_error == pytest.approx(np.std(scores, ddof=1) / np.sqrt(42))
    assert np.isnan(result.gold)
    again = evaluate(policy, ToyEnv(4), num_texts=42, seed=1)
    assert [e.response.tolist() for e in again.episodes] == [
        e.response.tolist() for e in result.episodes
    ]


def test_evaluation_on_given_prompts():
    class Prompted(ToyEnv):
        def reset(self, *, seed=None, options=None):
            _, info = super().reset(seed=seed)
            for i, prompt in enumerate((options or {}).get("prompts", [])):
                self.state["tokens"][i] = 0
                self.state["tokens"][i, : len(prompt)] = prompt
                self.state["length"][i] = self.state["prompt_length"][i] = len(prompt)
            return self._obs(), info

    prompts = [[2], [3, 4], [5], [6, 7], [8]]
    result = evaluate(LMPolicy(tiny_lm(seed=3)), Prompted(2), prompts=prompts)
    assert [e.prompt.tolist() for e in result.episodes] == prompts


def test_distinct_bigrams_and_standard_error_by_hand():
    assert distinct_bigrams([np.array([1, 2, 1, 2]), np.array([1, 2])]) == pytest.approx(2 / 4)
    assert np.isnan(distinct_bigrams([np.array([1])]))
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / np.sqrt(3))
    assert np.isnan(standard_error([1.0]))


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(InvalidArgument, match="num_texts=0"):
        evaluate(LMPolicy(tiny_lm()), ToyEnv(2), num_texts=0)
