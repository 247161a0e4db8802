"""stable-baselines3 on texts: what the adapter owes SB3, and that SB3 trains what the bundled
agents train."""

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from sb3_contrib import ARS, QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from tasks import STOPS, TOYS, T, assert_equal, copied, make_vec, random_actions, row_of

from tokenenv.errors import (
    EnvClosed,
    Interrupted,
    InvalidAction,
    InvalidArgument,
    MissingDependency,
)
from tokenenv.integrations import sb3
from tokenenv.integrations.sb3 import LMActorCriticPolicy, SB3VecEnv
from tokenenv.wrappers import ActionMask, TopKActions

N, BETA = 4, 0.3
SAME_STEP = AutoresetMode.SAME_STEP


def make(num_envs: int = N, env_id: str = "tests/Toy-v0", **options: Any) -> Any:
    return make_vec(num_envs, SAME_STEP, env_id, **{"kl": "none", **options})


def learner(algorithm: Any, envs: Any, **options: Any) -> Any:
    """An SB3 algorithm on the env's own language model."""
    model = options.pop("model", envs.unwrapped.model)
    policy = {"model": model, **options.pop("policy_kwargs", {})}
    return algorithm(
        LMActorCriticPolicy, SB3VecEnv(envs), policy_kwargs=policy, device="cpu", seed=0, **options
    )


def ppo(envs: Any, **options: Any) -> Any:
    return learner(
        PPO, envs, **{"n_steps": 10, "batch_size": 20, "n_epochs": 2, "gamma": 1.0, **options}
    )


class Steps(BaseCallback):
    """Keeps what the env was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []
        self.infos: list[list[dict[str, Any]]] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["clipped_actions"])
        self.rewards.append(self.locals["rewards"].copy())
        self.infos.append(self.locals["infos"])
        return True


def rollout(model: Any) -> tuple[Any, Steps]:
    """SB3's buffer after one rollout, and what passed between the two."""
    _, callback = model._setup_learn(model.n_steps * N, Steps())
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer, callback


