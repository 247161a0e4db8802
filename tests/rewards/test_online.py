"""A reward model that learns while the policy trains: each text is priced as a whole by one version,
which has not seen it; updates keep to their limits; what has been learned is saved, and undone."""

import copy
import math
from dataclasses import replace
from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Played, T, make_vec, play

from tokenenv.check import check_vector_env
from tokenenv.errors import CheckpointError, Interrupted, InvalidArgument
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.rewards import Clipped, Prime, Rule
from tokenenv.rewards.online import Texts, outcome_loss

COEF = 0.3
EVEN = Rule(lambda prompt, response: response[0] % 2, on="tokens")
"""An outcome that is read from the text alone."""


def prime(**options: Any) -> Prime:
    return Prime(**{"coef": COEF, "outcome": EVEN, "every": 4, "lr": 1e-2, **options})


def make(num_envs: int = 4, mode: Any = "SameStep", reward: Any = None, **options: Any) -> Any:
    reward = prime() if reward is None else reward
    return make_vec(num_envs, mode, reward=reward, kl="none", **options).unwrapped


def term_of(envs: Any, name: str = "prime") -> Any:
    return envs._engine.rewards.every[name]


def weights_of(envs: Any, name: str = "prime") -> dict[str, torch.Tensor]:
    """The weights as they are in the model that prices."""
    return {key: w.detach().clone() for key, w in term_of(envs, name)._parameters().items()}


def learned(envs: Any, name: str = "prime") -> dict[str, Any]:
    return envs.save_statistics()[name]


def log_ratios(model: Any, reference: Any, episode: Played) -> np.ndarray:
    """log p - log p_ref of each response token, from the models' own logits."""
    ids = torch.tensor([episode.prompt + episode.response])
    with torch.no_grad():
        one, other = (
            m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            for m in (model, reference)
        )
    return (one - other)[len(episode.prompt) - 1 :].numpy()


def model_with(weights: dict[str, torch.Tensor]) -> Any:
    model = copy.deepcopy(tasks.reference())
    model.load_state_dict(weights, strict=False)
    return model


# ------------------------------------------------------------------- the loss


