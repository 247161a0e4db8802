"""`Resets` of benchmarks/suite where the environment writes into texts, under action masks, on
stale texts and beside texts that run on."""

import numpy as np
import pytest
from suite_methods import G, V, algorithms, by_text, few, learned_from, make, move

from tokenenv.agents.episodes import EpisodeBatch

pytestmark = pytest.mark.filterwarnings("ignore:reward-to-go on", "ignore:update . moved")
T = 7
ENDS = {"score_truncated": False, "reward": {"end": "terminal", "task": "turn"}}
PAIRS = {"turns": {}, "masks": {"allowed": few, "turns": None}, "all": {"allowed": few, **ENDS}}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def agent_of(pair, **settings):
    return move(algorithms.Resets(make(**PAIRS[pair]), **settings))


def stale(agent):
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    agent.updates = 3
    return move(agent, 0.3, seed=1), batch


@each_pair
def test_the_text_that_earned_least_is_taken_back_to_where_the_policy_is_least_certain(pair):
    """What is paid counts, the KL apart: a text that was cut without a score has earned nothing.
    The policy is the present one, over the tokens that are allowed."""
    agent, batch = stale(agent_of(pair))
    entropies = [entropy.detach().numpy() for _, entropy in by_text(agent.policy, batch)]
    whole = [
        sum(float(paid.sum()) for name, paid in e.terms.items() if name != "kl")
        for e in batch.unstack()
    ]
    found = agent.resets(batch)
    assert [row // G for row, _ in found] == list(range(len(batch) // G))
    for row, place in found:
        group = range(row // G * G, row // G * G + G)
        assert whole[row] == pytest.approx(min(whole[j] for j in group))
        assert entropies[row][place] == pytest.approx(entropies[row].max(), abs=1e-4)


@each_pair
def test_continuations_go_on_behind_what_both_have_written(pair):
    """The prefix is the text so far, written tokens and all, and the policy has the rest of its
    budget. A continuation is scored as the whole text would be."""
    agent, batch = stale(agent_of(pair, place="random"))
    chosen, choose = [], agent.resets
    agent.resets = lambda given: chosen.extend(choose(given)) or chosen
    batches = learned_from(agent)
    agent.update(batch)
    episodes, played = batch.unstack(), batches[0].unstack()[len(batch) :]
    chosen.sort(key=lambda reset: reset[1])
    assert len(played) == G * len(chosen)
    prompts, responses, own = [], [], []
    for e, (row, place) in zip(played, [reset for reset in chosen for _ in range(G)], strict=True):
        source = episodes[row]
        end = source.places[place]
        assert e.prompt.tolist() == source.text[:end].tolist()
        assert e.version == 3
        assert len(e.response) + place <= T
        if e.action_mask is not None:
            allowed = np.unpackbits(e.action_mask, axis=1)[:, :V].astype(bool)
            assert allowed.tolist() == [few(int(at)).tolist() for at in e.places]
            assert allowed[np.arange(len(allowed)), e.response].all()
        prompts.append(source.prompt)
        responses.append(e.text[len(source.prompt) :])
        own.append(np.concatenate([source.own[: end - len(source.prompt)], e.own]))
    turns = {"own": own, "turn_rewards": [np.zeros(mine.sum()) for mine in own]}
    scores = agent.core.score_episodes(prompts, responses, **{} if pair == "masks" else turns)
    np.testing.assert_allclose(scores.score, [e.score for e in played], atol=1e-4)
    written = [len(mine) - mine.sum() for mine in own]
    assert any(written) == (pair != "masks")


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_no_text_is_older_than_allowed_and_continuations_are_of_this_policy(max_staleness):
    agent = agent_of("all", max_staleness=max_staleness, batch_tokens=40, epochs=1, minibatches=1)
    batches, ages = learned_from(agent), []

    def on_update(metrics, episodes):
        versions = batches.pop().version_B
        now = agent.updates - 1
        ages.append(now - int(versions[: len(episodes)].min()))
        assert (versions[len(episodes) :] == now).all()
        assert len(versions) > len(episodes)
        if agent.updates == 4:
            agent.stop()

    agent.learn(10_000, on_update=on_update)
    assert max(ages) == max_staleness


def test_the_running_texts_go_on_as_if_nothing_had_been_played():
    """The same random numbers give the same texts, answers and masks as where nothing was learned
    from."""
    agent, other = (agent_of("all") for _ in range(2))
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    other.collector.collect(60)
    other.collector.load_env(
        other.collector.save_env()
    )  # caches filled anew, as playing leaves them
    generator = agent.actor.generator.get_state()
    agent.optimise = lambda whole, loss: {}
    agent.update(batch)
    agent.actor.generator.set_state(generator)
    found, wanted = agent.collector.collect(80), other.collector.collect(80)
    for one, two in zip(found, wanted, strict=True):
        for field in one.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, field), getattr(two, field))
