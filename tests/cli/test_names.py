"""Names of a user's own on the command line: --env module:id, --reward module:Name, --algo
module:Name. In a run folder they are data."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import gymnasium as gym
import pytest
import yaml

import tokenenv
from tokenenv import plugins
from tokenenv.cli import Train, load_config, main, save_config
from tokenenv.cli.names import algorithm_of, env_id_of, reward_of
from tokenenv.cli.train import default_run_dir
from tokenenv.errors import InvalidArgument
from tokenenv.plugins import load_name
from tokenenv.rewards.designs import make_terms
from tokenenv.rewards.rule import Rule
from tokenenv.safety.trust import check_from_file

MINE = '''
"""Say good things, briefly."""

from dataclasses import dataclass

import torch

import tokenenv
from tokenenv.agents import PPO, PPOConfig
from tokenenv.envs.tasks.negation import task as negation


def task(*, length: int = 4, unannotated=3):
    return negation(max_new_tokens=length)


tokenenv.register("mine/Short-v0", task)


class Constant(tokenenv.RewardTerm):
    """Pays the same for every token. Nothing else."""

    name = "constant"

    def __init__(self, amount=0.25):
        self.amount = amount

    def reward(self, batch):
        return torch.full(batch.tokens.shape, self.amount)


class Needy(tokenenv.RewardTerm):
    def __init__(self, amount):
        self.amount = amount


class Leaves(tokenenv.RewardTerm):
    def __init__(self):
        raise SystemExit(4)


def brief(prompt, response):
    """Counts words."""
    return -len(response.split())


mixture = {"a": "terminal", "b": (Constant(), 0.5)}
number = 3


@dataclass(kw_only=True, slots=True)
class MineConfig(PPOConfig):
    patience: int = 2
    """How long it waits."""


class Mine(PPO):
    config_class = MineConfig
    config: MineConfig


def no_task():
    return 3
'''
SMALL = ["--num-envs", "4", "--total-tokens", "40", "--agent.batch-tokens", "20"]
NAMES = ["--env", "mine:mine/Short-v0", "--reward", "mine:Constant", "--algo", "mine:Mine"]


LATE = '''
def __getattr__(name):
    """What is named is imported when it is asked for."""
    if name == "leave":
        raise SystemExit(3)
    if name in ("Term", "task"):
        raise ImportError("no such extra")
    raise AttributeError(name)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a user's modules in it; what they register and import is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import json\n\njson.loads('{')\n")
    (tmp_path / "lacking.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage: script')\n")
    (tmp_path / "late.py").write_text(LATE)
    modules, ids = set(sys.modules), set(gym.registry)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name in {path.stem for path in tmp_path.glob("*.py")}:
            del sys.modules[name]
    for env_id in set(gym.registry) - ids:
        del gym.registry[env_id]


def error_of(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1
    return error


def test_a_run_with_names_of_ones_own(here, capsys):
    main(["train", *NAMES, *SMALL, "--agent.patience", "5", "--run-dir", "x"])
    printed = capsys.readouterr().out
    again = " ".join(NAMES)
    assert f"tokenenv evaluate x {again}\n" in printed
    config = yaml.safe_load((here / "x" / "config.yaml").read_text())
    assert [config[name] for name in ("env", "reward", "algo")] == NAMES[1::2]
    assert config["agent"]["patience"] == 5
    assert config["options"]["max_new_tokens"] == 4
    main(["train", "--resume", "x", *NAMES, "--total-tokens", "80"])
    main(["evaluate", "x", *NAMES, "--num-texts", "4"])
    assert "distinct bigrams" in capsys.readouterr().out
    main(["train", "--config", "x/config.yaml", *NAMES, "--run-dir", "y"])
    assert load_config(here / "y" / "config.yaml", env=NAMES[1], reward=NAMES[3], algo=NAMES[5])
    main(["show", "x"])


def test_the_default_run_folder_is_named_without_modules(here):
    made = Train(
        env="mine:mine/Short-v0", algo="mine:Mine", agent=algorithm_of("mine:Mine").config_class()
    )
    name = default_run_dir(made).as_posix()
    assert name.startswith("runs/short-v0-Mine-0-")


def test_the_rewards_are_those_of_the_named_design(here):
    main(["train", "--env", "mine:mine/Short-v0", *SMALL, "--run-dir", "x"])
    main(["train", *NAMES[:4], *SMALL, "--run-dir", "y"])
    rows = [
        yaml.safe_load((here / name / "episodes.jsonl").read_text().splitlines()[0])
        for name in "xy"
    ]
    assert "constant" not in rows[0]["token_terms"]
    assert rows[1]["token_terms"]["constant"] == [0.25] * rows[1]["length"]


def test_options_of_a_task_of_ones_own(here):
    options = ["--options", "length", "6", "unannotated", "4"]
    main(["train", "--env", "mine:mine/Short-v0", *SMALL, *options, "--run-dir", "x"])
    assert yaml.safe_load((here / "x" / "config.yaml").read_text())["options"]["length"] == "6"


def test_help_shows_the_settings_of_an_algorithm_of_ones_own(here, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--algo", "mine:Mine", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--agent.patience INT How long it waits. (default: 2)" in printed.replace("│ ", "")


def test_one_of_ones_own_is_described(here, capsys):
    main(["envs", "mine:mine/Short-v0"])
    printed = capsys.readouterr().out
    assert "Say good things, briefly." in printed
    assert "length" in printed
    assert "--env mine:mine/Short-v0" in printed
    main(["rewards", "mine:Constant"])
    assert "Pays the same for every token." in capsys.readouterr().out
    main(["rewards", "mine:brief"])
    assert "Counts words." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--env", "nowhere:mine/Short-v0"],
            "env='nowhere:mine/Short-v0': there is no module 'nowhere'",
        ),
        (["--env", "mine.sub:mine/Short-v0"], "there is no module 'mine.sub'"),
        (
            ["--env", "mine:mine/Shrt-v0"],
            "importing 'mine': env='mine/Shrt-v0' is not known; allowed: mine/Short-v0. Did you mean",
        ),
        (["--env", "mine:CartPole-v1"], "env='CartPole-v1' is not known"),
        (["--env", "CartPole-v1"], "is registered, but makes no token environment"),
        (["--env", "../mine:mine/Short-v0"], "is not of the form module:id"),
        (["--env", ":mine/Short-v0"], "is not of the form module:id"),
        (
            ["--reward", "nowhere:Constant"],
            "reward='nowhere:Constant': there is no module 'nowhere'",
        ),
        (["--reward", "mine:Constnt"], "'mine' has no 'Constnt'. Did you mean 'Constant'?"),
        (["--reward", "mine:mixture.x"], "reward='mine:mixture.x': 'dict' has no 'x'"),
        (["--reward", "mine:Needy"], "Needy() raised TypeError: "),
        (["--reward", "mine:Mine"], "reward='mine:Mine' is Mine; a reward is a RewardTerm class"),
        (["--reward", "mine:number"], "is of type int; a reward is"),
        (["--reward", "os:system"], "the function 'system' has the parameters (command); it must"),
        (["--reward", "mine:"], "reward='mine:' is not of the form module:Name"),
        (["--reward", "{a: 'mine:Constnt'}"], "reward='mine:Constnt': 'mine' has no 'Constnt'"),
        (["--reward", "{a: [token, 1, 2]}"], "reward= has a tuple of 3 at 'a'"),
        (["--reward", "{a: [token, much]}"], "the weight of 'a' must be a finite number"),
        (["--options", "reward", "mine:Constnt"], "'mine' has no 'Constnt'"),
        (["--options", "watch", "mine:Constnt"], "watch='mine:Constnt': 'mine' has no 'Constnt'"),
        (
            ["--algo", "mine:Constant"],
            "algo='mine:Constant' is Constant; an algorithm is a subclass",
        ),
        (["--algo", "mine:brief"], "algo='mine:brief' is of type function; an algorithm is"),
        (["--algo", "gppo"], "algo='gppo' is not known"),
        (["--options", "task", "mine:Mine"], "task='mine:Mine' is Mine; it must be a function"),
        (
            ["--options", "task", "mine:brief"],
            "prompt= and response= are missing: this id cannot be made",
        ),
        (["--options", "task", "mine:no_task"], "returned int; it must return a tokenenv.Task"),
        (
            ["--algo", "broken:Mine"],
            "algo='broken:Mine': importing 'broken' raised JSONDecodeError: ",
        ),
        (
            ["--algo", "lacking:Mine"],
            "importing 'lacking' raised ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
        ),
        (["--env", "wrong:mine/Short-v0"], "importing 'wrong' raised SyntaxError: "),
        (["--reward", "script:f"], "importing 'script' raised SystemExit: usage: script"),
        (["--reward", "mine:Leaves"], "reward='mine:Leaves': Leaves() raised SystemExit: 4 ("),
        (["--reward", "late:Term"], "reward='late:Term': 'late'.Term raised ImportError: no such"),
        (["--algo", "late:leave"], "algo='late:leave': 'late'.leave raised SystemExit: 3 ("),
        (["--options", "task", "late:task"], "task='late:task': 'late'.task raised ImportError"),
        (["--reward", "{1: token}"], "reward= has a term called 1; a name must be a text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_named_is_one_sentence(flags, message, here, capsys):
    assert message in error_of(["train", *SMALL, *flags, "--run-dir", "x"], capsys)
    assert not (here / "x").exists()


def test_an_error_of_an_import_names_the_line(here, monkeypatch):
    """Also of a module whose path begins as this package's does: tokenenv_reverse."""
    monkeypatch.syspath_prepend(str(here))
    beside = plugins.OWN_FOLDER.rstrip("/")
    monkeypatch.setattr(plugins, "OWN_FOLDER", plugins.OWN_FOLDER.replace(beside, f"{here}/lack"))
    with pytest.raises(
        InvalidArgument, match=r"^x: importing 'lacking' .*lacking\.py, line 1\)\.$"
    ):
        load_name("lacking:f", "x")


