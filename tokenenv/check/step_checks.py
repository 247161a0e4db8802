"""What every step of a vector env of texts has to return.

`STEP_CHECKS` is the list, in order. Each check states its rule in one sentence, and raises
`ContractError` with what to change where a step breaks it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from tokenenv.check.driver import Step, asked, close, difference, mode_of, require, rows_of

SCORED_KEYS = ("score", "gold", "token_rewards")
"""Infos of a text's end that are also fields of `EpisodeScores`."""
END_KEYS = (*SCORED_KEYS, "token_reward_terms", "token_watched", "cut", "own_mask")
"""Infos of a text's end."""
STEP_KEYS = ("reward_terms", "watched", "turn_reward")
"""Infos of every step that belong to the text, and so are in `final_info` too."""
KEYS = (*STEP_KEYS, "ref_logprob", "kl_coef", "prompt_id", "potential", *END_KEYS, "final_info")
"""The infos that belong to the contract. Wrappers may add others."""
NESTED = ("reward_terms", "token_reward_terms", "watched", "token_watched", "final_info")
"""Infos that are dicts of infos, with masks of their own."""


@dataclass(slots=True)
class Running:
    """What is known of a run while its steps are checked."""

    envs: Any
    tolerance: float
    paid: np.ndarray
    """(N,) float64: what step() has paid each running text so far, this step included."""
    watched: dict[str, np.ndarray] = field(default_factory=dict)
    """(N, T + 1) float64 by name: what was watched after each token of each running text; NaN where
    nothing was."""

    @property
    def spec(self) -> Any:
        """The env's `TokenSpec`."""
        return self.envs.unwrapped.token_spec


def check_steps(envs: Any, steps: list[Step], tolerance: float) -> None:
    """Check all steps of one run, which begins with new texts, and what only several of them
    show."""
    running = Running(envs, tolerance, np.zeros(envs.num_envs))
    for step in steps:
        running.paid += step.reward
        for check in STEP_CHECKS:
            check(step, running)
        running.paid[step.ended] = 0.0
    check_cut_flags(steps, running.spec)


def check_observation(step: Step, running: Running) -> None:
    """The observation is in observation_space."""
    require(
        running.envs.observation_space.contains(step.after),
        "an observation is not in observation_space; return arrays of its shapes, dtypes and "
        "ranges.",
    )


def check_ends(step: Step, running: Running) -> None:
    """A text terminates at a stop token, is cut at max_new_tokens, and ends nowhere else. Where the
    environment is asked, it may end the text, or let it go on after a stop token."""
    stopped = step.active & np.isin(step.action[0], running.spec.stop_token_ids)
    full = step.active & (step.age >= running.spec.max_new_tokens)
    free = step.active & asked(step.action[0], running.spec)
    if running.spec.responds:
        # Features do not show whether a text has reached the limit of its context.
        seen = isinstance(step.end, Mapping)
        full |= step.active & (step.end["length"] >= running.spec.max_length if seen else False)
        free = free if seen else step.active
    stopped, full = stopped & ~free, full & ~(stopped & ~free)
    require(
        not (step.terminated & step.truncated).any(),
        "a slot is terminated and truncated at once; set one of the two.",
    )
    require(
        step.terminated[stopped].all(),
        "a slot goes on after a stop token, or is truncated there; terminate it.",
    )
    require(
        step.ended[full].all(), "a slot goes on after max_new_tokens tokens; end the text there."
    )
    require(
        (step.ended == stopped | full)[~free].all(),
        "a slot ends without a stop token, before max_new_tokens tokens; let it go on.",
    )
    told = step.info.get("_cut", np.zeros_like(full))
    require(
        (told == step.ended).all(),
        "infos['cut'] is not there exactly where texts end; give it there and only there.",
    )
    require(
        (step.info.get("cut", full) == full)[~free].all(),
        "infos['cut'] is not True exactly where max_new_tokens ends a text; make it False at stop "
        "tokens.",
    )


def check_masks(step: Step, running: Running) -> None:
    """Every info has a mask of the slots that have it, and is zero in the others."""
    check_infos(step.info, running.envs.num_envs)


