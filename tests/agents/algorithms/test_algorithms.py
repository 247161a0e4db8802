"""Every bundled algorithm: it learns what it should, resumes exactly, says what it wants, and runs
from the command line."""

import ast
import inspect
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from runs import Recorder, same
from toy_env import ToyEnv

import tokenenv  # noqa: F401
from tokenenv.agents import A2C, ALGORITHMS, PPO, BestOfN, PPOConfig, Reference
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.run.checkpoint import read_checkpoint
from tokenenv.agents.run.evaluate import best_of_n_kl, evaluate
from tokenenv.cli import load_config, main
from tokenenv.errors import CheckpointError, InvalidArgument

NEGATION = "tokenenv/Negation-v0"
LEARNERS = [name for name in ALGORITHMS if name not in ("best-of-n", "reference")]
each = pytest.mark.parametrize("name", ALGORITHMS)
each_learner = pytest.mark.parametrize("name", LEARNERS)


def make(name, env_id=tasks.TOY, num_envs=16, **options):
    """An env that the algorithm can learn in: tiny random models whose texts end anywhere, or a
    task that can be learnt."""
    options = {"max_new_tokens": 8, "autoreset_mode": "SameStep", **options}
    if ALGORITHMS[name].grouped:
        options.setdefault("group_size", 4)
    return gym.make_vec(env_id, num_envs=num_envs, **options)


SMALL = {"vineppo": {"rollouts": 2, "segments": 2}, "klq": {"replay_tokens": 300}}


def agent_of(name, **options):
    return ALGORITHMS[name](
        make(name, **options), batch_tokens=120, lr=1e-3, seed=1, **SMALL.get(name, {})
    )


@pytest.fixture(scope="module")
def unlearned():
    """The env that learning is measured in, and what the reference earns there."""
    envs = make("reference", NEGATION, 64)
    return envs, evaluate(Reference(envs), envs, num_texts=256)


# One epoch a batch, as A2C has it, and values that are paid for in tokens, as VinePPO's, take longer.
TOKENS_TO_LEARN = {"a2c": 6000, "vineppo": 6000, "klq": 4000}


@each_learner
def test_it_learns(name, unlearned):
    """What it is there to raise, score - beta KL, ends clearly above the reference's."""
    settings = {"rollouts": 2, "segments": 2} if name == "vineppo" else {}
    num_envs = 16 if name == "vineppo" else 32
    agent = ALGORITHMS[name](make(name, NEGATION, num_envs), lr=1e-2, batch_tokens=256, **settings)
    agent.learn(TOKENS_TO_LEARN.get(name, 3000))
    envs, before = unlearned
    after = evaluate(agent, envs, num_texts=256)
    assert after.score - envs.unwrapped.kl_coef * after.kl > before.score + 0.3