def test_a_reward_is_read_as_it_is_typed(here):
    assert reward_of("token") == "token"
    assert reward_of("{dense: [token, 0.3], end: terminal}") == {
        "dense": ("token", 0.3),
        "end": "terminal",
    }
    assert isinstance(reward_of("mine:brief"), Rule)
    terms = make_terms(reward_of("{a: ['mine:Constant', 2], b: 'mine:mixture'}"))
    assert {name: term.weight for name, term in terms.items()} == {"a": 2, "b.a": 1.0, "b.b": 0.5}


def test_a_mixture_trains_and_goes_on_from_its_run_folder(here):
    mixture = "{dense: [delta, 0.3], end: terminal}"
    main(["train", "--env", "tokenenv/Negation-v0", "--reward", mixture, *SMALL, "--run-dir", "x"])
    main(["train", "--resume", "x", "--total-tokens", "80"])
    main(["evaluate", "x", "--num-texts", "4"])
    first = yaml.safe_load((here / "x" / "episodes.jsonl").read_text().splitlines()[0])
    assert set(first["token_terms"]) == {"dense", "end", "kl"}


def test_a_term_of_ones_own_is_watched(here, capsys):
    watch = ["--options", "watch", "{mine: mine:Constant}"]
    main(["train", "--env", "tokenenv/Negation-v0", *watch, *SMALL, "--run-dir", "x"])
    assert "evaluate x --options watch '{mine: mine:Constant}'\n" in capsys.readouterr().out
    first = yaml.safe_load((here / "x" / "episodes.jsonl").read_text().splitlines()[0])
    assert set(first["token_watched"]) == {"mine"}
    error = error_of(["evaluate", "x", "--num-texts", "4"], capsys)
    assert "options.watch='{mine: mine:Constant}' imports code" in error
    main(["evaluate", "x", "--num-texts", "4", *watch])
    assert "watch: mine, per token" in capsys.readouterr().out


