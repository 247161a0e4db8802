"""PPO: it learns, its update is what the formulas say, its settings are checked, its runs leave
what they should."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import collected
from toy_env import GOOD, STOP, T, ToyEnv, V, tiny_lm

from tokenenv.agents import PPO, LMPolicy, PPOConfig
from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig, learning_rate, run_progress
from tokenenv.agents.learning import advantages as adv
from tokenenv.agents.learning.learner import state_values
from tokenenv.agents.learning.losses import token_weights
from tokenenv.agents.learning.optimise import minibatches
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.errors import InvalidArgument


@pytest.mark.parametrize(
    "options", [{}, {"separate_value": True, "lambda_alpha": 1.0, "scale_rewards": False}]
)
def test_it_learns_to_emit_the_rewarded_token(options):
    agent = PPO(ToyEnv(32), batch_tokens=400, lr=1e-2, seed=1, **options)
    before = evaluate(agent, ToyEnv(64), num_texts=64)
    agent.learn(3000)
    after = evaluate(agent, ToyEnv(64), num_texts=64)
    assert before.score < 1.5
    assert after.score > 4.0
    assert GOOD in agent.generate([[2, 3]], greedy=True)[0]


def test_it_finds_the_kl_regularised_optimum():
    """The reference is nearly uniform, so the soft-optimal value follows from V_t = beta log E_ref
    exp(Q_t / beta)."""
    beta, optimum = 0.3, 0.0
    for _ in range(T):
        good, other = math.exp((1 + optimum) / beta), math.exp(optimum / beta)
        optimum = beta * math.log((good + 1.0 + (V - 2) * other) / V)
    agent = PPO(
        ToyEnv(64), batch_tokens=800, lr=6e-3, kl_coef=beta, lambda_actor=1.0, lambda_critic=1.0
    )
    start = evaluate(agent, ToyEnv(64), num_texts=256)
    agent.learn(10_000)
    found = evaluate(agent, ToyEnv(64), num_texts=256)
    objective = found.score - beta * found.kl
    assert start.score - beta * start.kl < 0.3 * optimum
    assert 0.95 * optimum < objective < 1.05 * optimum
    assert 0.5 * T < found.score < 0.9 * T


def test_the_first_step_follows_the_policy_gradient(monkeypatch):
    """Ratio 1, nothing clipped: the gradient is that of -A log pi + vf/2 (v - target)^2, computed
    here text by text."""
    cfg = {
        "epochs": 1,
        "minibatches": 1,
        "vf_coef": 0.3,
        "lambda_actor": 0.9,
        "lambda_critic": 1.0,
        "max_grad_norm": 1e9,
    }
    cfg |= {
        "aggregation": "sequence-mean",
        "entropy_coef": 0.1,
        "full_kl_coef": 0.2,
        "scale_rewards": False,
    }
    agent = PPO(
        ToyEnv(4, kl_coef=0.2), policy=LMPolicy(tiny_lm(seed=3, initializer_range=0.2)), **cfg
    )
    torch.nn.init.normal_(agent.policy.value_head.weight, std=0.1)
    episodes, batch = collected(agent)
    values = state_values(agent.policy, batch, 10_000)
    rewards = torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(e.reward - 0.2 * e.logprob) for e in episodes], batch_first=True
    )
    lengths, end = batch.response_length_B, torch.zeros(len(batch), dtype=torch.bool)
    advantages = adv.whiten(adv.gae(rewards, values, lengths, end, 1.0, 0.9), batch.mask_BT)
    targets = adv.returns_to_go(rewards, lengths, 1.0)
    grads = {}

    def step(*args, **kwargs):
        grads.update({name: p.grad.clone() for name, p in agent.policy.named_parameters()})

    monkeypatch.setattr(agent.optimizer, "step", step)
    agent.update(batch)
    agent.policy.zero_grad()
    weights, total, reference = token_weights(lengths, "sequence-mean"), torch.zeros(()), tiny_lm()
    for b, e in enumerate(episodes):
        text, start = torch.as_tensor(np.concatenate([e.prompt, e.response]))[None], len(e.prompt)
        result = agent.policy.model(input_ids=text, output_hidden_states=True)
        logprobs = torch.log_softmax(result.logits[0, start - 1 : -1], -1)
        ref_logprobs = torch.log_softmax(reference(input_ids=text).logits[0, start - 1 : -1], -1)
        chosen = logprobs.gather(1, text[0, start:, None])[:, 0]
        value = agent.policy.value(result.hidden_states[-1][0, start - 1 : -1])
        n = len(e.response)
        loss = -advantages[b, :n] * chosen + 0.15 * (value - targets[b, :n]) ** 2
        loss = (
            loss
            + 0.1 * (logprobs.exp() * logprobs).sum(-1)
            + 0.2 * (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
        )
        total = total + weights[b] * loss.sum()
    total.backward()
    for name, parameter in agent.policy.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=2e-6)


def estimates(**options):
    """The advantages, values and targets of one update, and the batch they are of."""
    agent = PPO(ToyEnv(4, kl_coef=0.2), minibatches=1, epochs=1, **options)
    torch.nn.init.constant_(agent.policy.value_head.bias, 0.25)
    _, batch = collected(agent, 120)
    agent.update(batch)
    return agent, batch, *(batch.learned[name] for name in ("advantage", "old_value", "target"))


def test_reward_scaling_divides_and_never_shifts():
    plain, batch, _, _, targets = estimates(scale_rewards=False, lambda_critic=1.0)
    scaled, _, _, _, scaled_targets = estimates(scale_rewards=True, lambda_critic=1.0)
    returns = adv.returns_to_go(plain.rewards(batch), batch.response_length_B, 1.0)
    std = float(returns[batch.mask_BT].std(correction=0))
    torch.testing.assert_close(targets[batch.mask_BT], returns[batch.mask_BT])
    torch.testing.assert_close(scaled_targets[batch.mask_BT], returns[batch.mask_BT] / std)
    assert scaled.statistics["reward_std"].std == pytest.approx(std, rel=1e-5)


def test_actor_and_critic_have_their_own_lambda():
    options = {"scale_rewards": False, "whiten": False, "lambda_critic": 0.3, "lambda_actor": 0.8}
    for alpha in (None, 0.4):
        agent, batch, advantages, values, targets = estimates(lambda_alpha=alpha, **options)
        lengths, rewards = batch.response_length_B, agent.rewards(batch)
        values_BT1 = torch.full((len(batch), rewards.shape[1] + 1), 0.25)
        actor = 0.8 if alpha is None else (1 - 1 / (0.4 * lengths)).clamp(0, 1)
        mask, end = batch.mask_BT, lengths < 0
        torch.testing.assert_close(
            advantages, adv.gae(rewards, values_BT1, lengths, end, 1.0, actor)
        )
        expected = adv.gae(rewards, values_BT1, lengths, end, 1.0, 0.3) + 0.25
        torch.testing.assert_close(targets[mask], expected[mask])
        assert (values[mask] == 0.25).all()


def test_only_the_env_that_leaves_it_out_gets_the_learners_half_of_the_penalty():
    agent = PPO(ToyEnv(4, kl_coef=0.2))
    _, batch = collected(agent)
    difference = agent.rewards(batch) - batch.reward_BT
    torch.testing.assert_close(difference, -0.2 * batch.logprob_BT)
    logprob = gym.spaces.Box(-np.inf, 0.0, (), np.float32)
    agent.envs.single_action_space = gym.spaces.Dict(
        {"token": agent.envs.single_action_space, "logprob": logprob}
    )
    torch.testing.assert_close(agent.rewards(batch), batch.reward_BT, atol=0.2e-5, rtol=0)


def test_another_algorithm_is_a_few_lines():
    """REINFORCE with whitened returns, on the shared parts alone."""

    class Reinforce(Agent):
        def update(self, batch):
            returns = adv.returns_to_go(self.rewards(batch), batch.response_length_B, 1.0)
            advantages = adv.whiten(returns, batch.mask_BT)

            def make_loss(weights):
                def loss(out):
                    return -(out.pick(weights) * out.pick(advantages) * out.logprob).sum(), {}

                return loss

            return self.optimise(batch, make_loss)

    agent = Reinforce(ToyEnv(32), batch_tokens=400, lr=1e-2, epochs=1).learn(4000)
    assert evaluate(agent, ToyEnv(64), num_texts=64).score > 4.0


@pytest.mark.parametrize("score_truncated", [True, False])
def test_it_bootstraps_at_unscored_truncation_only(score_truncated):
    envs = ToyEnv(4)
    envs.token_spec = type(envs.token_spec)(None, V, 0, (STOP,), 3, T, score_truncated)
    agent = PPO(envs)
    _, batch = collected(agent, 200)
    assert batch.truncated_B.any()
    assert batch.terminated_B.any()
    expected = (
        batch.truncated_B & ~batch.terminated_B
        if not score_truncated
        else torch.zeros(len(batch), dtype=torch.bool)
    )
    assert batch.bootstraps_B.tolist() == expected.tolist()


def test_target_kl_stops_before_the_step():
    agent = PPO(ToyEnv(8), lr=0.03, epochs=4, minibatches=4, target_kl=0.02)
    _, batch = collected(agent, 200)
    steps = []
    step = agent.optimizer.step
    agent.optimizer.step = lambda *args: (steps.append(1), step(*args))
    metrics = agent.update(batch)
    assert 1 <= len(steps) == metrics["policy/minibatches"] - 1 < 15
    assert all(p.grad is None for p in agent.policy.parameters())


def test_minibatches_cover_every_episode_once_an_epoch():
    agent = PPO(ToyEnv(2), epochs=3, minibatches=4)
    drawn = list(minibatches(10, agent.config, agent.rng))
    assert len(drawn) == 12
    for epoch in range(3):
        assert sorted(np.concatenate(drawn[4 * epoch : 4 * epoch + 4])) == list(range(10))
    assert [len(rows) for rows in minibatches(2, agent.config, agent.rng)] == [1] * 6


def test_adaptive_kl_by_hand():
    agent = PPO(ToyEnv(4, kl_coef=0.1), kl_target=0.5, kl_horizon=1000)
    _, batch = collected(agent)
    tokens = int(batch.response_length_B.sum())
    kl = float((batch.logprob_BT - batch.ref_logprob_BT).sum()) / tokens
    assert kl / 0.5 - 1 < -0.2  # near the reference: beta falls by the largest step
    agent._adapt_kl_coef(batch)
    assert agent.envs.kl_coef == pytest.approx(0.1 * (1 - 0.2 * tokens / 1000))
    agent.config.kl_target = kl / 1.1
    before = agent.kl_coef
    agent._adapt_kl_coef(batch)
    if kl > 0:
        assert agent.kl_coef == pytest.approx(before * (1 + 0.1 * tokens / 1000))


@pytest.mark.parametrize("tokens_over_horizon", [0.5, 1.0, 7.0, 1e6])
def test_an_adaptive_beta_changes_by_a_fifth_at_most_and_stays_positive(tokens_over_horizon):
    agent = PPO(ToyEnv(4, kl_coef=0.1), kl_target=0.5, kl_horizon=1)
    _, batch = collected(agent)
    agent.config.kl_horizon = int(batch.response_length_B.sum()) / tokens_over_horizon
    for _ in range(3):
        before = agent.kl_coef
        agent._adapt_kl_coef(batch)
        assert agent.kl_coef == pytest.approx(before * (1 - 0.2 * min(tokens_over_horizon, 1.0)))
    agent.learn(60)
    assert agent.kl_coef > 0


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ({"kl_coef": 0.0}, {"kl_target": 0.1}, r"kl_target=0\.1 cannot adapt kl_coef=0\.0"),
        (
            {"kl_coef": 0.1},
            {"kl_target": 0.1, "kl_coef": 0.0},
            r"kl_target=0\.1 cannot adapt kl_coef=0\.0",
        ),
        (
            {"kl": "none"},
            {"kl_target": 0.1},
            r"kl_target=0\.1 would do nothing in an env with kl='none'",
        ),
        (
            {"kl": "none"},
            {"kl_coef": 0.3},
            r"kl_coef=0\.3 would do nothing in an env with kl='none'",
        ),
        (
            {"kl": "none"},
            {"kl_coef": 0.3, "kl_target": 0.1},
            r"kl_coef=0\.3 and kl_target=0\.1 would do nothing",
        ),
    ],
)
def test_a_penalty_that_could_not_be_adapted_is_refused(env, settings, message):
    envs = gym.make_vec("tokenenv/Negation-v0", num_envs=4, autoreset_mode="SameStep", **env)
    with pytest.raises(InvalidArgument, match=message):
        PPO(envs, **settings)
    assert PPO(envs, kl_coef=0.0).kl_coef >= 0  # which says what is so


def learnt_at(total, batch_tokens=2048, **options):
    """The rate and the tokens seen after each update of a run, and how far the weights moved in
    all."""
    agent, seen = (
        PPO(
            ToyEnv(16),
            batch_tokens=batch_tokens,
            epochs=1,
            minibatches=1,
            lr=1.0,
            max_grad_norm=1e-9,
            **options,
        ),
        [],
    )
    before = [weight.detach().clone() for weight in agent.policy.parameters()]
    agent.learn(
        total,
        on_update=lambda metrics, episodes: seen.append((metrics["policy/lr"], agent.tokens_seen)),
    )
    moved = max(
        float((a.detach() - b).abs().max())
        for a, b in zip(agent.policy.parameters(), before, strict=True)
    )
    return [lr for lr, _ in seen], [tokens for _, tokens in seen], moved


def test_a_run_that_ends_inside_a_batch_wastes_no_update():
    """The rate of the k-th of n updates of one size is that of the middle of the k-th of n parts.
    The last batch holds what is left, and no less than half a batch, where there is a whole one."""
    rates, tokens, moved = learnt_at(120, 200)
    assert rates == [0.5]
    assert 120 <= tokens[0] < 120 + 16
    assert moved > 0
    for total, updates in ((660, 3), (720, 3), (800, 4)):
        rates, tokens, _ = learnt_at(total, 200)
        assert total <= tokens[-1] < total + 16  # less than one token in each slot
        assert len(rates) == updates
        middles = [(a + b) / 2 / total for a, b in zip([0, *tokens], tokens, strict=False)]
        assert rates[:-1] == pytest.approx([1 - middle for middle in middles[:-1]])
        assert 0 < rates[-1] < 0.25
        assert tokens[-1] - tokens[-2] >= 100
    rates, _, _ = learnt_at(2000, 200, lr_warmup=0.5)
    assert min(rates) > 0.02


@given(
    tokens=st.lists(st.integers(1, 10_000), min_size=1, max_size=30), total=st.integers(1, 50_000)
)
def test_progress_rises_and_stays_below_one(tokens, total):
    """Whatever the sizes of the batches."""
    before, last = 0, 0.0
    for size in tokens:
        if before >= total:
            break
        now = run_progress(before, before + size, total)
        assert last <= now + 1e-12
        assert 0 < now < 1
        assert learning_rate(PPOConfig(lr=1.0), now) > 0
        before, last = before + size, now


def test_learning_rate_by_hand():
    rates = {
        "constant": [0.0, 0.5, 1.0, 1.0, 1.0],
        "linear": [0.0, 0.5, 1.0, 0.5, 0.0],
        "cosine": [0.0, 0.5, 1.0, 0.5, 0.0],
    }
    for schedule, expected in rates.items():
        cfg = PPOConfig(lr=2.0, lr_schedule=schedule, lr_warmup=0.2)
        assert [learning_rate(cfg, p) / 2 for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(
            expected
        )
    quarter = learning_rate(PPOConfig(lr=1.0, lr_schedule="cosine"), 0.25)
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(PPOConfig(lr=1.0), 1.5) == 0.0
    assert learning_rate(PPOConfig(lr=1.0, lr_warmup=1.0), 1.0) == 1.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 0.0, "lr=0.0 is not allowed; it must be above 0"),
        ("lr", float("nan"), "lr=nan is not allowed"),
        ("epochs", 0, "epochs=0 is not allowed; it must be at least 1"),
        ("clip_range", -0.1, "clip_range=-0.1 is not allowed; it must be above 0"),
        ("lambda_actor", 1.5, "lambda_actor=1.5 is not allowed; it must lie between 0 and 1"),
        ("gamma", -0.1, "gamma=-0.1 is not allowed; it must lie between 0 and 1"),
        ("kl_target", 0.0, "kl_target=0.0 is not allowed; it must be above 0"),
        ("kl_coef", -1.0, "kl_coef=-1.0 is not allowed; it must be at least 0"),
        ("lr_schedule", "cosin", "lr_schedule='cosin' is not known; .* Did you mean 'cosine'"),
        ("aggregation", "mean", "aggregation='mean' is not known"),
        ("precision", "fp8", "precision='fp8' is not known"),
        ("dual_clip", 1.0, "dual_clip=1.0 is not allowed; it must be above 1"),
        ("k3_coef", -0.1, "k3_coef=-0.1 is not allowed; it must be at least 0"),
        (
            "clip_rang",
            0.1,
            "PPOConfig field='clip_rang' is not known. Did you mean 'clip_range'",
        ),
    ],
)
def test_settings_are_checked(field, value, message):
    with pytest.raises(InvalidArgument, match=message):
        PPO(ToyEnv(2), **{field: value})


def test_every_field_is_documented():
    import inspect

    for config in (AgentConfig, PPOConfig):
        lines = inspect.getsource(config).splitlines()
        for name in config.__annotations__:
            [at] = [n for n, line in enumerate(lines) if line.strip().startswith(f"{name}:")]
            assert lines[at + 1].strip().startswith('"""'), name


