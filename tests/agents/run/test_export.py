"""Episodes in files and as padded tensors: nothing changed, nothing lost, and what the examples
make of them."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.agents.episodes import Episode
from tokenenv.agents.run.export import (
    COLUMNS,
    episode_row,
    padded,
    read_episodes,
    token_advantages,
    write_episodes,
)
from tokenenv.errors import InvalidArgument, MissingDependency

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def episodes(draw):
    """Any episode, with terms of which one is the KL's."""
    prompt = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
    length = draw(st.integers(1, 6))

    def column():
        return np.asarray(draw(st.lists(numbers, min_size=length, max_size=length)), np.float32)

    terms = {
        name: column()
        for name in draw(st.sampled_from([(), ("token",), ("token", "kl"), ("a", "b", "kl")]))
    }
    return Episode(
        prompt=np.asarray(prompt),
        response=np.arange(length),
        logprob=column(),
        ref_logprob=column(),
        reward=column() if not terms else np.sum(list(terms.values()), axis=0, dtype=np.float32),
        kl_coef=draw(numbers),
        terminated=draw(st.booleans()),
        truncated=False,
        score=draw(numbers | st.just(float("nan"))),
        gold=draw(numbers | st.just(float("nan"))),
        prompt_id=draw(st.integers(-1, 9)),
        slot=0,
        potential=np.zeros(length + 1, np.float32),
        index=0,
        version=draw(st.integers(0, 9)),
        terms=terms,
        watched={name: column() for name in draw(st.sampled_from([(), ("a", "kl")]))},
    )


