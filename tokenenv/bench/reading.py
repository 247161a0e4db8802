"""Counting what the models behind a reward read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class ReadTokens:
    """Counts the tokens that go through the models of an env's reward, padding included: what the
    reward costs beside the policy.

    A model that does more than one thing (the reference that also scores) counts as well. Models
    elsewhere, behind a server, cannot be counted, and `count` is then None.

    Args:
        envs: a `TokenVectorEnv`.
    """

    def __init__(self, envs: Any) -> None:
        self._count, self._paused, self._known = 0, False, True
        roles = {
            role: model
            for role, model in envs.frozen_models.items()
            if role != "reference" and " watched " not in f" {role} "
        }
        for model in {id(model): model for model in roles.values()}.values():
            self._listen(model)

    @property
    def count(self) -> int | None:
        """The tokens so far; None where they are not known."""
        return self._count if self._known else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing: evaluations may share models with the training."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _listen(self, model: Any) -> None:
        if isinstance(model, nn.Module):
            model.register_forward_pre_hook(self._forward, with_kwargs=True)
        elif hasattr(model, "after"):
            step = model.after

            def after(states: Tensor, tokens: Tensor) -> Tensor:
                self._add(tokens.numel())
                return step(states, tokens)

            model.after = after
        else:
            self._known = False

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            self._add(ids.numel())
        elif isinstance(kwargs.get("inputs_embeds"), Tensor):
            self._add(kwargs["inputs_embeds"][..., 0].numel())

    def _add(self, tokens: int) -> None:
        self._count += 0 if self._paused else tokens
