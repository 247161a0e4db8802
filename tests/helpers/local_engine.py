"""Rollout engines in a few lines: the policy's own model, one full forward a token; and given
tokens."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from tokenenv.agents.rollout.actor import sample
from tokenenv.rollout.weights import transformers_model
from tokenenv.types import Written


@dataclass
class Running:
    prompt: list[int]
    max_tokens: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """Takes the weights at `sync`, as vLLM does, and draws each text from a stream of its own.

    `asked` holds what a text was begun with, by its key, and `turns` each of its turns, by the key
    and the tokens before it.
    `down` says what fails once and when: {"ended": 2} is the third step of `ended` from now on.
    Texts in `slow` take a token at every third step. `note(key)` is called when a text's first
    token is drawn.
    """

    def __init__(self, model, spec, *, temperature=1.0, num_texts=64, dtype="float32"):
        transformers_model(model)
        self.policy, self.model = model, copy.deepcopy(model)
        self.stops, self.temperature, self.num_texts = spec.engine_stop_ids, temperature, num_texts
        self.running: dict[int, Running] = {}
        self.asked: dict[int, tuple[list[int], int, int]] = {}
        self.turns: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self.most = 0
        self.steps = 0
        self.slow: set[int] = set()
        self.down: dict[str, int] = {}
        self.note: Callable[[int], None] = lambda key: None

    def _may_fail(self, call):
        left = self.down.pop(call, None)
        if left == 0:
            raise ConnectionError("down")
        if left is not None:
            self.down[call] = left - 1

    def begin(self, key, prompt, max_tokens, seed):
        self._may_fail("begin")
        assert key not in self.running
        asked = list(prompt), max_tokens, seed
        first = self.asked.setdefault(key, asked)[0]
        assert prompt[: len(first)] == first
        # A text that is begun again is the same, and so is a turn of it.
        turn = self.turns.setdefault((key, tuple(prompt)), asked[1:])
        assert turn == asked[1:]
        self.running[key] = Running(list(prompt), max_tokens, torch.Generator().manual_seed(seed))
        self.most = max(self.most, len(self.running))

    @torch.no_grad()
    def ended(self):
        assert self.running  # else this would be asked for ever
        found = []
        while not found:
            self._may_fail("ended")
            self.steps += 1
            awake = [
                (key, text)
                for key, text in self._side_by_side()
                if key not in self.slow or self.steps % 3 == 0
            ]
            for (key, text), logits in zip(awake, self._logits(awake), strict=True):
                if not text.tokens:
                    self.note(key)
                token, logprob = sample(logits[None], self.temperature, text.generator)
                text.tokens.append(token.item())
                text.logprobs.append(logprob.item())
                if token.item() in self.stops or len(text.tokens) == text.max_tokens:
                    found.append(Written(key, text.tokens, text.logprobs))
                    del self.running[key]
        return found

    def _side_by_side(self):
        return list(self.running.items())

    def _logits(self, texts):
        """Those after each text's last token: one forward, whose padding no text looks at."""
        rows = [torch.tensor(text.prompt + text.tokens) for _, text in texts]
        if not rows:
            return []
        ends = torch.tensor([len(row) - 1 for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.model(padded).logits[torch.arange(len(rows)), ends]

    def sync(self):
        self._may_fail("sync")
        self.model.load_state_dict(self.policy.state_dict())

    def abort(self):
        self.running.clear()


class EngineInRounds(LocalEngine):
    """Writes on while texts are scored, as an engine in another process does: `num_texts` texts
    side by side, in the order in which they were begun.

    `rounds` holds what each round was asked for.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rounds: list[tuple[int, int]] = []
        self.asked_for: tuple[int, int] | None = None

    def _side_by_side(self):
        return list(self.running.items())[: self.num_texts]

    def write_on(self, texts, tokens):
        assert self.asked_for is None
        assert texts >= 1
        assert tokens >= 1
        self.asked_for = texts, tokens
        self.rounds.append(self.asked_for)

    def ended(self):
        (texts, tokens), self.asked_for = self.asked_for or (1, 1), None
        found = []
        while self.running and (
            not found or (len(found) < texts and sum(len(w.tokens) for w in found) < tokens)
        ):
            found += [replace(one, step=self.steps) for one in super().ended()]
        return found

    def abort(self):
        super().abort()
        self.asked_for = None


class GivenEngine:
    """Writes given tokens behind each prompt of a text, up to a stop id or the limit."""

    def __init__(self, spec, tokens):
        self.stops, self.tokens = spec.engine_stop_ids, iter(tokens)
        self.asked: list[tuple[list[int], int]] = []
        self.running: list[Written] = []

    def begin(self, key, prompt, max_tokens, seed):
        assert max_tokens > 0
        self.asked.append((list(prompt), max_tokens))
        tokens = []
        while not tokens or (len(tokens) < max_tokens and tokens[-1] not in self.stops):
            tokens.append(next(self.tokens))
        self.running.append(Written(key, tokens, [-1.0] * len(tokens)))

    def ended(self):
        running, self.running = self.running, []
        return running

    def sync(self):
        pass

    def abort(self):
        self.running = []
