"""Learning forwards and gradients in length-sorted micro-batches.

One minibatch of an update is cut into micro-batches of at most `max_batch_tokens` tokens, padding
included, so that memory is bounded. A micro-batch always holds whole texts. Losses are weighted
sums over tokens, so the sum over micro-batches is exactly the loss of the minibatch.

Several processes that learn together (ranks, `tokenenv.ranks`) all hold the whole batch. Each runs
its share of the micro-batches, and what they found is added up. So whatever is made of a batch
beside these forwards, on every rank alike, needs to know nothing of ranks.

Suffixes: B episodes, L context, T response tokens, H hidden size, K response tokens of one
micro-batch, flat.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenenv import ranks
from tokenenv.agents.episodes import EpisodeBatch, token_mask
from tokenenv.agents.learning.kept import KeptStates
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.learning.token_stats import token_stats
from tokenenv.models.batching import last_states, micro_batches
from tokenenv.models.trunks import logits_head, text_states

Metrics = dict[str, float]

FORWARD_TOKENS = {"cpu": 64}
"""How many tokens one more forward and backward cost as much as, by device (measured on the CPU
with a model of 1.1 million parameters). Elsewhere kernels are so short that it is `MANY_TOKENS`."""
MANY_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the current policy says about the K response tokens of some whole episodes: float32 (K,)
    tensors on the policy's device, one entry a token, text after text."""

    logprob: Tensor
    """log pi of the tokens that were emitted, in nats."""
    entropy: Tensor
    """Entropy of the distribution that each token was drawn from, in nats."""
    ref_kl: Tensor
    """Full-vocabulary KL to the reference at each state, in nats; zero without `full_kl_coef`."""
    teacher_kl: Tensor
    """Full-vocabulary KL(pi_T || pi) from the teacher at each state, in nats; zero without
    `distill_coef`."""
    value: Tensor
    """The critic's value of the state that each token was emitted in, in reward."""
    rows: Tensor
    """int64 on the CPU: the row of the `EpisodeBatch` that each token belongs to."""
    steps: Tensor
    """int64 on the CPU: the place of each token in its response, from 0."""
    last_value: Tensor | None = None
    """The critic's value (B,) of each text's last state, where it was asked for."""
    logged: dict[str, Tensor] = field(default_factory=dict)
    """Numbers (K,) that a policy loss leaves for the log, by the metric's name. The metric is their
    mean over the minibatch's tokens, weighted as the loss is."""

    def pick(self, values: Tensor) -> Tensor:
        """Return these tokens' entries (K,) of `values`, (B, T) or (B,), on the policy's device."""
        chosen = values[self.rows, self.steps] if values.ndim == 2 else values[self.rows]
        return chosen.to(self.logprob.device)

    def text_means(self, values_K: Tensor) -> Tensor:
        """Return (K,): for each token the mean of `values_K` over all response tokens of its text.

        The mean is exact however the minibatch is cut, because a micro-batch holds whole texts.
        Differentiable in `values_K`.
        """
        # `rows` are places in the whole batch; here the texts are numbered 0, 1, ... to add up.
        index_K, counts = self.rows.unique(return_inverse=True, return_counts=True)[1:]
        index_K, counts = index_K.to(values_K.device), counts.to(values_K.device)
        sums = values_K.new_zeros(len(counts)).index_add(0, index_K, values_K)
        return (sums / counts)[index_K]


class FrozenLM:
    """A frozen causal LM that a full-vocabulary KL is measured against: the reference, or a
    teacher."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self.head = logits_head(model, vocab_size)

    @torch.no_grad()
    def states(self, tokens_BL: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the hidden states (B, L, H) of right-padded texts."""
        return text_states(self._model, tokens_BL, lengths)


