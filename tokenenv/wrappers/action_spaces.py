"""Wrappers that make the action space smaller: the reference's likeliest tokens as `Discrete(k)`,
and masks of the tokens that are allowed.

Both wrap a vector env of this package in any autoreset mode, with either observation and either
kind of array. Suffixes: N envs, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidAction, InvalidArgument
from tokenenv.wrappers import grammar as grammars


class TopKActions(VectorWrapper):
    """An action space `Discrete(k)`: action i is the reference's i-th likeliest next token.

    It makes value-based learners and small policies practical. No stop token is added: a text can
    end only where one is among the k, that is, where the reference itself might end it, and is cut
    at `max_new_tokens` otherwise. Under `kl="policy"` the `logprob` is that of the choice. Over an
    `ActionMask` the choices are the likeliest allowed tokens. Where fewer than k are allowed, the
    rest repeat the likeliest one, and `action_masks()` rules the repetitions out.

    Args:
        envs: a vector env of this package, wrapped or not.
        k: the number of choices, 1 to V.

    Raises:
        InvalidArgument: `envs` is no vector env of this package, or takes choices already; or `k`
            is out of range.
    """

    def __init__(self, envs: VectorEnv, k: int) -> None:
        core = _core(envs, "TopKActions", "k=8")
        super().__init__(envs)
        self._core = core
        _require_tokens(envs, core)
        if not 1 <= k <= core.token_spec.vocab_size:
            raise InvalidArgument(
                f"k={k} is not allowed; it must lie between 1 and {core.token_spec.vocab_size}."
            )
        self.k = k
        self._mask = _mask_of(envs)
        choice = gym.spaces.Discrete(k)
        single = envs.single_action_space
        self.single_action_space = (
            gym.spaces.Dict({**single.spaces, "token": choice})
            if isinstance(single, gym.spaces.Dict)
            else choice
        )
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def identity(self) -> dict[str, Any]:
        """The env's identity and the number of choices; checkpoints hold it."""
        inner: Any = self.env
        return {**inner.identity, "TopKActions": {"k": self.k}}

    def choices(self) -> np.ndarray:
        """Return the tokens (N, k) int64 on offer now, the likeliest first, equally likely ones by
        id."""
        ids_Nk, allowed_Nk = self._offer()
        return np.where(allowed_Nk, ids_Nk, ids_Nk[:, :1])

    def action_masks(self) -> np.ndarray:
        """Return which choices are no repetitions, (N, k) bool on the host. An `action_mask` in the
        observation is that of the tokens, (N, V)."""
        return self._offer()[1]

    def _offer(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the k likeliest tokens (N, k), those that are ruled out last, and which of them
        are allowed (N, k) bool."""
        logprobs_NV = torch.as_tensor(self._core.ref_logprobs())
        if self._mask is None:
            ids_Nk = likeliest(logprobs_NV, self.k).cpu().numpy()
            return ids_Nk, np.ones(ids_Nk.shape, bool)
        allowed_NV = self._mask.action_masks()
        # The reference may give -inf to all that is allowed. Such a token is raised to the lowest
        # finite number, so that it still comes before the tokens that are ruled out.
        possible_NV = logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)
        ruled_out_NV = torch.as_tensor(~allowed_NV, device=possible_NV.device)
        ids_Nk = likeliest(possible_NV.masked_fill(ruled_out_NV, -torch.inf), self.k).cpu().numpy()
        return ids_Nk, np.take_along_axis(allowed_NV, ids_Nk, 1)

    def step(self, actions: Any) -> Any:
        """Step with the numbers of the choices (N,), or with a dict of them as `token` and their
        log-probabilities as `logprob`.

        Raises:
            InvalidAction: a number is no choice; nothing changes.
        """
        given = actions["token"] if isinstance(actions, Mapping) else actions
        picks = _host(given)
        if picks.shape != (self.num_envs,) or not np.issubdtype(picks.dtype, np.integer):
            raise InvalidAction(
                f"actions are {self.num_envs} integers, 0 to {self.k - 1}, one for each env."
            )
        for row in map(int, np.flatnonzero((picks < 0) | (picks >= self.k))):
            if not self._core.ended[row]:
                raise InvalidAction(
                    f"actions[{row}]={picks[row]} is no choice; allowed: 0 to {self.k - 1}."
                )
        picks = picks.clip(0, self.k - 1)
        tokens = _like(np.take_along_axis(self.choices(), picks[:, None], 1)[:, 0], given)
        return self.env.step(
            {**actions, "token": tokens} if isinstance(actions, Mapping) else tokens
        )


class ActionMask(VectorWrapper):
    """Masks that rule tokens out: those outside the reference's nucleus, or those that a regular
    expression or a grammar forbids.

    `action_masks()` gives (N, V) bool. A token observation gets it as `action_mask` (N, V) int8, so
    that learners keep it with the episode. A masked token is an error.

    A stop token is allowed where the text matches, and also where nothing else is allowed: where no
    token of the vocabulary leads on to a match, or where a prefix given to `reset` cannot become
    one. A text that is cut at `max_new_tokens` may be unfinished. Where the nucleus and the
    expression have no token in common, the expression decides alone. `fork` and `load_state` of the
    env itself return observations without masks; those of the wrapper have them.

    Where the environment writes into texts, the expression begins anew with each turn: it never
    reads what the environment wrote. A token that ends a turn and has no text (`<|im_end|>`, say)
    is allowed where a stop token is, and the expression begins anew behind it, answered or not. Any
    other token is matched by its text, also one that ends a turn: the turn may be unfinished there.

    Args:
        envs: a vector env of this package, wrapped or not.
        top_p: keeps the fewest likeliest tokens that hold this probability under the reference;
            above 0, below 1.
        regex: what the whole response must match; a space before its first word is allowed. Where
            the environment writes into texts, what each turn of the policy's must match.
        grammar: what the response, or each turn, must match, as a Lark grammar of llguidance. It
            has to allow a space before the first word itself (`start: " "? ...`).

    Raises:
        InvalidArgument: `envs` is no vector env of this package, has such a mask already, or takes
            choices instead of tokens; or an option is not allowed.
        MissingDependency: llguidance is not installed.
    """

    def __init__(
        self,
        envs: VectorEnv,
        *,
        top_p: float | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> None:
        core = _core(envs, "ActionMask", "top_p=0.9")
        super().__init__(envs)
        self._core = core
        _require_tokens(envs, core)
        _check_mask_options(top_p, regex, grammar)
        if _mask_of(envs) is not None:
            raise InvalidArgument(
                "envs has an ActionMask already; give top_p= and regex= (or grammar=) to one."
            )
        self.top_p, self.regex, self.grammar = top_p, regex, grammar
        self._followers: list[grammars.Follower] = []
        if regex is not None or grammar is not None:
            start = grammars.compile_matcher(core.token_spec, regex=regex, grammar=grammar)
            self._followers = [
                grammars.Follower(start, core.token_spec) for _ in range(envs.num_envs)
            ]
            self._beginnings = grammars.beginnings(core.token_spec)
        self._masks = np.ones((envs.num_envs, core.token_spec.vocab_size), bool)
        self._masks_of = 0
        """The value of the env's `changes` when the masks were made."""
        seen = envs.single_observation_space
        self._in_obs = isinstance(seen, gym.spaces.Dict)
        if isinstance(seen, gym.spaces.Dict):
            mask = gym.spaces.Box(0, 1, (core.token_spec.vocab_size,), np.int8)
            self.single_observation_space = gym.spaces.Dict({**seen.spaces, "action_mask": mask})
            self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    @property
    def identity(self) -> dict[str, Any]:
        """The env's identity and what is ruled out; checkpoints hold it."""
        inner: Any = self.env
        return {
            **inner.identity,
            "ActionMask": {"top_p": self.top_p, "regex": self.regex, "grammar": self.grammar},
        }

    def action_masks(self) -> np.ndarray:
        """Return which tokens may come next in each text, (N, V) bool on the host."""
        self._keep_up()
        return self._masks.copy()

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """Reset as the env does; the observation has the masks."""
        return self._masked(*self.env.reset(seed=seed, options=options))

    def fork(self, sources: Any, targets: Any) -> Any:
        """Copy running episodes as the env does; the observation has the masks."""
        return self._masked(*self._core.fork(sources, targets))

    def load_state(self, saved: dict[str, Any]) -> Any:
        """Take up saved episodes as the env does; the observation has the masks."""
        return self._masked(*self._core.load_state(saved))

    def step(self, actions: Any) -> Any:
        """Step as the env does; raises `InvalidAction` for a token that is not allowed, and then
        nothing changes."""
        tokens = _host(actions["token"] if isinstance(actions, Mapping) else actions)
        self._check(tokens)
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        # The last observations of SAME_STEP have to fit the space too. No token follows them, so
        # nothing is ruled out.
        if "final_obs" in infos and self._in_obs:
            anything = _like(np.ones(self._masks.shape, np.int8), infos["final_obs"]["tokens"])
            infos["final_obs"] = {**infos["final_obs"], "action_mask": anything}
        return self._masked(obs, infos)[0], rewards, terminations, truncations, infos

    def _check(self, tokens: np.ndarray) -> None:
        self._keep_up()
        if tokens.shape != (self.num_envs,) or not np.issubdtype(tokens.dtype, np.integer):
            return  # The env itself says what is wrong.
        inside = (tokens >= 0) & (tokens < self._masks.shape[1])
        allowed = self._masks[np.arange(self.num_envs), np.where(inside, tokens, 0)] | ~inside
        for row in map(int, np.flatnonzero(~allowed)):
            if not self._core.ended[row]:
                raise InvalidAction(
                    f"actions[{row}]={tokens[row]} is ruled out by the action mask; action_masks() "
                    f"says what is not."
                )

    def _masked(self, obs: Any, infos: dict[str, Any]) -> Any:
        """Return the observation with the masks of the texts as they stand, and the infos."""
        self._keep_up()
        if self._in_obs:
            obs = {**obs, "action_mask": _like(self._masks.astype(np.int8), obs["tokens"])}
        return obs, infos

    def _keep_up(self) -> None:
        """Make the masks anew if the texts have changed, be it beneath this wrapper or in a call
        that was interrupted."""
        if self._masks_of != self._core.changes:
            # The number is kept last, so that an interrupted `_allowed` is made up for next time.
            changes = self._core.changes
            self._masks = self._allowed()
            self._masks_of = changes

    def _to_match(self) -> list[list[int]]:
        """Return what each of the N texts holds since its expression began."""
        if not self._core.token_spec.responds:
            return self._core.responses()
        ends = grammars.end_ids(self._core.token_spec)
        return [grammars.current_turn(segments, ends) for segments in self._core.segments()]

    def _allowed(self) -> np.ndarray:
        allowed = np.ones_like(self._masks)
        to_match = self._to_match() if self._followers else []
        for row, (follower, tokens) in enumerate(zip(self._followers, to_match, strict=True)):
            follower.follow(tokens)
            allowed[row] = follower.allowed(self._beginnings)
        if self.top_p is None:
            return allowed
        both = (
            allowed & nucleus(torch.as_tensor(self._core.ref_logprobs()), self.top_p).cpu().numpy()
        )
        return np.where(both.any(1, keepdims=True), both, allowed)


def likeliest(scores_NV: Tensor, k: int) -> Tensor:
    """Return the ids (N, k) of the k highest scores, the highest first, and equal ones by id.

    `topk` promises no order among equal ones, and so not which of them it takes.
    """
    # All ids above the k-th score are taken, and of those equal to it the first ones by id, as many
    # as there is room for.
    least_N1 = scores_NV.topk(k).values[:, -1:]
    above_NV, equal_NV = scores_NV > least_N1, scores_NV == least_N1
    room_N1 = k - above_NV.sum(1, keepdim=True)
    ids_Nk = (above_NV | (equal_NV & (equal_NV.cumsum(1) <= room_N1))).nonzero()[:, 1].view(-1, k)
    return ids_Nk.gather(
        1, scores_NV.gather(1, ids_Nk).argsort(dim=1, descending=True, stable=True)
    )


def nucleus(logprobs_NV: Tensor, top_p: float) -> Tensor:
    """Return which tokens are in the nucleus, (N, V) bool: the fewest likeliest ones that together
    have probability `top_p`. The likeliest is always among them."""
    probs_NV, order_NV = logprobs_NV.exp().sort(dim=1, descending=True, stable=True)
    kept_NV = probs_NV.cumsum(1) - probs_NV < top_p
    return torch.zeros_like(kept_NV).scatter(1, order_NV, kept_NV)


def _check_mask_options(top_p: float | None, regex: str | None, grammar: str | None) -> None:
    if top_p is None and regex is None and grammar is None:
        raise InvalidArgument("ActionMask rules nothing out; give top_p=, regex= or grammar=.")
    if regex is not None and grammar is not None:
        raise InvalidArgument("give regex= or grammar=, not both.")
    if top_p is not None and not 0.0 < top_p < 1.0:
        raise InvalidArgument(f"top_p={top_p} is not allowed; it must lie above 0 and below 1.")


def _mask_of(envs: Any) -> "ActionMask | None":
    """Return the `ActionMask` among the wrappers, or None."""
    while envs is not None and not isinstance(envs, ActionMask):
        envs = getattr(envs, "env", None)
    return envs


def _require_tokens(envs: VectorEnv, core: TokenVectorEnv) -> None:
    if envs.single_action_space != core.single_action_space:
        raise InvalidArgument(
            "envs takes choices, not tokens: it has a TopKActions already, which must be the "
            "outermost wrapper."
        )


def _core(envs: Any, wrapper: str, argument: str) -> TokenVectorEnv:
    """Return the env beneath its wrappers; `wrapper` and its `argument` are named in the error."""
    core = getattr(envs, "unwrapped", envs)
    if not isinstance(envs, VectorEnv) or not isinstance(core, TokenVectorEnv):
        name = repr(envs) if isinstance(envs, str) else type(core).__name__
        raise InvalidArgument(
            f"envs={name} is no vector env of this package; give "
            f'{wrapper}(gym.make_vec("tokenenv/Reviews-v0", num_envs=8), {argument}), say.'
        )
    return core


def _host(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _like(values: np.ndarray, other: Any) -> Any:
    """Return `values` as a tensor on the device of `other` where that is a tensor, else as they
    are."""
    return torch.as_tensor(values, device=other.device) if isinstance(other, Tensor) else values
