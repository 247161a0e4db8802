"""stable-baselines3 on token environments: the vector env it takes, and a policy that is a language model.

    envs = SB3VecEnv(gym.make_vec("tokenenv/Reviews-v0", num_envs=64, autoreset_mode="SameStep", kl="policy"))
    model = PPO(LMActorCriticPolicy, envs, policy_kwargs={"model": envs.unwrapped.model})

docs/stable-baselines3.md says what each combination optimises. Suffixes: N envs, K transitions, L context, V vocabulary.
"""

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from tokenenv.agents import LMPolicy
from tokenenv.agents.env_rows import wants_logprob
from tokenenv.agents.masks import allowed_of, rule_out
from tokenenv.errors import InvalidAction, InvalidArgument, MissingDependency
from tokenenv.models.batching import last_states

try:
    from stable_baselines3.common.distributions import CategoricalDistribution
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv
except ImportError as error:
    raise MissingDependency("tokenenv.integrations.sb3 needs stable-baselines3: pip install 'tokenenv-rl[sb3]'") from error


class SB3VecEnv(VecEnv):
    """A vector env of texts (wrapped or not) as stable-baselines3 takes it.

    Under `kl="policy"` the action is a Box of two numbers, the token and its log-probability (nats), which
    `LMActorCriticPolicy` fills in: the env's `Dict(token, logprob)`, flat. Otherwise it is the env's own.

    The info of a row that ended has `terminal_observation`, `episode` (r, l, t, as Monitor gives them), `TimeLimit.truncated`
    and the env's own numbers (`score`, `gold`, ...). `TimeLimit.truncated` tells SB3 to bootstrap, so it is true only for
    texts that were cut without a score (`score_truncated=False`).

    SB3's learners add no `-beta log pi`: under `kl="reference"` they would optimise score + beta E[log pi_ref], whose optimum
    is the single likeliest good text, and this class warns. `kl="policy"` (with `LMActorCriticPolicy`) is the bundled
    agents' objective, score - beta KL; with any other policy, on `observation="features"` say, take `kl="none"`.

    Args:
        envs: with `autoreset_mode="SameStep"`, as SB3 takes the first observation of the next text at once.
    """

    def __init__(self, envs: VectorEnv) -> None:
        if not isinstance(envs, VectorEnv):
            raise InvalidArgument(f"envs={type(envs).__name__} is no vector env; build one with gym.make_vec.")
        mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if mode != AutoresetMode.SAME_STEP:
            raise InvalidArgument(f"autoreset_mode={mode.value!r} is not SB3's; make the env with autoreset_mode='SameStep'.")
        self.envs = envs
        self.with_logprob = wants_logprob(envs)
        actions = _flat_space(envs.single_action_space) if self.with_logprob else envs.single_action_space
        super().__init__(envs.num_envs, envs.single_observation_space, actions)
        self._returns, self._lengths, self._start = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64), time.time()
        spec = getattr(envs.unwrapped, "token_spec", None)
        self._bootstraps = not getattr(spec, "score_truncated", False)
        _warn_of_kl(envs)

    @property
    def unwrapped(self) -> Any:
        """The env beneath its wrappers."""
        return self.envs.unwrapped

    def reset(self) -> Any:
        """The first observations; a seed given by `seed` counts once."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        if any(self._options):
            raise InvalidArgument("options of single envs cannot be set through SB3; reset the env itself with them.")
        obs, infos = map(_host, self.envs.reset(seed=seeds))
        self.reset_infos = [_row(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._returns[:], self._lengths[:] = 0.0, 0
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions (N,), or (N, 2) with log-probs."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Observations, rewards (N,) float32, dones (N,) bool, and one info a row: empty unless its text ended."""
        obs, rewards, terminations, truncations, infos = self.envs.step(self._env_actions(self._actions))
        obs, rewards, terminations, truncations = map(_host, (obs, rewards, terminations, truncations))
        dones = terminations | truncations
        self._returns += rewards
        self._lengths += 1
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            ends = _host({key: infos[key] for key in ("final_obs", "final_info")})
            for i in map(int, np.flatnonzero(dones)):
                cut = bool(truncations[i]) and not terminations[i] and self._bootstraps
                rows[i] = self._end(i, ends) | {"TimeLimit.truncated": cut}
        self._returns[dones], self._lengths[dones] = 0.0, 0
        return obs, rewards.astype(np.float32), dones, rows

    def _env_actions(self, actions: np.ndarray) -> Any:
        if not self.with_logprob:
            return actions
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 2) or (actions[:, 0] != actions[:, 0].round()).any():
            raise InvalidAction(
                "under kl='policy' actions are (token, logprob), which LMActorCriticPolicy gives; for another policy make the "
                "env with kl='none'."
            )
        return {"token": actions[:, 0].astype(np.int64), "logprob": actions[:, 1]}

    def _end(self, row: int, ends: Mapping[str, Any]) -> dict[str, Any]:
        final = ends["final_obs"]
        last = {key: value[row] for key, value in final.items()} if isinstance(final, Mapping) else final[row]
        seconds = round(time.time() - self._start, 6)
        episode = {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": seconds}
        return _row(ends["final_info"], row) | {"terminal_observation": last, "episode": episode}

    def close(self) -> None:
        """Closes the env."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the outermost wrapper that has it, once for each row."""
        return [getattr(self._layer(attr_name), attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets the attribute that `get_attr` gives; all rows share it."""
        if indices is not None and self._rows(indices) != list(range(self.num_envs)):
            raise InvalidArgument(f"indices={indices!r} is not allowed; {attr_name!r} belongs to all rows together.")
        setattr(self._layer(attr_name), attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method once; a result with a row for each env is handed out by rows (`action_masks`)."""
        result = self.get_attr(method_name)[0](*args, **kwargs)
        by_row = isinstance(result, np.ndarray | Tensor | Sequence) and len(result) == self.num_envs
        return [result[i] if by_row else result for i in self._rows(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """True of Monitor alone, whose `info["episode"]` this env gives."""
        return [issubclass(wrapper_class, Monitor)] * len(self._rows(indices))

    def get_images(self) -> Sequence[Any]:
        """What the env renders, one picture a row."""
        return list(self.envs.render() or [])

    def _layer(self, name: str) -> Any:
        """The outermost wrapper, or the env, that has this attribute."""
        layer: Any = self.envs
        while not hasattr(layer, name):
            layer = getattr(layer, "env", None)
            if layer is None:
                raise AttributeError(f"{type(self.unwrapped).__name__} has no attribute {name!r}.")
        return layer

    def _rows(self, indices: Any) -> list[int]:
        return list(self._get_indices(indices))


class LMActorCriticPolicy(ActorCriticPolicy):
    """A causal language model with a value head, as an SB3 policy: PPO and A2C train the model that the bundled agents train.

    SB3 draws its minibatches from single steps, so each step's whole text is read again, when acting and when learning.

    Args:
        model: what to train, through `policy_kwargs={"model": envs.unwrapped.model}`; a copy is taken. It is saved with the
            SB3 model, beside the trained weights.
        separate_value: whether the critic has a trunk of its own.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any,
        *,
        model: Any = None,
        separate_value: bool = False,
        **options: Any,
    ) -> None:
        if model is None:
            raise InvalidArgument('model=None: give PPO(..., policy_kwargs={"model": envs.unwrapped.model}).')
        if not isinstance(observation_space, spaces.Dict) or "tokens" not in observation_space.spaces:
            raise InvalidArgument("LMActorCriticPolicy reads tokens; with observation='features' take 'MlpPolicy'.")
        self._separate_value = separate_value
        self._make_lm = lambda: LMPolicy(copy.deepcopy(model), separate_value=separate_value)
        super().__init__(observation_space, action_space, lr_schedule, features_extractor_class=_NoFeatures, **options)

    def _build(self, lr_schedule: Any) -> None:
        self.lm = self._make_lm()
        self.with_logprob = isinstance(self.action_space, spaces.Box)
        self._require_tokens()
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = self.optimizer_class(weights, lr=lr_schedule(1), **self.optimizer_kwargs)

    def set_training_mode(self, mode: bool) -> None:
        """Nothing: with dropout, learning would not see the distribution that acting drew from."""

    def _require_tokens(self) -> None:
        space: Any = self.action_space
        count = space.high[0] if self.with_logprob else getattr(space, "n", None)
        if count != self.lm.vocab_size:
            raise InvalidArgument(
                f"model has {self.lm.vocab_size} tokens, action_space is {space}; LMActorCriticPolicy chooses among all tokens."
            )

    def read(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (K, V) of the next token, tokens that an `action_mask` rules out at -inf, and values (K, 1)."""
        lengths = obs["length"].reshape(-1).long().cpu().numpy()
        tokens_KL = obs["tokens"][:, : lengths.max()].long()
        with self.lm.autocast():
            states, value_states = (last_states(states, lengths) for states in self.lm.states(tokens_KL, lengths))
            logits_KV = rule_out(self.lm.head(states).float(), allowed_of(obs, tokens_KL.device))
        return logits_KV, self.lm.value(value_states)[:, None]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values (N, 1) and log-probs (N,)."""
        logits_NV, values = self.read(obs)
        actions, logprobs = self._act(self._distribution(logits_NV), deterministic)
        return actions, values, logprobs

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (K, 1), log-probs (K,) and entropies (K,) of the present policy."""
        logits_KV, values = self.read(obs)
        distribution = self._distribution(logits_KV)
        tokens = actions[:, 0] if self.with_logprob else actions.reshape(-1)
        return values, distribution.log_prob(tokens.long()), distribution.entropy()

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        """Of the next token."""
        return self._distribution(self.read(obs)[0])

    def predict_values(self, obs: Any) -> Tensor:
        """(K, 1)."""
        return self.read(obs)[1]

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self._act(self.get_distribution(observation), deterministic)[0]

    def _distribution(self, logits_KV: Tensor) -> CategoricalDistribution:
        return CategoricalDistribution(logits_KV.shape[1]).proba_distribution(logits_KV)

    def _act(self, distribution: CategoricalDistribution, deterministic: bool) -> tuple[Tensor, Tensor]:
        tokens = distribution.get_actions(deterministic=deterministic)
        logprobs = distribution.log_prob(tokens)
        return torch.stack([tokens.float(), logprobs], 1) if self.with_logprob else tokens, logprobs

    def _get_constructor_parameters(self) -> dict[str, Any]:
        kept = ("observation_space", "action_space", "lr_schedule", "optimizer_class", "optimizer_kwargs")
        parameters = super()._get_constructor_parameters()
        return {name: parameters[name] for name in kept} | {
            "model": self.lm.model,
            "separate_value": self._separate_value,
        }


class _NoFeatures(BaseFeaturesExtractor):
    """The language model reads the observation itself."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=1)


def _flat_space(space: Any) -> spaces.Box:
    """The Box of (token, logprob).

    SB3 wants finite bounds, and clips actions to them. One beyond what is allowed: clipped nonsense stays nonsense.
    """
    low, high = [-1.0, np.finfo(np.float32).min], [space["token"].n, 1.0]
    return spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def _warn_of_kl(envs: VectorEnv) -> None:
    core: Any = envs.unwrapped
    if getattr(getattr(core, "config", None), "kl", None) == "reference" and core.kl_coef > 0:
        warnings.warn(
            "kl='reference' pays beta log pi_ref, and SB3 does not add -beta log pi: it optimises another objective, short, "
            "mode-seeking texts. Make the env with kl='policy' for LMActorCriticPolicy, with kl='none' for other policies.",
            UserWarning,
            stacklevel=3,
        )


def _host(values: Any) -> Any:
    """Arrays of the caller's own, on the host."""
    if isinstance(values, Mapping):
        return {key: _host(value) for key, value in values.items()}
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _row(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of Gymnasium's vector info on the host, without the keys that it has not."""
    present = [key for key in infos if not key.startswith("_") and infos[f"_{key}"][row]]
    return {key: _row(infos[key], row) if isinstance(infos[key], Mapping) else infos[key][row] for key in present}