def test_settings_that_the_env_cannot_serve_are_refused():
    class Silent(ToyEnv):
        def step(self, actions):
            result = super().step(actions)
            for infos in (result[-1], result[-1].get("final_info", {})):
                infos.pop("ref_logprob", None)
            return result

    with pytest.raises(
        InvalidArgument, match=r"kl_target=0\.1 needs an env that reports ref_logprob"
    ):
        PPO(Silent(4, kl_coef=0.1), batch_tokens=20, kl_target=0.1).learn(100)
    with pytest.raises(
        InvalidArgument, match=r"k3_coef=0\.1 needs an env that reports ref_logprob"
    ):
        PPO(Silent(4), batch_tokens=20, k3_coef=0.1).learn(100)
    bare = ToyEnv(4)
    del bare.token_spec
    with pytest.raises(InvalidArgument, match="leave full_kl_coef at 0"):
        PPO(bare, policy=LMPolicy(tiny_lm()), full_kl_coef=0.1)
    with pytest.raises(
        InvalidArgument, match=r"config= is of type AgentConfig; allowed: PPOConfig"
    ):
        PPO(ToyEnv(2), AgentConfig())


def test_envs_it_cannot_drive_are_refused():
    class Bare(ToyEnv):
        def __init__(self):
            super().__init__(4)
            del self.token_spec, self.reference

        def _ref_logprobs(self, actions):
            return np.zeros(4, np.float32)

    with pytest.raises(
        InvalidArgument, match=r"Bare has no token_spec and reference .* give policy=LMPolicy"
    ):
        PPO(Bare())
    agent = PPO(Bare(), policy=LMPolicy(tiny_lm()), batch_tokens=40).learn(80)
    assert agent.updates >= 2
    with pytest.raises(InvalidArgument, match="policy has 9 tokens, the env 12 actions"):
        PPO(ToyEnv(2), policy=LMPolicy(tiny_lm(vocab_size=9)))
    envs = ToyEnv(2)
    with pytest.raises(
        InvalidArgument,
        match=r"policy trains model\.model\.embed_tokens\.weight, .* env's own reference",
    ):
        PPO(envs, policy=LMPolicy(envs.reference))
    frozen = LMPolicy(tiny_lm())
    frozen.model.requires_grad_(False)  # as an env does to the models that it is given
    with pytest.raises(
        InvalidArgument, match="policy's model has no weight to train: an env freezes the models"
    ):
        PPO(ToyEnv(2), policy=frozen)
    with pytest.raises(
        InvalidArgument, match=r"CartPoleEnv is no vector env; build one with gym.make_vec"
    ):
        PPO(gym.make("CartPole-v1").unwrapped)
    with pytest.raises(InvalidArgument, match='envs must observe "tokens"'):
        PPO(gym.make_vec("CartPole-v1", 2))