# ---------------------------------------------------------------- run folders are data

EVIL = "raise SystemExit('imported')\n"
STRANGE = {
    "env": "evil:evil/Short-v0",
    "reward": "evil:Reward",
    "algo": "evil:Agent",
}
HOSTILE = {
    **{name: {name: value} for name, value in STRANGE.items()},
    "all of them": STRANGE,
    "a mixture": {"reward": "{a: 'evil:Reward'}"},
    "a weighted mixture": {"reward": "{a: ['evil:Reward', 0.5]}"},
    "a mixture that is no YAML": {"reward": "{a: evil:Reward"},
    "a weight": {"reward": "{a: [token, 'evil:weight']}"},
    "a mapping within": {"reward": "{a: {b: 'evil:Reward'}}"},
    "the env's option": {"options": {"reward": "evil:Reward"}},
    "what is watched": {"options": {"watch": "evil:Reward"}},
    "a mapping of what is watched": {"options": {"watch": "{a: evil:Reward}"}},
    "spaces": {"reward": " evil:Reward "},
}


def strange(here, changes):
    """The run folder of a stranger, whose module lies in the current directory."""
    main(["train", "--env", "tokenenv/Negation-v0", *SMALL, "--run-dir", "x"])
    (here / "evil.py").write_text(EVIL)
    path = here / "x" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    options = values["options"] | changes.get("options", {})
    path.write_text(yaml.safe_dump(values | changes | {"options": options}))


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_folder_imports_nothing(changes, here, capsys):
    strange(here, changes)
    for argv in (
        ["train", "--resume", "x"],
        ["train", "--config", "x/config.yaml", "--run-dir", "y"],
        ["train", "--config", "x/config.yaml", "--help"],
        ["evaluate", "x", "--num-texts", "2"],
    ):
        assert "x/config.yaml" in error_of(argv, capsys)
    main(["show", "x"])
    assert "evil" not in sys.modules
    assert str(here) not in sys.path