def check_texts(step: Step, running: Running) -> None:
    """A running text grows by its action, and by what the environment writes behind it where it is
    asked; a slot that begins anew holds a prompt and nothing else."""
    same_step = mode_of(running.envs) == AutoresetMode.SAME_STEP
    anew = step.ended if same_step else ~step.active
    has_final = all(key in step.info for key in ("final_obs", "final_info"))
    require(
        has_final == (same_step and anew.any()),
        "final_obs and final_info belong where texts end under SAME_STEP; give both there, and "
        "nowhere else.",
    )
    require(
        step.info.get("_prompt_id", ~anew).all(),
        "infos['prompt_id'] is missing for a slot that begins anew; give its prompt's number.",
    )
    # Features show nothing of the tokens.
    if not isinstance(step.after, Mapping):
        return
    tokens, slots = step.before["tokens"].copy(), np.flatnonzero(step.active)
    tokens[slots, step.before["length"][slots]] = step.action[0][slots]
    grown = {
        "tokens": tokens,
        "length": step.before["length"] + 1,
        "prompt_length": step.before["prompt_length"],
    }
    if running.spec.responds:
        grown |= _with_reply(step, running, tokens, slots)
    for key, expected in grown.items():
        require(
            (step.end[key] == expected)[slots].all(),
            f"{key!r} is not that of the text before with the action appended; append it.",
        )
    require(
        not running.spec.responds or not step.after["own_mask"][anew].any(),
        "'own_mask' has tokens in a slot that begins anew; make it 1 on emitted tokens alone.",
    )
    require(
        (step.after["length"] == step.after["prompt_length"])[anew].all(),
        "a slot that begins anew holds more than a prompt; make length its prompt_length.",
    )
    blank = np.arange(tokens.shape[1]) >= step.after["length"][:, None]
    require(
        (step.after["tokens"] == running.spec.pad_token_id)[blank].all(),
        "tokens beyond length are not pad_token_id; fill them with it.",
    )


def _with_reply(
    step: Step, running: Running, tokens: np.ndarray, slots: np.ndarray
) -> dict[str, np.ndarray]:
    """What a token observation holds behind the actions: whatever the environment wrote, where it
    was asked. `tokens` (N, L) are the texts with the actions that `slots` took."""
    length, place = step.before["length"] + 1, np.arange(tokens.shape[1])
    free = asked(step.action[0], running.spec)
    after = np.where(free, np.maximum(step.end["length"], length), length)
    written = (place >= length[:, None]) & (place < after[:, None])
    own = step.before["own_mask"].copy()
    own[slots, step.before["length"][slots]] = 1
    return {
        "tokens": np.where(written, step.end["tokens"], tokens),
        "length": after,
        "own_mask": own,
    }


def check_replies(step: Step, running: Running) -> None:
    """Where the environment writes into texts, every step gives the reward of the turn, 0 where it
    was not asked, and the end of a text says whose its tokens are."""
    if not running.spec.responds:
        return
    none = np.zeros_like(step.active)
    paid, told = (step.info.get(key, none) for key in ("turn_reward", "_turn_reward"))
    require(
        np.isfinite(paid).all() and (told == step.active).all(),
        "infos['turn_reward'] is not a finite number exactly where a token was taken; give it so.",
    )
    require(
        not paid[~asked(step.action[0], running.spec)].any(),
        "infos['turn_reward'] is not 0 where the environment was not asked; make it 0.",
    )
    told = step.info.get("_own_mask", none)
    require(
        (told == step.ended).all(),
        "infos['own_mask'] is not there exactly where texts end; give it there and only there.",
    )
    if told.any() and isinstance(step.end, Mapping):
        require(
            (step.info["own_mask"] == step.end["own_mask"])[told].all(),
            "infos['own_mask'] is not that of the last observation; give the same mask.",
        )


def check_final_infos(step: Step, running: Running) -> None:
    """SAME_STEP gives the numbers of texts that end twice, at top level and in final_info, and they
    are the same."""
    given = step.info.get("final_info", {})
    final = {key: value for key, value in given.items() if key in (*STEP_KEYS, *END_KEYS)}
    shown = {key: step.info.get(key, {}) for key in final}
    require(
        difference(rows_of(final, step.ended), rows_of(shown, step.ended), 0.0) is None,
        "final_info and the infos at top level differ on a text that ended; give the same numbers.",
    )


