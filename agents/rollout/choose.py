"""`rollout="auto"`: what writes the texts of a design faster, found by a short trial.

Suffixes: N texts, T response tokens.
"""

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.rollout.actor import Policy
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.env_rows import env_core, wants_logprob
from tokenenv.agents.rollout.episode_engine import EpisodeEngine, check_options
from tokenenv.agents.rollout.make import make_actor
from tokenenv.agents.rollout.text import Text
from tokenenv.agents.rollout.text_scores import score_texts
from tokenenv.models.vllm_models import VLLMReference

TOKENS = 8
"""Tokens in each text that a trial writes by either way."""
READ = 4096
"""Tokens of whole texts that a trial has the env score, at the most, where one text has fewer."""

logger = logging.getLogger("tokenenv")


def choose_rollout(envs: VectorEnv, policy: Policy, config: AgentConfig) -> str:
    """Return "step" or "episode" for this env and policy, and log which and why, in one line.

    A trial, where there is one, resets the env and has it score its prompts, repeated. That teaches
    nothing and is counted nowhere.
    """
    check_options(config.rollout_options)
    chosen, why = _settled(envs) or _tried(envs, policy, config)
    # A warning is shown where nobody has set up logging.
    logger.warning('rollout="auto" is "%s" here: %s', chosen, why)
    return chosen


def _settled(envs: VectorEnv) -> tuple[str, str] | None:
    """Return the choice and the reason where nothing has to be tried."""
    core: Any = env_core(envs)
    if not hasattr(core, "score_episodes"):
        return "step", f"{type(core).__name__} does not score whole texts"
    why: str | None = core.why_step
    if envs is not core:
        return "step", f"{type(envs).__name__} around the env sees steps alone"
    if why is not None:
        return "step", why
    models = (getattr(core, name, None) for name in ("reference", "teacher"))
    if any(isinstance(model, VLLMReference) for model in models):
        return "episode", "a vLLM server reads whole texts only"
    return None


def _tried(envs: VectorEnv, policy: Policy, config: AgentConfig) -> tuple[str, str]:
    core = env_core(envs)
    tokens_seen = core.tokens_seen
    stepping = _stepping(envs, policy, config)
    core.tokens_seen = tokens_seen
    whole = _writing(core, policy, config, envs.num_envs)
    whole += _reading(core, envs.num_envs, pays_logprob=wants_logprob(envs))
    chosen = "step" if stepping < whole else "episode"
    step_us, whole_us = (f"{1e6 * seconds:,.0f} us" for seconds in (stepping, whole))
    return chosen, f"in a trial a token took {step_us} by stepping and {whole_us} in whole texts"


def _seconds(run: Callable[[], object], times: int) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return median(found[1:])


def _stepping(envs: VectorEnv, policy: Policy, config: AgentConfig) -> float:
    """Return the seconds of a token that the agent and the env write together."""
    actor = make_actor(envs, policy, config)
    collector = Collector(envs, actor)
    collector.reset()
    seconds = _seconds(collector.step, TOKENS)
    if actor.share:
        actor.share(None)  # the caches of the trial are let go
    return seconds / envs.num_envs


def _writing(core: Any, policy: Policy, config: AgentConfig, num_envs: int) -> float:
    """Return the seconds of a token that the policy writes alone."""
    num_texts = int(config.rollout_options.get("num_texts", num_envs))
    engine = EpisodeEngine(
        policy, core.token_spec, temperature=config.temperature, num_texts=num_texts
    )
    # As many as there may be: each could end with its first token.
    for number in range(num_texts * (TOKENS + 1)):
        prompt = core.prompts[number % len(core.prompts)]
        engine.begin(number, prompt, core.token_spec.max_new_tokens, seed=number)
    return _seconds(engine.step, TOKENS) / num_texts


def _reading(core: Any, most: int, *, pays_logprob: bool) -> float:
    """Return the seconds of a token that the env scores in whole texts of T tokens, `most` at the
    most."""
    count = max(1, min(most, READ // core.token_spec.max_length))
    texts = [_echo(core, row % len(core.prompts)) for row in range(count)]

    def read() -> None:
        score_texts(core, texts, pays_logprob=pays_logprob, played=False)

    return _seconds(read, 2) / (count * core.token_spec.max_new_tokens)


def _echo(core: Any, prompt_id: int) -> Text:
    """Return a text of T tokens that repeats its prompt, because a rule may be made for words."""
    spec, prompt = core.token_spec, [int(token) for token in core.prompts[prompt_id]]
    never = next(i for i in range(spec.vocab_size) if i not in spec.engine_stop_ids)
    words = [token for token in prompt if token not in spec.engine_stop_ids] or [never]
    tokens = np.resize(words, spec.max_new_tokens).tolist()
    return Text(
        0,
        0,
        prompt,
        prompt_id,
        core.weights,
        tokens=tokens,
        own=[True] * len(tokens),
        logprob=[0.0] * len(tokens),
        truncated=True,
        columns=core.columns[prompt_id] if core.columns else {},
    )
