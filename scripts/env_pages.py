"""Writes a page of the documentation for each registered id, from the task's docstrings and the env
itself, so that no page can be out of date. `scripts/site.py` puts them into the site."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
from griffe import Docstring, DocstringSectionKind
from gymnasium import spaces

from tokenenv.env.build import load_task
from tokenenv.env.config import EnvConfig
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import TokenEnvError
from tokenenv.models.loading import load_tokenizer
from tokenenv.registration import TASKS
from tokenenv.rewards.designs import DESIGNS

ASSETS = Path(__file__).parents[1] / "envs" / "assets"


def _chat_tokenizer() -> Any:
    """The bundled tokenizer with a chat template, which closes every message with the stop
    token."""
    tokenizer = load_tokenizer(str(ASSETS / "reviews-lm"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return tokenizer


def _ask_on(messages: list[dict[str, str]]) -> str | None:
    asked = ("and the waiter?", "and the dessert?")
    turns = sum(message["role"] == "assistant" for message in messages)
    return asked[turns - 1] if turns <= len(asked) else None


GIVEN: dict[str, dict[str, Any]] = {
    "tokenenv/TextGen-v0": {
        "model": str(ASSETS / "reviews-lm"),
        "reward_model": str(ASSETS / "reviews-reward"),
        "prompts": ["we visited this bar once. the"],
        "max_prompt_tokens": 16,
    },
    "tokenenv/ChatGen-v0": {
        "model": str(ASSETS / "reviews-lm"),
        "tokenizer": _chat_tokenizer(),
        "reward_model": str(ASSETS / "reviews-reward"),
        "prompts": ["how was the soup?"],
        "respond": _ask_on,
    },
}
"""Options of the ids that cannot be made without any: here a bundled model stands for the
reader's."""


@cache
def env_pages() -> dict[str, str]:
    """Markdown by file name, "index.md" among them."""
    pages = {f"{slug(env_id)}.md": _page(env_id) for env_id in sorted(TASKS)}
    return {"index.md": _index()} | pages


def slug(env_id: str) -> str:
    """The name of an id's page and picture: "delayed-key" for "tokenenv/DelayedKey-v0"."""
    name = env_id.split("/")[-1].rsplit("-v", 1)[0]
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", name).lower()


def make(env_id: str, num_envs: int, **options: Any) -> TokenVectorEnv:
    """The env of an id, unwrapped."""
    made = gym.make_vec(env_id, num_envs=num_envs, **GIVEN.get(env_id, {}), **options)
    unwrapped: TokenVectorEnv = made.unwrapped
    return unwrapped


def dense(env_id: str) -> str:
    """The design of an id's picture: one that pays a token when it is written."""
    env = make(env_id, 1)
    if env.oracle is not None:
        return "delta"
    return "token" if env._task.scorer.per_token else "process"


def _index() -> str:
    rows = "\n".join(
        f"| [{env_id.split('/')[-1]}]({slug(env_id)}.md) | {_what(env_id)} |"
        for env_id in sorted(TASKS)
    )
    return f"""# Environments

Every id is made by `gym.make_vec(id, num_envs=N)`, or by `gym.make(id)` for one text. All of them
follow [the contract](../contract.md) and take the options of
[`EnvConfig`][tokenenv.env.config.EnvConfig]; a page lists the options that a task adds.

| id | what |
|---|---|
{rows}

[Your own task](../your-task.md) is one function in a file of yours.
"""