def check_reward(step: Step, running: Running) -> None:
    """A reward is the sum of its terms, a text's token_rewards have the sum of what step() paid for
    it, and a slot that is only reset is paid nothing."""
    require(
        not step.reward[~step.active].any(),
        "a slot that is only reset (NEXT_STEP) is paid a reward; pay 0.",
    )
    total = sum(_named(step.info, "reward_terms").values(), np.zeros(len(step.reward)))
    require(
        close(step.reward, total, running.tolerance),
        "a reward is not the sum of infos['reward_terms']; list every term, weighted, and change "
        "no reward afterwards.",
    )
    has = step.info.get("_token_rewards", np.zeros_like(step.active))
    require(
        (has == step.ended).all(),
        "infos['token_rewards'] is not there exactly where texts end; give it there and only "
        "there.",
    )
    if not has.any():
        return
    placed = step.info["token_rewards"]
    require(
        close(placed.sum(1)[has], running.paid[has], running.tolerance),
        "token_rewards do not sum to what step() paid; pay at the last token what is placed at the "
        "end.",
    )
    parts = _named(step.info, "token_reward_terms").values()
    require(
        close(sum(parts, np.zeros_like(placed)), placed, running.tolerance),
        "infos['token_reward_terms'] do not add up to token_rewards; list every term, weighted.",
    )


def check_watched(step: Step, running: Running) -> None:
    """What was watched token by token is in token_watched where a text ends."""
    slots = np.flatnonzero(step.active)
    for name, values in _named(step.info, "watched").items():
        if name not in running.watched:
            shape = (len(step.active), running.spec.max_new_tokens + 1)
            running.watched[name] = np.full(shape, np.nan)
        running.watched[name][slots, step.age[slots]] = values[slots]
    ended = np.flatnonzero(step.ended)
    placed = _named(step.info, "token_watched")
    for name, seen in running.watched.items():
        require(
            not len(ended) or name in placed,
            f"infos['token_watched'] has no {name!r}, which infos['watched'] has; give it where "
            "texts end.",
        )
        for slot in ended:
            # The number after the first token, at age 1, belongs to column 0.
            taken = ~np.isnan(seen[slot, 1:])
            require(
                close(placed[name][slot][taken], seen[slot, 1:][taken], running.tolerance),
                f"infos['token_watched'][{name!r}] is not what infos['watched'] was token by "
                "token; place each number at its token.",
            )
        seen[ended] = np.nan


STEP_CHECKS: tuple[Callable[[Step, Running], None], ...] = (
    check_observation,
    check_ends,
    check_masks,
    check_texts,
    check_replies,
    check_final_infos,
    check_reward,
    check_watched,
)
"""What is checked of each step, in order."""


def check_cut_flags(steps: list[Step], spec: Any) -> None:
    """Texts that are cut are all terminated or all truncated, and truncated where they get no
    score."""
    kinds = {
        bool(flag)
        for step in steps
        for flag in step.terminated[step.info.get("cut", np.zeros_like(step.ended))]
    }
    require(
        len(kinds) < 2,
        "texts cut at max_new_tokens are terminated in one place and truncated in another; use "
        "one flag.",
    )
    require(
        spec.score_truncated or True not in kinds,
        "a cut that is not scored is a termination: learners must bootstrap there; truncate it.",
    )


def check_infos(info: Any, num_envs: int) -> None:
    """Every info has a mask of the slots that have it, and is zero in the others."""
    require(isinstance(info, dict), f"infos are of type {type(info).__name__}, not dict.")
    for key in [key for key in info if not key.startswith("_")]:
        mask = info.get(f"_{key}")
        require(
            isinstance(mask, np.ndarray) and mask.shape == (num_envs,) and mask.dtype == np.bool_,
            f"infos[{key!r}] has no mask infos['_{key}'] of {num_envs} bools; say which slots have "
            "it.",
        )
        if key in NESTED:
            check_infos(info[key], num_envs)
        elif isinstance(info[key], np.ndarray) and key != "final_obs":
            require(
                not info[key][~mask].any(),
                f"infos[{key!r}] is not zero where infos['_{key}'] is False; fill it with zeros.",
            )


def contract_infos(info: dict[str, Any]) -> dict[str, Any]:
    """Return the infos of the contract. Those of wrappers may tell the time and alias what they
    like."""
    return {key: value for key, value in info.items() if key.removeprefix("_") in KEYS}


def _named(info: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    """Return the arrays of a nested info by name, without their masks."""
    return {name: value for name, value in info.get(key, {}).items() if not name.startswith("_")}