def test_the_error_says_every_flag_that_has_to_be_repeated(here, capsys):
    strange(here, {**STRANGE, "reward": "{a: 'evil:Reward'}"})
    error = error_of(["train", "--resume", "x"], capsys)
    assert error.endswith(
        """say them again: --env evil:evil/Short-v0 --reward '{a: '"'"'evil:Reward'"'"'}' --algo evil:Agent\n"""
    )


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_on_the_command_line_lets_no_other_pass(name, here, capsys):
    """What is said for one field is taken for that field alone, and is what is imported."""
    strange(here, STRANGE)
    said = dict(zip(["env", "reward", "algo"], NAMES[1::2], strict=True))
    flags = [word for key, value in said.items() if key != name for word in (f"--{key}", value)]
    for argv in (["train", "--resume", "x", *flags], ["evaluate", "x", *flags]):
        error = error_of(argv, capsys)
        assert "evil" in error
        assert (
            "--algo mine:Mine does not fit" in error
            or f"{name}='{STRANGE[name]}' imports code" in error
        )
    assert "evil" not in sys.modules


def test_an_algorithm_of_another_run_is_refused_before_anything_is_imported(here, capsys):
    strange(here, {"algo": "evil:Agent"})
    message = "--algo mine:Mine does not fit x/config.yaml, which is for evil:Agent"
    assert message in error_of(["train", "--resume", "x", "--algo", "mine:Mine"], capsys)
    assert not {"evil", "mine"} & set(sys.modules)


def test_a_file_may_name_no_module_whatever_the_form(here):
    for name in ("env", "reward", "algo", "options.reward"):
        for value in ("a:b", "a.b:c/D-v0", "x y:z", ":", {"a": ["b:c", 1]}):
            with pytest.raises(InvalidArgument, match="imports code"):
                check_from_file({name: value}, "f")
        check_from_file({name: value}, "f", {name})


def test_a_config_that_python_code_reads_imports_nothing(here):
    save_config(Train(reward="mine:Constant"), here / "config.yaml")
    with pytest.raises(InvalidArgument, match="say it again: --reward mine:Constant"):
        load_config(here / "config.yaml")
    assert load_config(here / "config.yaml", reward="mine:brief").reward == "mine:brief"
    assert "mine" not in sys.modules


# ---------------------------------------------------------------- names of plugins, without any


def entry(group, name, value, dist):
    made = EntryPoint(name, value, group)
    return made._for(SimpleNamespace(name=dist, version="1.0"))


@pytest.fixture
def installed(monkeypatch):
    def install(*entries):
        found = EntryPoints(entry(*one) for one in entries)
        monkeypatch.setattr(plugins, "_entry_points", lambda group: found.select(group=group))

    ids = set(gym.registry)
    yield install
    for env_id in set(gym.registry) - ids:
        del gym.registry[env_id]


def test_a_bundled_name_stays_and_both_are_named(installed, here, capsys):
    installed(
        ("tokenenv.agents", "ppo", "mine:Mine", "his"),
        ("tokenenv.rewards", "token", "mine:Constant", "hers"),
        ("tokenenv.envs", "tokenenv/Reviews-v0", "mine:task", "theirs"),
    )
    assert algorithm_of("ppo") is tokenenv.agents.PPO
    assert type(make_terms("token")["token"]).__name__ == "Token"
    tokenenv.register_envs()
    assert gym.spec("tokenenv/Reviews-v0").kwargs["task"] == "tokenenv.envs.tasks.reviews:task"
    main(["envs"])
    main(["rewards"])
    # A narrow terminal breaks a long word of a table's cell.
    printed = "".join(capsys.readouterr().out.replace("│", " ").split())
    for name, giver in (("env='tokenenv/Reviews-v0'", "theirs"), ("reward='token'", "hers")):
        said = f"{name} is bundled with tokenenv-rl, which keeps it; the plugin {giver} 1.0"
        assert said.replace(" ", "") in printed
    assert "mine" not in sys.modules


