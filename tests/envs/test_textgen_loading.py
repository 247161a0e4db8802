"""What TextGen-v0 loads: by which revision, once each, and what it refuses before it loads."""

import fakes
import gymnasium as gym
import pytest
import torch
from fake_hub import FakeHub, folders_of

from tokenenv.cli import Train, load_config, main, save_config
from tokenenv.envs import textgen
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models import hub as hub_module
from tokenenv.models import loading

MAKERS = {
    "make_vec": lambda **options: gym.make_vec("tokenenv/TextGen-v0", num_envs=2, **options),
    "make": lambda **options: gym.make("tokenenv/TextGen-v0", **options),
    "task": textgen.task,
}
SHORT = {"prompts": ["the cat"], "max_new_tokens": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy in three revisions, one with a name that looks like a number, and a reward model in
    two."""
    made = {
        ("our/policy", "main"): fakes.causal_lm(seed=0),
        ("our/policy", "v1"): fakes.causal_lm(seed=1),
        ("our/policy", "1234567"): fakes.causal_lm(seed=2),
        ("our/reward", "main"): fakes.reward_model("token"),
        ("our/reward", "v2"): fakes.reward_model("sequence"),
    }
    return folders_of(made, tmp_path_factory)


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    return FakeHub(folders).use(monkeypatch, tmp_path / "cache")


@pytest.fixture
def loads(monkeypatch):
    """What is loaded: the auto class and the source of each."""
    seen, load = [], loading._from_pretrained

    def counted(auto_class, source, *args, **options):
        seen.append((auto_class, source))
        return load(auto_class, source, *args, **options)

    monkeypatch.setattr(loading, "_from_pretrained", counted)
    return seen


def seed_of(model):
    """Which of the fakes a policy is."""
    head = model.lm_head.weight
    return next(s for s in range(3) if torch.equal(head, fakes.causal_lm(seed=s).lm_head.weight))


# ------------------------------------------------------------------ refused at once


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "model= and prompts= are missing: this id cannot be made without them."),
        ({"model": "our/policy"}, "prompts= is missing: this id cannot be made without it."),
        ({"prompts": ["a"]}, "model= is missing: this id cannot be made without it."),
        ({"model": None, "prompts": ["a"]}, "model= is missing: this id cannot be made without"),
        ({"model": "our/policy", "prompts": None}, "prompts= is missing: this id cannot be made"),
    ],
)
def test_missing_arguments_are_one_sentence(maker, given, missing, loads):
    with pytest.raises(InvalidArgument, match=f"^{missing}"):
        MAKERS[maker](**given)
    assert loads == []


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("device", ["cuda:77", "meta", "nowhere"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(
    maker, device, on_disk, folders, loads
):
    model = folders["our/policy"]["main"] if on_disk else fakes.causal_lm()
    with pytest.raises(InvalidArgument, match=f"^device='{device}' cannot be used here: "):
        MAKERS[maker](model=model, device=device, **SHORT)
    assert loads == []


@pytest.mark.parametrize("argument", ["reference", "implicit_model", "reward_model", "tokenizer"])
def test_what_the_hub_does_not_have_is_said_before_anything_is_loaded(argument, hub, loads, caplog):
    for reachable, reason in ((True, "has no such id"), (False, "cannot be reached")):
        hub.reachable = reachable
        model = hub.folders["our/policy"]["main"]
        with pytest.raises(ModelError, match=f"^{argument}='our/none' cannot be loaded .*{reason}"):
            textgen.task(**{"model": model, argument: "our/none", **SHORT})
        hub_module._answer.cache_clear()
    assert len(hub.requests) == 2
    assert loads == []
    assert caplog.messages == []


def test_a_model_is_not_loaded_for_a_device_that_is_not_here(folders, loads):
    with pytest.raises(InvalidArgument, match="device='cuda:77' cannot be used here"):
        loading.load_causal_lm(folders["our/policy"]["main"], device="cuda:77")
    assert loads == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("prompts p.txt", "model= is missing: this id cannot be made without it."),
        ("prompts p.txt model null", "model= is missing: this id cannot be made without it."),
        ("prompts p.txt model our/policy device cuda:77", "device='cuda:77' cannot be used here"),
        ("prompts p.txt model our/policy", "model='our/policy' cannot be loaded (there is no"),
        ("prompts p.txt model our/policy revision v1", "not hold revision 'v1' of it"),
    ],
)
def test_the_command_line_says_it_in_one_sentence(options, message, hub, tmp_path, capsys):
    hub.reachable = False
    options = options.replace("p.txt", str(tmp_path / "p.txt")).split()
    (tmp_path / "p.txt").write_text("the cat\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--env", "tokenenv/TextGen-v0", "--options", *options])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(hub.requests) <= 1


# ------------------------------------------------------------------ revisions


def test_a_revision_is_of_the_model_and_of_what_else_names_its_id(hub, loads):
    made = textgen.task(
        model="our/policy",
        reference="our/policy",
        implicit_model="our/policy",
        reward_model="our/reward",
        revision="v1",
        **SHORT,
    )
    assert seed_of(made.reference) == 1
    assert made.model is None  # the reference's
    assert made.implicit_model is made.reference
    assert made.scorer.per_token  # of the default branch
    asked = [request for request in hub.requests if "our/policy/resolve" in request]
    assert asked
    assert not any("/main/" in request for request in asked)
    assert [auto for auto, _ in loads if auto == "AutoModelForCausalLM"] == ["AutoModelForCausalLM"]


def test_each_argument_may_have_a_revision_of_its_own(hub):
    made = textgen.task(
        model="our/policy",
        reference="our/policy",
        reward_model="our/reward",
        revision={"reference": "v1", "reward_model": "v2"},
        **SHORT,
    )
    assert seed_of(made.model) == 0
    assert seed_of(made.reference) == 1
    assert not made.scorer.per_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "v9"}, r"model='our/policy' .*has no revision 'v9' of that id"),
        ({"revision": {"reference": "v1"}}, "revision='v1' is of a hub id, and reference= names n"),
        ({"revision": {"policy": "v1"}}, "revision='policy' is not known; allowed: implicit_model"),
        ({"revision": {"model": 3}}, r"revision=\{'model': 3\} must hold a text"),
        ({"revision": 3}, "revision=3 must be a text, or a mapping from arguments to texts"),
        ({"revision": "v1", "model": fakes.causal_lm()}, "of a hub id, and model= names none"),
        (
            {"revision": {"reference": "v1"}, "reference": "http://localhost:1"},
            "revision='v1' is of a hub id, and reference= names none",
        ),
    ],
)
def test_a_revision_that_cannot_be_is_refused(options, message, hub, loads):
    with pytest.raises((InvalidArgument, ModelError), match=message):
        textgen.task(**{"model": "our/policy", **SHORT, **options})


def test_a_run_config_keeps_the_revision_as_it_was_typed(hub, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("the cat\n")
    for typed, seed in (("1234567", 2), ("{model: v1}", 1)):
        options = {"model": "our/policy", "prompts": str(prompts), "revision": typed}
        options |= {"reward_model": "our/reward", "max_new_tokens": "4"}
        run = Train(env="tokenenv/TextGen-v0", num_envs=2, options=options)
        save_config(run, tmp_path / "config.yaml")
        envs = load_config(tmp_path / "config.yaml").make_envs()
        assert seed_of(envs.reference) == seed


# ------------------------------------------------------------------ once each


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_model_in_two_roles_is_loaded_once(on_disk, folders, loads):
    other = folders["our/policy"]["v1"] if on_disk else fakes.causal_lm(seed=1)
    made = textgen.task(
        model=folders["our/policy"]["main"],
        reference=other,
        implicit_model=str(other) if on_disk else other,
        **SHORT,
    )
    assert made.implicit_model is made.reference
    assert made.model is not made.reference
    models = [source for auto, source in loads if auto == "AutoModelForCausalLM"]
    assert len(models) == 1 + on_disk