def test_the_loss_is_the_cross_entropy_of_the_outcomes():
    found = outcome_loss(torch.tensor([0.0, 2.0, 2.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    by_hand = [math.log(2), math.log(1 + math.exp(-2)), 2 + math.log(1 + math.exp(-2))]
    by_hand.append(math.log(1 + math.exp(-1)))
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


# ------------------------------------------------------------------- what is paid


def test_each_text_is_priced_as_a_whole_by_the_version_that_is_named():
    """Updates come while texts run. A price from states that older weights had cached would be
    another."""
    envs = make(reward=prime(mix=0.7))
    versions = [weights_of(envs)]
    update = term_of(envs).update_model

    def noted() -> None:
        update()
        if envs.reward_version == len(versions):
            versions.append(weights_of(envs))

    term_of(envs).update_model = noted
    episodes = play(envs, steps=40)
    models = [model_with(weights) for weights in versions]
    assert len(versions) > 5
    for episode in episodes:
        end = episode.infos[-1]
        expected = COEF * log_ratios(models[end["reward_version"]], tasks.reference(), episode)
        expected[-1] += 0.7 * (episode.response[0] % 2)
        placed = end["token_rewards"][: len(expected)]
        np.testing.assert_allclose(placed, expected, atol=1e-5)
        np.testing.assert_allclose(sum(episode.rewards), expected.sum(), atol=1e-5)
        assert episode.rewards[:-1] == [0.0] * (len(expected) - 1)
    long = [e for e in episodes if len(e.response) > 3]
    assert any(np.abs(e.infos[-1]["token_rewards"]).max() > 1e-2 for e in long)


def test_a_token_is_paid_nothing_for_what_comes_after_it():
    envs = make()
    play(envs, steps=30)
    texts = [[12, 13, 14, 15, 16], [12, 13, 14, 20, 21]]
    first, other = envs.score_episodes([[5, 6]] * 2, texts).token_reward_terms["prime"]
    np.testing.assert_allclose(first[:3], other[:3], atol=1e-6)
    assert not np.allclose(first[3:5], other[3:5], atol=1e-4)


def test_scoring_is_by_the_present_version_and_teaches_nothing():
    envs = make()
    play(envs, steps=30)
    version, before = envs.reward_version, learned(envs)
    model = model_with(weights_of(envs))
    texts = [[12, 13, 14], [15] * T, [20, 21]] * 4
    scores = envs.score_episodes([[5, 6]] * 12, texts, truncated=[False, True, False] * 4)
    assert scores.reward_version == version > 0
    for row, text in enumerate(texts):
        expected = COEF * log_ratios(model, tasks.reference(), Played([5, 6], text))
        expected[-1] += text[0] % 2
        np.testing.assert_allclose(scores.token_rewards[row, : len(text)], expected, atol=1e-5)
    tasks.assert_equal(learned(envs), before)


def test_a_version_has_not_seen_what_it_prices():
    """The first update is after the texts of four ends, so those are priced by the first version, which
    is the reference."""
    envs = make(num_envs=1)
    episodes = play(envs, steps=60)
    versions = [e.infos[-1]["reward_version"] for e in episodes]
    assert versions == [number // 4 for number in range(len(episodes))]
    for number, episode in enumerate(episodes[:8]):
        if len(episode.response) == 1:  # its only token is paid the outcome
            continue
        paid = np.abs(episode.infos[-1]["token_reward_terms"]["prime"][: len(episode.response) - 1])
        assert (paid > 0).all() == (number >= 4)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_version_is_in_the_infos_of_texts_that_end(mode):
    envs, rng = make(mode=mode), np.random.default_rng(0)
    envs.reset(seed=0)
    seen = set()
    for _ in range(25):
        _, _, terminated, truncated, infos = envs.step(tasks.random_actions(rng, envs, 0.3))
        ended = terminated | truncated
        assert ("reward_version" in infos) == ended.any()
        if not ended.any():
            continue
        np.testing.assert_array_equal(infos["_reward_version"], ended)
        assert infos["reward_version"].dtype == np.int64
        assert set(infos["reward_version"][ended]) == {envs.reward_version}
        assert not infos["reward_version"][~ended].any()
        seen.add(envs.reward_version)
        if mode == AutoresetMode.SAME_STEP:
            np.testing.assert_array_equal(
                infos["final_info"]["reward_version"], infos["reward_version"]
            )
        if mode == AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": ended})
    assert len(seen) > 3


def test_an_env_without_such_a_term_has_no_version():
    envs = make(reward="token")
    assert envs.reward_version is None
    assert all("reward_version" not in e.infos[-1] for e in play(envs, steps=10))
    assert envs.score_episodes([[5]], [[12, 13]]).reward_version is None
    envs.policy_updated(3)


def test_torch_arrays_say_the_same():
    plain = play(make(), steps=30)
    envs = make(array="torch")
    rng, found = np.random.default_rng(0), []
    envs.reset(seed=0)
    for _ in range(30):
        *_, infos = envs.step(tasks.random_actions(rng, envs))
        if "_reward_version" in infos:
            ended = infos["_reward_version"]
            found += infos["final_info"]["token_rewards"][ended].tolist()
            assert infos["reward_version"].dtype == torch.int64
    theirs = [e.infos[-1]["token_rewards"] for e in plain]
    np.testing.assert_allclose(found, theirs, atol=1e-6)


# ------------------------------------------------------------------- outcomes


def outcomes(envs: Any) -> list[float]:
    """Of the texts that wait."""
    saved = learned(envs)
    waiting = int(saved["counts"][1])
    return saved["waiting"]["outcome"][len(saved["waiting"]["outcome"]) - waiting :].tolist()


@pytest.mark.parametrize(
    ("outcome", "options"),
    [
        ("score", {}),
        ("gold", {}),
        (lambda prompt, response: len(response.split()), {}),
        (Rule(lambda prompt, response: len(response), on="tokens"), {}),
        ("score", {"gold": False}),
    ],
)
def test_an_outcome_is_1_from_the_threshold_on(outcome, options):
    threshold = 0.1 if outcome == "score" else 4.0
    envs = make(reward=prime(outcome=outcome, threshold=threshold, every=500), **options)
    episodes = play(envs, steps=30)
    score = outcome == "score"
    by_tokens = isinstance(outcome, Rule)
    numbers = [
        e.infos[-1]["score"] if score else len(e.response) if by_tokens else e.infos[-1]["gold"]
        for e in episodes
    ]
    expected = [float(number >= threshold) for number in numbers]
    assert outcomes(envs) == expected
    assert 0 < sum(expected) < len(expected)
    for episode, one in zip(episodes, expected, strict=True):  # the reference prices: mix alone
        assert episode.rewards[-1] == pytest.approx(one)


def test_a_function_is_given_columns():
    def right(prompt: str, response: str, answer: str) -> float:
        return float(answer == "yes")

    given = {"prompts": ["the cat", "a dog"] * 4, "answer": ["yes", "no"] * 4}
    table = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    table = [{"prompt": row["prompts"], "answer": row["answer"]} for row in table]
    options = tasks.textgen_options() | {"prompts": table, "max_new_tokens": T}
    envs = make(reward=prime(outcome=right), env_id="tokenenv/TextGen-v0", **options)
    episodes = play(envs, steps=20)
    ends = [envs.columns[e.infos[-1]["prompt_id"]]["answer"] == "yes" for e in episodes]
    paid = envs.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        columns={"answer": ["yes" if end else "no" for end in ends]},
    )
    again = envs.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        columns={"answer": ["no"] * len(ends)},
    )
    np.testing.assert_allclose(
        (paid.step_rewards - again.step_rewards).sum(1), np.float32(ends), atol=1e-6
    )
    with pytest.raises(InvalidArgument, match="answer"):
        envs.score_episodes([[5]], [[12, 13]])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_no_outcome(number):
    envs = make(reward=prime(outcome=lambda prompt, response: number))
    episodes = play(envs, steps=30)
    assert envs.reward_version == 0
    assert outcomes(envs) == []
    assert all(e.rewards[-1] == 0 for e in episodes)


def test_a_text_without_a_score_is_not_learned_from_and_paid_no_outcome():
    always = Rule(lambda prompt, response: 1.0, on="tokens")
    envs = make(reward=prime(outcome=always, every=500), score_truncated=False)
    episodes = play(envs, steps=40, stop=0.1)
    cut = [e.truncated for e in episodes]
    assert len(outcomes(envs)) == len(cut) - sum(cut)
    assert 0 < sum(cut) < len(cut)
    assert [e.rewards[-1] for e in episodes] == [float(not one) for one in cut]


def test_tokens_that_the_environment_writes_are_read_and_neither_paid_nor_learned_from():
    envs = make(reward=prime(mix=0.0, every=6), turns="fixed", max_new_tokens=T)
    play(envs, steps=40, stop=0.1)
    assert envs.reward_version > 0
    model, saved = model_with(weights_of(envs)), learned(envs)["waiting"]
    episode = next(e for e in play(envs, steps=20, stop=0.1) if not all(e.own))
    scores = envs.score_episodes(
        [episode.prompt],
        [episode.response],
        own=[episode.own],
        truncated=[episode.truncated],
    )
    del model
    model = model_with(weights_of(envs))
    every = COEF * log_ratios(model, tasks.reference(), episode)
    np.testing.assert_allclose(
        scores.token_rewards[0, : sum(episode.own)], every[np.array(episode.own)], atol=1e-5
    )
    assert (saved["own"].sum(1) <= T).all()


# ------------------------------------------------------------------- learning


def test_an_update_is_a_step_of_adamw_on_the_mean_loss_of_all_that_wait():
    """Two updates in a row, against torch's AdamW on the loss by hand: so its moments are kept."""
    envs = make(num_envs=1, reward=prime(every=3, lr=3e-3))
    episodes = play(envs, steps=60)[:6]
    model = copy.deepcopy(tasks.reference()).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    after = []
    for part in (episodes[:3], episodes[3:]):
        losses = []
        for episode in part:
            ids = torch.tensor([episode.prompt + episode.response])
            ratio = [
                m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                for m in (model, tasks.reference())
            ]
            total = COEF * (ratio[0] - ratio[1].detach())[len(episode.prompt) - 1 :].sum()
            wanted = torch.tensor(float(episode.response[0] % 2))
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(total, wanted))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after.append(copy.deepcopy(model).state_dict())
    again = make(num_envs=1, reward=prime(every=3, lr=3e-3))
    rng, seen = np.random.default_rng(0), []
    again.reset(seed=0)
    while len(seen) < 3:
        again.step(tasks.random_actions(rng, again))
        if again.reward_version == len(seen):
            seen.append(weights_of(again))
    for expected, found in zip(after, seen[1:], strict=True):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=1e-5)