class _Texts:
    """Some texts on the policy's device, and where the states before their response tokens are.

    A text's last token is read for the state after it alone, so it is left out, and with it what
    the environment wrote behind it; with `whole` they are there.
    """

    def __init__(
        self, batch: EpisodeBatch, rows: np.ndarray, device: torch.device, *, whole: bool = False
    ) -> None:
        self.texts, index = rows, torch.as_tensor(rows)
        responses = batch.response_length_B[index]
        lengths = batch.position_BT1[index, responses if whole else responses - 1]
        self.lengths, self.counts = lengths.numpy(), responses.tolist()
        # The batch is padded to its longest text; this micro-batch needs its own longest only.
        self.tokens_BL = batch.tokens_BL[index, : int(lengths.max())].to(device)
        row_K, self.steps = token_mask(responses, int(responses.max())).nonzero(as_tuple=True)
        self.rows = index[row_K]
        place_K = batch.position_BT1[self.rows, self.steps]
        self.chosen_K = batch.tokens_BL[self.rows, place_K].to(device)
        # A token is chosen at the state of the token before it, whoever wrote that: response token
        # 0 at the prompt's last token. The place counts in the flattened (B * L,) texts.
        self.place_K = (row_K * self.tokens_BL.shape[1] + place_K - 1).to(device)

    def at(self, states_BLH: Tensor) -> Tensor:
        """Return the states (K, H) that the response tokens were chosen at."""
        return states_BLH.flatten(0, 1).index_select(0, self.place_K)

    def frozen_states(self, model: FrozenLM, kept: KeptStates | None) -> Tensor:
        """Return a frozen model's states (K, H) that the response tokens were chosen at."""

        def read() -> Tensor:
            return self.at(model.states(self.tokens_BL, self.lengths))

        return read() if kept is None else kept.of(model, self.texts, self.counts, read)


def micro_batches_for(
    policy: LMPolicy, lengths: np.ndarray, max_batch_tokens: int
) -> list[np.ndarray]:
    """Return the micro-batches of this rank's share of some texts: within the budget, and cut
    further where a forward more costs the policy's device less than the padding that it spares."""
    cost = FORWARD_TOKENS.get(policy.device.type, MANY_TOKENS)
    own = ranks.share(lengths)
    return [own[rows] for rows in micro_batches(lengths[own], max_batch_tokens, cost)]


def outputs(
    policy: LMPolicy,
    batch: EpisodeBatch,
    rows: np.ndarray,
    *,
    temperature: float = 1.0,
    reference: FrozenLM | None = None,
    teacher: FrozenLM | None = None,
    kept: KeptStates | None = None,
    critic: bool = True,
    last_value: bool = False,
) -> Outputs:
    """Run one forward over the whole texts `rows` and read it where response tokens were chosen.

    With `last_value` the critic is read at the texts' last states as well; without `critic` it is
    not read, and values are zero. What the weights do not change is taken from `kept`, whose batch
    this is, and put there.
    """
    texts = _Texts(batch, rows, policy.device, whole=last_value)
    tokens_BL, masks_BTM = texts.tokens_BL, batch.action_mask_BTM
    # The masks stay on the host with the batch; only those of this micro-batch are uploaded.
    mask_KM = None
    if masks_BTM is not None:
        mask_KM = masks_BTM[texts.rows, texts.steps].to(tokens_BL.device)
    with policy.autocast():
        with nullcontext() if kept is None else kept.below(rows, texts.lengths):
            if critic:
                states_BLH, value_states_BLH = policy.states(tokens_BL, texts.lengths)
            else:
                states_BLH = policy.lm_states(tokens_BL, texts.lengths)
        frozen: dict[str, Any] = {}
        for name, model in (("ref", reference), ("teacher", teacher)):
            if model is not None:
                states_KH = texts.frozen_states(model, kept)
                frozen |= {f"{name}_states_KH": states_KH, f"{name}_head": model.head}
        stats = token_stats(
            texts.at(states_BLH),
            texts.chosen_K,
            policy.head,
            policy.vocab_size,
            temperature=temperature,
            mask_KM=mask_KM,
            **frozen,
        )
        value_K = torch.zeros_like(stats.logprob)
        if critic:
            value_K = policy.value(texts.at(value_states_BLH))
        ends = policy.value(last_states(value_states_BLH, texts.lengths)) if last_value else None
    numbers = stats.logprob, stats.entropy, stats.kl, stats.teacher_kl
    return Outputs(*numbers, value_K, texts.rows, texts.steps, ends)