def test_a_name_of_two_plugins_is_nobodys(installed, here, capsys):
    installed(
        *(
            (group, name, f"{dist}:Thing", dist)
            for group, name in (("agents", "mine"), ("rewards", "new"), ("envs", "my/New-v0"))
            for group in (f"tokenenv.{group}",)
            for dist in ("his", "hers")
        )
    )
    tokenenv.register_envs()
    for make in (
        lambda: algorithm_of("mine"),
        lambda: make_terms("new"),
        lambda: env_id_of("my/New-v0"),
        lambda: gym.make_vec("my/New-v0", num_envs=2),
        lambda: gym.make("my/New-v0"),
    ):
        with pytest.raises(
            InvalidArgument, match=r"is given by hers 1\.0 and by his 1\.0; uninstall"
        ):
            make()
    main(["envs"])
    main(["rewards"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "env='my/New-v0' is given by hers 1.0 and by his 1.0" in printed
    assert "reward='new' is given by hers 1.0 and by his 1.0" in printed


def test_a_broken_plugin_is_listed_with_its_error_and_breaks_nothing(
    installed, here, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(str(here))
    installed(
        ("tokenenv.envs", "my/Broken-v0", "broken:task", "bad"),
        ("tokenenv.envs", "no id at all", "mine:task", "bad"),
        ("tokenenv.envs", "my/Colon:x-v0", "mine:task", "bad"),
        ("tokenenv.envs", "my/Value-v0", "mine", "bad"),
        ("tokenenv.rewards", "broken", "broken:Term", "bad"),
        ("tokenenv.rewards", "kindless", "mine:Mine", "bad"),
        ("tokenenv.rewards", "late", "late:Term", "bad"),
        ("tokenenv.rewards", "leaves", "mine:Leaves", "bad"),
        ("tokenenv.agents", "broken", "broken:Agent", "bad"),
    )
    tokenenv.register_envs()
    main(["envs"])
    main(["rewards"])
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "my/Broken-v0 cannot be used: task='broken:task': importing 'broken' raised JSONDecodeError"
        in printed
    )
    assert "no id at all cannot be used: Gymnasium does not take this id" in printed
    assert (
        "my/Colon:x-v0 cannot be used: env='my/Colon:x-v0' of the plugin bad 1.0 is no entry point"
        in printed
    )
    assert "my/Value-v0 cannot be used" in printed
    assert (
        "broken cannot be used: 'broken' of the plugin bad 1.0: importing 'broken' raised"
        in printed
    )
    assert (
        "kindless cannot be used: 'kindless' of the plugin bad 1.0 is Mine; a reward is" in printed
    )
    assert "late cannot be used: 'late' of the plugin bad 1.0: 'late'.Term raised Imp" in printed
    assert "leaves cannot be used: 'leaves' of the plugin bad 1.0: Leaves() raised Sys" in printed
    assert "tokenenv/Reviews-v0 continue a review" in printed
    assert "importing 'broken' raised JSONDecodeError" in error_of(
        ["train", "--env", "my/Broken-v0", *SMALL], capsys
    )
    assert "importing 'broken' raised JSONDecodeError" in error_of(
        ["train", "--algo", "broken", *SMALL], capsys
    )
    assert gym.make_vec("tokenenv/Negation-v0", num_envs=1)


def test_names_of_plugins_are_read_without_importing_them(installed, here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    installed(
        ("tokenenv.envs", "my/Short-v0", "mine:task", "good"),
        ("tokenenv.rewards", "constant", "mine:Constant", "good"),
        ("tokenenv.agents", "mine", "mine:Mine", "good"),
    )
    tokenenv.register_envs()
    with pytest.raises(InvalidArgument, match="Did you mean 'constant'"):
        make_terms("konstant")
    with pytest.raises(InvalidArgument, match=r"allowed: .* mine,"):
        algorithm_of("mien")
    assert env_id_of("my/Short-v0") == "my/Short-v0"
    assert "mine" not in sys.modules
    assert make_terms("constant")["constant"].amount == 0.25
    assert algorithm_of("mine").__name__ == "Mine"
    envs = gym.make_vec("my/Short-v0", num_envs=2, length=5, reward={"a": ("constant", 2.0)})
    assert envs.unwrapped.token_spec.max_new_tokens == 5
    assert gym.make("my/Short-v0").unwrapped.token_spec.max_new_tokens == 4


def test_a_bundled_id_cannot_be_registered_anew():
    with pytest.raises(InvalidArgument, match="env_id='tokenenv/Reviews-v0' is bundled"):
        tokenenv.register("tokenenv/Reviews-v0", lambda: None)
    with pytest.raises(InvalidArgument, match="env_id='a b' is no id that Gymnasium takes"):
        tokenenv.register("a b", lambda: None)
