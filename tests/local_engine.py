"""A rollout engine in a few lines: the policy's own model, one full forward a token."""

import copy
from dataclasses import dataclass, field

import torch

from tokenenv.agents.actor import sample
from tokenenv.rollout.weights import check_transformers_model
from tokenenv.types import Written


@dataclass
class Running:
    prompt: list[int]
    max_tokens: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """Takes the weights at `sync`, as vLLM does, and draws each text from a stream of its own."""

    def __init__(self, model, spec, *, temperature=1.0, num_texts=64, dtype="float32"):
        check_transformers_model(model)
        self.policy, self.model = model, copy.deepcopy(model)
        self.stops, self.temperature, self.num_texts = spec.stop_token_ids, temperature, num_texts
        self.running: dict[int, Running] = {}
        self.prompts: dict[int, list[int]] = {}
        self.most = 0
        self.down = False

    def begin(self, key, prompt, max_tokens, seed):
        assert key not in self.running
        self.running[key] = Running(list(prompt), max_tokens, torch.Generator().manual_seed(seed))
        self.prompts[key] = list(prompt)
        self.most = max(self.most, len(self.running))

    @torch.no_grad()
    def ended(self):
        found = []
        while self.running and not found:
            if self.down:
                raise ConnectionError("down")
            for key, text in list(self.running.items()):
                logits = self.model(torch.tensor([text.prompt + text.tokens])).logits[:, -1]
                token, logprob = sample(logits, self.temperature, text.generator)
                text.tokens.append(token.item())
                text.logprobs.append(logprob.item())
                if token.item() in self.stops or len(text.tokens) == text.max_tokens:
                    found.append(Written(key, text.tokens, text.logprobs))
                    del self.running[key]
        return found

    def sync(self):
        self.model.load_state_dict(self.policy.state_dict())

    def abort(self):
        self.running.clear()
