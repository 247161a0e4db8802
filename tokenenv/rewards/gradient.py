"""The score, shared out by its gradient along a line to the response: integrated gradients."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models.batching import hidden_states, micro_batches, upload
from tokenenv.models.cached_lm import acting
from tokenenv.models.prefix_scores import read_length, read_scores
from tokenenv.models.trunks import trunk_of
from tokenenv.rewards.redistribute import (
    Redistribution,
    at_places,
    own_places,
    read_rows,
    rest_on_last,
)
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.term import Context
from tokenenv.types import Scorer

DOUBLINGS = 3
"""A text gets up to 2**3 times as many points as `steps`."""
ROUNDING = 1e-3
"""The least sum of |r_t| that an error is compared with: below it, all is rounding."""


class Gradient(Redistribution):
    """The score, shared out by integrated gradients: r_t = e_t . int_0^1 (d score / d e_t)(a e) da.

    e are the input embeddings of the own tokens. The last token is also paid what the sum of all
    r_t lacks to the score.

    These are integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) along the straight
    line from zero embeddings; the embeddings of the prompt, of a prefix and of what the environment
    wrote stay as they are. The
    integral's sum is score - f(zero embeddings). A text for which `steps` points miss that by more
    than `tolerance` of the sum of |r_t| gets twice as many points, up to 8 times as many, and then
    a warning. The points are Gauss-Legendre's in a**(1/3), which are dense near zero: layers that
    normalise their input (RMSNorm) see little but its direction, so most happens there.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen). Costs one forward of each token, and `steps` forwards and backwards of it, up
    to 15 times as many with all doublings. It fails where the score is not smooth: sharp attention,
    arithmetic in 16 bits, and a line that leads through embeddings that no token has.

    Args:
        steps: the points on the line, 1 or more.
        tolerance: the allowed error of the sum, relative to the sum of |r_t|; more than 0.
    """

    name = "gradient"
    needs = frozenset({"transformer scorer"})

    def __init__(self, steps: int = 16, tolerance: float = 0.01) -> None:
        if steps < 1:
            raise InvalidArgument(f"steps={steps} is not allowed; it must be 1 or more.")
        if not tolerance > 0:
            raise InvalidArgument(f"tolerance={tolerance} is not allowed; it must be more than 0.")
        self.steps, self.tolerance = steps, tolerance

    def bind(self, context: Context) -> None:
        """Takes the scorer. Raises `ModelError` if its trunk does not run on input embeddings."""
        super().bind(context)
        assert context.causal_scorer is not None
        self._trunk = trunk_of(context.causal_scorer.model)
        self._warned = False
        _check_embeddings(self._trunk)

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the attributions; the baseline's score and the error of the integral on the last
        token."""
        assert texts.score is not None
        # The caller may step in inference mode, in which there are no gradients.
        with torch.inference_mode(False), acting(self._trunk):
            placed = self._attributions(texts, max_new_tokens, texts.score - self._baseline(texts))
        return rest_on_last(placed, texts)

    def _attributions(self, texts: FinishedTexts, max_new_tokens: int, change: Tensor) -> Tensor:
        """The attributions (B, T); each row should add up to its entry of `change` (B,)."""
        placed = torch.zeros(len(change), max_new_tokens, dtype=torch.float32, device=change.device)
        rows = np.arange(len(change))
        for doubling in range(DOUBLINGS + 1):
            at = upload(rows, placed.device)
            placed[at] = self._integral(texts, rows, self.steps * 2**doubling, max_new_tokens)[at]
            error = _relative_error(placed, change)
            rows = np.flatnonzero((error > self.tolerance).cpu().numpy())
            if not len(rows):
                return placed
        self._warn(len(rows), float(error.max()))
        return placed

    def _integral(
        self, texts: FinishedTexts, rows: np.ndarray, steps: int, max_new_tokens: int
    ) -> Tensor:
        """(B, T): the attributions of the texts `rows` (n,) from so many points each; zero for the
        others."""
        points, weights = (np.tile(column, len(rows)) for column in quadrature(steps))
        rows, places = np.repeat(rows, steps), texts.positions(max_new_tokens)
        placed = torch.zeros(
            len(texts.ids), max_new_tokens, dtype=torch.float32, device=texts.tokens.device
        )
        for group in micro_batches(texts.length[rows], self._max_batch_tokens):
            slopes = self._slopes(texts, rows[group], points[group])
            weight = upload(weights[group], placed.device)[:, None]
            values = at_places(slopes.to(placed.device) * weight, places[rows[group]])
            placed.index_add_(0, upload(rows[group], placed.device), values)
        return torch.where(texts.own_mask(max_new_tokens), placed, 0.0)

    def _slopes(self, texts: FinishedTexts, rows: np.ndarray, points: np.ndarray) -> Tensor:
        """(n, W): e_t . d score / d e_t of each paid token at `points` (n,) of the line; zero for
        other tokens."""
        moving, inputs = self._on_line(texts, rows, points)
        with torch.enable_grad():
            inputs.requires_grad_()
            (gradient,) = torch.autograd.grad(self._scores(inputs, texts, rows).sum(), inputs)
        return (gradient.float() * moving.float()).sum(-1)

    def _baseline(self, texts: FinishedTexts) -> Tensor:
        """(B,): the scores at the line's beginning."""
        scores = torch.zeros(len(texts.ids), dtype=torch.float32, device=texts.tokens.device)
        for rows in micro_batches(texts.length, self._max_batch_tokens):
            _, inputs = self._on_line(texts, rows, np.zeros(len(rows), dtype=np.float32))
            scores[upload(rows, scores.device)] = self._scores(inputs, texts, rows).to(
                scores.device
            )
        return scores

    def _on_line(
        self, texts: FinishedTexts, rows: np.ndarray, points: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The embeddings (n, W, H) of the tokens that may be paid, zero elsewhere, and the inputs
        at `points` (n,)."""
        embeddings = self._trunk.get_input_embeddings()(read_rows(self._trunk, texts, rows))
        paid, place = own_places(texts, rows, embeddings.shape[1]), np.arange(embeddings.shape[1])
        paid &= place >= (texts.prompt_length + texts.prefix_length)[rows, None]
        moving = embeddings * upload(paid, embeddings.device)[..., None]
        return moving, embeddings - moving * upload(1 - points, embeddings.device).to(
            embeddings.dtype
        )[:, None, None]

    def _scores(self, inputs: Tensor, texts: FinishedTexts, rows: np.ndarray) -> Tensor:
        """(n,): the scores of `inputs` (n, W, H) in place of the embeddings."""
        states = _states(self._trunk, inputs)
        assert isinstance(self._scorer, Scorer)
        pad_id = self._scorer.pad_token_id
        ends = np.asarray(
            [read_length(texts.ids[row][: texts.length[row]], pad_id) for row in rows]
        )
        own = own_places(texts, rows, inputs.shape[1])
        return read_scores(self._scorer, states, texts.prompt_length[rows], ends, own)

    def _warn(self, count: int, error: float) -> None:
        if not self._warned:
            warnings.warn(
                f"reward={self.name!r}: with {self.steps * 2**DOUBLINGS} points the attributions "
                f"of {count} text(s) miss their "
                f"sum by up to {error:.1%} of their size (tolerance {self.tolerance:.1%}); the "
                f"last token is paid the rest.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights (steps,) float32 on [0, 1] for integrals of what changes fast near
    0: Gauss-Legendre in u, at u**3.

    The weights add up to 1, also where there is one point, so that a constant is integrated
    exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    u = (nodes + 1) / 2
    weights = weights * u**2
    return (u**3).astype(np.float32), (weights / weights.sum()).astype(np.float32)


def _relative_error(placed: Tensor, change: Tensor) -> Tensor:
    """(B,): how far the rows of `placed` (B, T) are from adding up to `change` (B,), relative to
    what was added up."""
    # A score may be read before the first own token (see `Scorer.pad_token_id`). All attributions
    # of such a text are 0, and its change is rounding.
    return (placed.sum(1) - change).abs() / placed.abs().sum(1).clamp(min=ROUNDING)


def _states(trunk: Any, inputs: Tensor) -> Tensor:
    """The states (n, W, H) after right-padded input embeddings (n, W, H); causal attention needs no
    mask."""
    return trunk(inputs_embeds=inputs, use_cache=False)[0]


def _check_embeddings(trunk: Any) -> None:
    """Raise `ModelError` unless the model's states are a function of its input embeddings: some
    models also look at the token ids in other ways."""
    tokens = torch.arange(3, device=trunk.device)[None] % trunk.config.get_text_config().vocab_size
    with acting(trunk):
        expected = hidden_states(trunk, tokens, [3])
        try:
            states = _states(trunk, trunk.get_input_embeddings()(tokens))
        except Exception as error:  # whatever a foreign model's code raises
            raise ModelError(
                f"reward='gradient': {type(trunk).__name__} does not run on input embeddings "
                f"({error})."
            ) from error
    tolerance = 1e-4 if states.dtype == torch.float32 else 5e-2
    # On no device (`models.shapes`) there are no numbers to compare.
    if not states.is_meta and not torch.allclose(states, expected, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"reward='gradient': {type(trunk).__name__} reads tokens other than by their input "
            f"embeddings."
        )
