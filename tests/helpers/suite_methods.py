"""The published methods of benchmarks/suite, and an env in which they meet what its own tasks do not
have: an environment that writes into texts, action masks, texts that are cut without a score."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tasks
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from tokenenv.agents.episodes import Episode, EpisodeBatch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.suite import algorithms
from benchmarks.suite.credit import GroupCredit

sys.path.pop(0)

METHODS: dict[str, tuple[type[GroupCredit], dict[str, Any]]] = {
    "gtpo": (algorithms.GTPO, {"alpha": 0.7}),
    "ktae": (algorithms.KTAE, {}),
    "hicra": (algorithms.HICRA, {"alpha": 0.5, "share": 0.3}),
    "carl": (algorithms.CARL, {"share": 0.5}),
    "spro": (algorithms.SPRO, {"process_coef": 0.5}),
    "tempo": (algorithms.TEMPO, {}),
    "gigpo": (algorithms.GiGPO, {}),
    "place-scaled": (algorithms.PlaceScaled, {}),
    "turn-scaled": (algorithms.PlaceScaled, {"baseline": "turn"}),
    "resets": (algorithms.Resets, {}),
    "random-resets": (algorithms.Resets, {"place": "random"}),
}
"""Each with settings under which it is not GRPO."""
G = 4
V = tasks.fakes.VOCAB_SIZE


class Masked(VectorWrapper):
    """Observes an `action_mask`: `allowed`, a function of a text's length, says which tokens (V,)
    may come next."""

    def __init__(self, envs: Any, allowed: Callable[[int], np.ndarray]) -> None:
        super().__init__(envs)
        self.allowed, seen = allowed, envs.single_observation_space.spaces
        mask = gym.spaces.Box(0, 1, (V,), np.int8)
        self.single_observation_space = gym.spaces.Dict({**seen, "action_mask": mask})
        self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    def _seen(self, obs: Any, *rest: Any) -> Any:
        rows = [self.allowed(int(length)) for length in obs["length"]]
        return obs | {"action_mask": np.stack(rows).astype(np.int8)}, *rest

    def reset(self, **options: Any) -> Any:
        return self._seen(*self.env.reset(**options))

    def step(self, actions: Any) -> Any:
        return self._seen(*self.env.step(actions))

    def fork(self, *slots: Any) -> Any:
        return self._seen(*self.env.unwrapped.fork(*slots))

    def load_state(self, saved: Any) -> Any:
        return self._seen(*self.env.unwrapped.load_state(saved))


def few(length: int) -> np.ndarray:
    """Three tokens of four, so that texts of a group coincide in places."""
    allowed = np.zeros(V, bool)
    allowed[np.delete([7, 10, 12, 13], length % 4)] = True
    return allowed


def all_of_them(length: int) -> np.ndarray:
    return np.ones(V, bool)


def make(
    allowed: Callable[[int], np.ndarray] | None = None,
    *,
    num_envs: int = 2 * G,
    turns: str | None = "random",
    **options: Any,
) -> Any:
    """Groups of 4 texts of up to 7 tokens of the policy's."""
    envs = tasks.make_vec(
        num_envs,
        AutoresetMode.SAME_STEP,
        turns=turns,
        group_size=G,
        **{"scorer": "sequence", "reward": "terminal", "kl_coef": 0.1} | options,
    )
    return envs if allowed is None else Masked(envs, allowed)


def move(agent: Any, size: float = 0.5, seed: int = 0) -> Any:
    """The agent, whose policy has become another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    agent.actor.refresh()
    return agent


def learned_from(agent: Any) -> list[EpisodeBatch]:
    """The batches that updates learn from, from now on: those that they are given, but for `Resets`,
    which adds to them."""
    batches: list[EpisodeBatch] = []
    optimise = agent.optimise
    agent.optimise = lambda batch, loss: (batches.append(batch), optimise(batch, loss))[1]
    return batches


def texts(
    responses: Sequence[Sequence[int]],
    prompt: Sequence[int] = (9,),
    positions: Sequence[Sequence[int]] | None = None,
) -> EpisodeBatch:
    """A batch of these responses; what is not given is 0."""
    episodes = []
    for row, response in enumerate(responses):
        zeros = np.zeros(len(response), np.float32)
        position = None if positions is None else np.array(positions[row])
        gaps = 0 if position is None else position[-1] + 1 - len(prompt) - len(response)
        episodes.append(
            Episode(
                prompt=np.array(prompt),
                response=np.array(response),
                **dict.fromkeys(("logprob", "ref_logprob", "reward"), zeros),
                **dict.fromkeys(("kl_coef", "score", "gold"), 0.0),
                **dict.fromkeys(("prompt_id", "slot", "index"), 0),
                terminated=True,
                truncated=False,
                potential=np.zeros(len(response) + 1, np.float32),
                position=position,
                written=np.full(gaps, 8),
            )
        )
    return EpisodeBatch.stack(episodes)


def by_text(policy: Any, batch: EpisodeBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log pi and the entropy (T,) at each of the policy's tokens over the allowed ones, text
    after text; with gradient."""
    for e in batch.unstack():
        tokens = torch.from_numpy(e.text)[None]
        states = policy.lm_states(tokens, np.array([len(e.text)]))[0]
        logits = policy.head(states)[e.places - 1]
        if e.action_mask is not None:
            bits = np.unpackbits(e.action_mask, axis=1)[:, :V].astype(bool)
            logits = logits.masked_fill(~torch.from_numpy(bits), -torch.inf)
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
        yield logprobs.gather(1, torch.from_numpy(e.response)[:, None])[:, 0], entropy