def values_unknown(batch: EpisodeBatch, update: int) -> Tensor:
    """Return bool (B,): the texts whose values before an update of this number have to be computed.

    Of the others the critic's values were read as they were drawn, all from the policy that the
    update begins with. Where the value of the last state counts, that has not been read.
    """
    known_BT = batch.drawn_value_BT.isfinite() | ~batch.mask_BT
    return ~known_BT.all(1) | (batch.version_B < update) | batch.bootstraps_B


@torch.no_grad()
def state_values(
    policy: LMPolicy, batch: EpisodeBatch, max_batch_tokens: int, which_B: Tensor | None = None
) -> Tensor:
    """Return the critic's values (B, T + 1) on the CPU: before each response token, then of the
    last state; zero to the right. With `which_B` (bool) only those texts are computed, and the
    others have the values that they were drawn with, and zero for the last state."""
    # One column more than tokens: a text cut without a score bootstraps from its last state.
    chosen = _chosen(batch, which_B)
    drawn_BT1 = _drawn(batch, chosen)[1]
    values_BT1 = torch.zeros_like(drawn_BT1)
    for rows in micro_batches_for(policy, batch.length_B.numpy()[chosen], max_batch_tokens):
        some = chosen[rows]
        texts = _Texts(batch, some, policy.device, whole=True)
        with policy.autocast():
            states_BLH = policy.value_states(texts.tokens_BL, texts.lengths)
            value_K = policy.value(texts.at(states_BLH))
            last_value_B = policy.value(last_states(states_BLH, texts.lengths))
        values_BT1[texts.rows, texts.steps] = value_K.cpu()
        values_BT1[some, batch.response_length_B[some]] = last_value_B.cpu()
    ranks.add_up([values_BT1])
    return drawn_BT1 + values_BT1


def values_before(
    policy: LMPolicy, batch: EpisodeBatch, update: int, max_batch_tokens: int
) -> Tensor:
    """Return the critic's values (B, T + 1) before an update of this number, as `state_values`
    does. Those that are known, since texts were drawn or their log-probs read again, are not
    computed once more."""
    read_BT1: Tensor | None = batch.learned.get("state_value")
    if read_BT1 is not None:
        return read_BT1
    return state_values(policy, batch, max_batch_tokens, values_unknown(batch, update))


class TokenOutputs(NamedTuple):
    """What a policy says about every response token of a batch, on the CPU; zero to the right of
    each text."""

    logprob_BT: Tensor
    """log pi of the tokens that were emitted, in nats."""
    entropy_BT: Tensor
    """Entropy of the distribution at each token, in nats."""


@torch.no_grad()
def token_outputs(
    policy: LMPolicy, batch: EpisodeBatch, max_batch_tokens: int, temperature: float = 1.0
) -> TokenOutputs:
    """Return the present policy's log-probs and entropies (B, T): one forward over all texts."""
    found = TokenOutputs(*torch.zeros(2, *batch.logprob_BT.shape))
    for rows in micro_batches_for(policy, batch.length_B.numpy(), max_batch_tokens):
        out = outputs(policy, batch, rows, temperature=temperature, critic=False)
        found.logprob_BT[out.rows, out.steps] = out.logprob.cpu()
        found.entropy_BT[out.rows, out.steps] = out.entropy.cpu()
    ranks.add_up(found)
    return found


