"""Groups of texts that share a prompt: none is mixed, none is lost, none waits for long, whatever
the lengths are."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from line_env import LineActor, LineEnv, check_episodes
from tasks import make_vec
from toy_env import ToyEnv

from tokenenv.agents import GRPO, RLOO, BestOfN
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.pairing import Pairing, whole_groups
from tokenenv.agents.rollout.staleness import waiting
from tokenenv.errors import ContractError, InvalidArgument


def toy(num_envs=12, group_size=3, mode="SameStep", **options):
    return make_vec(num_envs, mode, group_size=group_size, reward="token", **options)


def test_numbers_by_hand():
    pairing = Pairing(6, 3)
    pairing.restart()
    assert pairing.number.tolist() == [0, 1, 2, 3, 4, 5]
    pairing.begin(np.array([1, 2, 4]))  # prompt 1 of the first group, twice; prompt 1 of the second
    assert pairing.number.tolist() == [0, 6, 7, 3, 9, 5]
    pairing.begin(np.array([0, 1, 2]))  # what is missing of prompt 1, and prompt 2
    assert pairing.number.tolist() == [8, 12, 13, 3, 9, 5]
    assert whole_groups([8, 3, 7, 5, 6, 4, 12], 3) == [3, 4, 5, 6, 7, 8]
    assert whole_groups([4, 2], 1) == [2, 4]


def run(collector, updates, tokens):
    """The staleness of the texts of each update, and what waits after it."""
    ages, waits = [], []
    for _ in range(updates):
        episodes = collector.collect(tokens)
        check_episodes(episodes, collector.pairing.group_size)
        ages.append([collector.version - e.version for e in episodes])
        waits.append(waiting(collector.waiting))
        collector.refresh()
    return ages, waits


def test_texts_do_not_age_as_updates_go_by():
    """Geometric lengths of mean 8, 16 steps an update: the k-th texts of each slot drift to a mean
    of 6."""
    collector = Collector(
        LineEnv(32, AutoresetMode.SAME_STEP, 4, T=32), LineActor(1 / 8), group_size=4
    )
    ages, waits = run(collector, 100, 512)
    late = np.concatenate(ages[60:])
    assert late.mean() < 1.5
    assert late.max() <= 5
    assert max(w["rollout/waiting_tokens"] for w in waits) < 512
    assert all(w["rollout/waiting_texts"] <= w["rollout/waiting_tokens"] for w in waits)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_the_limit_holds_and_no_text_is_lost(max_staleness, group_size):
    env = LineEnv(16, AutoresetMode.SAME_STEP, group_size, T=64)
    collector = Collector(
        env, LineActor(1 / 16), group_size=group_size, max_staleness=max_staleness
    )
    found, ages = [], []
    for _ in range(25):
        episodes = collector.collect(100)
        check_episodes(episodes, group_size)
        found += episodes
        ages += [collector.version - e.version for e in episodes]
        collector.refresh()
    assert max(ages) == max_staleness
    assert len({(e.slot, e.index) for e in found}) == len(found)
    if max_staleness:  # at 0 what slots begin while others end is thrown away
        assert len(found) + len(collector.waiting) == collector.finished.sum()
        assert (
            sum(len(e.response) for e in [*found, *collector.waiting])
            + collector.recorder.age.sum()
            == collector.tokens_seen
        )


@pytest.mark.parametrize("group_size", [1, 4])
def test_at_staleness_0_lengths_are_right_from_the_first_batch_on(group_size):
    """The mean over the texts of many first and second batches; with slots that never idle the
    first one's is too short."""
    T, stop = 40, 1 / 20
    true = sum((1 - stop) ** t for t in range(T))
    found = {}
    for limit in (0, None):
        sums = np.zeros((2, 2))
        for seed in range(25):
            env = LineEnv(8, AutoresetMode.SAME_STEP, group_size, T)
            collector = Collector(
                env, LineActor(stop, seed), group_size=group_size, max_staleness=limit
            )
            for batch in range(2):
                lengths = [len(e.response) for e in collector.collect(100)]
                sums[batch] += sum(lengths), len(lengths)
                collector.refresh()
        found[limit] = sums[:, 0] / sums[:, 1]
    assert (
        np.abs(found[0] / true - 1).max() < 0.1
    )  # 300 texts at least, deviation 0.8 of the mean: 4.6 %
    assert found[None][0] / true < 0.92


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_batches_hold_whole_groups_of_one_prompt_and_lose_none(mode):
    """Of the env itself, which hands the prompts out."""
    agent = RLOO(toy(mode=mode))
    seen = []
    for _ in range(4):
        episodes = agent.collector.collect(100)
        assert len(episodes) % 3 == 0
        for i in range(0, len(episodes), 3):
            group = episodes[i : i + 3]
            assert len({e.slot // 3 for e in group}) == len({e.prompt_id for e in group}) == 1
            for e in group[1:]:
                np.testing.assert_array_equal(e.prompt, group[0].prompt)
        seen += [(e.slot, e.index) for e in episodes]
    assert len(set(seen)) == len(seen)
    left = [(e.slot, e.index) for e in agent.collector.waiting]
    ended = {
        (slot, index) for slot in range(12) for index in range(int(agent.collector.finished[slot]))
    }
    assert set(seen) | set(left) == ended


@pytest.mark.parametrize("max_staleness", [None, 0])
@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_waiting_texts_survive_a_checkpoint(mode, max_staleness, tmp_path):
    """Those that wait for the rest of their group are in the file; their group is whole
    afterwards."""
    agent = RLOO(toy(mode=mode), max_staleness=max_staleness)
    agent.collector.collect(100)
    while max_staleness is None and len(agent.collector.waiting) < 3:
        agent.collector.collect(1)
    agent.save(tmp_path / "c")
    resumed = RLOO.load(tmp_path / "c", toy(mode=mode))
    assert [(e.slot, e.index) for e in resumed.collector.waiting] == [
        (e.slot, e.index) for e in agent.collector.waiting
    ]
    for one, other in zip(
        agent.collector.collect(150), resumed.collector.collect(150), strict=True
    ):
        for field in one.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, field), getattr(other, field))


