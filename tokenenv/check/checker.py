"""The contract of token envs (docs/contract.md) as a check that anyone can run on an env of theirs.

`CHECKS` is the list of what is checked, in order. Each check states its rule in one sentence, and
raises `ContractError` with what to change where the rule is broken. What every step has to return
is in `step_checks`.
"""

import copy
from collections.abc import Callable, Mapping
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
    asked,
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
from tokenenv.check.step_checks import SCORED_KEYS, check_infos, check_steps, contract_infos
from tokenenv.tables import Columns, by_name
from tokenenv.types import TokenSpec


def check_vector_env(envs: Any, *, steps: int = 40, tolerance: float = 1e-5) -> None:
    """Check that a vector env of texts keeps the contract.

    `envs` may be wrapped, in any autoreset mode, with NumPy or torch arrays. It is reset many
    times, its prompt streams are seeded anew, and it is left open and reset. What terms have
    learned and the tokens that schedules are asked with are put back before every run, and left as
    they were. A wrapper that changes rewards breaks the contract (they are the sum of their terms).

    Args:
        envs: the env.
        steps: the random steps of each run. In a task without stop tokens, stepping is compared
            with `score_episodes` only if there are more of them than `max_new_tokens`.
        tolerance: the largest difference of equal numbers, relative to the larger of 1 and their
            size; 1e-5 is for models in float32.

    Raises:
        ContractError: the first rule that is broken, and what to change.
    """
    require(
        isinstance(envs, VectorEnv),
        f"{type(envs).__name__} is no VectorEnv; build one with gym.make_vec.",
    )
    trial = Trial(envs, steps, tolerance)
    for check in CHECKS:
        check(trial)
    trial.start()


class Trial:
    """An env under check, the actions that are tried on it, and the run that others are compared
    with."""

    def __init__(self, envs: Any, steps: int, tolerance: float) -> None:
        self.envs, self.tolerance = envs, tolerance
        self.rng = np.random.default_rng(0)
        # The last action stops every text, so that at least one text of each slot is scored.
        self.plan = [self.draw() for _ in range(steps - 1)] + [self.draw(stop=1.0)]
        self.learned = envs.unwrapped.save_statistics()
        self.tokens_seen = envs.unwrapped.tokens_seen
        self._first: list[Step] | None = None

    @property
    def first(self) -> list[Step]:
        """The run of the planned actions from new texts, made once."""
        if self._first is None:
            self._first = run(self.envs, self.start(), self.plan)
        return self._first

    def draw(self, **options: float) -> Action:
        """Draw an action for each slot; see `driver.draw`."""
        return draw(self.envs, self.rng, **options)

    def start(self, **options: Any) -> Any:
        """Begin new texts, always from the same prompt streams and with the same weights of terms,
        and return the first observation on the host."""
        self.forget()
        obs, info = self.envs.reset(seed=0, options=options or None)
        check_infos(host(info), self.envs.num_envs)
        return host(obs)

    def forget(self) -> None:
        """Put back what terms had learned and what schedules were asked with when the check
        began."""
        self.envs.unwrapped.load_statistics(self.learned)
        self.envs.unwrapped.tokens_seen = self.tokens_seen

    def midway(self) -> tuple[Any, int]:
        """Return the observation of running texts and how many response tokens they have: two, or
        fewer where two would end one of them."""
        for age in range(min(2, self.envs.unwrapped.token_spec.max_new_tokens - 1), 0, -1):
            taken = run(self.envs, self.start(), [self.draw(stop=0.0) for _ in range(age)])
            if not any(step.ended.any() for step in taken):
                return taken[-1].after, age
        return self.start(), 0

    def require_same(
        self, a: list[Step], b: list[Step], sentence: str, slots: Any = slice(None)
    ) -> None:
        """Raise `ContractError` unless two runs show the same of `slots`."""
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            what = difference(_shown(one, slots), _shown(other, slots), self.tolerance)
            require(what is None, f"{sentence} (step {number}: {what}).")


def check_not_reset(trial: Trial) -> None:
    """step() before the first reset() raises ResetNeeded."""
    try:
        trial.envs.unwrapped.save_state()
    # Only an env that was never reset has no state to save, and only there can this be tried.
    except ResetNeeded:
        sentence = "step() before reset() does not raise ResetNeeded; it must, and change nothing."
        action = as_action(trial.envs, trial.plan[0])
        require_raises(ResetNeeded, sentence, trial.envs.step, action)


