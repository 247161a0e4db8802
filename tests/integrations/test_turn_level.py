"""Turn-level environments as what answers: their state is a function of the turns of a text."""

import copy

import fakes
import gymnasium as gym
import numpy as np
import pytest
from chat_templates import CHATML, tokenizer_of

from tokenenv.check import check_vector_env
from tokenenv.errors import InvalidArgument
from tokenenv.integrations.turn_level import TurnLevel
from tokenenv.models.encoding import encode_continuation
from tokenenv.turns import Segment, TextSoFar

TOKENIZER = tokenizer_of(CHATML)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
MADE = []


class Counter:
    """Says how many turns and characters there were, and is done after `last` turns."""

    def __init__(self, last=3, form="three"):
        self.last, self.form, self.turns, self.characters = last, form, 0, 0
        self.closed = False
        MADE.append(self)

    def reset(self):
        assert not self.turns
        return (f"to {self.last}", {}) if self.form == "five" else f"to {self.last}"

    def step(self, text):
        assert not self.closed
        self.turns, self.characters = self.turns + 1, self.characters + len(text)
        done = self.turns == self.last
        message = f"is {self.turns} {self.characters}"
        reward = 0.5 * self.turns
        return {
            "three": (message, reward, done),
            "four": ({"role": "user", "content": message}, reward, done, {}),
            "five": ([{"role": "user", "content": message}], reward, False, done, {}),
            "two": (message, reward),
            "silent": ("", reward, done),
        }.get(self.form, (message, reward, done))

    def close(self):
        self.closed = True


class Init(Counter):
    """The form of skyrl_gym."""

    def init(self, prompt):
        return [*prompt, {"role": "user", "content": "more"}], {}

    def step(self, text):
        message, reward, done = super().step(text)
        said = [] if done else [{"role": "user", "content": message}]
        out = {"observations": said, "reward": reward, "done": done, "metadata": {}}
        return out | ({"postprocessed_action": text.upper()} if self.form == "rewrites" else {})


@pytest.fixture(autouse=True)
def none_made():
    MADE.clear()


def make_envs(respond, num_envs=2, prompts=None, **options):
    sizes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "eos_token_id": 2}
    given = {
        "model": fakes.causal_lm(**sizes),
        "tokenizer": TOKENIZER,
        "prompts": prompts or respond.prompts([{"last": 3}]),
        "respond": respond,
        "max_new_tokens": 20,
        "max_context_tokens": 200,
        "kl": "none",
        "autoreset_mode": "SameStep",
    }
    return gym.make_vec("tokenenv/ChatGen-v0", num_envs=num_envs, **(given | options))


def ids_of(text):
    return encode_continuation(text, TOKENIZER)


def turn(envs, *texts):
    """Step one turn in each env. The texts have the same number of tokens (digits are one each)."""
    ids = [[*encode_continuation(text, TOKENIZER), END] for text in texts]
    for tokens in zip(*ids, strict=True):
        out = envs.step(np.array(tokens))
    return out


def shown(obs, row=0):
    return TOKENIZER.decode(obs["tokens"][row, : obs["length"][row]], skip_special_tokens=True)


@pytest.mark.parametrize("form", ["three", "four", "five"])
def test_an_environment_answers_turn_by_turn(form):
    respond = TurnLevel(lambda last: Counter(last, form))
    assert respond.prompts([{"last": 2}]) == [
        {"last": 2, "prompt": [{"role": "user", "content": "to 2"}]}
    ]
    envs = make_envs(respond, 1)
    assert "to 3" in shown(envs.reset(seed=0)[0])
    MADE.clear()
    for number in (1, 2):
        obs, rewards, terminations, *_ = turn(envs, "good")
        assert f"is {number} {4 * number}\n" in shown(obs)
        assert (rewards, terminations) == (0.5 * number, False)
    _, rewards, terminations, _, infos = turn(envs, "good")
    assert (rewards, terminations) == (1.5, True)
    assert shown(infos["final_obs"]).endswith("is 3 12\n")
    assert len(MADE) == 1  # none was played again
    assert MADE[0].closed


def test_the_form_of_skyrl():
    respond = TurnLevel(lambda last, **row: Init(last))
    rows = respond.prompts([{"last": 2, "prompt": "a"}])
    assert [message["content"] for message in rows[0]["prompt"]] == ["a", "more"]
    envs = make_envs(respond, 1, rows)
    envs.reset(seed=0)
    assert turn(envs, "good")[1] == 0.5
    _, rewards, terminations, _, infos = turn(envs, "good")
    assert (rewards, terminations) == (1.0, True)
    assert shown(infos["final_obs"]).endswith("good\n") or "is 2" not in shown(infos["final_obs"])


def test_copies_and_saved_texts_play_their_turns_again():
    respond = TurnLevel(Counter)
    envs = make_envs(respond)
    envs.reset(seed=0)
    turn(envs, "1111", "2222")
    turn(envs, "3333", "4444")
    state = envs.unwrapped.save_state()
    envs.unwrapped.fork([0], [1])
    *_, infos = turn(envs, "5555", "6666")
    ends = infos["final_obs"]
    assert all("is 3 12" in shown(ends, row) for row in (0, 1))
    for again in (TurnLevel(Counter), TurnLevel(Counter, keep=1)):
        other = make_envs(again)
        other.unwrapped.load_state(copy.deepcopy(state))
        *_, infos = turn(other, "5555", "6666")
        assert "is 3 12" in shown(infos["final_obs"], 0)
        np.testing.assert_array_equal(infos["turn_reward"], [1.5, 1.5])