def test_a_state_is_the_callers():
    """Loaded twice it gives the same twice."""
    collector = Collector(LineEnv(8, AutoresetMode.SAME_STEP, 2), LineActor(0.2), group_size=2)
    collector.collect(40)
    state = collector.state_dict()
    kept = state["recorder"] | {"finished": state["finished"]}
    before = {name: np.copy(kept[name]) for name in ("age", "_ring", "finished", "version")}
    other = Collector(LineEnv(8, AutoresetMode.SAME_STEP, 2), LineActor(0.2), group_size=2)
    other.envs.reset()
    for _ in range(2):
        other.load_state_dict(state, running=True)
        other.resume(other.envs._obs())
        other.step()
        for name, value in before.items():
            np.testing.assert_array_equal(kept[name], value)


def test_an_env_that_shares_no_prompts_is_named():
    envs = ToyEnv(4)
    with pytest.raises(
        ContractError,
        match=r"group_size=2 says that the texts of slots \[\d, \d\] share a prompt, but one",
    ):
        Collector(envs, LineActor(0.2), group_size=2).collect(60)


def check_whole(episodes):
    assert len(episodes) % 4 == 0
    for i in range(0, len(episodes), 4):
        assert len({(e.slot // 4, e.prompt_id, tuple(e.prompt)) for e in episodes[i : i + 4]}) == 1


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_groups_are_whole_for_those_who_ask_twice(max_staleness):
    """GRPO draws what flat groups leave missing; BestOfN takes one of each group."""
    options = {"batch_tokens": 60, "max_staleness": max_staleness, "epochs": 1, "minibatches": 1}
    agent = GRPO(toy(8, 4), skip_flat_groups=True, **options)
    check_whole(agent.collect())
    best = BestOfN(toy(8, 4), batch_tokens=60, max_staleness=max_staleness)
    whole = []
    collect_best = best.collector.collect
    best.collector.collect = lambda tokens: whole.extend(found := collect_best(tokens)) or found
    chosen = best.collect()
    check_whole(whole)
    assert len(chosen) == len(whole) // 4
    assert [e.score for e in chosen] == [
        max(e.score for e in whole[i : i + 4]) for i in range(0, len(whole), 4)
    ]


def test_a_limit_below_0_is_refused():
    with pytest.raises(InvalidArgument, match="max_staleness=-1"):
        RLOO(toy(), max_staleness=-1)
