"""Process rewards: the scores at the ends of a text's steps, in the four forms that are in use."""

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.prefix_scores import read_lengths
from tokenenv.models.trunks import text_states
from tokenenv.rewards.redistribute import at_places
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.term import Context, RewardTerm

FORMS = ("sum", "delta", "clip", "min")


class Process(RewardTerm):
    """A process reward, paid at the last token of each step of a text, else 0.

    With q_k the step scorer's score at the end of step k, and q_0 that of the prompt:

    - "sum": r = q_k (Lightman et al. 2023, arXiv 2305.20050)
    - "delta": r = q_k - q_{k-1}, the progress that a step makes
    - "clip": r = min(q_k - floor, 0) (Gao et al. 2024, arXiv 2410.15115)
    - "min": r = softmax(-q / temperature)_k q_k (PURE, Cheng et al. 2025, arXiv 2504.15275)

    A step ends with one of the task's `step_end_token_ids`, and where a scored text ends. An
    unscored truncation ends no step. Steps are the policy's own: where the environment writes such
    a token, "delta" alone pays the difference, on the token before, so that differences add up.

    The rewards add up to something other than the score, so neither return nor gradient is
    preserved. One case preserves both: "delta" on the sequence score itself, which is `Shaping`
    with Phi = the score after the last step, and is then reported as potential-based. "sum" pays
    for the number of steps, so a policy learns to make many. "delta" and "clip" bound the return,
    and "min" pays about the worst step; it needs the finished text (hindsight) and one more forward
    of it.

    Args:
        form: "sum", "delta", "clip" or "min".
        floor: for "clip", in units of q: steps that score it or more are paid nothing.
        temperature: for "min", in units of q, more than 0; near 0 only the worst step is paid.
    """

    name = "process"
    needs = frozenset({"step ends", "step scorer"})
    preserves_return = False
    preserves_gradient = False

    def __init__(self, form: str = "sum", *, floor: float = 0.5, temperature: float = 0.1) -> None:
        check_choice("form", form, FORMS)
        if not temperature > 0:
            raise InvalidArgument(
                f"temperature={temperature} is not allowed; it must be more than 0."
            )
        self.form, self.floor, self.temperature = form, floor, temperature
        self.has_memory = form == "delta"
        if form == "min":
            self.kind, self.pays_score = "hindsight", True

    def bind(self, context: Context) -> None:
        """Takes the step scorer and the tokens that end a step."""
        super().bind(context)
        scorer = context.step_scorer
        assert scorer is not None
        self.models, self._head, self._max_batch_tokens = (
            (scorer.model,),
            scorer.head,
            context.max_batch_tokens,
        )
        self._of_text = scorer if scorer is context.scorer and not scorer.per_token else None
        self._ends_step = torch.zeros(
            context.spec.vocab_size, dtype=torch.bool, device=context.device
        )
        self._ends_step[list(context.task.step_end_token_ids)] = True
        if self.form == "delta" and self._of_text is not None:
            self.preserves_return = self.preserves_gradient = self.has_potential = True

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what a step is worth at its last token."""
        if self.form == "delta":
            return self._gained(batch)
        q = self._score(batch.after)
        paid = q if self.form == "sum" else self._clipped(q)
        return torch.where(self._ends_step[batch.tokens] | batch.scored, paid, 0.0)

    def _gained(self, batch: Transitions) -> Tensor:
        """(K,): what the score after the last step gained, up to where the policy acts next."""
        now = torch.where(batch.scored, self._score(batch.next), batch.next.memory[self.name])
        return now - batch.before.memory[self.name]

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the score after the last step; where a text begins, that of its prompt."""
        q = self._score(states)
        return q if memory is None else torch.where(self._ends_step[tokens], q, memory)

    def potential(self, states: States) -> Tensor:
        """(K,): the score after the last step, of "delta"."""
        return states.memory[self.name]

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): each step's score at its last own token, weighted towards the worst."""
        own, places = texts.own_mask(max_new_tokens), texts.positions(max_new_tokens)
        last = np.arange(max_new_tokens) == texts.steps()[:, None] - 1
        tokens = at_places(texts.tokens, places)
        ends = own & (self._ends_step[tokens] | upload(last, own.device))
        q = self._text_scores(texts, places)
        share = torch.where(ends, -q / self.temperature, -torch.inf).softmax(1)
        return torch.where(ends, share * q, 0.0)

    def _score(self, states: States) -> Tensor:
        if self._of_text is not None:
            assert states.score is not None
            # It may have been read at an earlier token (see `Scorer.pad_token_id`), which the head
            # on the last state would not do.
            return states.score
        return self._head(states.of(self.models[0]))

    def _clipped(self, q: Tensor) -> Tensor:
        return (q - self.floor).clamp(max=0.0)

    def _text_scores(self, texts: FinishedTexts, places: np.ndarray) -> Tensor:
        """(B, T): the step scorer's score after the tokens at `places` (B, T) of each text."""
        scores = torch.zeros(places.shape, dtype=torch.float32, device=texts.tokens.device)
        for rows in micro_batches(texts.length, self._max_batch_tokens):
            at, width = upload(rows, scores.device), int(texts.length[rows].max())
            states = text_states(self.models[0], texts.tokens[at, :width], texts.length[rows])
            each = self._head(states.flatten(0, 1)).view(len(rows), width)
            if self._of_text is not None:
                ends = np.zeros((len(rows), width), dtype=np.int64)
                pad_id = self._of_text.pad_token_id
                for i, row in enumerate(rows):
                    ends[i, : texts.length[row]] = (
                        read_lengths(texts.ids[row][: texts.length[row]], pad_id) - 1
                    )
                each = each.gather(1, upload(ends, each.device))
            scores[at] = at_places(each, places[rows])
        return scores