def check_spaces(trial: Trial) -> None:
    """The spaces are those of the contract, batched from the single ones, and the autoreset mode is
    an AutoresetMode."""
    envs, spec = trial.envs, trial.envs.unwrapped.token_spec
    require(
        isinstance(mode_of(envs), AutoresetMode),
        "metadata['autoreset_mode'] is no AutoresetMode; set it to one of gymnasium.vector's.",
    )
    for kind in ("observation", "action"):
        single, batched = getattr(envs, f"single_{kind}_space"), getattr(envs, f"{kind}_space")
        require(
            batch_space(single, envs.num_envs) == batched,
            f"{kind}_space is not {envs.num_envs} of single_{kind}_space; make it with "
            "gymnasium.vector.utils.batch_space.",
        )
    tokens = spaces.Box(0, spec.vocab_size - 1, (spec.max_length,), np.int64)
    count = spaces.Discrete(spec.max_length + 1)
    parts: dict[str, spaces.Space] = {"tokens": tokens, "length": count, "prompt_length": count}
    if spec.responds:
        parts["own_mask"] = spaces.MultiBinary(spec.max_length)
    texts = spaces.Dict(parts)
    seen = envs.single_observation_space
    features = isinstance(seen, spaces.Box) and seen.dtype == np.float32 and len(seen.shape) == 1
    require(
        features or seen == texts,
        f"single_observation_space is {seen}; make it {texts}, or float32 features (H,).",
    )
    action = envs.single_action_space
    token = action.get("token") if isinstance(action, spaces.Dict) else action
    require(
        token == spaces.Discrete(spec.vocab_size),
        f"the action's token is {token}; make it Discrete({spec.vocab_size}).",
    )


def check_what_steps_return(trial: Trial) -> None:
    """Every step returns what the contract says (see `step_checks`)."""
    check_steps(trial.envs, trial.first, trial.tolerance)


def check_aliases(trial: Trial) -> None:
    """Arrays that step() has returned are the caller's: later steps do not change them."""
    for step in trial.first:
        now, then = (
            dict(enumerate([*arrays[:-1], contract_infos(arrays[-1])]))
            for arrays in (host(step.returned), step.copied)
        )
        require(
            difference(now, then, 0.0) is None,
            "an array that step() returned has changed since: it aliases the env's own; return "
            "copies.",
        )


def check_repeats(trial: Trial) -> None:
    """The same seed and the same actions give the same run, also where the caller writes into the
    arrays that step() returned."""
    again = run(trial.envs, trial.start(), trial.plan)
    sentence = (
        "reset(seed=0) and the same actions do not give the same run again; draw all that is "
        "random from the seed"
    )
    trial.require_same(trial.first, again, sentence)
    again = run(trial.envs, trial.start(), trial.plan, after_step=overwrite)
    sentence = "writing to returned arrays changes the run: they alias the env's own; return copies"
    trial.require_same(trial.first, again, sentence)


def check_slots_are_independent(trial: Trial) -> None:
    """What a slot shows and earns does not depend on the actions in other slots."""
    even = np.arange(trial.envs.num_envs) % 2 == 0
    other = [trial.draw() for _ in trial.plan]
    mixed = [
        (np.where(even, a[0], b[0]), np.where(even, a[1], b[1]))
        for a, b in zip(trial.plan, other, strict=True)
    ]
    first, again = trial.first, run(trial.envs, trial.start(), mixed)
    if _later_texts_depend_on_others(trial.envs.unwrapped):
        end = min(_first_end(first), _first_end(again))
        first, again = first[:end], again[:end]
    sentence = (
        "what a slot shows depends on the other slots' actions; compute it from the slot alone"
    )
    trial.require_same(first, again, sentence, even)


def check_prefixes_and_cuts(trial: Trial) -> None:
    """A prefix uses up max_new_tokens, if its tokens count as the policy's, and earns nothing, and
    a slot whose text was cut is finished like any other."""
    envs, limit = trial.envs, trial.envs.unwrapped.token_spec.max_new_tokens
    given = max(limit - 2, 0)
    plan = [trial.draw(stop=0.0) for _ in range(limit - given)]
    obs = trial.start(prefixes=_prefixes(trial, given))
    steps = run(envs, obs, plan, given)
    check_steps(envs, steps, trial.tolerance)
    prefixed = np.ones(envs.num_envs, bool)
    for step in steps:
        placed = step.info.get("token_rewards", np.zeros((envs.num_envs, limit)))
        require(
            not placed[prefixed & step.ended, :given].any(),
            "a prefix earns rewards; place none on the tokens that reset() was given.",
        )
        prefixed &= ~step.ended
    if envs.unwrapped.token_spec.responds:
        others = [[False] * given] * envs.num_envs
        obs = trial.start(prefixes=_prefixes(trial, given), prefix_own=others)
        check_steps(envs, run(envs, obs, plan), trial.tolerance)
    if mode_of(envs) == AutoresetMode.DISABLED:
        envs.reset(options={"prefixes": _prefixes(trial, limit - 1)})
        envs.step(as_action(envs, plan[0]))
        sentence = (
            "a finished slot can be stepped under DISABLED: step() does not raise AssertionError; "
            "refuse until reset() was given the slot."
        )
        require_raises(AssertionError, sentence, envs.step, as_action(envs, plan[0]))


