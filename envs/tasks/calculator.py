"""Calculator-v0: answer a question, or call the calculator first.

## Description

A small language model is asked for sums and products, such as "37*46=". It may answer at once,
"1702<eos>", or call a calculator: behind "[37*46]" the environment writes "{1702}", and the model
goes on. Behind a call that makes no sense, such as "[37*]", it writes "?". The calculator adds and
multiplies whole numbers, and does what it is told: whether the call fits the question is up to the
policy.

A quarter of the questions are sums of a number up to 99 and one up to 9, which the reference knows
quite well. The others it can only guess: products of a number from 10 to 999 and one from 10 to 99,
and sums of three numbers from 10 to 99. It calls the calculator in one text of nine. It is bundled
(0.2 million parameters), and the policy starts from it.

## Observation Space

`Dict(tokens=Box(0, 19, (49,), int64), length=Discrete(50), prompt_length=Discrete(50),
own_mask=MultiBinary(49))`: the prompt and the response so far, padded on the right, and a mask that
is 1 on the policy's tokens. P = 9, and T = 20 by default (`max_new_tokens`). L = P + 2T = 49 has
room for every reply, for none is longer than the turn in front of it. With `observation="features"`
it is the reference's last hidden state, `Box(-inf, inf, (96,), float32)`.

## Action Space

`Discrete(20)`: the next character, a digit, "+", "*", "=", "[", "]", "{", "}", "?", `<eos>` or
`<pad>`.

## Rewards

The score of a text is 1 if its answer is right, else 0. The answer is what stands behind the last
"}" or "?" of the response, or behind the question where there is none, with its `<eos>`. The
default design is "terminal": the score at the last token. The KL term has `kl_coef=0.05`.
`infos["gold"]` is the score; the largest is 1.

The turn reward, which `reward="turn"` pays, is 0.2 for a call whose result is the right answer,
once in a text, and the score for the turn that ends the text. For a dense reward by the token there
is no learned model but a rule, with which a "step" of a text is a token: `Process("delta")` pays
what each token changes in the share of the right answer that stands in the text so far.

On the questions of "test" the reference's mean score is 0.29: 0.86 on sums of two numbers, and on
the others 0.86 with a call and 0.002 without one. A policy that always calls as well as it does
scores about 0.86.

## Starting State

A question drawn uniformly from those of `split`. "train" has 8,914 questions and "test" 3,086;
questions that differ only in the order of their numbers are in the same split.

## Episode End

A text ends with `<eos>`, or is cut after T tokens of the policy's. A call and an answer take 16
tokens at most.

## Arguments

```python
envs = gym.make_vec("tokenenv/Calculator-v0", num_envs=64, reward="turn", split="train")
```

## Version History

* v0: initial version.
"""

from collections.abc import Sequence

import torch

from tokenenv.envs.language.bundled import bundled_lm, bundled_tokenizer
from tokenenv.envs.language.calculator import (
    CLOSE,
    ERROR,
    RESULT_END,
    TOKENS,
    Grader,
    called,
    questions,
    value_of,
    written_behind,
)
from tokenenv.envs.language.digits import EOS
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import Scorer, Task

MAX_PROMPT_TOKENS = len("12+34+56=")
CALL_REWARD = 0.2


def task(
    *,
    split: str = "train",
    max_new_tokens: int = 20,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Make the task.

    Args:
        split: the questions, "train" (8,914) or "test" (3,086); no question is in both.
        max_new_tokens: T, the most tokens of a text that are the policy's, `<eos>` included. Fewer
            than 16 cannot hold every call and its answer.
        device: where the models are put.
        dtype: the data type of the models.

    Raises:
        InvalidArgument: the split is not known.
    """
    tokenizer, grader = bundled_tokenizer("calculator-lm"), Grader(device)
    return Task(
        tokenizer=tokenizer,
        prompts=tokenizer(list(questions(split)))["input_ids"],
        reference=bundled_lm("calculator-lm", device, dtype),
        scorer=Scorer(grader, grader.score, per_token=False),
        step_scorer=Scorer(grader, grader.progress, per_token=False),
        step_end_token_ids=tuple(range(len(TOKENS))),
        gold="score",
        respond=respond,
        turn_end_token_ids=(CLOSE, EOS),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=max_new_tokens,
        max_context_tokens=MAX_PROMPT_TOKENS + 2 * max_new_tokens,
        stop_token_ids=(EOS,),
        reward="terminal",
        kl_coef=0.05,
    )


def respond(text: TextSoFar) -> Reply:
    """Answer a call, or end the text, and say what the turn was worth (`Task.respond`)."""
    asked = value_of(spelled(text.prompt).partition("=")[0])
    if text.turn[-1] == EOS:
        return Reply(reward=float(answer(text.response) == f"{asked}<eos>"), ends=True)
    turn = spelled(text.turn)
    written = [TOKENS.index(character) for character in written_behind(turn)]
    known = any(segment.tokens == written for segment in text.segments if not segment.own)
    helps = asked is not None and called(turn) == asked and not known
    return Reply(written, reward=CALL_REWARD if helps else 0.0)


def answer(response: Sequence[int]) -> str:
    """Return what stands behind the last "}" or "?" of a response."""
    ends = [i for i, token in enumerate(response) if token in (RESULT_END, ERROR)]
    return spelled(response[ends[-1] + 1 if ends else 0 :])


def spelled(tokens: Sequence[int]) -> str:
    """Return the text of some tokens, `<eos>` and `<pad>` included."""
    return "".join(TOKENS[token] for token in tokens)