def test_the_policy_is_a_copy_of_the_reference():
    envs = ToyEnv(4)
    before = {name: value.clone() for name, value in envs.reference.state_dict().items()}
    agent = PPO(envs, batch_tokens=40, lr=0.1).learn(80)
    assert all(
        torch.equal(before[name], value) for name, value in envs.reference.state_dict().items()
    )
    assert not torch.equal(
        agent.policy.model.state_dict()["lm_head.weight"], before["lm_head.weight"]
    )


def test_caches_hold_the_new_weights_after_an_update():
    agent = PPO(ToyEnv(4), batch_tokens=40, lr=0.05).learn(40)
    obs = agent.collector._obs
    tokens, logprobs = agent.actor.act(obs)
    for text, length, token, logprob in zip(
        obs["tokens"], obs["length"], tokens, logprobs, strict=True
    ):
        logits = agent.policy.model(input_ids=torch.as_tensor(text[None, :length])).logits[0, -1]
        assert logprob.item() == pytest.approx(
            torch.log_softmax(logits, -1)[token].item(), abs=1e-5
        )


def test_learning_goes_on_to_the_tokens_asked_for():
    agent = PPO(ToyEnv(4), batch_tokens=40)
    agent.learn(100)
    seen = agent.tokens_seen
    assert seen >= 100
    assert agent.learn(100).tokens_seen == seen
    assert agent.learn(seen + 1).tokens_seen > seen