def check_scoring(trial: Trial) -> None:
    """step() pays what score_episodes() says of the same texts, and shows the same scores."""
    longest = trial.envs.unwrapped.token_spec.max_prompt_tokens
    prompts = [
        draw_ids(trial.envs, trial.rng, 1 + slot % longest) for slot in range(trial.envs.num_envs)
    ]
    rows = _rows(trial)
    given = {"columns": by_name(rows)} if rows else {}
    steps = run(trial.envs, trial.start(prompts=prompts, **given), trial.plan)
    # Texts are scored with what terms had learned when they began.
    trial.forget()
    for slot, prompt in enumerate(prompts):
        end = next((number for number, step in enumerate(steps) if step.ended[slot]), None)
        if end is not None:
            row = by_name(rows[slot : slot + 1])
            _check_scored_text(trial, slot, prompt, row, steps[: end + 1])


def check_saved_state(trial: Trial) -> None:
    """load_state() shows the texts that were saved, and they go on as they did."""
    obs, age = trial.midway()
    saved = trial.envs.unwrapped.save_state()
    first = run(trial.envs, obs, trial.plan, age)
    loaded = host(trial.envs.unwrapped.load_state(saved)[0])
    require(
        difference(obs, loaded, trial.tolerance) is None,
        "load_state() does not show the texts that were saved; return their observation.",
    )
    again = run(trial.envs, loaded, trial.plan, age)
    sentence = (
        "after load_state() the run that was saved goes on differently; save all that later "
        "steps depend on"
    )
    trial.require_same(first, again, sentence)


def check_fork(trial: Trial) -> None:
    """A copy shows and earns what its original does under the same actions, until both end, or the
    environment answers them differently."""
    if trial.envs.num_envs == 1:
        return
    spec = trial.envs.unwrapped.token_spec
    _, age = trial.midway()
    obs = host(trial.envs.unwrapped.fork([0], [1])[0])
    # Before the environment may answer, nothing that a copy shows is drawn anew.
    quiet = [trial.draw(stop=0.0) for _ in range(2 * spec.responds)]
    plan = [(_twins(tokens), _twins(logprobs)) for tokens, logprobs in [*quiet, *trial.plan]]
    for step in run(trial.envs, obs, plan, age):
        one, other = (
            {"obs": rows_of(step.end, [i]), "reward": step.reward[[i]], "ended": step.ended[[i]]}
            for i in (0, 1)
        )
        if _answered_apart(step, spec):
            return
        require(
            difference(one, other, trial.tolerance) is None,
            "after fork([0], [1]) the slots differ under the same actions; copy all that later "
            "steps depend on.",
        )
        if step.ended[0]:
            return


def _answered_apart(step: Step, spec: TokenSpec) -> bool:
    """Whether the environment answered slots 0 and 1 differently: what it writes into a copy is
    drawn anew."""
    if not asked(step.action[0][:1], spec)[0]:
        return False
    if not isinstance(step.end, Mapping):
        return True  # features do not tell
    place = np.arange(spec.max_length) < step.before["length"][:2, None] + 1
    given = np.where(place, step.end["tokens"][:2], -1)
    answers = (step.end["tokens"], step.terminated, step.info["turn_reward"])
    same = all((answer[0] == answer[1]).all() for answer in answers)
    return bool((given[0] == given[1]).all()) and not same


def check_bad_actions(trial: Trial) -> None:
    """An action that is not allowed raises ValueError and changes nothing."""
    obs, age = trial.midway()
    saved, plan = trial.envs.unwrapped.save_state(), [trial.draw() for _ in range(3)]
    first = run(trial.envs, obs, plan, age)
    obs = host(trial.envs.unwrapped.load_state(saved)[0])
    for name, action in bad_actions(trial.envs, *plan[0]):
        sentence = f"step() does not raise ValueError on an action with {name}; refuse it."
        require_raises(ValueError, sentence, trial.envs.step, action)
    again = run(trial.envs, obs, plan, age)
    sentence = "an action that was refused has changed the env; look at all of it before taking any"
    trial.require_same(first, again, sentence)


