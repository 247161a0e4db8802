"""What is paid at the ends of turns, and what differences along a text add up to where an
environment writes into it: by hand, on every text of small worlds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tabular import STEP_END, World, worlds
from torch import Tensor
from turn_world import STOP, TurnWorld, history_of, turn_worlds

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.process import Process
from tokenenv.rewards.scaling import Clipped
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Oracle, Shaping
from tokenenv.rewards.turn import OF, Turn

scorers = pytest.mark.parametrize("scorer", ["sequence", "token"])
both_ends = pytest.mark.parametrize("score_truncated", [True, False])


def paid(world: World, scorer: str, reward: Any, **options: Any) -> Tensor:
    """(B, T) float64."""
    found = world.paid(scorer, reward=reward, **options).token_rewards
    return torch.from_numpy(found).double()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


class Walked:
    """A text of a world, token by token of the policy's: the score before it, right after it, and
    where the policy acts next."""

    def __init__(self, world: TurnWorld, row: int, scorer: str, score_truncated: bool) -> None:
        self.world, self.row, self.count = world, row, int(world.length[row])
        self.scored = score_truncated or not bool(world.truncated[row])
        if scorer == "token":
            sums = [0.0, *world.scores[world.after[row, : self.count]].cumsum(0).tolist()]
            self.before, self.next = sums[:-1], sums[1:]
        else:
            self.before = world.scores[world.before[row, : self.count]].tolist()
            self.next = world.scores[world.next[row, : self.count]].tolist()
        self.last, self.score = self.count - 1, self.next[-1]
        self.turn = world.turns[row, : self.count].tolist()
        self.ends_turn = world.ends_turn[row, : self.count].tolist()
        self.wrote = (world.next != world.after)[row, : self.count].tolist()
        self.reward = world.earned[row, : self.count].tolist()


def by_hand(
    world: TurnWorld,
    scorer: str,
    pays: Callable[[Walked], list[float]],
    score_truncated: bool = True,
) -> Tensor:
    """(B, T): `pays` gives what each token of a text is paid."""
    out = torch.zeros(world.mask.shape, dtype=torch.float64)
    for row in range(len(out)):
        numbers = pays(Walked(world, row, scorer, score_truncated))
        out[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return out


# ---------------------------------------------------------------- the turn design


def rewards_of_turns(gamma: float) -> Callable[[Walked], list[float]]:
    return lambda w: [gamma ** w.turn[t] * w.reward[t] for t in range(w.count)]


def differences_of_turns(gamma: float) -> Callable[[Walked], list[float]]:
    def pays(w: Walked) -> list[float]:
        out, stands = [], 0.0
        for t in range(w.count):
            given = w.wrote[t] or w.reward[t] != 0
            out.append(gamma ** w.turn[t] * (w.reward[t] - stands) if given else 0.0)
            stands = w.reward[t] if given else stands
        return out

    return pays


def scores_of_turns(gamma: float) -> Callable[[Walked], list[float]]:
    def pays(w: Walked) -> list[float]:
        out, began = [], w.before[0]
        for t in range(w.count):
            due = w.wrote[t] or (t == w.last and w.scored)
            out.append(gamma ** w.turn[t] * (w.next[t] - began) if due else 0.0)
            began = w.next[t] if due else began
        return out

    return pays


PAYS = {"reward": rewards_of_turns, "differences": differences_of_turns, "score": scores_of_turns}


@scorers
@both_ends
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("of", OF)
def test_turns_are_paid_at_their_last_token(
    of: Any, gamma: float, score_truncated: bool, scorer: str
) -> None:
    for world in turn_worlds():
        options = {"score_truncated": score_truncated}
        found = paid(world, scorer, Turn(of, gamma=gamma), **options)
        close(found, by_hand(world, scorer, PAYS[of](gamma), score_truncated))
        assert (found[~world.ends_turn] == 0).all()
        assert int(world.turns.max()) == 2


def test_the_design_is_the_tasks_own_reward() -> None:
    world = turn_worlds()[0]
    close(paid(world, "sequence", "turn"), world.earned)


def test_undiscounted_differences_add_up_to_the_last_number() -> None:
    world = turn_worlds()[0]
    last = [next((r for r in one.turn_rewards[::-1] if r), 0.0) for one in world.outcomes]
    total = paid(world, "sequence", Turn("differences")).sum(1)
    close(total, torch.tensor(last, dtype=torch.float64))


def test_a_number_of_0_is_one_where_something_is_written_and_none_at_the_end() -> None:
    """Four texts of several turns, in the first of which the environment says 2."""
    world = turn_worlds()[0]
    envs = world.env(reward=Turn("differences"), kl="none")
    texts = {
        "0 is written": ([1, 2, 1, 2, STOP], [2.0, 0.0, 3.0], [2, -2, 3]),
        "5 without writing": ([1, 2, 2, 2], [2.0, 5.0, 0.0], [2, 3, 0]),
        "0 without writing": ([1, 2, 2, 2], [2.0, 0.0, 0.0], [2, 0, 0]),
        "5 at the end": ([1, 2, 2, STOP], [2.0, 0.0, 5.0], [2, 0, 3]),
    }
    for response, numbers, expected in texts.values():
        own = [t not in (1, 3) or (t == 3 and len(response) == 4) for t in range(len(response))]
        found = envs.score_episodes([[0]], [response], own=[own], turn_rewards=[numbers])
        assert found.token_rewards[0].tolist() == expected


def test_without_replies_the_score_of_turns_is_terminal_less_a_constant() -> None:
    for world in worlds():
        for scorer in ("sequence", "token"):
            terminal, found = (paid(world, scorer, r) for r in ("terminal", Turn("score")))
            first = world.scores[0] if scorer == "sequence" else 0.0
            close(found, terminal - first * world.final)
        assert (
            paid(world, "hindsight", Turn("score")) == paid(world, "hindsight", "terminal")
        ).all()


def test_it_says_what_it_keeps_and_what_it_needs() -> None:
    term = {of: Turn(of) for of in OF}
    assert [t.preserves_return for t in term.values()] == [False, False, True]
    assert not Turn("score", gamma=0.9).preserves_return
    assert not Turn("score", gamma=0.9).preserves_gradient
    for reward in ("turn", Turn("differences")):
        with pytest.raises(InvalidArgument, match="needs a task that answers the policy's turns"):
            worlds()[0].env(reward=reward)
    with pytest.raises(
        InvalidArgument, match="of='scores' is not known; allowed: differences, reward"
    ):
        Turn("scores")  # type: ignore[arg-type]
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidArgument, match="must lie between 0 and 1"):
            Turn(gamma=gamma)
    world = turn_worlds()[0]
    for of in ("reward", "differences"):
        with pytest.raises(InvalidArgument, match="turn_rewards= is missing; the term 'turn' pays"):
            world.score(world.env(reward=Turn(of), kl="none"), turn_rewards=None)


def test_potentials_are_reported_where_differences_of_the_score_are_shaping() -> None:
    world = turn_worlds()[0]
    for score_truncated in (True, False):
        options = {"score_truncated": score_truncated}
        found = world.paid(reward=Turn("score"), **options)
        terminal = world.paid(reward="terminal", **options).token_rewards
        assert found.potentials is not None
        shaping = np.diff(found.potentials, axis=1) * world.mask.numpy()
        np.testing.assert_allclose(found.token_rewards, terminal + shaping, atol=2e-6)
    assert world.paid(reward=Turn("score", gamma=0.5)).potentials is None
    assert world.paid(reward=Turn()).potentials is None


@pytest.mark.parametrize("turns", ["fixed", "random"])
def test_stepping_equals_scoring(turns: str) -> None:
    """What the toys answer includes rewards without a token, and replies that have no room."""
    options = {**tasks.TOYS["turn designs"], "turns": turns}
    envs = tasks.make_vec(4, AutoresetMode.SAME_STEP, **options)
    episodes = tasks.play(envs, steps=60)
    found = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        own=[e.own for e in episodes],
        turn_rewards=[[i["turn_reward"] for i in e.infos] for e in episodes],
        truncated=[e.truncated for e in episodes],
    )
    stepped = np.stack([e.padded(e.rewards, tasks.T) for e in episodes])
    np.testing.assert_allclose(found.step_rewards, stepped, atol=1e-5)
    for name in ("task", "gains", "moves"):
        assert (np.abs(found.terms[name]) > 0).sum() > 20


# ---------------------------------------------------------------- other designs


@scorers
@both_ends
def test_differences_go_to_where_the_policy_acts_next(score_truncated: bool, scorer: str) -> None:
    """What a token, and the reply to it, changed. All of it adds up to the score less that of the
    prompt; where a cut text is not scored, to where it has come."""

    def delta(w: Walked) -> list[float]:
        return [w.next[t] - w.before[t] for t in range(w.count)]

    def shaped(w: Walked, gamma: float = 0.9) -> list[float]:
        ends = [t == w.last and w.scored for t in range(w.count)]
        return [(w.score if end else gamma * w.next[t]) - w.before[t] for t, end in enumerate(ends)]

    for world in turn_worlds():
        options = {"score_truncated": score_truncated}
        found = paid(world, scorer, "delta", **options)
        close(found, by_hand(world, scorer, delta, score_truncated))
        first = world.scores[0] if scorer == "sequence" else 0.0
        close(found.sum(1), world.score_of(scorer) - first)
        found = paid(world, scorer, Shaping(gamma=0.9), **options)
        close(found, by_hand(world, scorer, shaped, score_truncated))
        every = Segment(threshold=0.0)  # a segment ends at each token, whoever wrote it
        close(
            paid(world, scorer, every, **options).sum(1),
            paid(world, scorer, "delta", **options).sum(1),
        )


def test_the_oracle_pays_what_the_reply_turned_out_to_be_worth() -> None:
    for world in turn_worlds():
        value = world.normal(len(world.scores))
        found = paid(world, "sequence", Oracle(beta=0.0), oracle=lambda beta, v=value: v)
        following = torch.where(world.final, world.score_of("sequence")[:, None], value[world.next])
        close(found, (following - value[world.before]) * world.mask)
        close(found.sum(1), world.score_of("sequence") - value[0])


def test_the_end_is_paid_with_what_was_written_behind_it() -> None:
    for world in turn_worlds():
        assert (world.next != world.after)[world.final].any()
        for scorer in ("sequence", "token"):
            expected = world.score_of(scorer)[:, None] * world.final
            close(paid(world, scorer, "terminal"), expected)


def test_what_is_a_tokens_own_is_read_right_after_it() -> None:
    for world in turn_worlds():
        close(paid(world, "token", "token"), world.scores[world.after] * world.mask)
        ratio = world.other.logprobs - world.reference.logprobs
        expected = 0.1 * ratio[world.before, world.tokens] * world.mask
        found = world.score(world.env(reward="implicit", kl_coef=0.1), weights={"kl": 0.0})
        close(torch.from_numpy(found.token_rewards).double(), expected)


def test_the_kl_is_paid_for_own_tokens_alone() -> None:
    for world in turn_worlds():
        found = world.score(world.env(reward="terminal", kl_coef=0.3)).terms["kl"]
        expected = 0.3 * world.reference.logprobs[world.before, world.tokens] * world.mask
        close(torch.from_numpy(found).double(), expected)


def step_differences(world: TurnWorld, row: int) -> list[float]:
    """What "delta" pays a text: the score after the last step, whoever ended it."""
    out: list[float] = []
    text, own = world.texts[row], world.own[row]
    reached = float(world.scores[0])
    for place, token in enumerate(text):
        out += [0.0] if own[place] else []
        if token == STEP_END or place == len(text) - 1:
            now = float(world.scores[history_of(text[: place + 1])])
            out[-1], reached = out[-1] + now - reached, now
    return out


def test_steps_are_the_policys_own_and_their_differences_add_up() -> None:
    """A step's end that the environment writes is paid by "delta" alone, on the token before."""
    for world in turn_worlds():
        ends = world.mask & ((world.tokens == STEP_END) | world.final)
        q = world.scores[world.after]
        close(paid(world, "sequence", Process("sum")), torch.where(ends, q, 0.0))
        found = paid(world, "sequence", Process("delta"))
        close(found, by_hand(world, "sequence", lambda w: step_differences(w.world, w.row)))
        close(found.sum(1), world.score_of("sequence") - world.scores[0])