@pytest.mark.parametrize("suffix", ["jsonl", "arrow"])
@settings(deadline=None)  # pyarrow is imported in the first
@given(some=st.lists(episodes(), max_size=4))
def test_what_is_written_is_read_bit_for_bit(suffix, some, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / f"e.{suffix}"
    write_episodes(path, some)
    rows = read_episodes(path)
    assert len(rows) == len(some)
    for row, episode in zip(rows, some, strict=True):
        assert list(row) == list(COLUMNS)
        for column, values in (("prompt_ids", episode.prompt), ("response_ids", episode.response)):
            assert row[column] == values.tolist()
        for column, values in (
            ("logprobs", episode.logprob),
            ("ref_logprobs", episode.ref_logprob),
        ):
            np.testing.assert_array_equal(np.asarray(row[column], np.float32), values)
        for name, values in episode.terms.items():
            if name != "kl":
                np.testing.assert_array_equal(np.asarray(row["terms"][name], np.float32), values)
        assert "kl" not in row["terms"]
        assert list(row["watched"]) == list(episode.watched)
        for name, values in episode.watched.items():
            np.testing.assert_array_equal(np.asarray(row["watched"][name], np.float32), values)
        for column in ("score", "gold"):
            value = getattr(episode, column)
            assert (
                row[column] is None
                if np.isnan(value)
                else np.float32(row[column]) == np.float32(value)
            )
        assert (row["terminated"], row["prompt_id"], row["version"]) == (
            episode.terminated,
            episode.prompt_id,
            episode.version,
        )
    if suffix == "jsonl":
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["jsonl", "arrow"])
@given(episode=episodes())
def test_a_watched_number_that_is_none_is_null(suffix, episode, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / f"e.{suffix}"
    values = np.full(len(episode.response), np.inf, np.float32)
    values[-1] = 0.5
    write_episodes(path, [dataclasses.replace(episode, watched={"a": values})])
    assert read_episodes(path)[0]["watched"] == {"a": [None] * (len(values) - 1) + [0.5]}


def test_files_from_before_numbers_were_watched_are_read(tmp_path):
    row = {**dict.fromkeys(COLUMNS), "terms": {}, **ROWS[0]}
    del row["watched"]
    (tmp_path / "e.jsonl").write_text(json.dumps(row) + "\n")
    assert read_episodes(tmp_path / "e.jsonl") == [row | {"watched": {}}]


@given(episode=episodes())
def test_rewards_are_the_terms_without_the_penalty(episode):
    row = episode_row(episode)
    rest = [values for name, values in episode.terms.items() if name != "kl"]
    expected = np.sum(rest, axis=0) if rest else episode.reward
    np.testing.assert_array_equal(np.asarray(row["token_rewards"], np.float32), expected)


def row_of(prompt, rewards):
    return {
        "prompt_ids": prompt,
        "response_ids": list(range(10, 10 + len(rewards))),
        "own": [True] * len(rewards),
        "token_rewards": rewards,
        "logprobs": [-1.0] * len(rewards),
        "ref_logprobs": [-2.0] * len(rewards),
        "kl_coef": 0.0,
        "terminated": len(rewards) == 2,
    }


ROWS = [row_of([1, 2, 3], [0.5, 1.5]), row_of([4], [1.0, 2.0, 3.0, 4.0])]


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    out = padded(ROWS, pad_token_id=99)
    assert out["prompt_ids"].tolist() == [[1, 2, 3], [99, 99, 4]]
    assert out["prompt_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert out["response_ids"].tolist() == [[10, 11, 99, 99], [10, 11, 12, 13]]
    assert out["response_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert out["token_rewards"].tolist() == [[0.5, 1.5, 0, 0], [1, 2, 3, 4]]
    assert out["logprobs"].dtype == torch.float32


def test_bad_paths_and_a_missing_pyarrow_are_named(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match=r"ends in '.csv'; allowed: .jsonl, .arrow"):
        write_episodes(tmp_path / "e.csv", [])
    with pytest.raises(InvalidArgument, match="is not a file"):
        read_episodes(tmp_path / "e.jsonl")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pip install pyarrow$"):
        write_episodes(tmp_path / "e.arrow", [])


def test_texts_come_with_a_tokenizer():
    tokenizer = fakes.tokenizer()
    ids = tokenizer(" ".join(fakes.WORDS[3:6]))["input_ids"]
    nothing = np.zeros(len(ids), np.float32)
    episode = Episode(
        *(
            np.asarray(ids),
            np.asarray(ids),
            nothing,
            nothing,
            nothing,
            0.0,
            True,
            False,
            0.0,
            0.0,
            0,
            0,
        ),
        np.zeros(1),
        0,
    )
    row = episode_row(episode, tokenizer)
    words = " ".join(fakes.WORDS[3:6])
    assert (row["prompt"], row["response"]) == (words, f" {words}")  # joined, they are the text
    assert episode_row(episode)["prompt"] is None


# ---------------------------------------------------------------- the examples


def test_verls_columns():
    from export_verl import tensors_of

    out = tensors_of(ROWS)
    assert out["input_ids"].tolist() == [[1, 2, 3, 10, 11, 0, 0], [0, 0, 4, 10, 11, 12, 13]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert out["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 4], [0, 0, 0, 1, 2, 3, 4]]
    assert out["rm_scores"].sum(1).tolist() == [2.0, 10.0]


def test_openrlhfs_rewards_are_its_own_where_only_the_last_token_is_paid():
    """Its formula: -beta KL everywhere, the text's number on the last token of the mask. A mask may
    begin anywhere."""
    from export_openrlhf import TokenReward

    rows = [row_of([1, 2], [0.0, 5.0]), row_of([4], [0.0, 0.0, 7.0])]
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    kl = torch.randn(2, 5) * mask
    expected = -0.1 * kl
    expected[0, 2] += 5.0
    expected[1, 3] += 7.0
    reward = TokenReward(lambda: rows)
    torch.testing.assert_close(reward(None, 0.1, kl, mask), expected)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    dense = TokenReward(lambda: ROWS)(None, -1.0, torch.ones(2, 6), mask)
    assert dense.tolist() == [[0, 0.5, 1.5, 0, 0, 0], [1, 2, 3, 4, 0, 0]]


def test_trls_advantages_are_returns_to_go_around_their_mean():
    from export_trl import inputs_of

    out = inputs_of(ROWS)
    returns = torch.tensor([[2.0, 1.5, 0, 0], [10, 9, 7, 4]])
    mean = (2 + 1.5 + 10 + 9 + 7 + 4) / 6
    torch.testing.assert_close(out["advantages"], (returns - mean) * out["completion_mask"])
    assert out["num_items_in_batch"] == 6


WRITTEN = [row_of([1, 2], [3.0, 0.0, 4.0]) | {"own": [True, False, True], "kl_coef": 0.5}]
"""A text in whose middle an environment wrote a token."""


def test_token_advantages_are_of_own_tokens_and_can_hold_the_penalty():
    assert token_advantages(ROWS, with_kl=False)[0] == pytest.approx(
        [2 - 5.5833335, 1.5 - 5.5833335]
    )
    assert token_advantages(ROWS) == token_advantages(ROWS, with_kl=False)  # beta is 0 in these
    # Two own tokens cost 0.5 * (-1 - -2) each: 6 from the first on, 3.5 from the last.
    assert token_advantages(WRITTEN) == [[1.25, 0.0, -1.25]]
    assert token_advantages(WRITTEN, with_kl=False) == [[1.5, 0.0, -1.5]]


def test_skyrls_rewards_are_token_by_token():
    from export_skyrl import generator_output

    out = generator_output([*ROWS, *WRITTEN])
    assert out["rewards"] == [[0.5, 1.5], [1.0, 2.0, 3.0, 4.0], [3.0, 0.0, 4.0]]
    assert out["loss_masks"][2] == [1, 0, 1]
    assert out["stop_reasons"] == ["stop", "length", "length"]


def test_prime_rls_advantages_are_of_sampled_tokens():
    from export_prime_rl import assign

    given = []
    assign(["trace"], WRITTEN, lambda trace, values: given.append((trace, values)))
    assert given == [("trace", [1.25, -1.25])]


def test_slimes_function_finds_texts_by_their_tokens_in_any_order():
    from export_slime import TokenAdvantages, rollout_data_of

    data = rollout_data_of([*WRITTEN, *ROWS[::-1]])
    data["kl"][0][:] = torch.tensor([1.0, 9.0, 1.0])  # that of an environment's token is no cost
    arguments = SimpleNamespace(kl_coef=0.5)
    TokenAdvantages(lambda: [*ROWS, *WRITTEN])(arguments, data)
    returns = [[6.0, 3.5, 3.5], [10.0, 9.0, 7.0, 4.0], [2.0, 1.5]]
    assert [one.tolist() for one in data["returns"]] == returns
    mean = (6 + 3.5 + 10 + 9 + 7 + 4 + 2 + 1.5) / 8
    assert data["advantages"][0].tolist() == pytest.approx([6 - mean, 0.0, 3.5 - mean])
    assert data["advantages"][2].tolist() == pytest.approx([2 - mean, 1.5 - mean])


def test_tinkers_inputs_are_of_the_next_tokens():
    from export_tinker import inputs_of

    [(tokens, targets)] = inputs_of(WRITTEN)
    assert tokens == [1, 2, 10, 11]
    assert targets["target_tokens"].tolist() == [2, 10, 11, 12]
    assert targets["logprobs"].tolist() == [0.0, -1.0, -1.0, -1.0]
    assert targets["advantages"].tolist() == [0.0, 1.25, 0.0, -1.25]


def test_tinkers_own_objects_take_them():
    tinker = pytest.importorskip("tinker")
    from export_tinker import inputs_of

    tokens, targets = inputs_of(WRITTEN)[0]
    datum = tinker.Datum(tinker.ModelInput.from_ints(tokens), targets)
    assert datum.model_input.length == 4
    assert datum.loss_fn_inputs["advantages"].to_numpy().tolist() == [0.0, 1.25, 0.0, -1.25]


@pytest.mark.parametrize(
    "name", ["verl", "openrlhf", "trl", "skyrl", "prime_rl", "slime", "tinker"]
)
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    """Without the trainer's package they say what is missing."""
    path = tmp_path / "e.jsonl"
    rows = [{**dict.fromkeys(COLUMNS), "terms": {}, **row} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(path), "a-model"] if name == "trl" else [str(path)]
    file = str(EXAMPLES / f"export_{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    runpy.run_path(file, run_name="__main__")
    printed = capsys.readouterr().out
    if name in ("verl", "openrlhf", "trl"):
        assert "(2, 4)" in printed
    if name in ("verl", "trl", "tinker"):
        assert "pip install" in printed or "datum" in printed
    assert printed
