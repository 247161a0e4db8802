"""Grids: which cells they have, and what is refused."""

import pytest

from tokenenv.bench import Grid
from tokenenv.bench.cells import train_of
from tokenenv.bench.file import read_grid, suite_file
from tokenenv.errors import InvalidArgument

KEY = "tokenenv/DelayedKey-v0"
FILE = """
seeds: [3, 5]
total_tokens: 1e3
agent: {lr: 1e-3}
envs:
  key: {env: tokenenv/DelayedKey-v0, options: {max_new_tokens: 4}, seed_options: [task_seed]}
  negation: tokenenv/Negation-v0
designs:
  end: terminal
  mixed: {good: [oracle, 0.3], end: terminal}
algorithms:
  ppo: {algo: ppo, agent: {lr: 2e-3}}
  rloo: rloo
rows:
  lambda 1: {agent: {lambda_actor: 1.0}, only: [key]}
"""


def written(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_rows_are_designs_times_algorithms_and_the_rows_by_name(tmp_path):
    grid = read_grid(written(tmp_path, FILE))
    assert grid.name == "mine"
    assert grid.row_labels() == ["end, ppo", "end, rloo", "mixed, ppo", "mixed, rloo", "lambda 1"]
    places = [(cell.task, cell.row, cell.seed) for cell in grid.cells()]
    assert len(places) == len(set(places)) == (5 + 4) * 2
    assert ("negation", "lambda 1", 3) not in places


def test_what_comes_later_goes_before(tmp_path):
    cells = {
        (c.task, c.row, c.seed): c.settings for c in read_grid(written(tmp_path, FILE)).cells()
    }
    assert cells["key", "mixed, ppo", 5] == {
        "env": KEY,
        "reward": {"good": ["oracle", 0.3], "end": "terminal"},
        "algo": "ppo",
        "total_tokens": 1000,
        "options": {"max_new_tokens": 4, "task_seed": 5},
        "agent": {"lr": 2e-3, "seed": 5},
    }
    assert cells["negation", "end, rloo", 3]["agent"] == {"lr": 1e-3, "seed": 3}
    changed = read_grid(written(tmp_path, FILE), always={"agent": {"lr": 5.0}}, seeds=1)
    assert {c.settings["agent"]["lr"] for c in changed.cells()} == {5.0}
    assert {c.seed for c in changed.cells()} == {0}


def test_what_differs_between_cells_is_checked_and_not_each_seed(monkeypatch):
    checked = []

    def noted(settings):
        checked.append((settings["env"], settings["reward"]))
        return train_of(settings)

    monkeypatch.setattr("tokenenv.bench.grid.train_of", noted)
    envs = {"key": KEY, "negation": {"env": "tokenenv/Negation-v0", "seed_options": ["task_seed"]}}
    designs = {"end": "terminal", "good": {"reward": "oracle", "only": ["key"]}}
    grid = Grid(envs=envs, designs=designs, seeds=100)
    expected = [(KEY, "terminal"), (KEY, "oracle"), ("tokenenv/Negation-v0", "terminal")]
    assert checked == expected
    cells = grid.cells()
    assert checked == expected
    assert [cell.seed for cell in cells] == 3 * list(range(100))
    assert [cell.settings["agent"]["seed"] for cell in cells] == 3 * list(range(100))
    assert [cell.settings["options"] for cell in cells[199:202]] == [
        {},
        {"task_seed": 0},
        {"task_seed": 1},
    ]
    assert grid.places() == [("key", "end"), ("key", "good"), ("negation", "end")]


def test_toml_says_the_same(tmp_path):
    toml = (
        f'[envs.key]\nenv = "{KEY}"\noptions = {{max_new_tokens = 4}}\n[designs]\nend = "terminal"'
    )
    yaml = (
        f"envs: {{key: {{env: {KEY}, options: {{max_new_tokens: 4}}}}}}\ndesigns: {{end: terminal}}"
    )
    one, other = (
        read_grid(written(tmp_path, text, name))
        for text, name in ((toml, "same.toml"), (yaml, "same.yaml"))
    )
    assert one == other
    assert [cell.key for cell in one.cells()] == [cell.key for cell in other.cells()]


def test_labels_of_an_axis_with_one_entry_are_left_out():
    axes = {"designs": {"end": "terminal"}, "algorithms": {"ppo": "ppo", "a2c": "a2c"}}
    assert Grid(**axes).row_labels() == ["ppo", "a2c"]
    assert Grid(designs={"end": "terminal"}, algorithms={"ppo": "ppo"}).row_labels() == ["end, ppo"]


def test_the_key_is_of_settings_and_not_of_labels():
    def key(**values):
        return Grid(seeds=[1], **values).cells()[0].key

    same = key(designs={"a": "terminal"})
    assert same == key(designs={"b": {"reward": "terminal"}})
    assert same != key(designs={"a": "uniform"})
    assert same != key(designs={"a": "terminal"}, texts=8)
    assert same != key(designs={"a": "terminal"}, settings={"agent": {"lr": 0.1}})


def test_a_version_makes_another_key(monkeypatch):
    before = Grid().cells()[0].key
    monkeypatch.setattr("tokenenv.__version__", "9.9")
    assert Grid().cells()[0].key != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("designs: {a: terminall}", "reward='terminall' is not known.*'terminal'"),
        ("envs: {a: {env: tokenenv/Nothing-v0}}", "a / default: env='tokenenv/Nothing-v0'"),
        ("envs: {a: {options: {vocab: 3}}}", "option='vocab' is not known"),
        ("rows: {a: {agent: {lrr: 3}}}", "the agent's setting of PPOConfig='lrr' is not known"),
        ("agent: {gammas: {a: 1}}", "PPOConfig='gammas' is not known"),  # another algorithm's
        ("rows: {a: {agent: {lr: -1}}}", "/ a: lr=-1.0 is not allowed"),
        ("rows: {a: {num_envs: many}}", "/ a: num_envs='many' is not allowed"),
        ("rows: {a: {lr: 3}}", "rows.a: the setting='lr' does not belong"),
        ("designs: {a: {reward: terminal, only: [b]}}", r"designs.a.only='b' is not known"),
        ("envs: {a: {env: tokenenv/Negation-v0, goal: {gold: x}}}", "envs.a.goal.gold='x' must be"),
        ("envs: {a: {env: tokenenv/Negation-v0, goal: 3}}", "envs.a.goal=3 must have one entry"),
        ("design: {a: terminal}", r"the entry='design' is not known.*'designs'"),
        ("seeds: 0", "seeds=0 must be a whole number, 1 or more"),
        ("seeds: [1, 1]", r"seeds=\[1, 1\] has a seed twice"),
        ("seeds: [-1]", "seed=-1 is not allowed"),
        ("points: 0", "points=0 must be"),
        ("rows: [a]", "rows=.* must be a mapping"),
        ("baseline: b", "baseline='b' is not known"),
        ("rows: {a: {}}\ndesigns: {a: terminal, b: uniform}", "two rows are called 'a'"),
        ("rows: {a: {}\nb: 3", "cannot be read as YAML: .* line 2"),
        ("[1]", "holds no mapping"),
        ("name: ../../elsewhere", "name='../../elsewhere' must be the name of a folder"),
        ("name: [a]", r"name=\['a'\] must be the name of a folder"),
        ("about: 3", "about=3 must be a sentence"),
        ("envs: {(all): tokenenv/Negation-v0}", r"envs: '\(all\)' cannot be a label"),
        ("rows: {'': {}}", "rows: '' cannot be a label"),
        ("rows: {null: {}}", "rows: None cannot be a label"),
        ("rows: {3: {}, '3': {}}", "rows has two entries with the same label"),
        ("rows: {a: {only: []}}", "rows.a.only must name an environment"),
        ("envs: {a: {env: tokenenv/Negation-v0, goal: {gold: .nan}}}", "must be a finite number"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_file_and_entry(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_grid(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("options: {group_size: 0}", "group_size=0 must be a whole number, 1 or more"),
        ("options: {group_size: 3}", "group_size=3 must divide num_envs=64"),
        ("algo: grpo, options: {group_size: 1}", "group_size=1 leaves GRPO nothing to compare"),
        ("algo: rloo, num_envs: 6", "group_size=4 must divide num_envs=6"),
        ("options: {max_new_tokens: 0}", "max_new_tokens=0 must be a whole number, 1 or more"),
        ("options: {kl: all}", "kl='all' is not known"),
        ("options: {kl_coef: -1}", "kl_coef=-1.0 must be finite and 0 or more"),
        ("options: {kl_estimator: k3}", "kl_estimator='k3' and kl_clamp=None need kl='policy'"),
        ("options: {observation: features}", "observation='features': the agents read tokens"),
        ("reward: [oracle, terminal]", r"reward=\['oracle', 'terminal'\] must be a design's name"),
        ("reward: {a: [oracle]}", "reward= has a tuple of 1 at 'a'; allowed: .design, weight"),
        ("reward: {a: [oracle, terminal]}", "the weight of 'a' must be a finite number"),
        ("reward: {a: [oracle, .inf]}", "the weight of 'a' must be a finite number"),
        ("reward: {a: 0.5}", "reward=0.5 must be a design's name"),
        ("reward: {kl: oracle}", "the term name 'kl' is taken"),
        ("reward: oracle, options: {watch: oracle}", "watch= has a term called 'oracle'"),
        ("options: {kl: none}, agent: {kl_coef: 0.1}", "kl_coef=0.1 would do nothing in an env"),
        ("options: {kl_coef: 0}, agent: {kl_target: 0.1}", "kl_target=0.1 cannot adapt kl_coef=0"),
    ],
)
def test_what_no_environment_or_agent_would_take_is_refused_before_a_cell_runs(
    tmp_path, settings, message
):
    path = written(tmp_path, f"env: {KEY}\nrows: {{fine: {{}}, bad row: {{{settings}}}}}")
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"{path}: {KEY} / bad row: ")
    assert "\n" not in str(caught.value)


def test_a_design_that_takes_weights_for_entries_is_refused_as_well(tmp_path):
    with pytest.raises(InvalidArgument, match=f"{KEY} / half: reward=0.5 must be a design's name"):
        read_grid(written(tmp_path, f"env: {KEY}\ndesigns: {{half: {{oracle: 0.5}}}}"))


def test_what_a_task_decides_is_left_to_the_cell():
    """No model is loaded for the check: these depend on the task's reward, beta and models."""
    rows = {
        "a": {"reward": "process"},
        "b": {"agent": {"kl_target": 0.1}},
        "c": {
            "reward": {"good": "oracle", "end": ["terminal", 0.5]},
            "options": {"watch": "token"},
        },
        "d": {"algo": "grpo"},
        "e": {"options": {"kl": "policy", "kl_estimator": "k3", "teacher": "no/where"}},
    }
    assert len(Grid(settings={"env": KEY}, rows=rows, seeds=1).cells()) == 5


OPTION = "env: tokenenv/DelayedKey-v0\nseed_options: [task_seed]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agent: {seed: 5}", "agent.seed=5 would be overruled: .*write seeds: .5..$"),
        ("agent: {seed: 0}", "agent.seed=0 would be overruled"),  # of one cell in three it is true
        ("always: {agent: {seed: 5}}", "agent.seed=5 would be overruled"),
        ("rows: {a: {}, b: {agent: {seed: x}}}", "/ b: agent.seed='x' would be overruled"),
        (OPTION + "options: {task_seed: 5}", "options.task_seed=5 would be overruled: seed_opt"),
        (OPTION + "rows: {a: {options: {task_seed: 5}}}", "/ a: options.task_seed=5 would be over"),
        (
            "options: {reward: oracle}\ndesigns: {a: terminal}",
            "/ a: options.reward='oracle' and re",
        ),
        ("options: {gold: 3}\ngold: tokenenv.errors:missing", "options.gold=3 and gold='tokenenv"),
    ],
)
def test_a_setting_that_would_be_overruled_in_silence_is_refused(tmp_path, text, message):
    with pytest.raises(InvalidArgument, match=message):
        read_grid(written(tmp_path, text), modules=["tokenenv.errors"])