@each
def test_resuming_is_exact(name, tmp_path):
    """Two updates, a checkpoint, a new agent and env, two updates: equal to four updates bit for
    bit."""

    class Enough(Exception):
        pass

    def run(agent, save_to=None):
        recorder = Recorder(agent, save_to)

        def on_update(metrics, episodes):
            recorder(metrics, episodes)
            if agent.updates == 4:
                raise Enough

        with pytest.raises(Enough):
            agent.learn(100_000, on_update=on_update)
        return recorder

    options = (
        {"max_new_tokens": 24} if ALGORITHMS[name].grouped else {}
    )  # so that the texts of a group end apart
    straight = agent_of(name, **options)
    whole = run(straight, tmp_path / "c")
    saved = read_checkpoint(tmp_path / "c")["ranks"][0]
    assert (saved["collector"]["pairing"]["waiting"] is not None) == ALGORITHMS[name].grouped
    kept = {"ppo": ["reward_std"], "a2c": ["reward_std"], "klq": ["replay"], "grpo": ["kept"]}
    assert list(saved["statistics"]) == kept.get(name, [])
    resumed = ALGORITHMS[name].load(tmp_path / "c", make(name, **options))
    rest = run(resumed)
    assert 0 < len(rest.episodes) < len(whole.episodes)
    for a, b in zip(whole.episodes[-len(rest.episodes) :], rest.episodes, strict=True):
        for field in a.__dataclass_fields__:
            np.testing.assert_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_equal(whole.metrics[2:], rest.metrics)
    assert same(straight.policy.state_dict(), resumed.policy.state_dict())
    assert same(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert straight.tokens_seen == resumed.tokens_seen


@each
def test_episodes_tell_what_was_made_of_each_token(name):
    seen = []
    agent_of(name).learn(400, on_update=lambda metrics, episodes: seen.extend(episodes))
    learns, critic = name in LEARNERS, name in ("ppo", "a2c", "klq", "vineppo")
    for e in seen:
        np.testing.assert_allclose(sum(e.terms.values()), e.reward, atol=1e-5)
        for column, expected in ((e.advantage, learns), (e.value, critic)):
            assert (column is not None) == expected
            assert column is None or column.shape == e.reward.shape


@each
def test_another_algorithms_checkpoint_is_refused(name, tmp_path):
    agent_of(name).save(tmp_path / "c")
    other = Reference if name != "reference" else BestOfN
    with pytest.raises(
        CheckpointError, match=f"was saved by {ALGORITHMS[name].__name__}, not by {other.__name__}"
    ):
        other.load(tmp_path / "c", make("best-of-n"))


@each
def test_every_setting_is_documented_and_every_file_is_short(name):
    file = Path(inspect.getsourcefile(ALGORITHMS[name]))
    text = file.read_text(encoding="utf-8")
    described = ast.get_docstring(ast.parse(text))
    assert described
    assert len(text.splitlines()) - len(described.splitlines()) < 150
    described = {}
    for cls in ALGORITHMS[name].config_class.__mro__[:-1]:
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                described.setdefault(field.target.id, text.value.value)
    for field in fields(ALGORITHMS[name].config_class):
        assert described[field.name].endswith((".", '"'))


WRONG = [
    ("ppo", "vf_coef", -1.0, "vf_coef=-1.0 is not allowed; it must be at least 0"),
    ("a2c", "value_clip", 0.0, "value_clip=0.0 is not allowed; it must be above 0"),
    ("a2c", "lambda_critic", 1.1, "lambda_critic=1.1 is not allowed; it must lie between 0 and 1"),
    ("reinforce++", "clip_range", 0.0, "clip_range=0.0 is not allowed; it must be above 0"),
    ("reinforce++", "clip_high", -0.1, "clip_high=-0.1 is not allowed; it must be above 0"),
    ("reinforce++", "gamma", 1.1, "gamma=1.1 is not allowed; it must lie between 0 and 1"),
    ("rloo", "entropy_coef", -0.1, "entropy_coef=-0.1 is not allowed; it must be at least 0"),
    (
        "rloo",
        "gammas",
        {"kl": -0.1},
        "gammas['kl']=-0.1 is not allowed; it must lie between 0 and 1",
    ),
    (
        "grpo",
        "scale",
        "sources",
        "scale='sources' is not known; allowed: group, none, source. Did you mean 'source'",
    ),
    ("vineppo", "segments", 0, "segments=0 is not allowed; it must be at least 1"),
    ("vineppo", "rollouts", 0, "rollouts=0 is not allowed; it must be at least 1"),
    ("klq", "lambda_", 1.5, "lambda_=1.5 is not allowed; it must lie between 0 and 1"),
    ("klq", "vf_coef", -0.5, "vf_coef=-0.5 is not allowed; it must be at least 0"),
    ("klq", "replay_tokens", 0, "replay_tokens=0 is not allowed; it must be at least 1"),
    ("klq", "replay_ratio", 0.0, "replay_ratio=0.0 is not allowed; it must be above 0"),
    ("best-of-n", "batch_tokens", 0, "batch_tokens=0 is not allowed; it must be at least 1"),
    ("reference", "temperature", "hot", "temperature='hot' is not allowed; it must be a number"),
    ("reference", "lr_warmup", "long", "lr_warmup='long' is not allowed; it must be a number"),
    ("reference", "temperature", 0.0, "temperature=0.0 is not allowed; it must be above 0"),
]


@pytest.mark.parametrize(
    ("name", "field", "value", "message"), WRONG, ids=[f"{case[0]}-{case[1]}" for case in WRONG]
)
def test_settings_are_checked(name, field, value, message):
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        ALGORITHMS[name].config_class(**{field: value})
    unknown = f"{ALGORITHMS[name].config_class.__name__} field='{field}x' is not known"
    with pytest.raises(InvalidArgument, match=re.escape(unknown)):
        ALGORITHMS[name](make(name), **{f"{field}x": value})


@each
def test_it_generates(name):
    """Of whatever prompts, text or tokens, as many texts as there are prompts; the same for the
    same seed."""
    agent = agent_of(name)
    stops = agent.spec.stop_token_ids
    prompts = [
        "the film was",
        agent.spec.tokenizer.encode("we liked this film"),
        "the film was",
    ]
    texts = agent.generate(prompts, seed=1)
    assert len(texts) == 3
    for text in texts:
        assert 1 <= len(text) <= 8
        assert (text[-1] in stops) == (len(text) < 8 or text[-1] in stops)
        assert not set(text[:-1]) & set(stops)
    assert agent.generate(prompts, seed=1) == texts != agent.generate(prompts, seed=2)
    assert agent.generate([]) == []


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if ALGORITHMS[name].grouped])
def test_a_group_of_one_is_refused(name):
    message = f"group_size=1 leaves {ALGORITHMS[name].__name__} nothing to compare a text with; make the env with group_size=4"
    with pytest.raises(InvalidArgument, match=message):
        ALGORITHMS[name](make("reference"))