def _page(env_id: str) -> str:
    task = load_task(TASKS[env_id])
    about = (inspect.getdoc(inspect.getmodule(task)) or "").split(": ", 1)[1]
    first, _, rest = about.partition("\n\n")
    envs = make(env_id, 2)
    made = {
        "Rewards": _designs(env_id),
        "Arguments": _options(task),
    }
    parts = [
        f"# {env_id.split('/')[-1]}",
        _prose(first[0].upper() + first[1:]),
        f"![A text of {env_id}, each token on the colour of its reward]({slug(env_id)}.png)",
        _caption(env_id, envs),
        "```python\n" + _call(env_id) + "\n```",
        _spaces(envs),
        _facts(envs),
        _note(env_id),
        *(_section(section, made) for section in re.split(r"^(?=## )", _prose(rest), flags=re.M)),
    ]
    envs.close()
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(text: str, made: dict[str, str]) -> str:
    """A section of the docstring, with what the env itself adds to it."""
    heading = text.partition("\n")[0].removeprefix("## ")
    return text.strip() + "\n\n" + made.get(heading, "")


def _caption(env_id: str, envs: TokenVectorEnv) -> str:
    writer = "the best of 64 texts by the reference"
    if envs.oracle is not None:
        writer = "a text by the exact optimum"
    return (
        f'*`render_mode="rgb_array"`, `reward="{dense(env_id)}"`: {writer}, each token on the '
        "colour of what it was paid.*"
    )


def _what(env_id: str) -> str:
    """The first sentence of a task's module."""
    about = inspect.getdoc(inspect.getmodule(load_task(TASKS[env_id]))) or ""
    return _text(about.split("\n", 1)[0].split(": ", 1)[-1])


def _call(env_id: str) -> str:
    if env_id not in GIVEN:
        return f'envs = gym.make_vec("{env_id}", num_envs=64)'
    responds = "    respond=respond,\n" if "respond" in GIVEN[env_id] else ""
    return (
        f'envs = gym.make_vec(\n    "{env_id}",\n    num_envs=64,\n    model="path/or/hub-id",\n'
        f'    reward_model="path/or/hub-id",\n    prompts="prompts.jsonl",\n{responds})'
    )


def _note(env_id: str) -> str:
    if env_id not in GIVEN:
        return ""
    return (
        "The numbers of this page are those of a bundled model of "
        f"{make(env_id, 1).token_spec.vocab_size} token ids; yours has its own."
    )


def _spaces(envs: TokenVectorEnv) -> str:
    rows = [
        "| | one env | N envs | range | what |",
        "|---|---|---|---|---|",
        *_rows("action", envs.single_action_space, envs, "the id of the token to append"),
    ]
    for name, space in envs.single_observation_space.items():
        rows += _rows(f"`{name}`", space, envs, OBSERVED[name])
    return "\n".join(rows) + (
        "\n\nThe reward is float32 `(N,)`. The infos are in [the contract](../contract.md)."
    )


OBSERVED = {
    "tokens": "prompt and response, padded on the right",
    "length": "how many of `tokens` are valid",
    "prompt_length": "how many of those are the prompt",
    "own_mask": "1 on the tokens of the policy's, 0 on those that the environment wrote",
}


def _rows(name: str, space: gym.Space, envs: TokenVectorEnv, what: str) -> Iterator[str]:
    if isinstance(space, spaces.Discrete):
        low, high = space.start, space.start + space.n - 1
    elif isinstance(space, spaces.MultiBinary):
        low, high = 0, 1
    else:
        low, high = space.low.min(), space.high.max()
    one, many = str(space.shape or "()"), f"({', '.join(['N', *map(str, space.shape)])})"
    many = many.replace("(N)", "(N,)")
    kind = type(space).__name__
    yield f"| {name} | {kind} {one} | {space.dtype} {many} | {low} to {high} | {what} |"