def test_an_answer_is_the_same_whoever_asks_again():
    respond = TurnLevel(Counter)
    envs = make_envs(respond, 1)
    obs, _ = envs.reset(seed=0)
    prompt = obs["tokens"][0, : obs["length"][0]].tolist()
    ids = [*encode_continuation("good", TOKENIZER), END]
    row = {"last": 3}
    replies = [envs.unwrapped.reply(prompt, ids, [True] * len(ids), columns=row) for _ in range(2)]
    made = len(MADE)
    obs, *_ = turn(envs, "good")
    assert replies[0] == replies[1]
    assert obs["tokens"][0, : obs["length"][0]].tolist() == [*prompt, *ids, *replies[0].tokens]
    assert len(MADE) == made


def test_the_contract_of_token_envs_holds():
    check_vector_env(make_envs(TurnLevel(Counter, keep=2), 3, max_new_tokens=6), steps=20)


def test_few_environments_are_kept_and_the_others_closed():
    respond = TurnLevel(Counter, keep=2)
    envs = make_envs(respond, 4)
    envs.reset(seed=0)
    MADE.clear()
    turn(envs, "1", "2", "3", "4")
    assert [one.closed for one in MADE] == [True, True, False, False]
    turn(envs, "1", "2", "3", "4")
    assert len(respond._running) == len(respond._known) == 2


def test_a_copy_of_the_adapter_has_environments_of_its_own():
    respond = TurnLevel(Counter)
    envs = make_envs(respond, 1)
    envs.reset(seed=0)
    turn(envs, "good")
    twin = copy.deepcopy(respond)
    assert len(respond._running) == 1
    assert not twin._running
    assert not twin._known


class Noisy:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        return "a"

    def step(self, text):
        return str(self.rng.integers(10**9)), 0.0, False


def test_an_environment_may_draw_by_the_episodes_seed_but_not_otherwise():
    envs = make_envs(TurnLevel(Noisy), 2, ["a"])
    envs.reset(seed=0)
    obs, *_ = turn(envs, "good", "good")
    assert shown(obs, 0) != shown(obs, 1)
    state = envs.unwrapped.save_state()
    seen = shown(turn(envs, "good", "good")[0])
    again = make_envs(TurnLevel(Noisy), 2, ["a"])
    again.unwrapped.load_state(state)
    assert shown(turn(again, "good", "good")[0]) == seen
    again.unwrapped.fork([0], [1])
    with pytest.raises(InvalidArgument, match=r"when a turn was played again.*another seed"):
        turn(again, "good", "good")


def test_a_seed_that_is_a_column_goes_with_copies():
    respond = TurnLevel(Noisy)
    envs = make_envs(respond, 2, respond.prompts([{"seed": 5}]))
    envs.reset(seed=0)
    turn(envs, "good", "good")
    envs.unwrapped.fork([0], [1])
    obs, *_ = turn(envs, "good", "good")
    assert shown(obs, 0) == shown(obs, 1)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda last: Counter(last, "two"), "step() of Counter returned"),
        (lambda last: Counter(last, "silent"), "neither a message nor that it is done"),
        (lambda last: Init(last, "rewrites"), "rewrites the policy's turn"),
        (lambda last: object(), "make() returned object, which has neither"),
        (lambda first: Counter(first), "make() asks for 'first', which is no column"),
    ],
)
def test_what_is_no_turn_level_environment_is_refused(made, reason):
    respond = TurnLevel(made)
    envs = make_envs(respond, 1, [{"prompt": "a", "last": 3}])
    envs.reset(seed=0)
    with pytest.raises(InvalidArgument) as caught:
        turn(envs, "good")
    assert reason in str(caught.value)


def test_without_a_chat_template_the_contents_are_written_as_they_are():
    respond = TurnLevel(Counter)
    prompt = TOKENIZER("to 3")["input_ids"]
    first = [Segment(True, encode_continuation("good", TOKENIZER))]
    reply = respond.respond(TextSoFar(prompt, first, TOKENIZER))
    assert (reply.tokens, reply.reward, reply.ends) == (ids_of("is 1 4"), 0.5, False)
    text = TextSoFar(prompt, [*first, Segment(False, reply.tokens), *first], TOKENIZER)
    again = TurnLevel(Counter).respond(text).tokens
    assert again == respond.respond(text).tokens == ids_of("is 2 8")


def test_an_environment_writes_no_special_tokens():
    """Neither where it writes them for the first time, nor where its turns are played again."""
    mark = "<|im_end|>"

    class Spells:
        def reset(self):
            return "to"

        def step(self, text):
            return mark, 0.0, False

    prompt, first = TOKENIZER("to 3")["input_ids"], [Segment(True, ids_of("good"))]
    reply = TurnLevel(Spells).respond(TextSoFar(prompt, first, TOKENIZER))
    assert TOKENIZER.convert_tokens_to_ids(mark) not in reply.tokens
    assert TOKENIZER.decode(reply.tokens) == mark
    text = TextSoFar(prompt, [*first, Segment(False, reply.tokens), *first], TOKENIZER)
    assert TurnLevel(Spells).respond(text).tokens == reply.tokens