def test_the_size_of_forwards_changes_nothing():
    found = []
    for size in (16384, 12):
        envs = make(max_batch_tokens=size)
        play(envs, steps=30)
        assert envs.reward_version > 3
        found.append(weights_of(envs))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-5, rtol=1e-4)


def test_training_leaves_every_other_model_as_it_was():
    reference = tasks.reference()
    given = fakes.causal_lm(seed=5, num_hidden_layers=1).requires_grad_(True)
    before = [copy.deepcopy(m.state_dict()) for m in (reference, given)]
    envs = make(reward=prime(model=given))
    start = weights_of(envs)
    play(envs, steps=30)
    assert envs.reward_version > 3
    assert all(w.requires_grad for w in given.parameters())
    for model, state in zip((reference, given), before, strict=True):
        assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert any(not torch.equal(w, start[name]) for name, w in weights_of(envs).items())


def test_adapters_share_the_references_weights_and_learn_alone():
    envs = make(reward=prime(lora_rank=2))
    before = copy.deepcopy(tasks.reference().state_dict())
    trained, mine = term_of(envs)._trained, weights_of(envs)
    places = {w.data_ptr() for w in tasks.reference().parameters()}
    shared = [w for w in trained.parameters() if not w.requires_grad]
    assert {w.data_ptr() for w in shared} <= places
    assert sum(w.numel() for w in mine.values()) < sum(w.numel() for w in shared) / 2
    assert all("lora" in name for name in mine)
    play(envs, steps=30)
    assert envs.reward_version > 3
    assert all(torch.equal(w, before[n]) for n, w in tasks.reference().state_dict().items())
    assert any(not torch.equal(w, mine[name]) for name, w in weights_of(envs).items())


