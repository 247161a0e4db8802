"""stable-baselines3 on token environments: the vector env that it takes, and a policy that is a
language model.

    envs = SB3VecEnv(gym.make_vec("tokenenv/Reviews-v0", num_envs=64, kl="policy"))
    model = PPO(LMActorCriticPolicy, envs, policy_kwargs={"model": envs.unwrapped.model})

docs/stable-baselines3.md says what each combination optimises. Suffixes: N envs, K transitions, L
context, V vocabulary.
"""

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenenv.agents import LMPolicy
from tokenenv.agents.learning.masks import allowed_of, rule_out
from tokenenv.agents.rollout.env_rows import read_ends, wants_logprob
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidAction, InvalidArgument, check_choice, missing
from tokenenv.models.batching import last_states

try:
    from stable_baselines3.common.distributions import CategoricalDistribution
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv
except ImportError as error:
    raise missing("tokenenv.integrations.sb3", "stable-baselines3", "sb3-contrib") from error


class SB3VecEnv(VecEnv):
    """A vector env of texts (wrapped or not) as stable-baselines3 takes it.

    Under `kl="policy"` the action is a Box of two numbers, the token and its log-probability
    (nats), which `LMActorCriticPolicy` fills in: the env's `Dict(token, logprob)`, flat. Otherwise
    it is the env's own.

    The info of a row that ended has `terminal_observation`, `episode` (r, l, t, as Monitor gives
    them), `TimeLimit.truncated` and the env's own numbers (`score`, `gold`, `cut`, ...).
    `TimeLimit.truncated` tells SB3 to bootstrap, so it is true only for texts that were cut without
    a score (`score_truncated=False`, or a time limit around the env).

    SB3's learners add no `-beta log pi`: under `kl="reference"` they would optimise score + beta
    E[log pi_ref], whose optimum is the single likeliest good text, and this class warns.
    `kl="policy"` (with `LMActorCriticPolicy`) is the bundled agents' objective, score - beta KL.
    With any other policy, on `observation="features"` say, take `kl="none"`.

    Args:
        envs: in any autoreset mode. SB3 takes the first observation of the next text at once. Under
            "SameStep" the env gives it; otherwise this class resets the rows that have ended,
            through `reset(options={"reset_mask": ...})`, so that no step is lost in any mode.

    Raises:
        InvalidArgument: `envs` is no vector env, or is one in "NextStep" mode that does not reset
            single rows.
    """

    def __init__(self, envs: VectorEnv) -> None:
        if not isinstance(envs, VectorEnv):
            raise InvalidArgument(
                f"envs={_shown(envs)} is no vector env; give "
                f'SB3VecEnv(gym.make_vec("tokenenv/Reviews-v0", num_envs=8)), say.'
            )
        self.envs = envs
        self._same_step = _autoreset_mode(envs) == AutoresetMode.SAME_STEP
        self.with_logprob = wants_logprob(envs)
        actions = (
            _flat_space(envs.single_action_space) if self.with_logprob else envs.single_action_space
        )
        super().__init__(envs.num_envs, envs.single_observation_space, actions)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._start = time.time()
        _warn_of_kl(envs)

    @property
    def unwrapped(self) -> Any:
        """The env beneath its wrappers."""
        return self.envs.unwrapped

    def reset(self) -> Any:
        """Begin new texts in all rows, and return the first observations.

        What `seed` and `set_options` gave counts for one reset. The options of a row are those of
        one text alone: `prompts` and `prefixes`, a list of one each.
        """
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        options = _joined_options(self._options, self.num_envs)
        obs, infos = map(_host, self.envs.reset(seed=seeds, options=options))
        self.reset_infos = [_row(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:] = 0.0, 0
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions (N,), or (N, 2) with log-probs, for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step, and return observations, rewards (N,) float32, dones (N,) bool, and one info a row,
        which is empty unless the row's text ended."""
        *stepped, infos = self.envs.step(self._env_actions(self._actions))
        obs, rewards, terminations, truncations = map(_host, stepped)
        dones = terminations | truncations
        self._returns += rewards
        self._lengths += 1
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            ended = np.flatnonzero(dones)
            last_obs, last_infos, obs, first_infos = self._next_texts(obs, infos, dones)
            _, bootstraps = read_ends(self.envs, terminations, truncations, last_infos, ended)
            for i, bootstrap in zip(map(int, ended), bootstraps, strict=True):
                end = self._end(i, last_obs, last_infos)
                rows[i] = end | {"TimeLimit.truncated": bool(bootstrap)}
                self.reset_infos[i] = _row(first_infos, i)
        self._returns[dones], self._lengths[dones] = 0.0, 0
        return obs, rewards.astype(np.float32), dones, rows

    def _next_texts(
        self, obs: Any, infos: Mapping[str, Any], ended: np.ndarray
    ) -> tuple[Any, Any, Any, Any]:
        """Begin new texts in the rows that have `ended` (N,), where the env has not yet.

        Returns:
            the last observations and infos of the texts that ended, and the observations and infos
            with which the next ones begin.
        """
        if not self._same_step:
            # A copy of the mask: a wrapper of Gymnasium's takes it out of the options and keeps it.
            next_obs, first_infos = self.envs.reset(options={"reset_mask": ended.copy()})
            return obs, _host(infos), _host(next_obs), _host(first_infos)
        begun = self.reset_infos[0]
        first_infos = {key: infos[key] for key in infos if key.removeprefix("_") in begun}
        return _host(infos["final_obs"]), _host(infos["final_info"]), obs, _host(first_infos)

    def _env_actions(self, actions: np.ndarray) -> Any:
        if not self.with_logprob:
            return actions
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 2) or (actions[:, 0] != actions[:, 0].round()).any():
            raise InvalidAction(
                "under kl='policy' actions are (token, logprob), which LMActorCriticPolicy gives; "
                "for another policy make the env with kl='none'."
            )
        return {"token": actions[:, 0].astype(np.int64), "logprob": actions[:, 1]}

    def _end(self, row: int, obs: Any, infos: Mapping[str, Any]) -> dict[str, Any]:
        """Return the info of the text that ended in `row`, from the last observations and infos."""
        if isinstance(obs, Mapping):
            last = {key: value[row] for key, value in obs.items()}
        else:
            last = obs[row]
        episode = {
            "r": float(self._returns[row]),
            "l": int(self._lengths[row]),
            "t": round(time.time() - self._start, 6),
        }
        return _row(infos, row) | {"terminal_observation": last, "episode": episode}

    def close(self) -> None:
        """Close the env."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return the attribute of the outermost wrapper that has it, once for each row."""
        layers = [layer for layer in self._layers() if hasattr(layer, attr_name)]
        if not layers:
            raise AttributeError(f"{type(self.unwrapped).__name__} has no attribute {attr_name!r}.")
        return [getattr(layers[0], attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute that `get_attr` gives, a new one on the outermost wrapper; all rows
        share it."""
        if indices is not None and self._rows(indices) != list(range(self.num_envs)):
            raise InvalidArgument(
                f"indices={indices!r} is not allowed; {attr_name!r} belongs to all rows together."
            )
        owners = (layer for layer in self._layers() if hasattr(layer, attr_name))
        setattr(next(owners, self.envs), attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method once. A result with one entry for each env, such as that of `action_masks`,
        is handed out by rows; any other is repeated."""
        result = self.get_attr(method_name)[0](*args, **kwargs)
        by_row = isinstance(result, np.ndarray | Tensor | Sequence) and len(result) == self.num_envs
        return [result[i] if by_row else result for i in self._rows(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return True for the wrappers of the vector env, and for Monitor, whose `info["episode"]`
        this env gives."""
        wrapped = issubclass(wrapper_class, Monitor) or any(
            isinstance(layer, wrapper_class) for layer in self._layers()
        )
        return [wrapped] * len(self._rows(indices))

    def get_images(self) -> Sequence[Any]:
        """Return what the env renders, one picture a row."""
        if self.render_mode != "rgb_array":
            raise InvalidArgument(
                f"render_mode={self.render_mode!r} gives no pictures; make the env with "
                f"render_mode='rgb_array'."
            )
        return list(self.envs.render() or [])

    def _layers(self) -> Iterator[Any]:
        """Yield the env with its wrappers, outermost first."""
        layer: Any = self.envs
        while layer is not None:
            yield layer
            layer = getattr(layer, "env", None)

    def _rows(self, indices: Any) -> list[int]:
        return list(self._get_indices(indices))


LEARNERS = (
    "LMActorCriticPolicy is for on-policy actor-critic learners (PPO, A2C, TRPO); for others (DQN, "
    "ARS, RecurrentPPO) take a policy of theirs, on an env with observation='features' and "
    "kl='none'."
)
"""The advice to whoever gives the policy to a learner that it is not for."""


class LMActorCriticPolicy(ActorCriticPolicy):
    """A causal language model with a value head, as an SB3 policy. PPO, A2C and sb3-contrib's TRPO
    train with it the model that the bundled agents train. Action masks are read from the
    observation, so no MaskablePPO is needed.

    SB3 draws its minibatches from single steps. So the whole text of each step is read again, both
    when acting and when learning.

    Args:
        model: what to train, through `policy_kwargs={"model": envs.unwrapped.model}`; a copy is
            taken. It is saved with the SB3 model, beside the trained weights.
        separate_value: whether the critic has a trunk of its own.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Any = None,
        *,
        model: Any = None,
        separate_value: bool = False,
        **options: Any,
    ) -> None:
        if lr_schedule is None or "n_critics" in options:
            raise InvalidArgument(LEARNERS)
        if options.get("use_sde"):
            raise InvalidArgument(
                "use_sde=True is noise on continuous actions; LMActorCriticPolicy draws tokens: "
                "leave it False."
            )
        if model is None:
            raise InvalidArgument(
                'model=None: give PPO(..., policy_kwargs={"model": envs.unwrapped.model}).'
            )
        if (
            not isinstance(observation_space, spaces.Dict)
            or "tokens" not in observation_space.spaces
        ):
            raise InvalidArgument(
                "LMActorCriticPolicy reads tokens; with observation='features' take 'MlpPolicy'."
            )
        self._separate_value = separate_value
        self._make_lm = lambda: LMPolicy(copy.deepcopy(model), separate_value=separate_value)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=_NoFeatures,
            **options,
        )

    def _build(self, lr_schedule: Any) -> None:
        self.lm = self._make_lm()
        self.with_logprob = isinstance(self.action_space, spaces.Box)
        self._require_tokens()
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = self.optimizer_class(weights, lr=lr_schedule(1), **self.optimizer_kwargs)

    def __getattr__(self, name: str) -> Any:
        """Explain a missing attribute: a learner of another kind asks for a Q-network, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"there is no {name!r} here: {LEARNERS}", name=name, obj=self
            ) from None

    def set_training_mode(self, mode: bool) -> None:
        """Do nothing: with dropout, learning would not see the distribution that acting saw."""

    def _require_tokens(self) -> None:
        space: Any = self.action_space
        count = space.high[0] if self.with_logprob else getattr(space, "n", None)
        if count != self.lm.vocab_size:
            raise InvalidArgument(
                f"model has {self.lm.vocab_size} tokens, action_space is {space}; "
                f"LMActorCriticPolicy chooses among all tokens."
            )

    def read(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits (K, V) of the next token, -inf where an `action_mask` rules it out, and
        the values (K, 1)."""
        lengths = obs["length"].reshape(-1).long().cpu().numpy()
        tokens_KL = obs["tokens"][:, : lengths.max()].long()
        with self.lm.autocast():
            states, value_states = (
                last_states(states, lengths) for states in self.lm.states(tokens_KL, lengths)
            )
            logits_KV = rule_out(self.lm.head(states).float(), allowed_of(obs, tokens_KL.device))
        return logits_KV, self.lm.value(value_states)[:, None]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions, (N,) or (N, 2) with log-probs, values (N, 1) and log-probs (N,)."""
        logits_NV, values = self.read(obs)
        actions, logprobs = self._act(self._distribution(logits_NV), deterministic)
        return actions, values, logprobs

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (K, 1), log-probs (K,) and entropies (K,) of the present policy."""
        logits_KV, values = self.read(obs)
        distribution = self._distribution(logits_KV)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        """Return the distribution of the next token. It can be differentiated twice, as TRPO
        does."""
        # Among the attention kernels, only the plain one has a second derivative.
        twice = torch.is_grad_enabled()
        if twice:
            self._require_plain_weights()
        with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
            return self._distribution(self.read(obs)[0])

    def _require_plain_weights(self) -> None:
        """Raise `InvalidArgument` for a model that TRPO cannot train: it leaves every weight with
        "value" in its name to the critic, and takes no frozen weights."""
        for name, weight in self.lm.model.named_parameters():
            if "value" in name or not weight.requires_grad:
                why = (
                    "it is frozen"
                    if "value" not in name
                    else "its name says 'value', which sb3-contrib takes for the critic"
                )
                raise InvalidArgument(
                    "get_distribution with gradients is for TRPO, which cannot train the weight "
                    f"{name!r} of this model, as {why}; take PPO or A2C, or torch.no_grad()."
                )

    def predict_values(self, obs: Any) -> Tensor:
        """Return the values (K, 1)."""
        return self.read(obs)[1]

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self._act(self.get_distribution(observation), deterministic)[0]

    def _distribution(self, logits_KV: Tensor) -> CategoricalDistribution:
        return _Tokens(logits_KV.shape[1]).proba_distribution(logits_KV)

    def _act(
        self, distribution: CategoricalDistribution, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        tokens = distribution.get_actions(deterministic=deterministic)
        logprobs = distribution.log_prob(tokens)
        return torch.stack([tokens.float(), logprobs], 1) if self.with_logprob else tokens, logprobs

    def _get_constructor_parameters(self) -> dict[str, Any]:
        kept = (
            "observation_space",
            "action_space",
            "lr_schedule",
            "optimizer_class",
            "optimizer_kwargs",
        )
        parameters = super()._get_constructor_parameters()
        return {name: parameters[name] for name in kept} | {
            "model": self.lm.model,
            "separate_value": self._separate_value,
        }


class _Tokens(CategoricalDistribution):
    """The distribution of the next token. An action is a token, or a token and the log-probability
    with which it was drawn."""

    def proba_distribution(self, action_logits: Tensor) -> "_Tokens":
        # Finite, so that the KL of two such distributions is: at tokens that both rule out it would
        # be 0 times NaN.
        return super().proba_distribution(action_logits.clamp(min=-1e9))

    def log_prob(self, actions: Tensor) -> Tensor:
        tokens = actions if actions.shape == self.distribution.batch_shape else actions[:, 0]
        return super().log_prob(tokens.long())


class _NoFeatures(BaseFeaturesExtractor):
    """A features extractor, which SB3 asks for and does not use here: the language model reads the
    observation itself."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=1)


def _flat_space(space: Any) -> spaces.Box:
    """Return the Box of (token, logprob).

    SB3 wants finite bounds, and clips actions to them. The bounds are one beyond what is allowed,
    so that an invalid action stays invalid when it is clipped, and the env refuses it.
    """
    low, high = [-1.0, np.finfo(np.float32).min], [space["token"].n, 1.0]
    return spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def _autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """The env's autoreset mode; raises `InvalidArgument` where no text could begin at once."""
    mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    # An env in DISABLED mode takes a mask by definition. In NEXT_STEP mode these three are known
    # to, and another one might ignore the mask and reset every row.
    resets_rows = isinstance(envs.unwrapped, TokenVectorEnv | SyncVectorEnv | AsyncVectorEnv)
    if mode == AutoresetMode.NEXT_STEP and not resets_rows:
        raise InvalidArgument(
            f"envs={type(envs.unwrapped).__name__} begins the next episode one step late "
            f"(autoreset_mode='NextStep') and does not reset single rows; make it with "
            f"autoreset_mode='SameStep'."
        )
    return mode


def _warn_of_kl(envs: VectorEnv) -> None:
    """Warns where the env leaves half of the KL penalty to a learner that does not know it."""
    core: Any = envs.unwrapped
    if getattr(getattr(core, "config", None), "kl", None) == "reference" and core.kl_coef > 0:
        env_id = repr(getattr(core.spec, "id", "..."))
        warnings.warn(
            "kl='reference' pays beta log pi_ref, and SB3 does not add -beta log pi: it optimises "
            "another objective, short, mode-seeking texts. Make the env with "
            f"gym.make_vec({env_id}, num_envs={core.num_envs}, kl='policy') for "
            "LMActorCriticPolicy, or with observation='features', kl='none' for 'MlpPolicy' and "
            "other policies of SB3.",
            UserWarning,
            stacklevel=3,
        )


def _shown(value: Any) -> str:
    """A string as it was typed, or the type of anything else."""
    return repr(value) if isinstance(value, str) else type(value).__name__


def _joined_options(
    options: Sequence[Mapping[str, Any]], num_envs: int
) -> dict[str, list[Any]] | None:
    """Join the options of single texts, one a row, to those of the vector env."""
    if len(options) != num_envs:
        raise InvalidArgument(
            f"options has {len(options)} entries; allowed: a mapping, or one entry an env "
            f"({num_envs})."
        )
    for name, value in (pair for given in options for pair in given.items()):
        check_choice("options key", name, ("prompts", "prefixes"))
        if isinstance(value, str) or len(value) != 1:
            raise InvalidArgument(
                f"options[{name!r}]={value!r} must be a list of one: they are the options of one "
                f"text alone."
            )
    names = dict.fromkeys(name for given in options for name in given)
    return {name: [given.get(name, [None])[0] for given in options] for name in names} or None


def _host(values: Any) -> Any:
    """Return the arrays on the host, also those in a mapping."""
    if isinstance(values, Mapping):
        return {key: _host(value) for key, value in values.items()}
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _row(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return one row of Gymnasium's vector info, without the keys that the row lacks."""
    present = [key for key in infos if not key.startswith("_") and infos[f"_{key}"][row]]
    return {
        key: _row(infos[key], row) if isinstance(infos[key], Mapping) else infos[key][row]
        for key in present
    }
