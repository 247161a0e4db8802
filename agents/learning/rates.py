"""The learning rate that an agent takes where none is given: by what it trains.

The same rate does not suit all. AdamW moves each weight by about the rate in each step, whatever
the gradient is. A small model needs large steps. All weights of a pretrained model moved that far
make another model at once. Adapters begin at zero and are few, so they bear more. What the first
update moves SmolLM2-135M by is in docs/algorithms.md, "The learning rate".
"""

import logging
from typing import Any

from torch import nn

from tokenenv.models.adapters import adapter_layers

logger = logging.getLogger("tokenenv")

SMALL = 10_000_000
"""The largest number of weights of a small model. The bundled ones have 1 million or fewer."""
SMALL_LR = 3e-4
FULL_LR = 1e-5
"""For all weights of a model that is not small."""
LORA_LR = 2e-4
"""For the adapters of a model that is not small."""


def default_lr(policy: nn.Module) -> float:
    """Return the learning rate for what of this policy is trained, and log it where the model is
    not a small one."""
    own: Any = getattr(policy, "model", None)
    model = own if isinstance(own, nn.Module) else policy
    size = sum(weight.numel() for weight in model.parameters())
    is_trained = any(weight.requires_grad for weight in model.parameters())
    if size <= SMALL or not is_trained:
        return SMALL_LR
    has_adapters = bool(adapter_layers(model))
    rate, trained = (LORA_LR, "adapters") if has_adapters else (FULL_LR, "all weights")
    # A warning is shown where nobody has set up logging.
    logger.warning("lr=None is %g here: %s of %.0fM weights are trained", rate, trained, size / 1e6)
    return rate