@each
def test_it_runs_from_the_command_line(name, tmp_path, capsys):
    folder = str(tmp_path / "x")
    flags = [
        "--env",
        NEGATION,
        "--algo",
        name,
        "--num-envs",
        "8",
        "--total-tokens",
        "200",
        "--agent.batch-tokens",
        "60",
        "--agent.lr",
        "2e-3",
    ]
    main(["train", *flags, "--options", "max_new_tokens", "6", "--run-dir", folder])
    made = load_config(tmp_path / "x" / "config.yaml")
    assert (made.algo, made.agent.lr) == (name, 2e-3)
    assert type(made.agent) is ALGORITHMS[name].config_class
    main(["train", "--resume", folder, "--total-tokens", "400"])
    main(["evaluate", folder, "--num-texts", "8", "--examples", "1"])
    assert "before" in capsys.readouterr().out
    main(["show", folder])


@each
def test_help_shows_the_algorithms_own_settings(name, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--algo", name, "--help"])
    shown = set(re.findall(r"--agent\.([a-z0-9-]+)", capsys.readouterr().out))
    wanted = {
        field.name.strip("_").replace("_", "-") for field in fields(ALGORITHMS[name].config_class)
    }
    assert wanted <= {flag.strip("-") for flag in shown}


def test_a_config_of_another_algorithm_is_refused(tmp_path, capsys):
    main(
        [
            "train",
            "--num-envs",
            "4",
            "--total-tokens",
            "50",
            "--agent.batch-tokens",
            "40",
            "--run-dir",
            str(tmp_path / "x"),
        ]
    )
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "x" / "config.yaml"), "--algo", "grpo"])
    assert "--algo grpo does not fit" in " ".join(capsys.readouterr().err.split())


def test_a2c_takes_ppos_step_at_ratio_one(monkeypatch):
    """One epoch, one minibatch, fresh texts: clipping changes nothing, so the gradients are the
    same."""
    grads = []
    for algorithm in (A2C, PPO):
        options = (
            {f.name: getattr(algorithm.config_class(), f.name) for f in fields(PPOConfig)}
            if algorithm is A2C
            else {}
        )
        shared = {
            "epochs": 1,
            "minibatches": 1,
            "whiten": False,
            "lambda_actor": 1.0,
            "lambda_critic": 1.0,
            "value_clip": None,
        }
        agent = algorithm(make("ppo"), seed=2, **shared)
        assert not options or options["clip_range"] is None
        batch = EpisodeBatch.stack(agent.collector.collect(120))
        found = {}
        weights = dict(agent.policy.named_parameters())
        monkeypatch.setattr(
            agent.optimizer,
            "step",
            lambda w=weights, f=found: f.update({n: p.grad.clone() for n, p in w.items()}),
        )
        agent.update(batch)
        grads.append(found)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the baselines


