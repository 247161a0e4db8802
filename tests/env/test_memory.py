"""A term's memory of any shape and dtype: whatever copies, saves or reads texts takes it along."""

from typing import Any

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from memories import Drift, LastTokens
from tasks import assert_equal, copied, make_vec, play, random_actions

from tokenenv.errors import CheckpointError, InvalidArgument
from tokenenv.rewards import Clipped, RewardTerm, Scaled

SAME_STEP = AutoresetMode.SAME_STEP
REWARD = {
    "tokens": LastTokens(),
    "mean": Drift(),
    "scaled": Scaled(LastTokens()),
    "both": Clipped(Scaled(Drift()), -1.0, 1.0),
}


def make(num_envs: int = 4, mode: Any = SAME_STEP, **options: Any) -> Any:
    return make_vec(num_envs, mode, **{"reward": REWARD, "kl": "none", **options})


def stepped(envs: Any, steps: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        copied(dict(enumerate(envs.step(random_actions(rng, envs, stop=0))))) for _ in range(steps)
    ]


def memories(envs: Any) -> dict[str, np.ndarray]:
    return {name: m.numpy().copy() for name, m in envs.unwrapped._engine.states.memory.items()}


def test_memories_are_what_the_text_says() -> None:
    envs = make(mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    for _ in range(4):
        envs.step(np.arange(4) + 11)
    held = memories(envs)["tokens"]
    assert held.dtype == np.int64
    assert held.tolist() == [[token] * 3 for token in range(11, 15)]
    assert memories(envs)["mean"].shape == (4, tasks.reference().config.hidden_size)


@pytest.mark.parametrize("watched", [False, True])
def test_stepping_equals_scoring_also_under_wrappers(watched: bool) -> None:
    """The texts that begin with the env know nothing of statistics yet, as a new env does."""
    options: dict[str, Any] = {"reward": {}, "watch": REWARD} if watched else {}
    first = play(make(8, **options), steps=tasks.T, stop=0)
    whole = make(**options).unwrapped.score_episodes(
        [e.prompt for e in first], [e.response for e in first]
    )
    stepped_key = "token_watched" if watched else "token_reward_terms"
    for name, values in (whole.watched if watched else whole.token_reward_terms).items():
        theirs = np.stack([e.infos[-1][stepped_key][name] for e in first])
        np.testing.assert_allclose(values, theirs, atol=1e-5, rtol=1e-5)
        assert np.abs(values).max() > 1e-3


@pytest.mark.parametrize("mode", tuple(AutoresetMode))
def test_what_follows_a_prefix_is_paid_as_in_the_whole_text(mode: AutoresetMode) -> None:
    envs = make(3, mode)
    prompts, response = [[11], [12, 13], [14]], [20, 21, 22, 23, 24, 25]
    whole = envs.unwrapped.score_episodes(prompts, [response] * 3).step_rewards
    lengths = [0, 2, 4]
    envs.reset(options={"prompts": prompts, "prefixes": [response[:n] for n in lengths]})
    for step in range(2):
        rewards = envs.step(np.array([response[n + step] for n in lengths]))[1]
        theirs = [whole[row, n + step] for row, n in enumerate(lengths)]
        np.testing.assert_allclose(rewards, theirs, atol=1e-5)


def test_forked_texts_go_on_as_their_sources() -> None:
    envs = make()
    envs.reset(seed=0)
    stepped(envs, 2, seed=1)
    envs.unwrapped.fork([0, 1], [2, 0])
    before = memories(envs)
    rewards = envs.step(np.array([20, 20, 20, 20]))[1]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    for name, values in before.items():
        np.testing.assert_array_equal(values[0], values[1], err_msg=name)
        assert (values[2] != values[0]).any()


@pytest.mark.parametrize("mode", tuple(AutoresetMode))
def test_a_saved_state_holds_memories_as_they_are_and_a_new_env_goes_on(mode: Any) -> None:
    envs, other = make(mode=mode), make(mode=mode)
    envs.reset(seed=0)
    stepped(envs, 2, seed=1)
    saved = envs.unwrapped.save_state()
    held = saved["engine"]["memory"]
    assert_equal(held, memories(envs))
    assert {values.dtype for values in held.values()} == {np.dtype(np.int64), np.dtype(np.float32)}
    other.unwrapped.load_state(saved)
    steps = 2 if mode == AutoresetMode.DISABLED else 6
    actions = [np.array([20, 21, 22, 23]) + t for t in range(steps)]
    for tokens in actions:
        mine, theirs = (dict(enumerate(env.step(tokens))) for env in (envs, other))
        assert_equal(copied(mine), copied(theirs), 1e-5)


def test_a_masked_reset_begins_the_memories_of_its_slots_alone() -> None:
    envs = make(mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.step(np.array([20, 21, 22, 23]))
    before = memories(envs)
    mask = np.array([True, False, False, True])
    obs, _ = envs.reset(options={"reset_mask": mask})
    after = memories(envs)
    last = obs["tokens"][np.arange(4), obs["length"] - 1]
    assert after["tokens"][mask].tolist() == [[0, 0, token] for token in last[mask]]
    for name in before:
        np.testing.assert_array_equal(before[name][~mask], after[name][~mask])


class Holds(RewardTerm):
    """Declares one thing and remembers another."""

    name, has_memory = "holds", True

    def __init__(self, declared: Any, dtype: Any, gives: Any) -> None:
        self.memory_shape, self.memory_dtype, self.gives = declared, dtype, gives

    def remember(self, memory: Any, tokens: Any, states: Any) -> Any:
        return self.gives(tokens)

    def reward(self, batch: Any) -> torch.Tensor:
        return batch.before.memory[self.name].double().view(len(batch.tokens), -1).sum(1)


@pytest.mark.parametrize("wrap", [lambda term: term, Scaled], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (3,),
            torch.bfloat16,
            "has memory_dtype=torch.bfloat16, which cannot be kept on 'cpu' and",
        ),
        ((3,), torch.uint32, "has memory_dtype=torch.uint32"),
        ((3,), "int64", "has memory_dtype='int64'"),
        ([3], torch.int64, r"has memory_shape=\[3\]; allowed: a tuple of whole numbers"),
        ((0,), torch.int64, r"has memory_shape=\(0,\)"),
    ],
)
def test_what_cannot_be_kept_is_refused_when_the_env_is_made(
    shape: Any, dtype: Any, message: str, wrap: Any
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(reward=wrap(Holds(shape, dtype, None)))


@pytest.mark.parametrize(
    ("shape", "dtype", "gives", "message"),
    [
        (
            (3,),
            torch.int64,
            lambda t: t,
            r"shape \(2,\) and torch.int64; .* \(2, 3\) and torch.int64",
        ),
        ((), torch.int64, lambda t: t.float(), r"torch.float32; .* shape \(2,\) and torch.int64"),
        ((), torch.float32, lambda t: t, r"torch.int64; .* and torch.float32"),
        ((), torch.int64, lambda t: [1, 2], "no tensor"),
        ((), torch.int64, lambda t: t.to("meta"), r"a tensor on 'meta'; the env's .* on 'cpu'"),
    ],
)
def test_a_memory_that_is_not_as_declared_is_named(
    shape: Any, dtype: Any, gives: Any, message: str
) -> None:
    envs = make(2, reward=Holds(shape, dtype, gives))
    with pytest.raises(
        InvalidArgument, match=r"remember\(\) of the term 'holds' returned .*" + message
    ):
        envs.reset(seed=0)


def test_a_later_memory_that_is_not_as_declared_is_named_too() -> None:
    given = []
    term = Holds((), torch.int64, lambda t: given.append(1) or (t if len(given) < 3 else t[:1]))
    envs = make(2, reward=term)
    envs.reset(seed=0)
    envs.step(np.array([20, 21]))
    with pytest.raises(InvalidArgument, match=r"returned shape \(1,\)"):
        envs.step(np.array([20, 21]))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.float64, torch.complex64]
)
def test_every_allowed_dtype_is_forked_saved_loaded_and_scored(dtype: Any) -> None:
    term = Holds(
        (2, 2), dtype, lambda t: torch.stack([t, t % 2, t * 0, t], 1).view(-1, 2, 2).to(dtype)
    )
    if dtype == torch.complex64:
        term.reward = lambda batch: batch.before.memory["holds"].real.flatten(1).sum(1)
    envs = make(3, reward=term)
    envs.reset(seed=0)
    envs.step(np.array([20, 21, 22]))
    envs.unwrapped.fork([0], [1])
    saved = envs.unwrapped.save_state()
    held = saved["engine"]["memory"]["holds"]
    assert held.shape == (3, 2, 2)
    assert torch.from_numpy(held).dtype == dtype
    np.testing.assert_array_equal(held[0], held[1])
    other = make(3, reward=term)
    other.unwrapped.load_state(saved)
    rewards = other.step(np.array([23, 24, 25]))[1]
    np.testing.assert_array_equal(rewards, envs.step(np.array([23, 24, 25]))[1])
    whole = envs.unwrapped.score_episodes([[11]], [[20, 23]])
    assert whole.token_rewards[0, 1] == rewards[0]


def test_a_state_with_another_memory_is_refused() -> None:
    envs = make(2, reward={"m": LastTokens()})
    envs.reset(seed=0)
    saved = envs.unwrapped.save_state()
    other = make(2, reward={"m": Holds((4,), torch.int64, lambda t: t[:, None].expand(-1, 4))})
    with pytest.raises(CheckpointError, match=r"the state's m is \(2, 3\) int64 and this env's"):
        other.unwrapped.load_state(saved)
    with pytest.raises(CheckpointError, match="watch="):
        make(2, reward="token").unwrapped.load_state(saved)
