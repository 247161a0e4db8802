"""Numbers that are not finite are named where they arise; nothing learns from them; their texts are
in the run folder."""

import json
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tasks import make_vec, random_actions
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import PPO, GRPOConfig, LMPolicy, PPOConfig
from tokenenv.agents.rollout.collector import Collector
from tokenenv.errors import Interrupted, InvalidArgument, NotFinite
from tokenenv.rewards.term import RewardTerm

MODES = list(AutoresetMode)


class Spoilt(RewardTerm):
    """1 for each token; `value` in one row from the `left`-th step on."""

    name = "spoilt"
    left = 1_000_000
    value = math.nan
    row = 2

    def reward(self, batch):
        self.left -= 1
        rewards = torch.ones(len(batch.tokens))
        if self.left <= 0:
            rewards[self.row] = self.value
        return rewards


class Placed(Spoilt):
    """The same of a finished text."""

    name = "placed"
    kind = "hindsight"

    def place(self, texts, max_new_tokens):
        self.left -= 1
        return torch.full(
            (len(texts.length), max_new_tokens), self.value if self.left == 0 else 1.0
        )


def bound(envs, name):
    return envs.unwrapped._engine.rewards.terms[name]


def step(envs, rng):
    envs.step(random_actions(rng, envs))
    if envs.unwrapped.autoreset_mode == AutoresetMode.DISABLED and envs.unwrapped._ended.any():
        envs.reset(options={"reset_mask": envs.unwrapped._ended.copy()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_pays_it_names_term_row_and_token(mode, value):
    envs, rng = (
        make_vec(4, mode, reward={"even": "token", "spoilt": Spoilt()}),
        np.random.default_rng(0),
    )
    envs.reset(seed=0)
    step(envs, rng)
    bound(envs, "spoilt").left, bound(envs, "spoilt").value = 2, value
    step(envs, rng)
    envs.unwrapped._ended[:] = False  # so that the row takes a token
    token = int(envs.unwrapped._texts.steps[2])
    with pytest.raises(
        NotFinite,
        match=f"the reward term 'spoilt' is {value} in env row 2, at response token {token} ",
    ) as caught:
        step(envs, rng)
    assert caught.value.rows == [2]
    bound(envs, "spoilt").left = 1_000_000
    with pytest.raises(Interrupted):
        step(envs, rng)
    envs.reset()
    step(envs, rng)


@pytest.mark.parametrize("mode", MODES)
def test_a_device_that_is_not_waited_for_says_so_with_the_next_step(mode, monkeypatch):
    """There the flag comes with the one copy of the next step; it stays until all begins anew."""
    envs, rng = make_vec(4, mode, reward=Spoilt()), np.random.default_rng(0)
    watch = envs.unwrapped._engine.finite
    monkeypatch.setattr(watch, "waits", False)
    envs.reset(seed=0)
    bound(envs, "spoilt").left = 1
    step(envs, rng)
    bound(envs, "spoilt").left = 1_000_000
    for _ in range(2):
        with pytest.raises(
            NotFinite, match="the reward term 'spoilt' is nan in env row 2, at response token 0 "
        ):
            envs.step(random_actions(rng, envs))
    saved = envs.unwrapped.save_state()
    envs.reset()
    step(envs, rng)
    bound(envs, "spoilt").left = 1
    step(envs, rng)
    bound(envs, "spoilt").left = 1_000_000
    envs.unwrapped.load_state(saved)
    envs.unwrapped._ended[:] = False
    step(envs, rng)


def test_whole_texts_name_the_text():
    envs = make_vec(4, reward=Placed())
    envs.reset(seed=0)
    bound(envs, "placed").left = 1
    with pytest.raises(
        NotFinite, match="the reward term 'placed' is nan in text 0, at response token 0"
    ) as caught:
        envs.unwrapped.score_episodes([[10], [11]], [[20, 21], [22, 23]])
    assert caught.value.rows == [0, 1]
    assert np.isfinite(envs.unwrapped.score_episodes([[10]], [[20, 21]]).token_rewards).all()


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_broken_reference_is_named_and_a_token_it_lacks_is_not(kl_coef, monkeypatch):
    envs, rng = make_vec(4, reward="token", kl_coef=kl_coef), np.random.default_rng(0)
    dynamics = envs.unwrapped._engine.dynamics
    real = dynamics.ref_logprob
    envs.reset(seed=0)
    for value, message in (
        (math.nan, "the reference's log-prob is nan in env row 1"),
        (-math.inf, "the reward term 'kl' is -inf"),
    ):
        monkeypatch.setattr(
            dynamics,
            "ref_logprob",
            lambda h, t, v=value: torch.where(torch.arange(4) == 1, v, real(h, t)),
        )
        if value == -math.inf and not kl_coef:
            envs.step(random_actions(rng, envs))
            continue
        with pytest.raises(NotFinite, match=message) as caught:
            envs.step(random_actions(rng, envs))
        assert ("ActionMask" in str(caught.value)) == (value == -math.inf)
        monkeypatch.setattr(dynamics, "ref_logprob", real)
        envs.reset()


def scheduled(value):
    return make_vec(2, reward={"dense": ("token", lambda seen: value if seen > 4 else 1.0)})


def many_steps(envs):
    rng = np.random.default_rng(0)
    for _ in range(40):
        envs.step(random_actions(rng, envs, stop=0.5))


def test_settings_are_finite():
    for value in (math.nan, math.inf):
        with pytest.raises(InvalidArgument, match=f"missing_eos_penalty={value} must be finite"):
            make_vec(2, missing_eos_penalty=value)
        with pytest.raises(InvalidArgument, match=f"kl_coef={value} must be finite"):
            make_vec(2, kl_coef=value)
        envs = scheduled(value)
        envs.reset(seed=0)
        with pytest.raises(InvalidArgument, match=f"kl_coef={value}"):
            envs.unwrapped.kl_coef = value
        with pytest.raises(
            InvalidArgument,
            match=rf"the weight of 'dense' is {value} at tokens_seen=\d+; a schedule must be",
        ):
            many_steps(envs)


# ---------------------------------------------------------------- agents


@pytest.mark.parametrize(
    ("config", "settings", "allowed"),
    [
        (PPOConfig, {"lr": "1e-3"}, "a number or None"),
        (PPOConfig, {"epochs": 1.5}, "a whole number"),
        (PPOConfig, {"seed": True}, "a whole number"),
        (PPOConfig, {"max_staleness": 0.5}, "a whole number or None"),
        (PPOConfig, {"whiten": "no"}, "True or False"),
        (PPOConfig, {"rollout": 3}, "text"),
        (GRPOConfig, {"gammas": None}, "a mapping"),
    ],
)
def test_a_setting_of_another_type_is_named(config, settings, allowed):
    """Not taken, to fail or to mean something else deep inside an update."""
    [(name, value)] = settings.items()
    with pytest.raises(
        InvalidArgument, match=rf"^{name}={value!r} is not allowed; it must be {allowed}\.$"
    ):
        config(**settings)
    config(lr=np.float32(1e-3), epochs=np.int64(2), target_kl=1, max_staleness=None)


def lines(folder):
    path = folder / "failed_episodes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("mode", "waits", "array"),
    [
        (mode, waits, ("numpy", "torch")[(place + waits) % 2])
        for place, mode in enumerate(MODES)
        for waits in (True, False)
    ],
)
def test_nothing_learns_from_a_spoilt_reward_and_learning_goes_on(mode, waits, array, tmp_path):
    agent = PPO(
        make_vec(4, mode, reward=Spoilt(), kl_coef=0.1, array=array),
        batch_tokens=20,
        run_dir=tmp_path,
    )
    agent.learn(20)
    agent.core._engine.finite.waits = waits
    term = bound(agent.envs, "spoilt")
    for left in (3, 4, 5, 6):
        term.left = left
        weights = [weight.detach().clone() for weight in agent.policy.parameters()]
        with pytest.raises(NotFinite, match="the reward term 'spoilt' is nan"):
            agent.learn(agent.tokens_seen + 40)
        term.left = 1_000_000
        if agent.updates == lines(tmp_path)[-1]["update"] == 1:
            assert all(
                torch.equal(one, other)
                for one, other in zip(weights, agent.policy.parameters(), strict=True)
            )
        agent.learn(agent.tokens_seen + 40)
        assert all(weight.isfinite().all() for weight in agent.policy.parameters())
    for line in lines(tmp_path):
        assert "spoilt" in line["error"]
        assert line["slot"] == 2
        assert line["prompt_tokens"]
        assert line["update"] > 0


def test_a_policy_that_is_not_finite_is_named(tmp_path):
    """When it acts, by row and update, whoever pays the KL."""
    for kl in ("reference", "policy"):
        agent = PPO(
            make_vec(3, AutoresetMode.SAME_STEP, reward="token", kl=kl),
            batch_tokens=20,
            run_dir=tmp_path / kl,
        )
        agent.learn(20)
        updates, weights = agent.updates, next(agent.policy.parameters())
        kept = weights.detach().clone()
        with torch.no_grad():
            weights.fill_(math.nan)
        agent.actor.refresh()
        with pytest.raises(
            NotFinite,
            match=rf"the policy's log-prob is not finite in env rows \[0, 1, 2\], after {updates} upd",
        ):
            agent.learn(10_000)
        assert [line["slot"] for line in lines(tmp_path / kl)] == [0, 1, 2]
        with torch.no_grad():
            weights.copy_(kept)
        agent.actor.refresh()
        agent.learn(agent.tokens_seen + 30)


class NaNToy(ToyEnv):
    """An env of another make, which pays nan at its tenth step."""

    steps = 0
    spoilt = False

    def step(self, actions):
        self.steps += 1
        if self.steps >= 10 and not self.state["ended"][1] and not self.spoilt:
            self.state["kl_coef"][1], self.spoilt = math.nan, True
        return super().step(actions)


@pytest.mark.parametrize("mode", MODES)
def test_an_env_of_another_make(mode, tmp_path):
    """Which says nothing of it itself: the ended text does."""
    agent = PPO(
        NaNToy(4, mode), policy=LMPolicy(tiny_lm(seed=3)), batch_tokens=30, run_dir=tmp_path
    )
    with pytest.raises(
        NotFinite,
        match=r"the reward is nan at token \d of text \d+ of slot 1, in the batch of update \d",
    ):
        agent.learn(2_000)
    [line] = lines(tmp_path)
    assert None in line["token_rewards"]
    assert len(line["token_rewards"]) == len(line["response_tokens"])
    agent.learn(agent.tokens_seen + 60)


def test_an_interrupted_collector_keeps_no_part_of_a_spoilt_batch():
    collector = Collector(NaNToy(4), PPO(ToyEnv(4), policy=LMPolicy(tiny_lm(seed=3))).actor)
    with pytest.raises(NotFinite):
        collector.collect(500)
    assert not collector.running
    assert all(np.isfinite(e.reward).all() for e in collector.collect(100))