# ---------------------------------------------------------------- with what it meets


def test_a_wrapper_keeps_what_the_term_remembers() -> None:
    world = turn_worlds()[0]
    for of in OF:
        plain = paid(world, "sequence", Turn(of, gamma=0.5))
        close(
            paid(world, "sequence", Clipped(Turn(of, gamma=0.5), -0.5, 0.5)), plain.clamp(-0.5, 0.5)
        )


def test_what_follows_a_prefix_is_paid_as_in_the_whole_text() -> None:
    """The turns of the prefix count, and the score stands where its last turn has left it."""
    reward = {"task": Turn(gamma=0.5), "moves": Turn("score", gamma=0.5)}
    options = {"reward": reward, "turns": "fixed", "scorer": "sequence", "kl": "none"}
    envs = tasks.make_vec(1, AutoresetMode.SAME_STEP, **options)
    compared = 0
    for seed in range(6):
        for whole in tasks.play(envs, seed=seed, steps=40, stop=0.0):
            own = np.asarray(whole.own)
            cut = 0 if own.all() else int(np.flatnonzero(~own)[-1]) + 1  # behind the last reply
            rest = np.flatnonzero(own[cut:]) + cut
            if cut == 0 or not len(rest):
                continue
            begun = {
                "prompts": [whole.prompt],
                "prefixes": [whole.response[:cut]],
                "prefix_own": [whole.own[:cut]],
            }
            envs.reset(options=begun)
            found = [float(envs.step(np.array([whole.response[t]]))[1][0]) for t in rest]
            np.testing.assert_allclose(found, whole.rewards[-len(rest) :], atol=1e-5)
            compared += sum(np.abs(found) > 1e-4)
    assert compared > 5
