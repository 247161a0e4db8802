"""ChatGen-v0: a function of the user's answers the policy's turns."""

import copy
import sys
from pathlib import Path

import fakes
import gymnasium as gym
import numpy as np
import pytest
import yaml
from chat_templates import CHATML, DROPS_THOUGHTS, FAMILIES, tokenizer_of

from tokenenv.agents import PPO
from tokenenv.check import check_vector_env
from tokenenv.cli import main
from tokenenv.errors import InvalidArgument
from tokenenv.models.chat_turns import Answer
from tokenenv.models.encoding import encode_continuation

TOKENIZER = tokenizer_of(CHATML)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "eos_token_id": 2}
ROWS = [{"prompt": "a dog", "answer": "4"}, {"prompt": "the cat", "answer": "7"}]
T, L = 12, 120


def right(messages, answer):
    """Say so, as often as the policy is wrong."""
    turns = sum(message["role"] == "assistant" for message in messages)
    if answer in messages[-1]["content"]:
        return None, 1.0
    return (f"is {turns}", -0.25) if turns < 4 else None


def stochastic(messages, rng):
    return (f"{rng.integers(1000)}", float(rng.random())) if rng.random() < 0.8 else None


def make(num_envs=2, tokenizer=TOKENIZER, **options):
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    given = {
        "model": fakes.causal_lm(**sizes),
        "tokenizer": tokenizer,
        "prompts": ROWS,
        "respond": right,
        "max_new_tokens": T,
        "max_context_tokens": L,
        "autoreset_mode": "SameStep",
    }
    return gym.make_vec("tokenenv/ChatGen-v0", num_envs=num_envs, **(given | options))


def ids_of(text):
    return encode_continuation(text, TOKENIZER)


# ------------------------------------------------------------ what is in a text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_stands_in_the_text_as_the_template_writes_it(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    envs = make(1, tokenizer, kl="none", prompts=ROWS[:1])
    (end,) = envs.unwrapped.token_spec.turn_end_token_ids
    obs, _ = envs.reset(seed=0)
    conversation = [{"role": "user", "content": "a dog"}]
    space = " " if family == "mistral" else ""  # its template puts a space before an answer
    for number, answer in enumerate((f"{space}is", f"{space}good", f"{space}walking"), 1):
        for token in [*encode_continuation(answer, tokenizer), end]:
            obs, rewards, terminations, truncations, infos = envs.step(np.array([token]))
        conversation += [
            {"role": "assistant", "content": answer.strip()},
            {"role": "user", "content": f"is {number}"},
        ]
        whole = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        seen = obs["tokens"][0, : obs["length"][0]]
        assert tokenizer.decode(seen) == whole
        assert (rewards, infos["turn_reward"]) == (-0.25, -0.25)
        assert not (terminations | truncations).any()
    own = obs["tokens"][0][obs["own_mask"][0].astype(bool)]
    assert tokenizer.decode(own[own != end]) == f"{space}is{space}good{space}walking"
    for token in [*encode_continuation("4", tokenizer), end]:
        _, rewards, terminations, _, _ = envs.step(np.array([token]))
    assert (rewards, terminations) == (1.0, True)


def test_an_answer_may_end_the_conversation_with_a_last_message():
    asked = []

    def respond(messages):
        asked.append(messages)
        return Answer("good", 2.0, True)

    envs = make(1, respond=respond, kl="none", prompts=["a dog"])
    envs.reset(seed=0)
    _, rewards, terminations, _, infos = envs.step(np.array([END]))
    assert (rewards, terminations) == (2.0, True)
    last = infos["final_obs"]
    text = TOKENIZER.decode(last["tokens"][0, : last["length"][0]])
    assert text.endswith("<|im_end|>\n<|im_start|>user\ngood<|im_end|>\n")
    user, assistant = {"role": "user", "content": "a dog"}, {"role": "assistant", "content": ""}
    assert asked == [[user, assistant]]