def test_lora_learns():
    pytest.importorskip("peft")
    model = tiny_lm(initializer_range=0.3)
    agent = PPO(ToyEnv(32, reference=model), batch_tokens=400, lr=2e-2, lora_rank=4)
    frozen = agent.policy.model.get_input_embeddings().weight.clone()
    agent.learn(4000)
    assert evaluate(agent, ToyEnv(64, reference=model), num_texts=64).score > 3.0
    assert torch.equal(agent.policy.model.get_input_embeddings().weight, frozen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_it_learns_and_resumes_on_cuda(tmp_path, precision):
    model = tiny_lm().cuda()
    agent = PPO(ToyEnv(16, reference=model), batch_tokens=400, lr=3e-3, precision=precision).learn(
        6000
    )
    assert evaluate(agent, ToyEnv(16, reference=model), num_texts=64).score > 5.0
    agent.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", ToyEnv(16, reference=model)).learn(7000)
    assert evaluate(resumed, ToyEnv(16, reference=model), num_texts=64).score > 5.0


def test_a_run_folder_holds_events_and_episodes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    seen = []
    agent = PPO(ToyEnv(4, kl_coef=0.1), run_dir=run, batch_tokens=40)
    agent.learn(120, on_update=lambda metrics, episodes: seen.append((metrics, episodes)))
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    episodes = [e for _, group in seen for e in group]
    assert [line["response"] for line in lines] == [e.response.tolist() for e in episodes]
    assert lines[0].keys() >= {
        "tokens_seen",
        "prompt",
        "score",
        "gold",
        "reward",
        "kl",
        "length",
        "terminated",
    }
    assert lines[0]["gold"] is None
    events = EventAccumulator(str(run)).Reload()
    names = {
        "objective/kl", "objective/score", "policy/approx_kl", "policy/clip_fraction", "policy/entropy", "loss/policy",
        "loss/value", "value/explained_variance", "episode/length", "time/tokens_per_second", "objective/kl_coef",
    }  # fmt: skip
    assert names <= set(events.Tags()["scalars"])
    assert "objective/gold" not in events.Tags()["scalars"]
    [last] = [
        event for event in events.Scalars("objective/score") if event.step == agent.tokens_seen
    ]
    assert last.value == pytest.approx(seen[-1][0]["objective/score"])