def test_a_setting_that_says_what_the_grid_says_is_none_the_worse(tmp_path):
    text = OPTION + "seeds: [5]\nagent: {seed: 5}\noptions: {task_seed: 5}"
    (cell,) = read_grid(written(tmp_path, text)).cells()
    assert (cell.settings["agent"], cell.settings["options"]) == ({"seed": 5}, {"task_seed": 5})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("goal: {share: 0.5}", "the entry='goal' does not belong here but to an environment: envs"),
        ("rows: {a: {goal: {share: 0.5}}}", "the setting='goal' .* but to an environment: envs"),
        ("options: {goal: {share: 0.5}}", "option='goal' .* but to an environment: envs"),
        ("only: [a]", "the entry='only' .* but to a design, an algorithm or a row: rows"),
        ("envs: {a: {only: [b]}}", "envs.a: the setting='only' .* but to a design, an algorithm"),
        ("seed: 3", r"the entry='seed' .* but to the top of the grid: seeds: \[0"),
        ("rows: {a: {seed: 3}}", r"the setting='seed' .* but to the top of the grid: seeds: \[0"),
        ("always: {points: 3}", "always: .*='points' .* but to the top of the grid: points: "),
        ("rows: {a: {num_envs: 8, envs: {}}}", "='envs' .* but to the top of the grid: envs: "),
        ("agent: {total_tokens: 9}", "agent='total_tokens' .* but to the settings beside options"),
        ("options: {algo: grpo}", "option='algo' .* but to the settings beside options and agent"),
        ("max_new_tokens: 3", "but to the options of the environment: options: {max_new_tokens"),
        ("agent: {max_new_tokens: 3}", "agent='max_new_tokens' .* but to the options of the env"),
        ("kl_coef: 3", "='kl_coef' .* but to the options of the environment: options: {kl_coef: "),
        (
            "rows: {a: {lr: 3}}",
            "a: the setting='lr' .* but to the settings of the algorithm: agent",
        ),
        ("options: {lr: 3}", "option='lr' .* but to the settings of the algorithm: agent: {lr"),
    ],
)
def test_an_entry_in_the_wrong_place_is_told_where_it_belongs(tmp_path, text, where):
    with pytest.raises(InvalidArgument, match=where) as caught:
        read_grid(written(tmp_path, text))
    assert "Did you mean" not in str(caught.value)


