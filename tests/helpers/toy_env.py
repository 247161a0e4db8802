"""A small vector env of texts that agents are tested on: reward 1 for each token `GOOD`; `STOP`
ends a text."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tokenenv.types import TokenSpec

V, PAD, STOP, GOOD = 12, 0, 1, 5
P, T = 3, 8


def tiny_lm(seed: int = 0, vocab_size: int = V, **changes: Any) -> Any:
    """A transformer of a few thousand parameters that emits nearly uniform tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    options = sizes | {"num_key_value_heads": 1, "max_position_embeddings": 64} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (
            LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **options))
            .eval()
            .requires_grad_(False)
        )


class ToyEnv(VectorEnv):
    """Prompts of 1 to P random tokens; `kl_coef * ref_logprob` is paid beside the reward where `kl`
    is on."""

    def __init__(
        self,
        num_envs: int = 8,
        mode: AutoresetMode = AutoresetMode.SAME_STEP,
        kl_coef: float = 0.0,
        reference: Any = None,
        group_size: int = 1,
    ) -> None:
        self.num_envs, self.mode, self.kl_coef, self.group_size = (
            num_envs,
            mode,
            kl_coef,
            group_size,
        )
        self.metadata = {"autoreset_mode": mode, "render_modes": []}
        self.reference = reference or tiny_lm()
        self.teacher: Any = None
        self.token_spec = TokenSpec(None, V, PAD, (STOP,), P, T)
        counts = {name: gym.spaces.Discrete(P + T + 1) for name in ("length", "prompt_length")}
        tokens = gym.spaces.Box(0, V - 1, (P + T,), np.int64)
        self.single_observation_space = gym.spaces.Dict({"tokens": tokens, **counts})
        self.single_action_space = gym.spaces.Discrete(V)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state: dict[str, Any] = {}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if not self.state or seed is not None:
            N = self.num_envs
            self.state = {
                "begun": np.zeros(N, np.int64),
                "rng": np.random.default_rng(seed).bit_generator.state,
                "tokens": np.zeros((N, P + T), np.int64),
                "length": np.zeros(N, np.int64),
                "prompt_length": np.zeros(N, np.int64),
                "kl_coef": np.zeros(N),
                "total": np.zeros((N, T)),
                "ended": np.zeros(N, bool),
            }
        mask = (options or {}).get("reset_mask")
        if mask is None:
            self.state["begun"] = -(-self.state["begun"] // self.group_size) * self.group_size
        self._begin(np.ones(self.num_envs, bool) if mask is None else mask)
        return self._obs(), {}

    def _begin(self, rows: np.ndarray) -> None:
        s, rng = self.state, np.random.default_rng()
        rng.bit_generator.state = s["rng"]
        for i in np.flatnonzero(rows):
            group = i // self.group_size
            prompt = [group, s["begun"][group] // self.group_size]
            drawn = rng if self.group_size == 1 else np.random.default_rng(prompt)
            s["begun"][group] += 1
            n = int(drawn.integers(1, P + 1))
            s["tokens"][i] = PAD
            s["tokens"][i, :n] = drawn.integers(2, V, n)
            s["length"][i] = s["prompt_length"][i] = n
            s["kl_coef"][i], s["total"][i], s["ended"][i] = self.kl_coef, 0.0, False
        s["rng"] = rng.bit_generator.state

    def _obs(self) -> dict[str, np.ndarray]:
        return {key: self.state[key].copy() for key in ("tokens", "length", "prompt_length")}

    def _ref_logprobs(self, actions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            device = next(self.reference.parameters()).device
            logits = (
                self.reference(input_ids=torch.as_tensor(self.state["tokens"], device=device))
                .logits.cpu()
                .float()
            )
        rows = np.arange(self.num_envs)
        return torch.log_softmax(logits, -1)[rows, self.state["length"] - 1, actions].numpy()

    def step(self, actions: Any) -> Any:
        s, rows, actions = self.state, np.arange(self.num_envs), np.asarray(actions)
        resting = s["ended"].copy()
        assert not (self.mode == AutoresetMode.DISABLED and resting.any())
        s["length"] = np.where(resting, 1, s["length"])
        ref_logprobs = self._ref_logprobs(actions)
        reward = np.where(resting, 0.0, (actions == GOOD) + s["kl_coef"] * ref_logprobs)
        s["tokens"][rows[~resting], s["length"][~resting]] = actions[~resting]
        s["total"][rows, np.minimum(s["length"] - s["prompt_length"], T - 1)] = reward
        s["length"] = s["length"] + ~resting
        terminated = ~resting & (actions == STOP)
        truncated = ~resting & ~terminated & (s["length"] - s["prompt_length"] == T)
        s["ended"] = terminated | truncated
        good = (
            ((s["tokens"] == GOOD) & (np.arange(P + T) >= s["prompt_length"][:, None]))
            .sum(1)
            .astype(float)
        )
        infos = {
            "ref_logprob": ref_logprobs,
            "kl_coef": s["kl_coef"].copy(),
            "score": good,
            "_score": s["ended"].copy(),
            "token_rewards": s["total"].astype(np.float32),
            "_token_rewards": s["ended"].copy(),
        }
        if self.mode == AutoresetMode.SAME_STEP and s["ended"].any():
            ended = s["ended"].copy()
            infos |= {
                "final_obs": self._obs(),
                "_final_obs": ended,
                "final_info": dict(infos),
                "_final_info": ended,
            }
            self._begin(ended)
        if resting.any():
            self._begin(resting)
        return self._obs(), reward.astype(np.float32), terminated, truncated, infos

    def save_state(self) -> dict[str, Any]:
        return copy.deepcopy({"state": self.state, "beta": self.kl_coef})

    def load_state(self, saved: dict[str, Any]) -> Any:
        self.state, self.kl_coef = copy.deepcopy(saved["state"]), saved["beta"]
        return self._obs(), {}
