"""What interrupts an update, or makes its numbers no numbers, leaves nothing behind that a later
update could learn from."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from toy_env import ToyEnv

import tokenenv  # noqa: F401
from tokenenv.agents import KLQ, PPO, ReinforcePlusPlus
from tokenenv.agents.algorithms import policy_gradient
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import optimise
from tokenenv.agents.learning.learner import outputs, token_logprobs
from tokenenv.errors import NotFinite
from tokenenv.rewards import RewardTerm, Scaled

SETTINGS = {
    "batch_tokens": 60,
    "minibatches": 2,
    "epochs": 2,
    "lr": 1e-2,
    "lr_schedule": "constant",
    "max_batch_tokens": 40,
}


def make(**options):
    return PPO(ToyEnv(4, kl_coef=0.1), **SETTINGS, **options)


def raising(call, at, error):
    """`call`, which raises in its `at`-th run, before or after the work is done."""
    runs = []

    def wrapped(*args, **kwargs):
        runs.append(1)
        if len(runs) == at:
            raise error
        return call(*args, **kwargs)

    return wrapped


PLACES = {
    "backward": (torch.Tensor, "backward"),
    "clip": (optimise, "clip_grad_norm_"),
    "gradient": (optimise, "accumulate_gradient"),
    "before": (policy_gradient, "token_logprobs"),
}


@pytest.mark.parametrize(
    ("place", "at"), [("backward", 1), ("backward", 2), ("clip", 2), ("gradient", 3), ("before", 1)]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_an_interrupted_update_leaves_no_gradient_and_no_cache(monkeypatch, place, at, error):
    """The next update follows its own gradient, of texts whose log-probs are those of the weights
    as they then were."""
    agent = make(importance_cap=2.0).learn(60)
    monkeypatch.setattr(*PLACES[place], raising(getattr(*PLACES[place]), at, error()))
    with pytest.raises(error):
        agent.learn(200)
    monkeypatch.undo()
    assert all(weight.grad is None for weight in agent.policy.parameters())
    tokens, logprobs = agent.actor.act(agent.collector._obs)
    for text, length, token, logprob in zip(
        agent.collector._obs["tokens"],
        agent.collector._obs["length"],
        tokens,
        logprobs,
        strict=True,
    ):
        logits = agent.policy.model(input_ids=torch.as_tensor(text[None, :length])).logits[0, -1]
        assert logprob.item() == pytest.approx(
            torch.log_softmax(logits, -1)[token].item(), abs=1e-5
        )
    agent.learn(agent.tokens_seen + 60)


def test_gradients_that_others_left_are_not_followed():
    norms = []
    for left in (False, True):
        agent, seen = make(), []
        if left:
            for weight in agent.policy.parameters():
                weight.grad = torch.full_like(weight, 7.0)
        agent.learn(
            60,
            on_update=lambda metrics, episodes, seen=seen: seen.append(metrics["policy/grad_norm"]),
        )
        norms.append(seen)
    assert norms[0] == norms[1]


class Spoilt(ToyEnv):
    """Pays `value` for the tokens of one step, the last of so many."""

    def __init__(self, value, after=40):
        super().__init__(4, kl_coef=0.1)
        self.left, self.value = after, value

    def step(self, actions):
        self.left -= 1
        obs, rewards, terminated, truncated, infos = super().step(actions)
        if self.left == 0:
            written = self.state["length"] - self.state["prompt_length"]
            self.state["total"][np.arange(4), np.maximum(written - 1, 0)] = self.value
        return obs, rewards, terminated, truncated, infos


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("algorithm", [PPO, ReinforcePlusPlus, KLQ])
def test_a_batch_with_a_number_that_is_none_teaches_nothing_and_the_next_one_does(algorithm, value):
    agent = algorithm(Spoilt(value), **SETTINGS)
    with pytest.raises(
        NotFinite,
        match=rf"reward is {value} at token \d of text \d+ of slot \d, in the batch of update \d",
    ):
        agent.learn(2000)
    before, states = (
        agent.updates,
        {name: one.state_dict() for name, one in agent.statistics.items()},
    )
    assert all(
        math.isfinite(x)
        for state in states.values()
        for x in state.values()
        if isinstance(x, float)
    )
    seen = []
    for _ in range(5):
        try:
            agent.learn(
                agent.tokens_seen + 60, on_update=lambda metrics, episodes: seen.append(metrics)
            )
        except NotFinite:  # the other texts of the spoilt step
            assert not seen
    assert agent.updates >= before + 3
    assert all(math.isfinite(m["policy/grad_norm"]) for m in seen)
    assert all(weight.isfinite().all() for weight in agent.policy.parameters())


class NaNOnce(RewardTerm):
    """Pays a token its number, once NaN."""

    name, calls = "score", 0

    def reward(self, batch):
        self.calls += 1
        return (
            batch.tokens.float() if self.calls != 20 else torch.full(batch.tokens.shape, math.nan)
        )


def test_a_term_that_gives_nan_once_is_named_and_no_statistic_keeps_it():
    """A running scale of the env, and the agent's own."""
    reward = {"score": Scaled(NaNOnce())}
    envs = gym.make_vec(
        "tokenenv/Reviews-v0",
        num_envs=4,
        autoreset_mode="SameStep",
        max_new_tokens=6,
        reward=reward,
    )
    agent = PPO(envs, **SETTINGS)
    with pytest.raises(NotFinite, match="reward term 'score' is nan"):
        agent.learn(1000)
    seen = []
    agent.learn(
        agent.tokens_seen + 200,
        on_update=lambda metrics, episodes: seen.append(metrics["objective/reward"]),
    )
    assert len(seen) >= 2
    assert np.isfinite(seen).all()
    assert np.isfinite(envs.unwrapped.save_statistics()["score"]).all()
    assert math.isfinite(agent.statistics["reward_std"].std)


