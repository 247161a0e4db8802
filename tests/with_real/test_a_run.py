"""LoRA PPO on SmolLM2 with a Python rule: what it changes, its checkpoint, its adapter, and the
command line."""

import json

import numpy as np
import pytest
import torch
from runs import same
from vader import polarity_scores

from tokenenv.agents import PPO
from tokenenv.agents.run.checkpoint import trained_weights
from tokenenv.cli import main
from tokenenv.rewards import Rule

SETTINGS = {"lora_rank": 4, "lr": 5e-4, "batch_tokens": 32, "minibatches": 2, "seed": 1}
TOKENS = 96


def sentiment(prompt, response):
    return polarity_scores(response)["compound"]


@pytest.fixture(scope="module")
def make_trained(make):
    return lambda: make(reward=Rule(sentiment, dense=True), max_new_tokens=8)


@pytest.fixture(scope="module")
def trained(make_trained, tmp_path_factory):
    """An agent after a few updates, the checkpoint that it wrote after the first one, and what
    `on_update` heard."""
    path, heard = tmp_path_factory.mktemp("run") / "checkpoint", []
    agent = PPO(make_trained(), **SETTINGS)

    def listen(metrics, episodes):
        heard.append((metrics, episodes))
        if agent.updates == 1:
            agent.save(path)

    agent.learn(TOKENS, on_update=listen)
    return agent, path, heard


def test_updates_are_small_and_pay_what_the_rule_says(trained, load):
    agent, _, heard = trained
    tokenizer = load("smollm2")[1]
    assert agent.updates >= 3
    assert all(0 < metrics["policy/approx_kl"] < 0.1 for metrics, _ in heard)
    assert all(np.isfinite(metrics["objective/score"]) for metrics, _ in heard)
    for episode in (e for _, episodes in heard for e in episodes):
        said = tokenizer.decode(episode.response, skip_special_tokens=True)
        assert episode.terms["rule"].sum() == pytest.approx(sentiment("", said), abs=1e-5)
        assert episode.score == pytest.approx(sentiment("", said), abs=1e-5)


def test_the_base_stays_as_it_was_loaded(trained, load):
    base = dict(load("smollm2")[0].named_parameters())
    kept = {
        name.replace(".base_layer", ""): weight
        for name, weight in trained[0].policy.model.named_parameters()
        if "lora_" not in name
    }
    assert kept.keys() == base.keys()
    assert all(torch.equal(weight, base[name]) for name, weight in kept.items())


def test_a_resumed_run_is_the_run(trained, make_trained):
    agent, path, heard = trained
    other, again = PPO.load(path, make_trained()), []
    other.learn(TOKENS, on_update=lambda metrics, episodes: again.extend(episodes))
    assert same(trained_weights(other.policy), trained_weights(agent.policy))
    expected = [episode for _, episodes in heard[1:] for episode in episodes]
    assert [e.response.tolist() for e in again] == [e.response.tolist() for e in expected]


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
def test_plain_libraries_load_what_is_saved(merge, trained, folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    agent, _, heard = trained
    agent.save_pretrained(tmp_path, merge=merge)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path if merge else folder("smollm2"), dtype=torch.float32
    )
    episode = heard[-1][1][0]
    text = torch.as_tensor(np.concatenate([episode.prompt, episode.response]))[None]
    ours = agent.policy.model(input_ids=text, use_cache=False).logits
    if not merge:
        untrained = model(input_ids=text, use_cache=False).logits
        assert not torch.allclose(untrained, ours, atol=1e-2)
        model = PeftModel.from_pretrained(model, tmp_path)
    plain = model(input_ids=text, use_cache=False).logits
    # Sums of weights are rounded to float32, so merging is exact to the rounding of a forward.
    assert (plain - ours).norm() <= (1e-5 if merge else 0) * ours.norm()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_command_line_trains_evaluates_and_shows(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "happy.py").write_text(
        "from vader import polarity_scores\n"
        "def sentiment(prompt, response):\n    return polarity_scores(response)['compound']\n"
    )
    (tmp_path / "train.txt").write_text("Tell me about a bridge.\nTell me about bread.\n")
    (tmp_path / "held_out.txt").write_text("Tell me about the moon.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    options = ["chat_template", "true", "max_new_tokens", "8", "prompts", "train.txt"]
    settings = ["--agent.lora-rank", "4", "--agent.batch-tokens", "16", "--agent.minibatches", "1"]
    rule = ["--reward", "happy:sentiment"]
    run = ["--num-envs", "2", "--total-tokens", "16", "--run-dir", "run"]
    train = ["train", "--env", "tokenenv/TextGen-v0", *rule, *run, *settings]
    held_out = ["--eval-prompts", "held_out.txt"]
    main([*train, *held_out, "--options", "model", folder("smollm2"), *options])
    main(["evaluate", "run", *rule, "--num-texts", "2"])
    printed = capsys.readouterr().out
    assert "Tell me about the moon." in printed
    assert "<|im_" not in printed
    main(["show", "run"])
    lines = (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()
    page = (tmp_path / "run" / "episodes.html").read_text()
    assert json.loads(lines[0])["tokens"][0].strip() in page