def test_toml_errors_name_the_line(tmp_path):
    with pytest.raises(InvalidArgument, match="line 2"):
        read_grid(written(tmp_path, "seeds = 3\nenvs 3\n", "a.toml"))


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("designs: {mine: evil:brief}", "evil"),
        ("reward: evil:brief", "evil"),
        ("rows: {mine: {reward: {a: [evil.more:brief, 0.5]}}}", "evil.more"),
        ("rows: {mine: {reward: '{a: evil:brief}'}}", "evil"),
        ("rows: {mine: {options: {watch: evil:brief}}}", "evil"),
        ("envs: {mine: evil:mine/Short-v0}", "evil"),
        ("algorithms: {mine: evil:Mine}", "evil"),
        ("always: {gold: evil:brief}", "evil"),
    ],
)
def test_a_file_names_no_module_that_the_command_line_does_not_allow(
    tmp_path, monkeypatch, text, module
):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match=f"imports the module '{module}'.*--modules {module}"):
        read_grid(written(tmp_path, text))


def test_a_file_runs_no_code_and_opens_no_connection(tmp_path):
    for settings in ("options: {task: 'm:f'}", "options: {reward_model: 'http://h/x'}"):
        with pytest.raises(InvalidArgument, match="which no file can ask for"):
            read_grid(written(tmp_path, f"rows: {{a: {{{settings}}}}}"), modules=())


def test_a_suite_is_a_folder_or_a_name(tmp_path, monkeypatch):
    path = tmp_path / "benchmarks" / "suite" / "mine" / "grid.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("designs: {end: terminal}")
    monkeypatch.chdir(tmp_path)
    assert suite_file("mine").samefile(path)
    assert suite_file(str(path.parent)).samefile(path)
    assert read_grid(suite_file("mine")).name == "mine"
    with pytest.raises(InvalidArgument, match=r"suite='other' .* There are: .*mine"):
        suite_file("other")
