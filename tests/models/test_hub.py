"""Models and tokenizers by hub id: revisions, the cache, and a hub that cannot be reached."""

import shutil

import fakes
import pytest
import torch
from fake_hub import FakeHub, folders_of
from huggingface_hub import is_offline_mode
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as bars

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models import hub as hub_module
from tokenenv.models.loading import load_causal_lm, load_reward_model, load_tokenizer

LOADERS = [load_causal_lm, load_reward_model, load_tokenizer]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy in two revisions, and a reward model."""
    made = {
        ("our/policy", "main"): fakes.causal_lm(seed=0),
        ("our/policy", "v1"): fakes.causal_lm(seed=1),
        ("our/reward", "main"): fakes.reward_model("token"),
    }
    return folders_of(made, tmp_path_factory)


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    return FakeHub(folders).use(monkeypatch, tmp_path / "cache")


def head(model):
    return model.lm_head.weight


def test_a_revision_of_a_model_and_of_its_tokenizer(hub):
    for revision, seed in ((None, 0), ("v1", 1)):
        loaded = load_causal_lm("our/policy", revision=revision)
        assert torch.equal(head(loaded), head(fakes.causal_lm(seed=seed)))
    hub.requests.clear()
    assert load_tokenizer("our/policy", revision="v1").get_vocab() == fakes.tokenizer().get_vocab()
    asked = [request for request in hub.requests if "tokenizer" in request]
    assert asked
    assert not any("/main/" in request for request in hub.requests)


@pytest.mark.parametrize("load", LOADERS)
def test_out_of_reach_is_one_sentence_after_one_request(load, hub):
    hub.reachable = False
    with pytest.raises(
        ModelError,
        match=r"^reference='Qwen/Qwen3-0.6B' cannot be loaded \(there is no such directory, the "
        r"hub \(https://huggingface.co\) cannot be reached \(Name or service not known\), and its "
        r"cache on this machine does not hold Qwen/Qwen3-0.6B\); allowed: a hub id, or a local "
        r"directory with safetensors, which needs no network$",
    ):
        load("Qwen/Qwen3-0.6B", argument="reference")
    assert hub.requests == ["GET api/models/Qwen/Qwen3-0.6B"]


def test_a_proxy_that_answers_for_the_hub_is_no_hub(hub):
    hub.status = 502
    with pytest.raises(ModelError, match=r"huggingface.co\) cannot be reached \(.*502"):
        load_causal_lm("our/policy")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("load", LOADERS)
def test_an_id_or_a_revision_that_the_hub_does_not_have(load, hub):
    with pytest.raises(ModelError, match=r"model='our/none' .*huggingface.co\) has no such id, or"):
        load("our/none", argument="model")
    with pytest.raises(ModelError, match=r"='our/policy' .* has no revision 'v9' of that id"):
        load("our/policy", revision="v9")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nothing", "a/b/c", ""])
def test_a_path_that_is_no_id_asks_nobody(load, path, hub):
    with pytest.raises(ModelError, match=f"='{path}' cannot be loaded .there is no such directory"):
        load(path)
    assert hub.requests == []


def test_what_the_cache_holds_is_loaded_while_the_hub_is_out_of_reach(hub, tmp_path):
    sources = {load_causal_lm: "our/policy", load_reward_model: "our/reward"}
    online = {load: load(source) for load, source in sources.items()}
    load_tokenizer("our/policy")
    # Where it was not transformers that filled the cache, it does not say which files do not exist.
    for absent in (tmp_path / "cache").rglob(".no_exist"):
        shutil.rmtree(absent)
    hub.reachable = False
    hub_module._answer.cache_clear()
    hub.requests.clear()
    for load, source in sources.items():
        loaded = load(source).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in online[load].state_dict().items())
    assert load_tokenizer("our/policy").get_vocab() == fakes.tokenizer().get_vocab()
    # Each id is asked for once, whatever is loaded from it.
    assert hub.requests == ["GET api/models/our/policy", "GET api/models/our/reward"]
    with pytest.raises(ModelError, match="does not hold revision 'v1' of it"):
        load_causal_lm("our/policy", revision="v1")
    assert not is_offline_mode()
    hub.reachable = True  # and the next call asks again
    assert torch.equal(
        head(load_causal_lm("our/policy", revision="v1")), head(fakes.causal_lm(seed=1))
    )


def test_the_base_of_an_adapter_is_asked_for_too(hub, tmp_path):
    peft = pytest.importorskip("peft")
    model = fakes.causal_lm()
    model.name_or_path = "our/missing"
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    hub.reachable = False
    hub.requests.clear()  # peft's
    with pytest.raises(ModelError, match=r"the base model of model='our/missing' cannot be loaded"):
        load_causal_lm(str(tmp_path))
    assert len(hub.requests) == 1


def test_a_directory_asks_nobody_and_has_no_revision(folders, hub):
    folder = str(folders["our/policy"]["main"])
    load_causal_lm(folder)
    load_tokenizer(folder)
    assert hub.requests == []
    with pytest.raises(InvalidArgument, match=r"revision='v1' is of a hub id, and model='.*' is a"):
        load_causal_lm(folder, revision="v1")


@pytest.mark.parametrize("source", [None, 3, ["our/policy"]])
def test_a_source_of_another_type_is_named(source, hub):
    kind = type(source).__name__
    with pytest.raises(
        InvalidArgument, match=f"model= is of type {kind}; allowed: a hub id, a loc"
    ):
        load_causal_lm(source)
    assert hub.requests == []


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("downloads", [True, False])
def test_no_bars_of_other_libraries_and_the_users_setting_afterwards(
    shown, downloads, folders, hub, capfd
):
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    if not downloads:
        disable_progress_bars()
    try:
        load_causal_lm("our/policy")
        load_causal_lm(str(folders["our/policy"]["main"]))
        with pytest.raises(ModelError):
            load_causal_lm(str(folders["our/policy"]["main"]), attn_implementation="none")
        assert capfd.readouterr() == ("", "")
        expected = downloads and shown  # transformers' switch turns the hub's too
        assert (bars.is_progress_bar_enabled(), not are_progress_bars_disabled()) == (
            shown,
            expected,
        )
    finally:
        bars.enable_progress_bar()


class AtOnce:
    """A timer for which the time has come."""

    def __init__(self, seconds, function, args):
        assert seconds == 2.0
        self.start, self.cancel = lambda: function(*args), lambda: None


def test_a_slow_load_says_what_is_loaded_and_from_where(folders, hub, monkeypatch, caplog):
    folder = str(folders["our/policy"]["main"])
    load_causal_lm(folder)
    assert caplog.messages == []
    monkeypatch.setattr(hub_module.threading, "Timer", AtOnce)
    load_causal_lm(folder)
    load_tokenizer(folder)
    load_reward_model("our/reward")
    first, second = caplog.messages
    assert first == f"loading model={folder!r} from a local directory ..."
    assert second.startswith("loading reward_model='our/reward' from the hub or ")
    assert second.endswith("cache ...")