def test_a_turn_without_its_end_is_not_answered():
    """Neither where another stop token ends the text, nor where it is cut."""
    envs = make(2, respond=lambda messages: pytest.fail("was asked"), max_new_tokens=2)
    envs.reset(seed=0)
    assert envs.step(np.array([2, 5]))[2].tolist() == [True, False]
    assert envs.step(np.array([2, 5]))[2].tolist() == [True, True]


def test_what_a_function_is_given():
    given = []

    def respond(messages, /, text, *, answer, level="low", **row):
        given.append((copy.deepcopy(messages), text.columns, answer, level, dict(row)))
        messages.clear()
        row.clear()

    rows = [{"prompt": "a", "answer": [4], "other": 1}]
    envs = make(1, respond=respond, prompts=rows)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.array([END]))
    messages, columns, answer, level, row = given[0]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert columns == {"answer": [4], "other": 1}
    assert (answer, level, row) == ([4], "low", {"other": 1})
    assert given[1] == given[0]


# ------------------------------------------------------------ the contract


@pytest.mark.parametrize("respond", [right, stochastic])
def test_the_contract_of_token_envs_holds(respond):
    check_vector_env(make(3, respond=respond, max_new_tokens=6), steps=24)


def random_steps(envs, count, seed):
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        actions = rng.integers(3, len(TOKENIZER), envs.num_envs)
        actions[rng.random(envs.num_envs) < 0.4] = END
        steps.append(envs.step(actions))
    return steps


def test_what_is_asked_does_not_depend_on_what_was_asked_before():
    """A saved state goes on in another env, whose function has not seen the text so far."""
    envs, again = make(respond=stochastic), make(respond=stochastic)
    envs.reset(seed=1)
    random_steps(envs, 5, 1)
    again.unwrapped.load_state(envs.unwrapped.save_state())
    for one, other in zip(random_steps(envs, 8, 2), random_steps(again, 8, 2), strict=True):
        np.testing.assert_array_equal(one[0]["tokens"], other[0]["tokens"])
        np.testing.assert_allclose(one[1], other[1], atol=1e-5)


def test_a_copy_of_a_text_remembers_what_was_said_in_it():
    """The copy's environment draws other numbers, and what was written stays what was written."""
    asked = []

    def respond(messages, rng):
        asked.append(messages)
        return str(rng.integers(10**6))

    envs = make(respond=respond, prompts=["a dog"])
    envs.reset(seed=0)
    envs.step(np.array([END, 5]))
    said = asked[0]
    envs.unwrapped.fork([0], [1])
    asked.clear()
    obs, *_ = envs.step(np.array([END, END]))
    first, copied = asked
    assert first == copied
    assert first[:2] == said
    assert first[2]["content"] in TOKENIZER.decode(obs["tokens"][0])
    assert (obs["tokens"][0] != obs["tokens"][1]).any()


def test_a_policy_learns():
    agent = PPO(make(4), batch_tokens=48, epochs=1, minibatches=1)
    agent.learn(total_tokens=96)


# ------------------------------------------------------------ options


def test_the_turns_end_stops_a_text_whatever_stop_tokens_are_given():
    spec = make(stop_token_ids=[7]).unwrapped.token_spec
    assert (spec.stop_token_ids, spec.turn_end_token_ids) == ((7, END), (END,))


def test_room_for_the_messages():
    longest = make().unwrapped.token_spec.max_prompt_tokens
    assert make(max_context_tokens=None).unwrapped.token_spec.max_length == longest + 2 * T
    long = {"max_new_tokens": 150, "max_context_tokens": None}
    assert make(**long).unwrapped.token_spec.max_length == 256
    with pytest.raises(InvalidArgument, match="max_context_tokens=257, but a model has 256"):
        make(max_context_tokens=257)
    with pytest.raises(InvalidArgument, match="must be a whole number above max_prompt_tokens"):
        make(max_context_tokens=longest)


def test_the_default_reward_is_the_turns_unless_a_model_scores():
    assert make().unwrapped._task.reward == "turn"
    model = fakes.reward_model("token", **SIZES)
    scored = make(reward_model=model, reward_tokenizer=TOKENIZER)
    assert scored.unwrapped._task.reward == "token"
    check_vector_env(scored, steps=16)