def stored(buffer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Observations, actions and log-probs as training sees them, steps before rows."""
    obs = {
        key: torch.as_tensor(values).flatten(0, 1) for key, values in buffer.observations.items()
    }
    return (
        obs,
        torch.as_tensor(buffer.actions).flatten(0, 1),
        torch.as_tensor(buffer.log_probs).flatten(),
    )


def unfreeze_values(model: Any) -> None:
    """A critic that starts at zero would hide whether SB3 asks it."""
    head = model.policy.lm.value_head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(head.bias, 0.7)


# --------------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize(
    ("options", "wrap"),
    [
        ({}, lambda envs: envs),
        ({"array": "torch"}, lambda envs: envs),
        ({"observation": "features"}, lambda envs: envs),
        ({}, RecordEpisodeStatistics),
    ],
    ids=["numpy", "torch", "features", "wrapped"],
)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_shows_what_the_env_shows(options: dict[str, Any], wrap: Any, mode: Any) -> None:
    """In every autoreset mode: what an env in SAME_STEP mode shows, and no step more."""
    options = TOYS["mixture"] | {"kl": "none"} | options
    envs, plain = SB3VecEnv(wrap(make_vec(N, mode, **options))), make(**options)
    rng, ended = np.random.default_rng(0), 0
    returns, lengths = np.zeros(N), np.zeros(N, int)
    envs.seed(5)
    expected, info = plain.reset(seed=5)
    assert_equal(envs.reset(), copied(expected))
    assert_equal(
        dict(enumerate(envs.reset_infos)), {row: row_of(copied(info), row) for row in range(N)}
    )
    for _ in range(25):
        actions = random_actions(rng, plain)
        obs, rewards, dones, infos = envs.step(actions)
        expected, paid, terminated, truncated, info = copied(
            dict(enumerate(plain.step(actions)))
        ).values()
        assert_equal(obs, expected)
        assert_equal(rewards, paid)
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(dones, terminated | truncated)
        returns, lengths = returns + paid, lengths + 1
        for row in range(N):
            if not dones[row]:
                assert infos[row] == {}
                continue
            final = info["final_obs"]
            last = (
                {key: value[row] for key, value in final.items()}
                if isinstance(final, dict)
                else final[row]
            )
            assert_equal(infos[row]["terminal_observation"], last)
            assert infos[row]["episode"]["r"] == pytest.approx(returns[row], abs=1e-5)
            assert infos[row]["episode"]["r"] == pytest.approx(
                info["token_rewards"][row].sum(), abs=1e-5
            )
            assert infos[row]["episode"]["l"] == lengths[row]
            assert_equal(
                {key: infos[row][key] for key in row_of(info["final_info"], row)},
                row_of(info["final_info"], row),
            )
            assert {"score", "gold"} <= set(infos[row])
            ended += 1
        returns[dones], lengths[dones] = 0.0, 0
    assert ended >= N


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_it_returns_is_the_callers_own(mode: Any) -> None:
    options = TOYS["mixture"] | {"kl": "none"}
    (a, b), rng = (
        [SB3VecEnv(make_vec(N, mode, **options)) for _ in range(2)],
        np.random.default_rng(0),
    )
    for envs in (a, b):
        envs.seed(0)
        envs.reset()
    for _ in range(15):
        actions = random_actions(rng, a.envs)
        one, other = a.step(actions), b.step(actions)
        assert_equal(one[0], other[0])
        assert_equal(dict(enumerate(one[1:3])), dict(enumerate(other[1:3])))
        for array in (*one[0].values(), one[1]):
            array[:] = 1


def test_seeds_count_for_one_reset() -> None:
    envs = SB3VecEnv(make())
    envs.seed(3)
    first, second = envs.reset(), envs.reset()
    envs.seed(3)
    assert_equal(envs.reset(), first)
    assert (second["tokens"] != first["tokens"]).any()


def test_attributes_and_methods() -> None:
    mask = ActionMask(make(), top_p=0.5)
    envs = SB3VecEnv(RecordEpisodeStatistics(mask))
    envs.reset()
    assert envs.get_attr("top_p") == [0.5] * N
    assert envs.get_attr("oracle", indices=[0, 2]) == [None, None]
    assert envs.has_attr("action_masks")
    assert not envs.has_attr("no_such_thing")
    np.testing.assert_array_equal(envs.env_method("action_masks"), mask.action_masks())
    np.testing.assert_array_equal(
        envs.env_method("action_masks", indices=1)[0], mask.action_masks()[1]
    )
    assert [len(row) for row in envs.env_method("responses")] == [0] * N
    envs.set_attr("kl_coef", 0.25)
    assert envs.unwrapped.kl_coef == 0.25
    envs.set_attr("top_p", 0.7)
    assert mask.top_p == 0.7
    with pytest.raises(AttributeError, match="TokenVectorEnv has no attribute 'no_such_thing'"):
        envs.get_attr("no_such_thing")
    envs.set_attr("no_such_thing", 1)
    assert envs.get_attr("no_such_thing", indices=[-1]) == [1]
    assert envs.envs.no_such_thing == 1
    with pytest.raises(
        InvalidArgument, match=r"indices=\[0\] is not allowed; 'top_p' belongs to all rows"
    ):
        envs.set_attr("top_p", 0.5, indices=[0])
    assert envs.env_is_wrapped(Monitor) == [True] * N
    assert envs.env_is_wrapped(gym.Wrapper, indices=0) == [False]
    assert envs.env_is_wrapped(ActionMask, indices=[0, 1]) == [True] * 2
    assert SB3VecEnv(make(array="torch")).env_method("reset") is not None


def prompts_of(obs: Any) -> list[list[int]]:
    return [
        row[:length].tolist()
        for row, length in zip(obs["tokens"], obs["prompt_length"], strict=True)
    ]


def test_options_are_those_of_single_texts_and_count_for_one_reset() -> None:
    envs = SB3VecEnv(make())
    envs.seed(3)
    drawn = prompts_of(envs.reset())
    envs.set_options({"prompts": [[11, 12]]})
    assert prompts_of(envs.reset()) == [[11, 12]] * N
    envs.seed(3)
    assert prompts_of(envs.reset()) == drawn
    envs.seed(3)
    envs.set_options(
        [{}, {"prompts": [[11]], "prefixes": [[21, 22]]}, {"prompts": ["the cat"]}, {}]
    )
    obs = envs.reset()
    words = envs.unwrapped.token_spec.tokenizer("the cat")["input_ids"]
    assert prompts_of(obs) == [drawn[0], [11], words, drawn[3]]
    np.testing.assert_array_equal(obs["length"] - obs["prompt_length"], [0, 2, 0, 0])
    assert [info["prompt_id"] for info in envs.reset_infos[1:3]] == [-1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a", "b"]}, r"options\['prompts'\]=\['a', 'b'\] must be a list of one"),
        ({"prompts": "a"}, "options.*='a' must be a list of one"),
        (
            {"reset_mask": [True]},
            "options key='reset_mask' is not known; allowed: prefixes, prompts",
        ),
        ([{}], r"options has 1 entries; allowed: a mapping, or one entry an env \(4\)"),
    ],
)
def test_options_that_cannot_be(options: Any, message: str) -> None:
    envs = SB3VecEnv(make())
    envs.set_options(options)
    with pytest.raises(InvalidArgument, match=message):
        envs.reset()


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("group_size", [1, 2])
def test_reset_infos_are_those_of_the_texts_that_run(mode: Any, group_size: int) -> None:
    options = {"reward": "delta", "scorer": "sequence", "kl": "none", "group_size": group_size}
    envs, plain = SB3VecEnv(make_vec(N, mode, **options)), make(**options)
    envs.seed(5)
    envs.reset()
    plain.reset(seed=5)
    expected = [dict(info) for info in envs.reset_infos]
    for _ in range(12):
        actions = random_actions(np.random.default_rng(0), plain, stop=0.3)
        _, _, dones, _ = envs.step(actions)
        info = plain.step(actions)[4]
        for row in np.flatnonzero(dones):
            expected[row] = {key: info[key][row] for key in ("prompt_id", "potential")}
        assert_equal(dict(enumerate(envs.reset_infos)), dict(enumerate(expected)))
    assert len({info["prompt_id"] for info in expected}) > 1


def test_rendering() -> None:
    pictures = SB3VecEnv(make(render_mode="rgb_array"))
    pictures.reset()
    tiled = pictures.render()
    assert tiled.dtype == np.uint8
    assert np.array_equal(tiled, pictures.render(mode="rgb_array"))
    assert len(pictures.get_images()) == N
    with pytest.warns(UserWarning, match="render mode"):
        assert pictures.render(mode="ansi") is None
    texts = SB3VecEnv(make(render_mode="ansi"))
    texts.reset()
    assert texts.render() is None
    assert texts.metadata["render_modes"] == ["ansi"]
    with pytest.raises(
        InvalidArgument,
        match="render_mode='ansi' gives no pictures; make the env with render_mode='rgb_array'",
    ):
        texts.get_images()
    with pytest.warns(UserWarning, match="no `render_mode` was passed"):
        assert SB3VecEnv(make()).render() is None


def test_sending_and_waiting_and_closing() -> None:
    (a, b), actions = (SB3VecEnv(make()) for _ in range(2)), np.full(N, 20)
    for envs in (a, b):
        envs.seed(1)
        envs.reset()
    a.step_async(actions)
    assert_equal(a.step_wait()[0], b.step(actions)[0])
    assert a.seed() == [a._seeds[0] + row for row in range(N)]
    a.reset()
    a.close()
    a.close()
    for call in (a.reset, lambda: a.step(actions)):
        with pytest.raises(EnvClosed, match="closed"):
            call()


def test_beneath_sb3s_own_wrappers() -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        envs = VecMonitor(SB3VecEnv(make(stops=())))
    envs.reset()
    for _ in range(T):
        *_, infos = envs.step(np.full(N, 20))
    assert [info["episode"]["l"] for info in infos] == [T] * N
    assert envs.unwrapped.token_spec.max_new_tokens == T
    plain = SB3VecEnv(make(observation="features"))
    stacked = VecCheckNan(VecFrameStack(VecNormalize(plain), 2))
    assert stacked.env_is_wrapped(Monitor) == [True] * N
    assert stacked.reset().shape == (N, 2 * plain.observation_space.shape[0])
    assert stacked.step(np.full(N, 20))[0].shape == (N, 2 * plain.observation_space.shape[0])


# ---------------------------------------------------------------------------------------------------- the same objective


@pytest.mark.parametrize("case", ["all tokens", "masked", "turns"])
def test_the_log_prob_paid_for_is_the_one_stored_and_the_one_recomputed(case: str) -> None:
    """Also of a text that an environment writes into: a step is one token of the policy's."""
    masked, options = (
        case == "masked",
        {"masked": {"stops": (STOPS[0],)}, "turns": {"turns": "fixed"}},
    )
    envs = make(kl="policy", kl_coef=BETA, **options.get(case, {}))
    envs = (
        ActionMask(envs, regex="(the|a) (cat|dog) (is|was) (very )*good", top_p=0.95)
        if masked
        else envs
    )
    model = ppo(envs, n_steps=20)
    buffer, steps = rollout(model)
    obs, actions, logprobs = stored(buffer)
    np.testing.assert_array_equal(np.concatenate(steps.actions)[:, 1], logprobs)
    model.policy.set_training_mode(True)
    _, again, entropy = model.policy.evaluate_actions(obs, actions)
    torch.testing.assert_close(again, logprobs, atol=1e-4, rtol=0)
    assert entropy.isfinite().all()
    if masked:
        allowed = obs["action_mask"].gather(1, actions[:, :1].long())
        assert allowed.all()
        assert (logprobs == 0).any()
    if case == "turns":
        ends = [info for row in steps.infos for info in row if "episode" in info]
        last = [info["terminal_observation"] for info in ends]
        lengths = [int(obs["length"] - obs["prompt_length"]) for obs in last]
        own = [info["episode"]["l"] for info in ends]
        assert own == [int(obs["own_mask"].sum()) for obs in last]
        assert sum(lengths) > sum(own)


def test_the_kl_term_is_the_k1_penalty() -> None:
    envs = make(kl="policy", kl_coef=BETA, reward={})
    paid: list[Any] = []
    step = envs.step
    envs.step = lambda actions: paid.append((actions, result := step(actions))) or result
    buffer, _ = rollout(ppo(envs))
    for t, (actions, (_, rewards, _, _, infos)) in enumerate(paid):
        np.testing.assert_allclose(
            infos["reward_terms"]["kl"],
            -BETA * (buffer.log_probs[t] - infos["ref_logprob"]),
            atol=1e-5,
        )
        np.testing.assert_array_equal(rewards, infos["reward_terms"]["kl"])
        np.testing.assert_array_equal(actions["token"], buffer.actions[t][:, 0])
    # The policy is the reference itself, so every log-ratio is 0 to begin with; after an update it
    # is not.
    assert np.abs(buffer.rewards).max() < 1e-4


def test_rewards_in_the_buffer_add_up_to_the_episodes() -> None:
    buffer, steps = rollout(ppo(make(**TOYS["mixture"] | {"kl": "policy"}), n_steps=25))
    running, seen = np.zeros(N), 0
    for rewards, infos in zip(buffer.rewards, steps.infos, strict=True):
        running += rewards
        for row, info in enumerate(infos):
            if "episode" in info:
                assert running[row] == pytest.approx(info["episode"]["r"], abs=1e-4)
                assert running[row] == pytest.approx(info["token_rewards"].sum(), abs=1e-4)
                running[row] = 0.0
                seen += 1
    assert seen >= N


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
def test_learners_bootstrap_only_where_a_cut_text_is_not_scored(scored: bool, flag: str) -> None:
    envs = make(kl="policy", cut=flag, score_truncated=scored, stops=(STOPS[0],))
    model = ppo(envs, n_steps=2 * T, batch_size=28)
    unfreeze_values(model)
    buffer, steps = rollout(model)
    cut = 0
    for stored, paid, infos in zip(buffer.rewards, steps.rewards, steps.infos, strict=True):
        for row, info in enumerate(infos):
            bonus = 0.0
            if (
                "episode" in info
                and info["episode"]["l"] == T
                and info["terminal_observation"]["tokens"][-1] != STOPS[0]
            ):
                assert info["TimeLimit.truncated"] == (not scored)
                assert info["cut"]
                last = {
                    key: torch.as_tensor(value)[None]
                    for key, value in info["terminal_observation"].items()
                }
                bonus = 0.0 if scored else float(model.policy.predict_values(last).detach())
                cut += 1
            assert stored[row] == pytest.approx(paid[row] + bonus, abs=1e-5)
    assert cut >= N


def test_a_text_that_ends_with_a_stop_token_never_bootstraps() -> None:
    envs = SB3VecEnv(make(score_truncated=False))
    envs.reset()
    _, _, dones, infos = envs.step(np.full(N, STOPS[0]))
    assert dones.all()
    assert not any(info["TimeLimit.truncated"] for info in infos)


@pytest.mark.parametrize("case", ["scored", "time limit", "unscored"])
def test_the_flags_are_those_that_sb3_reads_of_single_envs(case: str) -> None:
    """SB3's own vector env and Gymnasium's, of the same single envs, the latter through the
    adapter; with a time limit too."""
    limit = 4 if case == "time limit" else None
    given = {
        "stops": (),
        "kl": "none",
        "max_episode_steps": limit,
        "score_truncated": case != "unscored",
    }
    theirs = DummyVecEnv([lambda: gym.make("tests/Toy-v0", **given)] * 2)
    ours = SB3VecEnv(
        SyncVectorEnv([lambda: gym.make("tests/Toy-v0", **given)] * 2, autoreset_mode=SAME_STEP)
    )
    for envs in (theirs, ours):
        envs.seed(0)
        envs.reset()
        for _ in range((limit or T) - 1):
            assert not envs.step(np.full(2, 20))[2].any()
        _, _, dones, infos = envs.step(np.full(2, 20))
        assert dones.all()
        assert [info["TimeLimit.truncated"] for info in infos] == [case != "scored"] * 2


def test_a_row_is_read_without_its_neighbours() -> None:
    model = ppo(make(kl="policy"))
    unfreeze_values(model)
    obs, actions, logprobs = stored(rollout(model)[0])
    values = model.policy.predict_values(obs).detach()
    for row in (0, 7, 30):
        one = {key: value[row : row + 1] for key, value in obs.items()}
        with torch.no_grad():
            alone = model.policy.evaluate_actions(one, actions[row : row + 1])
        assert float(alone[0]) == pytest.approx(float(values[row]), abs=1e-5)
        assert float(alone[1]) == pytest.approx(float(logprobs[row]), abs=1e-5)


def test_dropout_is_off_when_learning() -> None:
    """Or the log-probs of the first epoch would already differ from those that the texts were drawn
    with."""
    model = ppo(
        make(kl="policy"),
        model=fakes.causal_lm("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5),
    )
    obs, actions, logprobs = stored(rollout(model)[0])
    model.policy.set_training_mode(True)
    torch.testing.assert_close(
        model.policy.evaluate_actions(obs, actions)[1], logprobs, atol=1e-4, rtol=0
    )


# -------------------------------------------------------------------------------------------------------------- learning


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_learned(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = weights(model)
    assert all(value.isfinite().all() for value in after.values())
    assert any((after[name] != before[name]).any() for name in before)


def bundled(name: str, **options: Any) -> Any:
    return make(8, f"tokenenv/{name}", **{"max_new_tokens": 6, **options})


CASES = {
    "ppo reviews": lambda: ppo(
        bundled("Reviews-v0", kl="policy"), n_steps=12, batch_size=48, ent_coef=0.01
    ),
    "ppo masked": lambda: ppo(
        ActionMask(bundled("Reviews-v0", kl="policy"), regex="[a-z ]*", top_p=0.9),
        n_steps=12,
        batch_size=48,
        ent_coef=0.01,
    ),
    "ppo two trunks": lambda: ppo(
        bundled("Negation-v0", kl="policy"), policy_kwargs={"separate_value": True}
    ),
    "ppo without kl": lambda: ppo(bundled("Reviews-v0")),
    "a2c brackets": lambda: learner(
        A2C, bundled("Brackets-v0", kl="policy", max_new_tokens=8), n_steps=8
    ),
    "ppo features": lambda: PPO(
        "MlpPolicy",
        SB3VecEnv(bundled("Reviews-v0", observation="features")),
        n_steps=16,
        device="cpu",
    ),
    "dqn top k": lambda: DQN(
        "MlpPolicy",
        SB3VecEnv(TopKActions(bundled("Negation-v0", observation="features"), 4)),
        learning_starts=64,
        batch_size=32,
        device="cpu",
    ),
    "maskable": lambda: MaskablePPO(
        "MlpPolicy",
        SB3VecEnv(ActionMask(bundled("Negation-v0", observation="features"), top_p=0.5)),
        n_steps=12,
        device="cpu",
    ),
    "maskable top k": lambda: MaskablePPO(
        "MlpPolicy",
        SB3VecEnv(
            TopKActions(
                ActionMask(
                    bundled("Reviews-v0", observation="features"), regex="(very )*(good|bad)"
                ),
                5,
            )
        ),
        n_steps=12,
        device="cpu",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_it_learns_without_an_error(name: str) -> None:
    model = CASES[name]()
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.learn(200)
    assert_learned(model, before)


def test_ppo_learns_the_task() -> None:
    envs = bundled("Negation-v0", kl="policy", kl_coef=0.02)
    model = ppo(envs, n_steps=24, batch_size=96, learning_rate=2e-2)
    scores: list[float] = []

    class Scores(BaseCallback):
        def _on_step(self) -> bool:
            scores.extend(info["score"] for info in self.locals["infos"] if info)
            return True

    model.learn(3000, callback=Scores())
    assert np.mean(scores[-100:]) > np.mean(scores[:100]) + 0.5, (
        np.mean(scores[:100]),
        np.mean(scores[-100:]),
    )


def test_evaluation_and_prediction() -> None:
    model = ppo(make(kl="policy"))
    mean, _ = evaluate_policy(model, model.env, n_eval_episodes=5)
    assert np.isfinite(mean)
    obs = model.env.reset()
    actions, _ = model.predict(obs, deterministic=True)
    tensors = {key: torch.as_tensor(value) for key, value in obs.items()}
    logits = model.policy.read(tensors)[0]
    np.testing.assert_array_equal(actions[:, 0], logits.argmax(1))
    np.testing.assert_allclose(
        actions[:, 1], torch.log_softmax(logits, 1).max(1).values.detach(), atol=1e-5
    )
    tokens, _ = ppo(make()).predict(obs, deterministic=True)
    assert tokens.shape == (N,)


# ------------------------------------------------------------------------------------------------------ saving, loading


@pytest.mark.parametrize("env_id", ["Reviews-v0", "Negation-v0"])
def test_a_saved_model_goes_on(tmp_path: Path, env_id: str) -> None:
    model = ppo(
        bundled(env_id, kl="policy"), learning_rate=1e-2, policy_kwargs={"separate_value": True}
    )
    model.learn(80)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=SB3VecEnv(bundled(env_id, kl="policy")), device="cpu")
    assert_equal(
        {k: v.numpy() for k, v in weights(loaded).items()},
        {k: v.numpy() for k, v in weights(model).items()},
    )
    obs = {key: torch.as_tensor(value) for key, value in loaded.env.reset().items()}
    for mine, theirs in zip(model.policy.read(obs), loaded.policy.read(obs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    before = weights(loaded)
    loaded.learn(80)
    assert_learned(loaded, before)


def test_a_saved_policy_is_the_policy(tmp_path: Path) -> None:
    envs = make(kl="policy")
    model = ppo(envs, policy_kwargs={"separate_value": True})
    unfreeze_values(model)
    model.policy.save(tmp_path / "policy")
    loaded = LMActorCriticPolicy.load(tmp_path / "policy", device="cpu")
    obs = {key: torch.as_tensor(value) for key, value in envs.reset()[0].items()}
    for mine, theirs in zip(model.policy.read(obs), loaded.read(obs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_envs_own_model_is_not_trained() -> None:
    envs = make(kl="policy")
    before = {name: value.clone() for name, value in envs.unwrapped.reference.state_dict().items()}
    ppo(envs, learning_rate=1e-2).learn(80)
    for name, value in envs.unwrapped.reference.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------- errors


def test_envs_that_cannot_begin_a_text_at_once_are_refused() -> None:
    """Gymnasium's own vector CartPole would ignore the mask, and reset every row."""
    with pytest.raises(
        InvalidArgument,
        match=r"CartPoleVectorEnv begins the next episode one step late .*; make it with autoreset_",
    ):
        SB3VecEnv(gym.make_vec("CartPole-v1", 2, "vector_entry_point"))


@pytest.mark.parametrize("given", [lambda: gym.make("tests/Toy-v0"), lambda: "tests/Toy-v0"])
def test_what_is_no_vector_env_is_refused_with_the_call_to_make(given: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"is no vector env; give SB3VecEnv\(gym.make_vec\("):
        SB3VecEnv(given())


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasiums_own_vector_env_in_every_mode(mode: Any) -> None:
    """Its single envs, stepped by hand, say what has to be seen."""
    singles = [gym.make("tests/Toy-v0", kl="none") for _ in range(2)]
    makers = [lambda: gym.make("tests/Toy-v0", kl="none")] * 2
    envs, rng = SB3VecEnv(SyncVectorEnv(makers, autoreset_mode=mode)), np.random.default_rng(0)
    envs.seed(3)
    first = envs.reset()
    expected = [single.reset(seed=3 + row)[0] for row, single in enumerate(singles)]
    assert_equal(first, {key: [obs[key] for obs in expected] for key in first})
    for _ in range(3 * T):
        actions = rng.integers(0, envs.action_space.n, 2)
        obs, rewards, dones, infos = envs.step(actions)
        for row, single in enumerate(singles):
            last, reward, terminated, truncated, _ = single.step(actions[row])
            assert rewards[row] == np.float32(reward)
            assert dones[row] == (terminated or truncated)
            if dones[row]:
                assert_equal(infos[row]["terminal_observation"], last)
                last, _ = single.reset()
            assert_equal({key: value[row] for key, value in obs.items()}, last)


@pytest.mark.parametrize("wrap", [lambda envs: TopKActions(envs, 4), RecordEpisodeStatistics])
def test_learning_is_the_same_in_every_autoreset_mode(wrap: Any) -> None:
    """Whatever mode `gym.make_vec` was left in, and whatever stands between."""
    weights = []
    for mode in AutoresetMode:
        envs = SB3VecEnv(wrap(make_vec(N, mode, kl="none", observation="features")))
        model = PPO("MlpPolicy", envs, n_steps=10, batch_size=20, seed=0, device="cpu").learn(80)
        weights.append(torch.cat([w.flatten() for w in model.policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_language_model_with_masks_learns_the_same_in_every_mode(mode: Any) -> None:
    def learned(mode: Any) -> torch.Tensor:
        envs = make_vec(N, mode, kl="policy", stops=(STOPS[0],))
        model = ppo(ActionMask(envs, top_p=0.9)).learn(80)
        return torch.cat([w.detach().flatten() for w in model.policy.lm.model.parameters()])

    assert torch.equal(learned(mode), learned(SAME_STEP))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_interrupted_step_is_the_envs_to_refuse(mode: Any) -> None:
    """Where a reset of single rows is stopped half-way, the env says so until it is reset."""
    envs, plain = SB3VecEnv(make_vec(N, mode, kl="none")), SB3VecEnv(make())
    envs.reset()
    begin = envs.unwrapped._begin
    envs.unwrapped._begin = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        envs.step(np.full(N, STOPS[0]))
    envs.unwrapped._begin = begin
    with pytest.raises(Interrupted):
        envs.step(np.full(N, 20))
    for one in (envs, plain):
        one.seed(4)
        one.reset()
    assert_equal(envs.step(np.full(N, STOPS[0]))[0], plain.step(np.full(N, STOPS[0]))[0])


def test_the_calls_as_people_type_them() -> None:
    """The vector env with the default of everything, then the adapter, then SB3."""
    with pytest.warns(UserWarning, match=r"gym.make_vec\('tokenenv/Negation-v0', num_envs=8, kl="):
        envs = SB3VecEnv(gym.make_vec("tokenenv/Negation-v0", num_envs=8))
    assert envs.reset()["tokens"].shape == (8, 17)
    envs = SB3VecEnv(
        gym.make_vec("tokenenv/Negation-v0", num_envs=8, kl="none", observation="features")
    )
    A2C("MlpPolicy", envs, device="cpu").learn(80)


def test_the_kl_that_sb3_does_not_add_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="SB3 does not add -beta log pi"):
        SB3VecEnv(make(kl="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SB3VecEnv(make(kl="policy"))
        SB3VecEnv(make(kl="reference", kl_coef=0.0))


@pytest.mark.parametrize("num_envs", [1, N])
def test_a_policy_that_gives_no_log_prob_is_an_error(num_envs: int) -> None:
    envs = SB3VecEnv(make(num_envs, kl="policy", observation="features"))
    with pytest.raises(InvalidAction):
        PPO("MlpPolicy", envs, n_steps=16, batch_size=16, device="cpu").learn(16)
    envs = SB3VecEnv(make(kl="policy"))
    envs.reset()
    for actions in (np.full((N, 2), 0.5, np.float32), np.full(N, 3)):
        with pytest.raises(
            InvalidAction, match=r"actions are \(token, logprob\), which LMActorCriticPolicy gives"
        ):
            envs.step(actions)
    for junk in ([-0.7, -1.0], [1e4, -1.0], [3.0, 0.4]):
        clipped = np.clip(
            junk, envs.action_space.low, envs.action_space.high
        )  # as SB3 does to every Box action
        with pytest.raises(InvalidAction):
            envs.step(np.array([clipped] * N, np.float32))
    for logprob in (np.nan, 1.0):
        with pytest.raises(InvalidAction, match="needs a finite log-prob, 0 or less"):
            envs.step(np.full((N, 2), [3, logprob], np.float32))


def test_a_policy_that_cannot_be() -> None:
    envs = make()
    with pytest.raises(InvalidArgument, match="use_sde=True is noise on continuous actions"):
        ppo(make(kl="policy"), use_sde=True)
    with pytest.raises(InvalidArgument, match=r"model=None: give PPO\(..., policy_kwargs="):
        PPO(LMActorCriticPolicy, SB3VecEnv(envs), device="cpu")
    with pytest.raises(InvalidArgument, match="LMActorCriticPolicy reads tokens"):
        ppo(make(observation="features"))
    for kl in ("none", "policy"):
        with pytest.raises(
            InvalidArgument,
            match=rf"model has {fakes.VOCAB_SIZE} tokens, action_space is .*chooses among all",
        ):
            ppo(TopKActions(make(kl=kl), 5))


@pytest.mark.parametrize("algorithm", [RecurrentPPO, ARS, DQN, QRDQN, SAC, DDPG])
def test_learners_of_another_kind_are_refused_in_a_sentence(algorithm: Any) -> None:
    envs = make(kl="policy" if algorithm in (SAC, DDPG) else "none")
    with pytest.raises(
        (InvalidArgument, AttributeError),
        match=r"is for on-policy actor-critic learners \(PPO, A2C, TRPO\)",
    ):
        learner(algorithm, envs).learn(10)


@pytest.mark.parametrize("case", ["policy", "none", "masked"])
def test_trpo_stays_within_its_bound(case: str) -> None:
    envs = make(kl="none" if case == "none" else "policy", stops=(STOPS[0],))
    envs = (
        ActionMask(envs, regex="(the|a) (cat|dog) (is|was) (very )*good")
        if case == "masked"
        else envs
    )
    model = learner(
        TRPO, envs, n_steps=6, batch_size=24, target_kl=0.02, cg_max_steps=4, n_critic_updates=2
    )
    before = copy.deepcopy(model.policy)
    model.learn(24)
    obs = {
        key: torch.as_tensor(values) for key, values in model.rollout_buffer.observations.items()
    }  # flat since training
    with torch.no_grad():
        old, new = (policy.get_distribution(obs).distribution for policy in (before, model.policy))
    assert 1e-4 < float(torch.distributions.kl_divergence(new, old).mean()) < 0.02
    assert any(
        (weight != other).any()
        for weight, other in zip(before.parameters(), model.policy.parameters(), strict=True)
    )


def test_trpo_refuses_weights_that_it_would_leave_to_the_critic() -> None:
    model = learner(
        TRPO, make(kl="policy"), model=fakes.causal_lm("gpt_neox"), n_steps=6, batch_size=24
    )
    with pytest.raises(
        InvalidArgument, match=r"query_key_value.*its name says 'value'.*take PPO or A2C"
    ):
        model.learn(24)
    model = learner(TRPO, make(kl="policy"), n_steps=6, batch_size=24)
    model.policy.lm.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(InvalidArgument, match=r"it is frozen; take PPO or A2C"):
        model.learn(24)


def test_without_sb3_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "stable_baselines3"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install stable-baselines3 sb3-contrib$"):
        importlib.reload(sb3)