def test_the_reference_learns_nothing():
    agent = agent_of("reference")
    before = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
    agent.learn(500)
    assert agent.updates > 1
    assert same(before, dict(agent.policy.state_dict()))


def test_best_of_n_keeps_the_best_of_each_group():
    agent, n = agent_of("best-of-n"), 4
    drawn = agent.collector.collect(200)
    bests = [max(drawn[i : i + n], key=lambda e: e.score) for i in range(0, len(drawn), n)]
    agent.collector.collect = lambda tokens: drawn
    assert agent.collect() == bests
    assert agent.update(None)["objective/kl"] == pytest.approx(np.log(4) - 3 / 4)


def test_best_of_n_generates_the_best_by_the_envs_score():
    envs = make("best-of-n")
    agent = BestOfN(envs)
    prompts = ["the film was", "we liked this film"]
    [first, second] = agent.generate(prompts, seed=3)
    drawn = Reference(make("reference")).generate([p for p in prompts for _ in range(4)], seed=3)
    scores = envs.unwrapped.score_episodes([p for p in prompts for _ in range(4)], drawn).score
    assert first == drawn[int(scores[:4].argmax())]
    assert second == drawn[4 + int(scores[4:].argmax())]


def test_more_texts_to_choose_from_score_higher():
    test_envs = make("reference", NEGATION, 32)
    found = [evaluate(Reference(test_envs), test_envs, num_texts=64)]
    found += [
        evaluate(BestOfN(make("best-of-n", NEGATION, n, group_size=n)), test_envs, num_texts=64)
        for n in (2, 8)
    ]
    assert found[0].score < found[1].score < found[2].score
    for evaluation, n in zip(found, (1, 2, 8), strict=True):
        assert evaluation.kl == pytest.approx(best_of_n_kl(n), abs=1e-3)
        prompts = [[e.prompt.tolist() for e in other.episodes] for other in found]
        assert prompts[0] == prompts[1] == prompts[2]
    assert best_of_n_kl(1) == 0.0


def test_best_of_n_needs_scores():
    envs = ToyEnv(4)
    envs.group_size = 2
    step = envs.step

    def silent(actions):
        result = step(actions)
        for infos in (result[-1], result[-1].get("final_info", {})):
            infos.pop("score", None)
        return result

    envs.step = silent
    agent, written = BestOfN(envs, batch_tokens=20), []
    for ask in (
        lambda: agent.learn(20),
        lambda: evaluate(agent, envs, num_texts=8, on_text=lambda *n: written.append(n)),
    ):
        with pytest.raises(InvalidArgument, match="this env gives a text no score: make it with"):
            ask()
    assert written[-1] == (8, 16)  # it is said before the second eight are written in vain
    assert np.isnan(evaluate(agent, envs, num_texts=8, best_of=1).score)


def test_texts_are_counted_as_they_are_written():
    written = []
    for prompts in (None, [[1, 2]] * 5):
        evaluate(
            Reference(ToyEnv(4)),
            ToyEnv(4),
            num_texts=5,
            prompts=prompts,
            on_text=lambda *n: written.append(n),
        )
        counts = [done for done, _ in written]
        assert counts == sorted(counts)
        assert written[-1] == (5, 5)
        written.clear()


def test_best_of_n_generates_where_the_env_pays_the_whole_penalty():
    prompts = ["the film was"]
    texts = [
        BestOfN(make("best-of-n", kl=kl)).generate(prompts, seed=3)
        for kl in ("reference", "policy")
    ]
    assert texts[0] == texts[1]