def test_rewards_of_turns_are_called_biased_only_where_there_is_a_score():
    assert make().unwrapped.biased_terms == ()
    model = fakes.reward_model("token", **SIZES)
    scored = make(reward_model=model, reward_tokenizer=TOKENIZER, reward="turn")
    assert scored.unwrapped.biased_terms == ("turn",)


def test_a_reward_model_that_reads_one_answer_is_refused():
    other = tokenizer_of(FAMILIES["llama3"], "legacy")
    model = fakes.reward_model("sequence", **(SIZES | {"vocab_size": len(other)}))
    with pytest.raises(InvalidArgument, match="reads a finished text as one answer"):
        make(reward_model=model, reward_tokenizer=other)


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (None, "respond= is missing"),
        (3, "must be a function of messages"),
        (dict, "must be a function of messages"),
        (lambda: None, "must take the messages first"),
        (lambda *, messages: None, "must take the messages first"),
        (lambda messages, answers: None, "asks for the column 'answers'"),
        ("nowhere:respond", "respond='nowhere:respond'"),
    ],
)
def test_what_is_no_function_of_messages_is_refused(respond, reason):
    with pytest.raises(InvalidArgument, match=reason):
        make(respond=respond)


@pytest.mark.parametrize(
    "returned",
    [
        3,
        (),
        ("a", "b"),
        ("a", float("nan")),
        ("a", 10**400),
        ("a", np.ones(2)),
        ("a", 1.0, 1),
        ("a", 0.0, True, 4),
        {"role": "user"},
        {"role": "assistant", "content": "a"},  # it would be read as the user's
        "\ud800",
    ],
)
def test_what_is_no_answer_is_refused(returned):
    envs = make(1, respond=lambda messages: returned)
    envs.reset(seed=0)
    with pytest.raises(InvalidArgument, match=r"^respond .*returned"):
        envs.step(np.array([END]))


def test_a_template_that_rewrites_history_is_refused_when_the_env_is_made():
    with pytest.raises(InvalidArgument, match="rewrites what was said before"):
        make(tokenizer=tokenizer_of(DROPS_THOUGHTS))


# ------------------------------------------------------------ the command line


MINE = """
def respond(messages, answer):
    return (None, 1.0) if answer in messages[-1]["content"] else "the cat"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with a chat template, prompts, and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    fakes.saved(fakes.causal_lm(**SIZES), tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    Path("mine.py").write_text(MINE)
    Path("prompts.jsonl").write_text('{"prompt": "a dog", "answer": "4"}\n')
    yield tmp_path
    sys.modules.pop("mine", None)


def train(*more):
    small = ["--agent.batch-tokens", "16", "--agent.minibatches", "1", "--agent.epochs", "1"]
    main(["train", *more, *small])


def test_a_run_of_the_command_line_names_the_function_and_no_file_does(folder, capsys):
    options = ["model", "model", "prompts", "prompts.jsonl", "max_new_tokens", "6"]
    new = ["--env", "tokenenv/ChatGen-v0", "--num-envs", "2", "--total-tokens", "16"]
    train(*new, "--run-dir", "x", "--options", *options, "respond", "mine:respond")
    assert yaml.safe_load(Path("x/config.yaml").read_text())["options"]["respond"] == "mine:respond"
    with pytest.raises(SystemExit):
        main(["train", "--resume", "x", "--total-tokens", "32"])
    error = " ".join(capsys.readouterr().err.split())
    assert "options.respond='mine:respond' imports code" in error
    assert "--options respond mine:respond" in error
    again = ["--options", "respond", "mine:respond"]
    main(["train", "--resume", "x", "--total-tokens", "32", *again])
    main(["evaluate", "x", "--num-texts", "2", *again])


def test_a_run_of_python_names_the_function_where_it_has_a_name(folder):
    import mine

    typed = make(respond=mine.respond).unwrapped.as_typed
    assert typed.values["options"]["respond"] == "mine:respond"
    assert typed.no_name.keys() == {"options.model", "options.tokenizer"}
    unnamed = make(respond=lambda messages: None).unwrapped.as_typed.no_name["options.respond"]
    assert unnamed.endswith("name one: --options respond module:function")