@torch.no_grad()
def token_logprobs(
    policy: LMPolicy,
    batch: EpisodeBatch,
    max_batch_tokens: int,
    temperature: float = 1.0,
    which_B: Tensor | None = None,
) -> Tensor:
    """Return the present policy's log pi (B, T) of every response token, on the CPU; zero to the
    right. With `which_B` (bool) only those texts are computed, and the others keep the log-probs
    they were drawn with."""
    if which_B is None:
        return token_outputs(policy, batch, max_batch_tokens, temperature).logprob_BT
    chosen = _chosen(batch, which_B)
    drawn_BT = _drawn(batch, chosen)[0]
    logprob_BT = torch.zeros_like(drawn_BT)
    for rows in micro_batches_for(policy, batch.length_B.numpy()[chosen], max_batch_tokens):
        out = outputs(policy, batch, chosen[rows], temperature=temperature, critic=False)
        logprob_BT[out.rows, out.steps] = out.logprob.cpu()
    ranks.add_up([logprob_BT])
    return drawn_BT + logprob_BT


@torch.no_grad()
def logprobs_and_values(
    policy: LMPolicy,
    batch: EpisodeBatch,
    max_batch_tokens: int,
    temperature: float = 1.0,
    which_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `token_logprobs` and `state_values` do, (B, T) and (B, T + 1), by one forward."""
    chosen = _chosen(batch, which_B)
    drawn_BT, drawn_BT1 = _drawn(batch, chosen)
    logprob_BT, values_BT1 = torch.zeros_like(drawn_BT), torch.zeros_like(drawn_BT1)
    for rows in micro_batches_for(policy, batch.length_B.numpy()[chosen], max_batch_tokens):
        some = chosen[rows]
        out = outputs(policy, batch, some, temperature=temperature, last_value=True)
        assert out.last_value is not None
        logprob_BT[out.rows, out.steps] = out.logprob.cpu()
        values_BT1[out.rows, out.steps] = out.value.cpu()
        values_BT1[some, batch.response_length_B[some]] = out.last_value.cpu()
    ranks.add_up([logprob_BT, values_BT1])
    return drawn_BT + logprob_BT, drawn_BT1 + values_BT1


def _chosen(batch: EpisodeBatch, which_B: Tensor | None) -> np.ndarray:
    """Return the rows of the texts that are to be computed; None means all."""
    return np.arange(len(batch)) if which_B is None else which_B.nonzero()[:, 0].numpy()


def _drawn(batch: EpisodeBatch, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the log-probs (B, T) and values (B, T + 1) that all texts but the chosen ones were
    drawn with; zero elsewhere."""
    others_BT = batch.mask_BT
    others_BT[chosen] = False
    logprob_BT, value_BT = (
        drawn_BT.masked_fill(~others_BT, 0.0)
        for drawn_BT in (batch.logprob_BT, batch.drawn_value_BT)
    )
    return logprob_BT, torch.nn.functional.pad(value_BT, (0, 1))


LossFunction = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]
"""A loss of one micro-batch: a sum over tokens whose weights sum to 1 over the minibatch, and
metrics that are such sums as well."""


def accumulate_gradient(
    policy: LMPolicy,
    batch: EpisodeBatch,
    rows: np.ndarray,
    loss_function: LossFunction,
    max_batch_tokens: int,
    *,
    temperature: float = 1.0,
    reference: FrozenLM | None = None,
    teacher: FrozenLM | None = None,
    kept: KeptStates | None = None,
    scale: float = 1.0,
) -> Metrics:
    """Put the gradient of one minibatch, times `scale`, into the weights' `.grad`, which are None
    or 0, one micro-batch at a time. Return the summed metrics. Both are those of all ranks."""
    totals: dict[str, Tensor] = {}
    for micro in micro_batches_for(policy, batch.length_B.numpy()[rows], max_batch_tokens):
        out = outputs(
            policy,
            batch,
            rows[micro],
            temperature=temperature,
            reference=reference,
            teacher=teacher,
            kept=kept,
        )
        loss, metrics = loss_function(out)
        # The graph of a micro-batch is freed here, before the next one is built.
        (scale * loss).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
    ranks.add_up_gradients([weight for weight in policy.parameters() if weight.requires_grad])
    # Metrics stay on the device until the end: one wait a minibatch, not one a micro-batch.
    return ranks.summed({name: float(value) for name, value in totals.items()})
