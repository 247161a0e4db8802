"""Token envs for those who step in whole turns.

    env = TurnEnv(gym.make("tokenenv/Calculator-v0", kl="none"))
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("12 + 30 =")

The other direction, a turn-level environment that answers in a token env, is `turn_level`.
"""

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tokenenv.errors import InvalidAction, InvalidArgument
from tokenenv.models.encoding import encode_continuation
from tokenenv.types import TokenSpec

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
"""Those that `AnyText` draws from."""


class AnyText(spaces.Text):
    """Texts of any characters, of 0 to `max_length`. `sample` draws from ASCII."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=CHARACTERS)

    def contains(self, x: Any) -> bool:
        """Return whether x is a text that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length


class TurnEnv(gym.Env):
    """A token env of one text as whole turns: an action is the text of a turn, an observation is
    the text that the environment has written since, and a reward is the sum of the rewards of the
    turn's tokens.

    The action is tokenised by the env's tokenizer, as a continuation: it begins with a space where
    it begins with a new word. It is stepped until the environment has written something or the
    text ends, and what is left of the action then is dropped. Where neither happens, the token that
    ends a turn is stepped behind it: a stop token if there is one. In an env that writes nothing,
    an episode has one turn (a contextual bandit); where texts have no stop token either, an episode
    goes on until T tokens are there.

    The first observation is the prompt, without special tokens. The infos are those of the turn's
    last token, and `tokens`, the turn's number of tokens. Under `kl="reference"` the rewards hold
    beta log pi_ref, which needs a learner that adds the other half; `kl="none"` leaves it out.

    Args:
        env: a single env, `gym.make(id)`, that shows tokens; it may be wrapped.
        max_chars: the most characters of an action or an observation, for the spaces.

    Raises:
        InvalidArgument: the env has no tokenizer, shows features, or asks for log-probabilities
            (`kl="policy"`).
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env: gym.Env, max_chars: int = 100_000) -> None:
        self.env = env
        self.spec_of_tokens: TokenSpec = env.unwrapped.token_spec  # type: ignore[attr-defined]
        _require_texts(env, self.spec_of_tokens)
        self.observation_space = AnyText(max_chars)
        self.action_space = AnyText(max_chars)
        self._length = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin a new text and return its prompt; see `TokenEnv.reset`."""
        super().reset(seed=seed)
        observation, info = self.env.reset(seed=seed, options=options)
        self._length = int(observation["length"])
        return self._text(observation["tokens"][: self._length]), info

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Write a turn.

        Raises:
            InvalidAction: the action is no text, or has no tokens where no token ends a turn.
        """
        taken, total = 0, 0.0
        for token in self._tokens(action):
            observation, reward, terminated, truncated, info = self.env.step(token)
            taken, total = taken + 1, total + float(reward)
            written = int(observation["length"]) > self._length + taken
            if written or terminated or truncated:
                break
        start, self._length = self._length + taken, int(observation["length"])
        text = self._text(observation["tokens"][start : self._length])
        return text, total, bool(terminated), bool(truncated), {**info, "tokens": taken}

    def _tokens(self, action: Any) -> list[int]:
        """The tokens of an action and of the turn's end."""
        if not isinstance(action, str):
            raise InvalidAction(f"action={action!r:.80} must be a text, the whole turn.")
        spec = self.spec_of_tokens
        ids = [int(i) for i in encode_continuation(action, spec.tokenizer) if i < spec.vocab_size]
        ends = _turn_end(spec)
        if ids and ids[-1] in (*spec.stop_token_ids, *(spec.turn_end_token_ids or ())):
            return ids
        if not ids and not ends:
            raise InvalidAction(f"action={action!r:.80} has no tokens, and no token ends a turn.")
        return [*ids, *ends]

    def _text(self, tokens: np.ndarray) -> str:
        text = self.spec_of_tokens.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text[: self.observation_space.max_length]  # type: ignore[attr-defined]

    def close(self) -> None:
        """Let go of the models."""
        self.env.close()


def _turn_end(spec: TokenSpec) -> list[int]:
    """The token that ends a turn, in a list; an empty one where there is none. A stop token comes
    first: in an env of tools the others are calls."""
    asks = spec.turn_end_token_ids or ()
    both = [token for token in spec.stop_token_ids if token in asks]
    return [*both, *spec.stop_token_ids, *asks][:1]


def _require_texts(env: gym.Env, spec: TokenSpec) -> None:
    if spec.tokenizer is None:
        raise InvalidArgument("env= has tokens without a text; turns need a tokenizer.")
    if not isinstance(env.observation_space, spaces.Dict):
        raise InvalidArgument("env= shows features; make it with observation='tokens'.")
    if isinstance(env.action_space, spaces.Dict):
        raise InvalidArgument(
            "env= asks for the log-probability of each token (kl='policy'), which a text has not; "
            "make it with kl='none'."
        )