def check_closed(trial: Trial) -> None:
    """step() and reset() after close() raise ClosedEnvironmentError."""
    # A copy is marked as closed: the env itself stays open.
    closed = copy.copy(trial.envs.unwrapped)
    closed.closed = True
    action = as_action(trial.envs, trial.plan[0])
    for name, call in {"step": (closed.step, action), "reset": (closed.reset,)}.items():
        sentence = f"{name}() after close() does not raise ClosedEnvironmentError; ask `closed`."
        require_raises(ClosedEnvironmentError, sentence, *call)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    check_not_reset,
    check_spaces,
    check_what_steps_return,
    check_aliases,
    check_repeats,
    check_slots_are_independent,
    check_prefixes_and_cuts,
    check_scoring,
    check_saved_state,
    check_fork,
    check_bad_actions,
    check_closed,
)
"""What is checked, in order. The first ones are what the later ones rely on."""


def _shown(step: Step, slots: Any) -> dict[str, Any]:
    """Return what a step shows of some slots. Infos that only other slots have are left out, since
    they come and go with those."""
    flags = {"terminated": step.terminated, "truncated": step.truncated}
    arrays = {"obs": step.after, "end": step.end, "reward": step.reward, **flags}
    return rows_of(arrays | contract_infos(step.info), slots)


def _later_texts_depend_on_others(env: Any) -> bool:
    """Return whether what a slot's second text is, or is paid, follows from other slots too: a
    group hands out its prompts as its texts end, terms that learn (a running scale) take in what
    all slots earned, and a schedule is asked with the tokens of all."""
    terms = getattr(env, "reward_terms", {})
    scheduled = any(callable(term.weight) for term in terms.values())
    return env.group_size > 1 or scheduled or bool(env.save_statistics())


def _first_end(steps: list[Step]) -> int:
    """Return how many steps there are before the first text ends."""
    return next((number for number, step in enumerate(steps) if step.ended.any()), len(steps))


def _prefixes(trial: Trial, length: int) -> list[list[int]]:
    return [draw_ids(trial.envs, trial.rng, length) for _ in range(trial.envs.num_envs)]


def _rows(trial: Trial) -> list[Columns]:
    """Return columns for prompts that are given, one row for each slot: those of the env's own
    prompts. None where these have no columns."""
    table = getattr(trial.envs.unwrapped, "columns", ())
    return [table[slot % len(table)] for slot in range(trial.envs.num_envs)] if table else []


def _twins(array: np.ndarray) -> np.ndarray:
    """Return an action (N,) in which slot 1 does what slot 0 does."""
    return np.concatenate([array[:1], array[:1], array[2:]])


def _check_scored_text(
    trial: Trial, slot: int, prompt: list[int], columns: dict[str, list[Any]], steps: list[Step]
) -> None:
    """Raise `ContractError` unless a text of `slot` was paid as `score_episodes` says."""
    tokens, logprobs = ([float(step.action[part][slot]) for step in steps] for part in (0, 1))
    response = list(map(int, tokens))
    options: dict[str, Any] = {"columns": columns} if columns else {}
    if trial.envs.unwrapped.token_spec.responds:
        if not isinstance(steps[-1].end, Mapping):
            return  # features do not show what the environment wrote
        response, own = _with_replies(steps[-1].end, slot)
        turns = [float(step.info["turn_reward"][slot]) for step in steps]
        options |= {"own": [own], "turn_rewards": [turns]}
    last = steps[-1].info
    said = trial.envs.unwrapped.score_episodes(
        [prompt],
        [response],
        logprobs=[logprobs],
        truncated=[bool(last["cut"][slot])],
        **options,
    )
    paid = np.array([step.reward[slot] for step in steps])
    require(
        close(paid, said.step_rewards[0, : len(steps)], trial.tolerance),
        "step() does not pay what score_episodes() says; compute both from the same transitions.",
    )
    for key in SCORED_KEYS:
        _require_said(trial, f"infos[{key!r}]", last.get(key), getattr(said, key), slot)
    shown, watched = last.get("token_watched", {}), getattr(said, "watched", None) or {}
    for name in {*watched, *(key for key in shown if not key.startswith("_"))}:
        what = f"infos['token_watched'][{name!r}]"
        _require_said(trial, what, shown.get(name), watched.get(name), slot)


def _with_replies(end: Mapping[str, np.ndarray], slot: int) -> tuple[list[int], list[bool]]:
    """Return the response of a slot in a token observation, and which of its tokens were
    emitted."""
    span = slice(end["prompt_length"][slot], end["length"][slot])
    return end["tokens"][slot, span].tolist(), end["own_mask"][slot, span].astype(bool).tolist()


def _require_said(trial: Trial, what: str, shown: Any, said: Any, slot: int) -> None:
    """Raise `ContractError` unless step() shows what score_episodes() says, or neither has it."""
    require(
        (shown is None) == (said is None),
        f"{what} is given by one of step(), score_episodes(); give it by both or by none.",
    )
    if said is not None:
        require(
            close(shown[slot], said[0], trial.tolerance),
            f"{what} is not what score_episodes() says; compute both from the same transitions.",
        )