def test_adapters_of_a_model_that_was_given_share_nothing_with_it():
    given = fakes.causal_lm(seed=5, num_hidden_layers=1).requires_grad_(True)
    envs = make(reward=prime(model=given, lora_rank=2))
    places = {w.data_ptr() for w in given.parameters()}
    assert not places & {w.data_ptr() for w in term_of(envs)._trained.parameters()}
    assert all(w.requires_grad for w in given.parameters())


def test_a_table_is_learned_by_the_policys_kind_of_model():
    envs = make(env_id="tokenenv/Negation-v0", max_new_tokens=T, reward=prime(outcome="score"))
    assert isinstance(term_of(envs)._trained, ResidualLM)
    play(envs, steps=4 * T)
    assert envs.reward_version > 1
    assert np.abs(envs.model.output.weight.detach()).max() == 0  # the policy's own


def test_what_is_watched_learns_nothing():
    envs = make(reward="token", watch={"prime": prime(model=fakes.causal_lm(seed=5))})
    before = weights_of(envs)
    episodes = play(envs, steps=30)
    assert envs.reward_version is None
    assert "prime" not in envs.save_statistics()
    assert all(torch.equal(w, before[name]) for name, w in weights_of(envs).items())
    assert any(np.abs(e.infos[-1]["token_watched"]["prime"]).max() > 0.01 for e in episodes)


