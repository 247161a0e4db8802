"""Equal texts are read once: by caches, envs, actors and `generate`."""

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch

from tokenenv.agents import GRPO, LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.generate import generate
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.same_texts import first_equals, prefill_once

N, L = 6, 12


def texts(*rows):
    """Right-padded tokens (n, L) and lengths."""
    tokens = np.zeros((len(rows), L), dtype=np.int64)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(tokens), [len(row) for row in rows]


@pytest.fixture
def rows(monkeypatch):
    """How many texts each prefill of a cache reads."""
    seen, prefill = [], CachedLM.prefill

    def counted(self, slots, tokens, lengths):
        seen.append(len(slots))
        return prefill(self, slots, tokens, lengths)

    monkeypatch.setattr(CachedLM, "prefill", counted)
    return seen


def test_the_first_of_equal_texts():
    # The pad id may end a text, and what stands behind a text does not matter.
    tokens, lengths = texts([3, 4], [3, 4, 0], [3], [3, 4], [3, 4, 0], [3])
    tokens[3, 2:] = 7
    assert first_equals(tokens, lengths).tolist() == [0, 1, 2, 0, 1, 2]
    assert first_equals(*texts([3, 4])).tolist() == [0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mamba"])
@pytest.mark.filterwarnings("ignore:.*cannot be cached:RuntimeWarning")
def test_a_copied_text_runs_on_as_one_that_was_read(architecture, rows):
    model = fakes.causal_lm(architecture)
    once, each = (CachedLM(model, N, L) for _ in range(2))
    given = texts([3, 4, 5], [6], [3, 4, 5], [6], [3, 4, 5])
    slots = [5, 0, 2, 1, 4]  # 3 keeps what it holds
    for cached in (once, each):
        cached.prefill([3], *texts([8, 9]))
    rows.clear()
    found = prefill_once(once, slots, *given, first_equals(*given))
    assert rows == [2]
    torch.testing.assert_close(found, each.prefill(slots, *given))
    assert torch.equal(found[0], found[4])
    assert once.positions.tolist() == each.positions.tolist() == [1, 1, 3, 2, 3, 3]
    for tokens in torch.randint(3, fakes.VOCAB_SIZE, (4, N)):
        torch.testing.assert_close(once.append(tokens), each.append(tokens))


def make(**options):
    """Six texts in groups of three, with a reward model beside the policy."""
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=N,
        model=fakes.causal_lm(),
        tokenizer=fakes.tokenizer(),
        reward_model=fakes.reward_model("token"),
        max_new_tokens=4,
        **{"prompts": [[3, 4, 5], [6, 7]], "group_size": 3, **options},
    )


def test_a_group_is_read_once_by_every_model_and_scored_as_it_stands(rows):
    envs = make(autoreset_mode="Disabled")
    rows.clear()
    obs, _ = envs.reset(options={"prompts": [[3, 4, 5]] * 3 + [[6, 7]] * 3})
    assert rows == [2, 2]  # of the reference and of the reward model
    responses = np.random.default_rng(0).integers(3, fakes.VOCAB_SIZE, (N, 4))
    rewards = [envs.step(responses[:, t])[1] for t in range(4)]
    prompts = [t[:n].tolist() for t, n in zip(obs["tokens"], obs["length"], strict=True)]
    scored = envs.unwrapped.score_episodes(prompts, responses.tolist())
    np.testing.assert_allclose(np.stack(rewards, 1), scored.step_rewards, atol=1e-5)


def test_prefixes_and_saved_states_are_texts_like_others(rows):
    envs = make()
    rows.clear()
    options = {"prompts": [[6, 7]] * N, "prefixes": [[8], [8, 9], [8], [8], [], []]}
    envs.reset(options=options)
    assert rows == [3, 3]
    state = envs.unwrapped.save_state()
    rows.clear()
    envs.unwrapped.load_state(state)
    assert rows == [3, 3]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_slots_that_copy_are_equal_to_slots_that_read(mode, monkeypatch):
    def played():
        """Rewards and observations where two texts end, and begin anew, at every step."""
        envs = make(autoreset_mode=mode, group_size=1, prompts=[[6, 7]])
        envs.reset(seed=3)
        for t in range(6):
            action = np.full(N, 5)
            action[t % 3 :: 3] = fakes.EOS
            obs, reward, terminated, truncated, _ = envs.step(action)
            yield reward, obs["tokens"].copy()
            if mode == "Disabled" and (ended := terminated | truncated).any():
                envs.reset(options={"reset_mask": ended})

    copied = list(played())
    monkeypatch.setattr("tokenenv.env.engine.first_equals", lambda texts, _: np.arange(len(texts)))
    for (reward, tokens), (other, others) in zip(copied, played(), strict=True):
        np.testing.assert_allclose(reward, other, atol=1e-5)
        np.testing.assert_array_equal(tokens, others)


def test_an_actor_and_generate_read_a_prompt_once(rows):
    policy = LMPolicy(fakes.causal_lm())
    prompts = [[3, 4, 5]] * 3 + [[6, 7]] * 3
    tokens, lengths = texts(*prompts)
    actor = Actor(policy, temperature=0)
    obs = {"tokens": tokens, "length": np.asarray(lengths)}
    actor.act(obs)
    rows.clear()
    actor.refresh()
    first = actor.act(obs)[0]
    assert rows == [2]
    rows.clear()
    found = generate(policy, prompts, max_new_tokens=3, greedy=True)
    assert rows == [2]
    assert [response[0] for response in found] == first.tolist()
    alone = [generate(policy, [p], max_new_tokens=3, greedy=True)[0] for p in prompts]
    assert found == alone


def test_a_group_method_samples_different_texts_of_one_reading(rows):
    agent = GRPO(make(autoreset_mode="SameStep"), batch_tokens=24)
    rows.clear()
    episodes = agent.collect()
    assert max(rows) <= 2
    assert len({tuple(episode.response.tolist()) for episode in episodes}) > 1
