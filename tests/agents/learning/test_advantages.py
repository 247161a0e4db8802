"""Advantages: hand-computed tables and identities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.agents.learning import advantages as adv

NO = torch.tensor([False])


def test_kl_penalised_completes_the_k1_penalty():
    logprob, ref_logprob = (
        torch.tensor([[-1.0, -2.0], [-0.5, -0.25]]),
        torch.tensor([[-3.0, -1.0], [-0.5, -4.0]]),
    )
    beta, score = torch.tensor([0.5, 0.1]), torch.tensor([[0.0, 7.0], [1.0, 0.0]])
    from_env = score + beta[:, None] * ref_logprob
    expected = torch.tensor([[-0.5 * 2.0, 7.0 + 0.5 * 1.0], [1.0, -0.1 * 3.75]])
    torch.testing.assert_close(adv.kl_penalised(from_env, logprob, beta), expected)


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5. Row 0 ends: deltas 1 + 0.5*2 - 1 = 1, 0 + 0.5*4 - 2 = 0, 2 - 4 = -2.
    # Row 1 has two tokens and goes on: deltas 0 + 0.5*1 - 2 = -1.5, 1 + 0.5*3 - 1 = 1.5; its third
    # column is not read.
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, torch.nan]])
    values = torch.tensor([[1.0, 2.0, 4.0, 9.0], [2.0, 1.0, 3.0, torch.nan]])
    result = adv.gae(rewards, values, torch.tensor([3, 2]), torch.tensor([False, True]), 0.5, 0.5)
    expected = [
        [1.0 + 0.25 * (0.0 + 0.25 * -2.0), 0.25 * -2.0, -2.0],
        [-1.5 + 0.25 * 1.5, 1.5, 0.0],
    ]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_lambda_per_row():
    rewards, values, lengths = torch.randn(2, 4), torch.randn(2, 5), torch.tensor([4, 3])
    together = adv.gae(
        rewards, values, lengths, torch.tensor([True, False]), 0.9, torch.tensor([0.3, 0.8])
    )
    for row, lambda_ in enumerate([0.3, 0.8]):
        keep = slice(row, row + 1)
        alone = adv.gae(
            rewards[keep], values[keep], lengths[keep], torch.tensor([row == 0]), 0.9, lambda_
        )
        torch.testing.assert_close(together[keep], alone)


def test_lambda_one_is_the_return_minus_the_value():
    rewards, values, lengths = torch.randn(3, 5), torch.randn(3, 6), torch.tensor([5, 1, 3])
    result = adv.gae(rewards, values, lengths, lengths < 0, 1.0, 1.0)
    returns = adv.returns_to_go(rewards, lengths, 1.0)
    mask = adv.token_mask(lengths, 5)
    torch.testing.assert_close(result, (returns - values[:, :-1]) * mask)
    torch.testing.assert_close(returns[0], rewards[0].flip(0).cumsum(0).flip(0))
    assert returns[1, 0] == rewards[1, 0]


def test_terminated_never_reads_the_value_beyond():
    values = torch.tensor([[1.0, 2.0, 1e6]])
    assert adv.gae(torch.zeros(1, 2), values, torch.tensor([2]), NO, 1.0, 1.0).tolist() == [
        [-1.0, -2.0]
    ]
    assert adv.gae(torch.zeros(1, 2), values, torch.tensor([2]), ~NO, 1.0, 0.0).tolist() == [
        [1.0, 1e6 - 2.0]
    ]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 7),
    gamma=st.floats(0.5, 1.0),
    lambda_=st.floats(0.0, 1.0),
    bootstrap=st.booleans(),
)
def test_shaping_equals_a_shifted_critic(seed, length, gamma, lambda_, bootstrap):
    """r + gamma Phi(s') - Phi(s) with critic V - Phi, and r with V, have the same advantages
    (rewards: Ng et al. 1999).

    Phi is zero where nothing is bootstrapped, kept at the last state where it is.
    """
    g = torch.Generator().manual_seed(seed)
    rewards, values, potential = (
        torch.randn(1, n, generator=g, dtype=torch.float64) for n in (7, 8, 8)
    )
    if not bootstrap:
        potential[0, length] = 0.0
    shaped = rewards + gamma * potential[:, 1:] - potential[:, :-1]
    lengths, keep = torch.tensor([length]), torch.tensor([bootstrap])
    plain = adv.gae(rewards, values, lengths, keep, gamma, lambda_)
    torch.testing.assert_close(
        adv.gae(shaped, values - potential, lengths, keep, gamma, lambda_), plain
    )


def test_unshaped_by_hand():
    # gamma 0.5. Row 0 ends; row 1 has one token, is cut, and keeps its last potential.
    rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    potentials = torch.tensor([[4.0, 6.0, 0.0], [1.0, 8.0, 0.0]])
    result = adv.unshaped(rewards, potentials, torch.tensor([2, 1]), 0.5)
    assert result.tolist() == [[1.0 - (3.0 - 4.0), 2.0 - (0.0 - 6.0)], [3.0 - (4.0 - 1.0), 0.0]]


def test_length_adaptive_lambda_is_clamped():
    lambdas = adv.length_adaptive_lambda(torch.tensor([1, 10, 20, 40, 400]), 0.05)
    torch.testing.assert_close(lambdas, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.95]))


def test_whiten_over_valid_tokens_only():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, torch.nan, torch.nan]])
    mask = adv.token_mask(torch.tensor([2, 1]), 3)
    scale = np.sqrt(8 / 3)
    expected = torch.tensor([[-2 / scale, 0.0, 0.0], [2 / scale, 0.0, 0.0]], dtype=torch.float32)
    torch.testing.assert_close(adv.whiten(values, mask), expected)
    assert adv.whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_whitening_makes_no_signal_of_rounding(unit):
    """The mean of many 0.7 is not 0.7 in float32."""
    mask = torch.ones(7, 143, dtype=torch.bool)
    same = unit * (0.7 + 4e-8 * torch.arange(143) / 143).expand(7, -1)
    assert (adv.whiten(same, mask) == 0).all()
    different = same.clone()
    different[0, 0] += unit * 0.01
    assert adv.whiten(different, mask).std(correction=0).item() == pytest.approx(1.0, rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_std_equals_that_of_everything_seen(parts):
    running = adv.RunningStd()
    for part in parts:
        running.update(torch.tensor(part))
    everything = np.float32(np.concatenate(parts)).astype(np.float64)
    expected = everything.std() if everything.std() > 1e-6 * max(1, abs(everything.mean())) else 1.0
    assert running.std == pytest.approx(expected, rel=1e-6)
    again = adv.RunningStd()
    again.load_state_dict(running.state_dict())
    assert again.std == running.std