def test_a_wrapped_term_learns_too():
    envs = make(reward=Clipped(prime(), -0.02, 0.02))
    episodes = play(envs, steps=40)
    assert envs.reward_version > 3
    assert set(envs.save_statistics()) == {"prime/inner"}
    paid = np.concatenate([e.infos[-1]["token_rewards"] for e in episodes])
    assert np.abs(paid).max() == np.float32(0.02)


# ------------------------------------------------------------------- when it learns


@pytest.fixture(scope="module")
def counted() -> Any:
    """A term whose update only counts, and the texts that it has learned from."""
    term, taken = term_of(make()), list[int]()

    def updated(before: Any, texts: Any) -> Any:
        taken.append(len(texts["length"]))
        return replace(before, counts=before.counted(version=before.version + 1, waiting=0))

    term._updated = updated
    return term, term._learned, taken


@settings(max_examples=100, deadline=None)
@given(
    max_lag=st.sampled_from([0, 1, 3, None]),
    every=st.integers(1, 5),
    batches=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
def test_no_text_is_priced_more_than_max_lag_updates_before_it_is_learned_from(
    counted, max_lag, every, batches
):
    """A policy learns from the texts that have ended since it last did. Whatever the limit, every
    text is learned from once or waits."""
    term, begun, taken = counted
    taken.clear()
    term.max_lag, term.every, term._learned = max_lag, every, begun
    text = Texts(*(begun.waiting[name][:1] for name in ("tokens", "length", "place", "own")))
    term.policy_updated(0)
    for updates, texts in enumerate(batches):
        priced = []
        for _ in range(texts):  # a step of the engine in which one text ends
            term.update_model()
            priced.append(term.model_version)
            term._wait(text, np.zeros((1, T)), torch.tensor([True]), np.ones(1))
        assert max_lag is None or term.model_version - min(priced) <= max_lag
        assert sum(taken) + int(term._learned.counts[1]) == sum(batches[: updates + 1])
        assert all(count >= every for count in taken)
        term.policy_updated(updates + 1)
    if max_lag is None:
        assert taken == [every] * ((sum(batches) - 1) // every)


def test_who_says_nothing_of_the_policy_has_no_limit_and_at_0_each_update_is_waited_for():
    silent = make()
    play(silent, steps=40)
    assert silent.reward_version > 5
    told = make()
    told.policy_updated(0)
    play(told, steps=40)
    assert told.reward_version == 0
    told.policy_updated(1)
    play(told, steps=40)
    assert told.reward_version == 1
    told.policy_updated(1)  # the same number again is no news
    play(told, steps=40)
    assert told.reward_version == 1


def test_the_oldest_texts_are_dropped_beyond_the_capacity():
    envs = make(reward=prime(every=5, capacity=6))
    envs.policy_updated(0)
    episodes = play(envs, steps=40)
    saved = learned(envs)
    assert saved["counts"].tolist() == [0, 6, 0, 0]
    for row, episode in enumerate(episodes[-6:]):
        text = episode.prompt + episode.response
        assert saved["waiting"]["tokens"][row, : len(text)].tolist() == text
        assert saved["waiting"]["length"][row] == len(text)


def test_texts_played_elsewhere_are_learned_from_and_a_call_has_one_version():
    envs = make(max_batch_tokens=12)  # several forwards
    rng = np.random.default_rng(0)

    def score(**options: Any) -> Any:
        texts = [rng.integers(10, 60, 4).tolist() for _ in range(9)]
        return envs.score_episodes([[5, 6]] * 9, texts, played=True, **options)

    first, second = score(), score()
    assert (first.reward_version, second.reward_version, envs.reward_version) == (0, 1, 1)
    assert not first.token_rewards[:, :-4].any()
    np.testing.assert_array_equal(np.abs(first.token_rewards) > 0, first.token_rewards == 1.0)
    assert (np.abs(second.token_rewards[:, :4]) > 0).all()


# ------------------------------------------------------------------- keeping it


def after(envs: Any, steps: int = 25, seed: int = 9) -> Any:
    """What the same steps show from here on."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(steps):
        obs, rewards, *_, infos = envs.step(tasks.random_actions(rng, envs, 0.3))
        version = infos.get("reward_version", np.zeros(0))
        found.append({"tokens": obs["tokens"], "rewards": rewards, "version": version})
    return dict(enumerate(tasks.copied(dict(enumerate(found))).values()))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"max_lag": 2}])
def test_a_loaded_state_goes_on_bit_for_bit(options):
    envs = make(reward=prime(**options))
    envs.policy_updated(3)
    play(envs, steps=33)
    envs.policy_updated(4)
    play(envs, steps=7)
    saved = envs.save_state()
    kept = copy.deepcopy(saved)
    envs.load_state(saved)  # with caches filled anew, as the other
    envs.policy_updated(5)
    expected = after(envs)
    tasks.assert_equal(saved["engine"]["learned"], kept["engine"]["learned"])
    other = make(reward=prime(**options))
    other.load_state(saved)
    other.policy_updated(5)
    tasks.assert_equal(after(other), expected)
    tasks.assert_equal(learned(other), learned(envs))
    assert other.reward_version > saved["engine"]["learned"]["prime"]["counts"][0] > 0
    tasks.assert_equal(saved["engine"]["learned"], kept["engine"]["learned"])


def test_a_state_of_some_slots_leaves_what_was_learned():
    envs = make()
    play(envs, steps=10)
    some, before = envs.save_state([1]), None
    play(envs, steps=20)
    before = learned(envs)
    envs.load_state(some)
    tasks.assert_equal(learned(envs), before)
    envs.fork([1], [2])
    tasks.assert_equal(learned(envs), before)


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "other rank"])
def test_a_state_of_another_model_is_refused_before_anything_changes(change):
    envs = make()
    play(envs, steps=20)
    saved = envs.save_state()
    weights = saved["engine"]["learned"]["prime"]["weights"]
    name = next(iter(weights))
    if change == "shape":
        weights[name] = weights[name][:1]
    elif change == "dtype":
        weights[name] = weights[name].astype(np.float64)
    elif change == "missing":
        del weights[name]
    else:
        saved = (other := make(reward=prime(lora_rank=2))).reset() and other.save_state()
    before = learned(envs)
    with pytest.raises(CheckpointError):
        envs.load_state(saved)
    tasks.assert_equal(learned(envs), before)


@pytest.mark.parametrize("where", ["step", "zero_grad"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_update_teaches_nothing(monkeypatch, where, kind):
    """Before and after the weights have moved; the env then refuses to go on until a reset."""
    envs = make(num_envs=2)
    envs.policy_updated(0)
    play(envs, steps=20)
    assert learned(envs)["counts"][1] >= 4
    weights, before = weights_of(envs), learned(envs)
    envs.policy_updated(1)
    real = getattr(torch.optim.AdamW, where)

    def stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise kind("stopped by the test")

    monkeypatch.setattr(torch.optim.AdamW, where, stopped)
    with pytest.raises(kind):
        play(envs, steps=20)
    with pytest.raises(Interrupted):
        envs.save_state()
    monkeypatch.undo()
    envs.reset(seed=3)
    np.testing.assert_array_equal(learned(envs)["counts"][:2], before["counts"][:2])
    assert all(torch.equal(w, weights[name]) for name, w in weights_of(envs).items())
    play(envs, steps=20)
    assert envs.reward_version == 1


def test_played_texts_that_fail_teach_nothing(monkeypatch):
    envs = make()
    call = ([[5, 6]] * 5, [[12, 13, 14]] * 5)
    envs.score_episodes(*call, played=True)
    weights, before = weights_of(envs), learned(envs)
    with monkeypatch.context() as patch:
        patch.setattr("tokenenv.env.scoring.require_finite_scores", lambda out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            envs.score_episodes(*call, played=True)
    tasks.assert_equal(learned(envs), before)
    assert all(torch.equal(w, weights[name]) for name, w in weights_of(envs).items())
    assert envs.score_episodes(*call, played=True).reward_version == 1


def test_a_step_copies_no_weights():
    envs = make()
    play(envs, steps=20)
    weights = term_of(envs)._learned.weights
    held = envs._engine.snapshot()["prime"]["weights"]
    assert all(held[name] is weight for name, weight in weights.items())


def test_a_copy_of_an_env_learns_by_itself():
    envs = make()
    play(envs, steps=20)
    twin, before = copy.deepcopy(envs), learned(envs)
    assert after(twin)
    assert twin.reward_version > envs.reward_version
    tasks.assert_equal(learned(envs), before)
    assert all(
        torch.equal(w, torch.from_numpy(before["weights"][name]))
        for name, w in weights_of(envs).items()
    )


def test_one_term_serves_several_envs():
    term = prime()
    one, other = make(reward=term), make(reward=term)
    play(one, steps=30)
    assert (one.reward_version > 3, other.reward_version) == (True, 0)


# ------------------------------------------------------------------- the contract


def test_the_contract_holds():
    check_vector_env(make(mode=AutoresetMode.NEXT_STEP, reward=prime(every=32)))


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: Prime(outcome="truth"), "outcome='truth' is not known; allowed: gold, score"),
        (lambda: Prime(every=0), "every=0 must be a whole number, 1 or more"),
        (lambda: Prime(max_lag=-1), "max_lag=-1 must be a whole number, 0 or more"),
        (lambda: Prime(capacity=2.5), "capacity=2.5 must be a whole number, 1 or more"),
        (lambda: Prime(lr=0.0), "lr=0.0 is not allowed"),
        (lambda: Prime(every=64, capacity=32), "every=64.*capacity=32"),
        (lambda: make(reward=Prime(outcome="gold"), gold=False), "has no gold"),
        (
            lambda: tasks.make_vec(
                2,
                env_id="tokenenv/TextGen-v0",
                model=tasks.reference(),
                tokenizer=fakes.tokenizer(),
                prompts=["a"],
                max_new_tokens=T,
                reward=Prime(outcome="gold"),
                gold="score",
            ),
            "the gold is the score here",
        ),
        (lambda: make(reward=Prime(), scorer=None), "reward='prime' needs a reward model"),
        (lambda: make(reward=Prime(object(), outcome=EVEN)), "model=object has no weights"),
        (
            lambda: make(reward={"a": prime(), "b": prime()}),
            r"2 terms that train a model \(a, b\)",
        ),
        (
            lambda: make(
                env_id="tokenenv/Negation-v0", reward=Prime(lora_rank=2), max_new_tokens=T
            ),
            "lora_rank=2",
        ),
    ],
)
def test_what_cannot_be_is_named(make_env, message):
    with pytest.raises(InvalidArgument, match=message):
        make_env()


def test_settings_make_an_env_another_one_and_learning_does_not():
    envs = make()
    before = envs.identity
    play(envs, steps=20)
    assert envs.identity == before
    assert make(reward=prime(lr=1e-3)).identity != before
