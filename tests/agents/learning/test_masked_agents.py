"""Action masks in the bundled agents: what was ruled out when a token was drawn is ruled out when
it is learnt from."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st
from toy_env import STOP, ToyEnv, V, tiny_lm

from tokenenv.agents import KLQ, PPO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import FrozenLM, outputs, token_logprobs
from tokenenv.agents.learning.masks import pack, unpack
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector


def allowed_at(length):
    """What may follow a text of this length: a third of the tokens, and STOP."""
    allowed = (np.arange(V) + length) % 3 == 0
    allowed[STOP] = True
    return allowed


class MaskedToy(ToyEnv):
    """The toy env with an `action_mask` in its observation."""

    def _obs(self):
        mask = np.stack([allowed_at(int(length)) for length in self.state["length"]])
        return super()._obs() | {"action_mask": mask.astype(np.int8)}


def collect(mode=AutoresetMode.SAME_STEP, tokens=150):
    policy = LMPolicy(tiny_lm(seed=3, initializer_range=0.3))
    return policy, Collector(
        MaskedToy(3, mode, kl_coef=0.1), Actor(policy, seed=1), seed=5
    ).collect(tokens)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
def test_tokens_and_their_logprobs_are_of_the_allowed_ones(mode):
    policy, episodes = collect(mode)
    for e in episodes:
        text, start = np.concatenate([e.prompt, e.response]), len(e.prompt)
        with torch.no_grad():
            logits = policy.model(input_ids=torch.as_tensor(text)[None]).logits[0]
        for t, token in enumerate(e.response):
            allowed = allowed_at(start + t)
            assert allowed[token]
            np.testing.assert_array_equal(np.unpackbits(e.action_mask[t])[:V].astype(bool), allowed)
            row = torch.log_softmax(
                logits[start + t - 1].masked_fill(~torch.as_tensor(allowed), -torch.inf), -1
            )
            assert e.logprob[t] == pytest.approx(float(row[token]), abs=1e-5)


@pytest.mark.parametrize("chunk", [None, 3 * V], ids=["whole", "chunked"])
def test_learning_sees_the_distribution_that_was_sampled_from(monkeypatch, chunk):
    from tokenenv.agents.learning import learner, token_stats

    if chunk is not None:
        stats = token_stats.token_stats
        monkeypatch.setattr(
            learner, "token_stats", lambda *args, **kw: stats(*args, **kw, chunk_elements=chunk)
        )
    policy, episodes = collect()
    batch = EpisodeBatch.stack(episodes)
    mask = batch.mask_BT
    torch.testing.assert_close(
        token_logprobs(policy, batch, 10_000)[mask], batch.logprob_BT[mask], atol=1e-5, rtol=0
    )
    out = outputs(policy, batch, np.arange(len(batch)), reference=FrozenLM(tiny_lm(), V))
    assert (out.entropy <= np.log(V // 3 + 1) + 1e-5).all()
    assert out.ref_kl.isfinite().all()
    out.logprob.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.model.parameters() if p.grad is not None)


def test_episodes_come_out_of_a_batch_as_they_went_in():
    _, episodes = collect()
    for one, again in zip(episodes, EpisodeBatch.stack(episodes).unstack(), strict=True):
        for name in one.__dataclass_fields__:
            before, after = (
                np.float32(v) if isinstance(v := getattr(e, name), float) else v
                for e in (one, again)
            )
            np.testing.assert_equal(after, before)


@pytest.mark.parametrize("algorithm", [PPO, KLQ])
def test_it_learns_under_a_mask(algorithm):
    options = {"batch_tokens": 400, "lr": 3e-3, "seed": 1}
    agent = algorithm(MaskedToy(16, kl_coef=0.05), **options)
    first, last = [], []
    agent.learn(
        6000,
        on_update=lambda metrics, episodes: (first if agent.updates < 3 else last).append(metrics),
    )
    assert last[-1]["objective/score"] > first[0]["objective/score"] + 0.7
    assert last[-1]["policy/approx_kl"] < 1.0


def test_a_masked_run_resumes_exactly(tmp_path):
    settings = {"batch_tokens": 100, "lr": 1e-3, "lr_schedule": "constant"}
    straight = PPO(MaskedToy(4, kl_coef=0.1), **settings)
    seen = []
    straight.learn(250)
    straight.save(tmp_path / "c")
    straight.learn(600, on_update=lambda metrics, episodes: seen.extend(episodes))
    resumed, again = PPO.load(tmp_path / "c", MaskedToy(4, kl_coef=0.1)), []
    resumed.learn(600, on_update=lambda metrics, episodes: again.extend(episodes))
    for a, b in zip(seen, again, strict=True):
        np.testing.assert_equal(
            (a.response, a.logprob, a.action_mask), (b.response, b.logprob, b.action_mask)
        )


@given(
    st.integers(1, 40).flatmap(
        lambda v: st.lists(st.lists(st.booleans(), min_size=v, max_size=v), min_size=1, max_size=5)
    )
)
def test_packing_loses_nothing(rows):
    mask = np.array(rows)
    np.testing.assert_array_equal(
        unpack(torch.as_tensor(pack({"action_mask": mask})), mask.shape[1]).numpy(), mask
    )
    np.testing.assert_array_equal(
        pack({"action_mask": torch.as_tensor(mask)}), pack({"action_mask": mask.astype(np.int8)})
    )


def test_without_masks_nothing_is_kept():
    episodes = Collector(ToyEnv(2), Actor(LMPolicy(tiny_lm()))).collect(20)
    assert all(e.action_mask is None for e in episodes)
    assert EpisodeBatch.stack(episodes).action_mask_BTM is None
    assert pack({}) is None
