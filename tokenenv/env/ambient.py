"""What a caller's own torch settings must not change."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Args = ParamSpec("Args")
Result = TypeVar("Result")


def ordinary_tensors(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Runs `function` without gradients, and outside `torch.inference_mode` where the caller is in
    it: what an env keeps has to be writable at the next call, which may come from elsewhere."""

    @wraps(function)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