@pytest.mark.parametrize("algorithm", [PPO, KLQ])
def test_rewards_too_large_to_add_up_leave_no_trace(algorithm):
    """Each is a number, their sums and squares are not: the batch is not learnt from, now or later,
    by any statistic."""
    envs = ToyEnv(4, kl_coef=0.1)
    agent = algorithm(envs, batch_tokens=40, epochs=1)
    agent.learn(60)
    before = {name: value.state_dict() for name, value in agent.statistics.items()}
    collect = agent.collector.collect

    def spoilt(num_tokens):
        return [
            replace(episode, reward=np.full_like(episode.reward, 3e38))
            for episode in collect(num_tokens)
        ]

    agent.collector.collect = spoilt
    with pytest.raises(NotFinite, match=r"the gradient's norm|\.advantages returned"):
        agent.learn(10_000)
    agent.collector.collect = collect
    assert str({name: value.state_dict() for name, value in agent.statistics.items()}) == str(
        before
    )
    updates = agent.updates
    agent.learn(10_000, on_update=lambda metrics, episodes: agent.stop())
    assert agent.updates == updates + 1


def test_a_gradient_that_is_no_number_is_not_followed(monkeypatch):
    agent = make().learn(60)
    weights = [weight.detach().clone() for weight in agent.policy.parameters()]
    loss = agent.policy_loss
    monkeypatch.setattr(agent, "policy_loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(
        NotFinite,
        match=r"the gradient's norm is nan in minibatch 0 of update \d+, with .*'loss/policy': nan",
    ):
        agent.learn(1000)
    monkeypatch.undo()
    assert all(
        torch.equal(one, other)
        for one, other in zip(agent.policy.parameters(), weights, strict=True)
    )
    agent.learn(agent.tokens_seen + 60)


# ---------------------------------------------------------------- the early stop on KL


def stale(agent, tokens=80):
    """A batch that another policy wrote: the learner's has moved since, by two updates."""
    batch = EpisodeBatch.stack(agent.collector.collect(tokens))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in agent.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    agent.updates = 2
    return batch


def test_the_age_of_texts_does_not_end_an_update():
    """It is reported apart; what counts is how far the update itself has gone."""
    agent = PPO(ToyEnv(8), target_kl=0.01, epochs=2, minibatches=2, lr=1e-6)
    batch = stale(agent)
    age = token_logprobs(agent.policy, batch, 10_000) - batch.logprob_BT
    k3 = float((age.expm1() - age)[batch.mask_BT].mean())
    metrics = agent.update(batch)
    assert k3 > 0.02
    assert metrics["rollout/stale_kl"] == pytest.approx(k3, rel=1e-4)
    assert metrics["policy/approx_kl"] < 1e-6
    assert metrics["policy/minibatches"] == 4
    far = PPO(ToyEnv(8), target_kl=0.01, epochs=4, minibatches=2, lr=0.03)
    metrics = far.update(stale(far))
    assert 1 < metrics["policy/minibatches"] < 8


def test_only_stale_texts_are_read_again(monkeypatch):
    agent = PPO(ToyEnv(8), target_kl=0.01)
    batch = EpisodeBatch.stack(agent.collector.collect(80))
    batch.version_B[:3] = -1
    read = []
    monkeypatch.setattr(
        "tokenenv.agents.learning.learner.outputs",
        lambda *args, **kw: (read.extend(args[2]), outputs(*args, **kw))[1],
    )
    metrics = agent._policy_before(batch)
    assert sorted(read) == [0, 1, 2]
    assert metrics["rollout/stale_kl"] < 1e-6  # old by number alone
    torch.testing.assert_close(
        batch.learned["learner_logprob"], batch.logprob_BT, atol=1e-5, rtol=0
    )
    batch.version_B[:3] = 0
    del batch.learned["learner_logprob"]
    read.clear()
    assert agent._policy_before(batch) == {}
    assert not read
