"""The contract of token envs (docs/contract.md), as a check that anyone can run on an env of
theirs."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tokenenv.check.driver import (
    Action,
    Step,
    as_action,
    bad_actions,
    close,
    difference,
    draw,
    draw_ids,
    host,
    mode_of,
    overwrite,
    require,
    require_raises,
    rows_of,
    run,
)

SCORED_KEYS = ("score", "gold", "token_rewards")
END_KEYS = (*SCORED_KEYS, "token_reward_terms", "cut")
KEYS = ("reward_terms", "ref_logprob", "kl_coef", "prompt_id", "potential", *END_KEYS, "final_info")
"""The infos that belong to the contract; wrappers may add others."""


def check_vector_env(envs: Any, *, steps: int = 40, tolerance: float = 1e-5) -> None:
    """Checks that a vector env of texts keeps the contract; raises `ContractError` with the first
    thing that is broken.

    `envs` may be wrapped, in any autoreset mode, with NumPy or torch arrays. It is reset many
    times, its prompt streams are seeded anew, and it is left open and reset. What terms have
    learned is put back before every run, and left as it was. A wrapper that changes rewards breaks
    the contract (they are the sum of their terms); weights that follow a schedule cannot be
    checked, since equal runs are then paid differently.

    Args:
        envs: the env.
        steps: random steps of each run. In a task without stop tokens, stepping is compared with
            `score_episodes` only if there are more of them than `max_new_tokens`.
        tolerance: the largest difference of equal numbers, relative to the larger of 1 and their
            size; 1e-5 is for models in float32.
    """
    require(
        isinstance(envs, VectorEnv),
        f"{type(envs).__name__} is no VectorEnv; build one with gym.make_vec.",
    )
    rng = np.random.default_rng(0)
    plan = [draw(envs, rng) for _ in range(steps - 1)] + [draw(envs, rng, stop=1.0)]
    _check_fresh(envs, plan[0])
    _check_spaces(envs)
    learned = envs.unwrapped.save_statistics()
    first = run(envs, _start(envs), plan)
    _check_steps(envs, first, tolerance)
    _check_aliases(first)
    envs.unwrapped.load_statistics(learned)
    _check_repeat(envs, first, plan, learned, tolerance)
    envs.unwrapped.load_statistics(learned)
    _check_independence(envs, first, plan, rng, tolerance)
    _check_cut_texts(envs, rng, tolerance)
    envs.unwrapped.load_statistics(learned)
    _check_scores(envs, plan, rng, learned, tolerance)
    _check_state(envs, plan, rng, tolerance)
    _check_fork(envs, plan, rng, tolerance)
    _check_bad_actions(envs, rng, tolerance)
    _check_closed(envs, plan[0])
    envs.reset(seed=0)
    envs.unwrapped.load_statistics(learned)


def _start(envs: Any, **options: Any) -> Any:
    """The first observation of new texts, always from the same prompt streams."""
    obs, info = envs.reset(seed=0, options=options or None)
    _check_info(host(info), envs.num_envs)
    return host(obs)


def _midway(envs: Any, rng: np.random.Generator) -> tuple[Any, int]:
    """The observation of running texts of two response tokens (or fewer, where two would end them),
    and their number."""
    obs, age = _start(envs), min(2, envs.unwrapped.token_spec.max_new_tokens - 1)
    taken = run(envs, obs, [draw(envs, rng, stop=0.0) for _ in range(age)])
    return (taken[-1].after if taken else obs), age


def _check_fresh(envs: Any, action: Action) -> None:
    """An env that has no state to save yet cannot be stepped either."""
    try:
        envs.unwrapped.save_state()
    except ResetNeeded:
        sentence = "step() before reset() does not raise ResetNeeded."
        require_raises(ResetNeeded, sentence, envs.step, as_action(envs, action))


def _check_spaces(envs: Any) -> None:
    require(
        isinstance(mode_of(envs), AutoresetMode), "metadata['autoreset_mode'] is no AutoresetMode."
    )
    spec = envs.unwrapped.token_spec
    for kind in ("observation", "action"):
        single, batched = getattr(envs, f"single_{kind}_space"), getattr(envs, f"{kind}_space")
        require(
            batch_space(single, envs.num_envs) == batched,
            f"{kind}_space is not {envs.num_envs} of single_{kind}_space.",
        )
    length = spec.max_prompt_tokens + spec.max_new_tokens
    tokens, count = (
        spaces.Box(0, spec.vocab_size - 1, (length,), np.int64),
        spaces.Discrete(length + 1),
    )
    texts, seen = (
        spaces.Dict(tokens=tokens, length=count, prompt_length=count),
        envs.single_observation_space,
    )
    features = isinstance(seen, spaces.Box) and seen.dtype == np.float32 and len(seen.shape) == 1
    require(
        features or seen == texts,
        f"single_observation_space is {seen}, neither {texts} nor float32 features (H,).",
    )
    action = envs.single_action_space
    token = action.get("token") if isinstance(action, spaces.Dict) else action
    require(
        token == spaces.Discrete(spec.vocab_size),
        f"the action's token is {token}, not Discrete({spec.vocab_size}).",
    )


def _check_steps(envs: Any, steps: list[Step], tolerance: float) -> None:
    paid = np.zeros(envs.num_envs)
    for step in steps:
        require(
            envs.observation_space.contains(step.after),
            "an observation is not in observation_space.",
        )
        _check_ends(step, envs.unwrapped.token_spec)
        _check_info(step.info, envs.num_envs)
        _check_text(step, mode_of(envs), envs.unwrapped.token_spec)
        _check_final(step)
        paid += step.reward
        _check_reward(step, paid, tolerance)
        paid[step.ended] = 0.0
    _check_cut_flag(steps, envs.unwrapped.token_spec)


def _check_ends(step: Step, spec: Any) -> None:
    stopped = step.active & np.isin(step.action[0], spec.stop_token_ids)
    full = step.active & (step.age >= spec.max_new_tokens) & ~stopped
    require(
        not (step.terminated & step.truncated).any(), "a row is terminated and truncated at once."
    )
    require(
        step.terminated[stopped].all(), "a row goes on after a stop token, or is truncated there."
    )
    require(step.ended[full].all(), "a row goes on after max_new_tokens tokens.")
    require(
        (step.ended == stopped | full).all(),
        "a row ends without a stop token, before max_new_tokens tokens.",
    )
    told = step.info.get("_cut", np.zeros_like(full))
    require((told == step.ended).all(), "infos['cut'] is not there exactly where rows end.")
    require(
        (step.info.get("cut", full) == full).all(),
        "infos['cut'] is not True exactly where max_new_tokens ends a text.",
    )


def _check_cut_flag(steps: list[Step], spec: Any) -> None:
    """A scored cut is always a termination or always a truncation; one without a score is a
    truncation."""
    kinds = {
        bool(flag)
        for step in steps
        for flag in step.terminated[step.info.get("cut", np.zeros_like(step.ended))]
    }
    require(
        len(kinds) < 2,
        "texts cut at max_new_tokens are terminated in one place and truncated in another.",
    )
    require(
        spec.score_truncated or True not in kinds,
        "a cut that is not scored is a termination: learners must bootstrap.",
    )


def _check_info(info: Any, num_envs: int) -> None:
    require(isinstance(info, dict), f"infos are of type {type(info).__name__}, not dict.")
    for key in [key for key in info if not key.startswith("_")]:
        mask = info.get(f"_{key}")
        right = (
            isinstance(mask, np.ndarray) and mask.shape == (num_envs,) and mask.dtype == np.bool_
        )
        require(right, f"infos[{key!r}] has no mask infos['_{key}'] of {num_envs} bools.")
        if key in ("reward_terms", "final_info"):
            _check_info(info[key], num_envs)
        elif isinstance(info[key], np.ndarray) and key != "final_obs":
            require(
                not info[key][~mask].any(),
                f"infos[{key!r}] is not zero where infos['_{key}'] is False.",
            )


def _check_text(step: Step, mode: Any, spec: Any) -> None:
    """Each active row has one token more; rows that begin anew hold a prompt and nothing else."""
    anew = step.ended if mode == AutoresetMode.SAME_STEP else ~step.active
    ends = all(key in step.info for key in ("final_obs", "final_info"))
    require(
        ends == (mode == AutoresetMode.SAME_STEP and anew.any()),
        "final_obs and final_info belong where SAME_STEP's rows end.",
    )
    require(
        step.info.get("_prompt_id", ~anew).all(),
        "infos['prompt_id'] is missing for a row that begins anew.",
    )
    if not isinstance(step.after, Mapping):
        return
    tokens, rows = step.before["tokens"].copy(), np.flatnonzero(step.active)
    tokens[rows, step.before["length"][rows]] = step.action[0][rows]
    grown = {
        "tokens": tokens,
        "length": step.before["length"] + 1,
        "prompt_length": step.before["prompt_length"],
    }
    for key, expected in grown.items():
        require(
            (step.end[key] == expected)[rows].all(),
            f"{key!r} is not that of the text before with the action appended.",
        )
    require(
        (step.after["length"] == step.after["prompt_length"])[anew].all(),
        "a row that begins anew holds more than a prompt.",
    )
    blank = np.arange(tokens.shape[1]) >= step.after["length"][:, None]
    require(
        (step.after["tokens"] == spec.pad_token_id)[blank].all(),
        "tokens beyond length are not pad_token_id.",
    )


def _check_final(step: Step) -> None:
    """SAME_STEP gives the numbers of the episodes that ended twice: at top level and in
    final_info."""
    final = {
        key: value
        for key, value in step.info.get("final_info", {}).items()
        if key in ("reward_terms", *END_KEYS)
    }
    shown = {key: step.info.get(key, {}) for key in final}
    same = difference(rows_of(final, step.ended), rows_of(shown, step.ended), 0.0) is None
    require(same, "final_info and the infos at top level differ on an episode that ended.")


def _check_reward(step: Step, paid: np.ndarray, tolerance: float) -> None:
    require(
        not step.reward[~step.active].any(),
        "a row that is only reset (NEXT_STEP) is paid a reward.",
    )
    terms = step.info.get("reward_terms", {})
    total = sum(
        (values for key, values in terms.items() if not key.startswith("_")), np.zeros(len(paid))
    )
    require(
        close(step.reward, total, tolerance), "a reward is not the sum of infos['reward_terms']."
    )
    has = step.info.get("_token_rewards", np.zeros_like(step.active))
    require(
        (has == step.ended).all(), "infos['token_rewards'] is not there exactly where rows end."
    )
    if has.any():
        placed = step.info["token_rewards"]
        require(
            close(placed.sum(1)[has], paid[has], tolerance),
            "token_rewards do not sum to what step() paid.",
        )
        parts = [
            values
            for key, values in step.info["token_reward_terms"].items()
            if not key.startswith("_")
        ]
        same = close(sum(parts, np.zeros_like(placed)), placed, tolerance)
        require(same, "infos['token_reward_terms'] do not add up to token_rewards.")


def _check_aliases(steps: list[Step]) -> None:
    for step in steps:
        now, then = (
            dict(enumerate([*arrays[:-1], _own(arrays[-1])]))
            for arrays in (host(step.returned), step.copied)
        )
        require(
            difference(now, then, 0.0) is None,
            "an array that step() returned has changed since: it aliases the env's own.",
        )


def _check_same(
    a: list[Step], b: list[Step], tolerance: float, sentence: str, rows: Any = slice(None)
) -> None:
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        what = difference(_seen(one, rows), _seen(other, rows), tolerance)
        require(what is None, f"{sentence} (step {number}: {what}).")


def _seen(step: Step, rows: Any) -> dict[str, Any]:
    """What a step shows of `rows`. Of the infos only those that these rows have: others come and go
    with other rows."""
    flags = {"terminated": step.terminated, "truncated": step.truncated}
    return rows_of(
        {"obs": step.after, "end": step.end, "reward": step.reward, **flags, **_own(step.info)},
        rows,
    )


def _own(info: dict[str, Any]) -> dict[str, Any]:
    """Without the infos of wrappers, which may tell the time and alias what they like."""
    return {key: value for key, value in info.items() if key.removeprefix("_") in KEYS}


def _check_repeat(
    envs: Any, first: list[Step], plan: list[Action], learned: Any, tolerance: float
) -> None:
    again = run(envs, _start(envs), plan)
    _check_same(
        first, again, tolerance, "reset(seed=0) and the same actions do not give the same run again"
    )
    envs.unwrapped.load_statistics(learned)
    again = run(envs, _start(envs), plan, after_step=overwrite)
    _check_same(
        first,
        again,
        tolerance,
        "writing to returned arrays changes the run: they alias the env's own",
    )


def _check_independence(
    envs: Any, first: list[Step], plan: list[Action], rng: np.random.Generator, tolerance: float
) -> None:
    even = np.arange(envs.num_envs) % 2 == 0
    other = [draw(envs, rng) for _ in plan]
    mixed = [
        (np.where(even, a[0], b[0]), np.where(even, a[1], b[1]))
        for a, b in zip(plan, other, strict=True)
    ]
    again = run(envs, _start(envs), mixed)
    if envs.unwrapped.save_statistics():
        # Through what terms learn, what others earned may matter to later texts: the first ones
        # alone are compared.
        first, again = (steps[: _first_end(steps)] for steps in (first, again))
    _check_same(
        first, again, tolerance, "what a row shows depends on the other rows' actions", even
    )


def _first_end(steps: list[Step]) -> int:
    """How many steps there are before a text begins that is not the first of its row."""
    return next((number for number, step in enumerate(steps) if step.ended.any()), len(steps))


def _check_cut_texts(envs: Any, rng: np.random.Generator, tolerance: float) -> None:
    """A prefix uses up max_new_tokens and earns nothing; a row that is cut has ended as any
    other."""
    limit = envs.unwrapped.token_spec.max_new_tokens
    given = max(limit - 2, 0)
    plan = [draw(envs, rng, stop=0.0) for _ in range(limit - given)]
    steps = run(
        envs,
        _start(envs, prefixes=[draw_ids(envs, rng, given) for _ in range(envs.num_envs)]),
        plan,
        given,
    )
    _check_steps(envs, steps, tolerance)
    require(not steps[-1].info["token_rewards"][:, :given].any(), "a prefix earns rewards.")
    if mode_of(envs) == AutoresetMode.DISABLED:
        envs.reset(
            options={"prefixes": [draw_ids(envs, rng, limit - 1) for _ in range(envs.num_envs)]}
        )
        envs.step(as_action(envs, plan[0]))
        sentence = (
            "a finished row can be stepped under DISABLED: step() does not raise AssertionError."
        )
        require_raises(AssertionError, sentence, envs.step, as_action(envs, plan[0]))


def _check_scores(
    envs: Any, plan: list[Action], rng: np.random.Generator, learned: Any, tolerance: float
) -> None:
    """Stepping pays what `score_episodes` says, here for the texts that begin with given
    prompts."""
    longest = envs.unwrapped.token_spec.max_prompt_tokens
    prompts = [draw_ids(envs, rng, 1 + row % longest) for row in range(envs.num_envs)]
    steps = run(envs, _start(envs, prompts=prompts), plan)
    envs.unwrapped.load_statistics(learned)  # those that the texts began with
    for row, prompt in enumerate(prompts):
        end = next((number for number, step in enumerate(steps) if step.ended[row]), None)
        if end is not None:
            _check_score(envs, row, prompt, steps[: end + 1], tolerance)


def _check_score(
    envs: Any, row: int, prompt: list[int], steps: list[Step], tolerance: float
) -> None:
    tokens, logprobs = ([float(step.action[part][row]) for step in steps] for part in (0, 1))
    cut = [bool(steps[-1].info["cut"][row])]
    said = envs.unwrapped.score_episodes(
        [prompt], [list(map(int, tokens))], logprobs=[logprobs], truncated=cut
    )
    paid = np.array([step.reward[row] for step in steps])
    require(
        close(paid, said.step_rewards[0, : len(steps)], tolerance),
        "step() does not pay what score_episodes() says.",
    )
    for key in SCORED_KEYS:
        values = getattr(said, key)
        require(
            (values is not None) == (key in steps[-1].info),
            f"infos[{key!r}] is given by one of step(), score_episodes().",
        )
        if values is not None:
            same = close(steps[-1].info[key][row], values[0], tolerance)
            require(same, f"infos[{key!r}] is not what score_episodes() says.")


def _check_state(envs: Any, plan: list[Action], rng: np.random.Generator, tolerance: float) -> None:
    obs, age = _midway(envs, rng)
    saved = envs.unwrapped.save_state()
    first = run(envs, obs, plan, age)
    loaded = host(envs.unwrapped.load_state(saved)[0])
    require(
        difference(obs, loaded, tolerance) is None,
        "load_state() does not show the texts that were saved.",
    )
    again = run(envs, loaded, plan, age)
    _check_same(
        first, again, tolerance, "after load_state() the run that was saved goes on differently"
    )


def _check_fork(envs: Any, plan: list[Action], rng: np.random.Generator, tolerance: float) -> None:
    """A copy earns what the original earns under the same actions, until both end."""
    if envs.num_envs == 1:
        return
    _, age = _midway(envs, rng)
    obs = host(envs.unwrapped.fork([0], [1])[0])
    twins = [
        tuple(np.concatenate([part[:1], part[:1], part[2:]]) for part in action) for action in plan
    ]
    for step in run(envs, obs, [(tokens, logprobs) for tokens, logprobs in twins], age):
        one, other = (
            {"obs": rows_of(step.end, [i]), "reward": step.reward[[i]], "ended": step.ended[[i]]}
            for i in (0, 1)
        )
        require(
            difference(one, other, tolerance) is None,
            "after fork([0], [1]) the rows differ under the same actions.",
        )
        if step.ended[0]:
            return


def _check_bad_actions(envs: Any, rng: np.random.Generator, tolerance: float) -> None:
    obs, age = _midway(envs, rng)
    saved, plan = envs.unwrapped.save_state(), [draw(envs, rng) for _ in range(3)]
    first = run(envs, obs, plan, age)
    obs = host(envs.unwrapped.load_state(saved)[0])
    for name, action in bad_actions(envs, *plan[0]):
        require_raises(
            ValueError,
            f"step() does not raise ValueError on an action with {name}.",
            envs.step,
            action,
        )
    _check_same(
        first,
        run(envs, obs, plan, age),
        tolerance,
        "an action that was refused has changed the env",
    )


def _check_closed(envs: Any, action: Action) -> None:
    """On a copy that is marked as closed: the env itself stays open."""
    closed = copy.copy(envs.unwrapped)
    closed.closed = True
    error = ClosedEnvironmentError
    require_raises(
        error,
        "step() after close() does not raise ClosedEnvironmentError.",
        closed.step,
        as_action(envs, action),
    )
    require_raises(
        error, "reset() after close() does not raise ClosedEnvironmentError.", closed.reset
    )
