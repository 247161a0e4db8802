"""The folders of benchmarks/suite: their grids are valid, their questions and the survey name rows
that exist, and their designs pay what they say."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.suite import rewards  # noqa: E402
from benchmarks.suite.answers import ENDLESS, MODULES, NEVER, SUITE, tokens_to, verdict  # noqa: E402
from benchmarks.suite.answers import _answer as answer  # noqa: E402
from benchmarks.suite.answers import _times_fewer as times_fewer  # noqa: E402
from tokenenv.bench.file import read_grid  # noqa: E402
from tokenenv.bench.statistics import Interval  # noqa: E402
from tokenenv.report.reading import read  # noqa: E402

GRIDS = sorted(path.parent.name for path in SUITE.glob("*/grid.yaml"))
QUESTIONS = sorted(path.parent.name for path in SUITE.glob("*/question.yaml"))


def grid_of(name):
    return read_grid(SUITE / name / "grid.yaml", MODULES)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_has_its_cells_its_controls_and_the_seeds_that_are_wanted(name):
    grid = grid_of(name)
    assert grid.about.endswith("?")
    transformer = any("Reviews" in str(env["env"]) for env in grid.envs.values())
    assert len(grid.seeds) == (3 if transformer else 10)
    assert len(grid.cells()) >= 4 * len(grid.seeds)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_name_rows_that_exist(name):
    said = yaml.safe_load((SUITE / name / "question.yaml").read_text())
    assert set(said) <= {"question", "claim", "answers"}
    if "answers" not in said:
        return
    places = {(cell.task, cell.row) for cell in grid_of(name).cells()}
    for one in said["answers"]:
        assert set(one) == {"task", "row", "than", "by", "claimed"}
        assert {(one["task"], one["row"]), (one["task"], one["than"])} <= places
        assert one["by"] in ("tokens", "share", "gold", "length", "regret")
        assert one["claimed"] in ("more", "less", "equal")


def test_a_run_beside_a_grid_leaves_the_grids_results_alone():
    both = [name for name in GRIDS if (SUITE / name / "run.py").is_file()]
    assert both == ["attribution"]
    for name in both:
        assert '"results.csv"' not in (SUITE / name / "run.py").read_text()
        assert (SUITE / name / "results" / "credit.csv").is_file()


def test_at_least_twenty_methods_of_the_survey_are_rows():
    survey = yaml.safe_load((SUITE / "survey.yaml").read_text())
    assert len({one["method"] for one in survey}) == len(survey) >= 20
    for one in survey:
        assert one["row"] in grid_of(one["folder"]).row_labels(), one


def scores_of(reward, **options):
    """Return the rewards of some texts of Reviews-v0 under a design, those of "token", and the
    texts."""
    envs = gym.make_vec(
        "tokenenv/Reviews-v0", num_envs=2, reward={"paid": reward, "token": "token"}, **options
    )
    core = envs.unwrapped
    rng = np.random.default_rng(0)
    prompts = [[int(one) for one in rng.integers(3, 60, 4)] for _ in range(6)]
    responses = [[int(one) for one in rng.integers(3, 60, n)] for n in (1, 2, 5, 5, 7, 9)]
    found = core.score_episodes(prompts, responses)
    return *(found.token_reward_terms[name] for name in ("paid", "token")), responses


def delta_of(q):
    """What Delta of Gao et al. pays each token: q less that of the next, and nothing at the end."""
    return np.append(q[:-1] - np.append(q[1:-1], 0.0)[: len(q) - 1], 0.0)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    ("design", "pays"),
    [
        (rewards.KindSum, lambda q: q),
        (rewards.KindMin, lambda q: np.diff(np.minimum.accumulate(q), prepend=0.0)),
        (rewards.KindGain, lambda q: np.diff(q, prepend=0.0)),
        (rewards.KindDelta, delta_of),
        (lambda uneven: rewards.KindClip(0.15, uneven), lambda q: np.minimum(q - 0.15, 0.0)),
    ],
)
def test_kind_rewards_pay_their_form(design, pays, uneven):
    paid, token, responses = scores_of(design(uneven))
    for row, scores, response in zip(paid, token, responses, strict=True):
        bonus = 2.0 * (np.asarray(response) % 2 == 0) if uneven else 1.0
        q = scores[: len(response)] + rewards.KINDNESS * bonus
        assert row[: len(response)] == pytest.approx(pays(q), abs=1e-5)
        assert not row[len(response) :].any()


def test_deltas_to_go_are_each_tokens_own_score():
    paid, token, responses = scores_of(rewards.KindDelta())
    for row, scores, response in zip(paid, token, responses, strict=True):
        to_go = row[::-1].cumsum()[::-1][: len(response) - 1]
        assert to_go == pytest.approx(scores[: len(response) - 1] + rewards.KINDNESS, abs=1e-5)


def test_decoys_are_paid_beside_the_difference_in_the_score():
    design = {"decoys": rewards.Decoys(), "delta": "delta"}
    envs = gym.make_vec("tokenenv/Negation-v0", num_envs=1, reward=design)
    texts = [[1, 35, 30, 7, 29, 40, *[2] * 10]]
    found = envs.unwrapped.score_episodes([[0]], texts)
    more = found.terms["decoys"][0] - found.terms["delta"][0]
    assert more[:6] == pytest.approx([0, 0.1, 0.1, 0, 0, 0], abs=1e-6)
    words = [envs.unwrapped.token_spec.tokenizer.decode([one]) for one in range(30, 40)]
    assert all(word.startswith("w") for word in words)


def line(tokens, share):
    return {"tokens": tokens, "share": share}


def test_tokens_to_a_goal_are_interpolated_and_may_never_come():
    lines = [line(0, 0.0), line(100, 0.2), line(200, 0.6), line(300, 0.1)]
    assert tokens_to(lines, "share", 0.5) == pytest.approx(175)
    assert tokens_to(lines, "share", 0.0) == 0
    assert tokens_to(lines, "share", 0.7) == NEVER


def test_times_fewer_counts_runs_that_did_not_get_there():
    one, never = [np.array([100.0, 200.0, 400.0])], [np.array([NEVER] * 3)]
    assert times_fewer(one, one) == 1
    assert times_fewer(one, [np.array([300.0, 800.0, NEVER])]) == 4
    assert times_fewer(one, never) > ENDLESS
    assert times_fewer(never, one) < 1 / ENDLESS
    assert times_fewer(never, never) == 1
    half = [np.array([100.0, NEVER])]  # the mean of these two is the tokens of no run
    assert times_fewer(half, never) == 1
    assert times_fewer(one, half) > ENDLESS


def answer_to(by, column, *ends_of_rows, claimed="equal"):
    """Return the answer to a comparison of two rows, by what their runs have at the end."""
    runs = {
        ("negation", row): {
            seed: [line(0, 0.0), {"tokens": 100, column: end}] for seed, end in enumerate(values)
        }
        for row, values in zip(("a", "b"), ends_of_rows, strict=True)
    }
    asked = {"task": "negation", "row": "a", "than": "b", "by": by, "claimed": claimed}
    return answer(SimpleNamespace(runs=runs), grid_of("mix"), asked)


def test_two_rows_that_never_got_there_are_not_equal():
    found = answer_to("tokens", "share", [0.1, 0.2, 0.1], [0.3, 0.4, 0.2])
    assert (found["found"], found["verdict"]) == ("neither got there", "not told apart")
    assert answer_to("tokens", "share", [0.9, 0.9, 0.9], [0.9, 0.9, 0.9])["verdict"] == "held"


def test_what_is_not_known_is_said_so():
    found = answer_to("regret", "share", [0.9], [0.9])
    assert (found["found"], found["verdict"]) == ("regret is not known", "not told apart")
    assert answer_to("tokens", "share", [None], [None])["found"] == "neither got there"


@pytest.mark.parametrize("name", GRIDS)
def test_rows_of_an_environment_are_measured_by_the_same_objective(name):
    for cell in grid_of(name).cells():
        options = cell.settings["options"]
        assert options.get("kl") != "none" or options.get("kl_coef"), cell.name


@pytest.mark.parametrize(
    ("low", "high", "claimed", "said"),
    [
        (0.1, 0.2, "more", "held"),
        (-0.2, -0.1, "more", "did not hold"),
        (-0.1, 0.2, "more", "not told apart"),
        (-0.2, -0.1, "less", "held"),
        (0.1, 0.2, "less", "did not hold"),
        (-0.04, 0.03, "equal", "held"),
        (0.01, 0.04, "equal", "held"),
        (-0.1, 0.03, "equal", "not told apart"),
        (0.1, 0.2, "equal", "did not hold"),
        (0.01, 0.06, "equal", "not told apart"),
    ],
)
def test_a_claim_holds_where_its_side_has_the_whole_interval(low, high, claimed, said):
    assert verdict(Interval((low + high) / 2, low, high), 0.0, claimed, 0.05) == said
    assert verdict(Interval((low + high) / 2 + 1, low + 1, high + 1), 1.0, claimed, 0.05) == said


def test_a_shaped_reward_and_a_shifted_critic_have_one_curve_until_rounding_has_grown():
    """What docs/findings.md says of the committed results."""
    runs = read(SUITE / "better_critic" / "results").runs
    for task in ("negation", "delayed key"):
        one, other = (
            runs[task, f"{row}, not scaled"] for row in ("oracle", "critic + optimal value")
        )
        assert len(one) == len(other) == 10
        for seed in one:
            for point in (0, 1):
                shares = [lines[point]["share"] for lines in (one[seed], other[seed])]
                assert shares[0] == pytest.approx(shares[1], abs=1e-5)
        assert one[0][0]["share"] != one[0][1]["share"]