def _facts(envs: TokenVectorEnv) -> str:
    spec, task = envs.token_spec, envs._task
    rows = [
        ("vocabulary V", f"{spec.vocab_size:,} token ids"),
        ("prompts", f"{len(task.prompts):,}, of up to P = {spec.max_prompt_tokens} tokens"),
        ("response", f"up to T = {spec.max_new_tokens} tokens (`max_new_tokens`)"),
        *_turns(envs),
        ("a text ends with", _ends(envs)),
        ("reference", f"`{type(task.reference).__name__}`"),
        ("score", _score(task)),
        ("gold metric", _gold(task)),
        ("`reward=` by default", f'`"{task.reward}"`'),
        ("`kl_coef=` by default", f"{task.kl_coef} per nat"),
    ]
    if task.oracle is not None:
        best, start = task.oracle.optimal_objective(task.kl_coef), task.oracle.reference_objective()
        rows.append(("exact optimum", f"J* = {best:.4f}; the reference has J = {start:.4f}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _turns(envs: TokenVectorEnv) -> Iterator[tuple[str, str]]:
    """Rows on what the environment writes, where it does."""
    spec = envs.token_spec
    if not spec.responds:
        return
    ends = spec.turn_end_token_ids
    after = "every token" if ends is None else _some(_token(envs, i) for i in ends)
    yield "the environment may write after", after
    yield "a text", f"up to L = {spec.max_length} tokens, whoever wrote them"


def _ends(envs: TokenVectorEnv) -> str:
    """What ends a text."""
    spec = envs.token_spec
    stops = ", ".join(_token(envs, i) for i in spec.stop_token_ids) or "the cut at T"
    return f"{stops}, or where the environment ends it" if spec.responds else stops


def _some(names: Iterable[str], most: int = 8) -> str:
    """Names in a row, of which the middle is left out where there are many."""
    listed = list(names)
    if len(listed) > most:
        listed[2:-1] = ["…"]
    return ", ".join(listed)


def _token(envs: TokenVectorEnv, token: int) -> str:
    tokenizer = envs.token_spec.tokenizer
    return f"id {token}" if tokenizer is None else f"`{tokenizer.convert_ids_to_tokens(token)}`"


def _score(task: Any) -> str:
    if task.scorer is None:
        return "none"
    return "one number a token, added up" if task.scorer.per_token else "one number a text"


def _gold(task: Any) -> str:
    if task.gold is None or task.gold == "score":
        return "none" if task.gold is None else "the score itself"
    said = inspect.getdoc(task.gold) or ""
    return _text(said.split("\n\n")[0].removeprefix("Return "))


def _designs(env_id: str) -> str:
    taken, refused = [], []
    for design in DESIGNS:
        try:
            make(env_id, 1, reward=design).close()
            taken.append(f"`{design}`")
        except TokenEnvError as error:
            refused.append(f"| `{design}` | {_reason(design, str(error))} |")
    lines = [f"`reward=` takes {', '.join(taken)}, and [your own](../your-reward.md)."]
    if refused:
        lines.append("| refused | why |\n|---|---|\n" + "\n".join(refused))
    return "\n\n".join(lines) + "\n\nWhat each pays is in [Reward designs](../rewards.md)."


def _reason(design: str, message: str) -> str:
    """What a design needs, of the sentence that refuses it."""
    return _text(message.removeprefix(f"reward={design!r} ").split(", which ")[0])


def _options(task: Callable[..., Any]) -> str:
    said = _arguments(task)
    rows = []
    for name, parameter in inspect.signature(task).parameters.items():
        default = "needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        kind = inspect.formatannotation(parameter.annotation).replace("|", "\\|")
        rows.append(f"| `{name}` | `{kind}` | {default} | {said.get(name, '')} |")
    shared = ", ".join(f"`{field.name}`" for field in fields(EnvConfig))
    return (
        "| option | type | default | what |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nOptions of every env, in [`EnvConfig`][tokenenv.env.config.EnvConfig]: {shared}."
    )


def _arguments(task: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of each argument."""
    docstring = Docstring(inspect.getdoc(task) or "")
    sections = docstring.parse("google", warnings=False)
    return {
        item.name: _text(item.description)
        for section in sections
        if section.kind is DocstringSectionKind.parameters
        for item in section.value
    }


def _prose(docstring: str) -> str:
    """A docstring as Markdown, in which "<" outside of code is a character."""
    parts = docstring.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _text(docstring: str) -> str:
    """A docstring's prose as one line, for the cell of a table."""
    return re.sub(r"\s*\n\s*", " ", _prose(docstring)).replace("|", "\\|")
