"""The audit of every kind of env and reward: what can be said is said, and the rest in a sentence."""

import dataclasses
import json

import numpy as np
import pytest
import tasks
from tasks import TOYS, make_vec

from tokenenv.audit import audit
from tokenenv.audit.nulls import candidates
from tokenenv.audit.sampling import reference_texts
from tokenenv.audit.texts import no_listener, pay
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.rewards.rule import TokenRule

SAID = {
    "token": "return is preserved",
    "k1": "the KL term is left out",
    "unscored": "were cut and not scored",
    "no scorer": "gold is unknown",
    "memories": "length",
    "no stops": "length has no price here",
    "turns": "the environment writes into texts",
    "turn designs": "the environment writes into texts",
    "random turns": "no sequence score",
    "uniform": "placed in hindsight: uniform",
    "no reward": "pays all texts alike",
}


@pytest.mark.parametrize("name", SAID)
def test_every_kind_of_env_is_audited(name):
    envs = make_vec(4, group_size=2, **TOYS[name]).unwrapped
    obs, _ = envs.reset(seed=0)
    before = envs.tokens_seen, obs["tokens"].copy() if isinstance(obs, dict) else None
    found = audit(envs, num_texts=64)
    assert any(SAID[name] in verdict.sentence for verdict in found.verdicts), found.verdicts
    assert envs.tokens_seen == before[0]
    # The running texts go on.
    assert np.array_equal(envs._texts.tokens, before[1])
    json.dumps(found.as_dict(), allow_nan=False)
    assert (found.gold_spread is None) == (TOYS[name].get("gold") is False)


def test_rewards_that_cancel_out_pay_all_texts_alike():
    both = {"end": "terminal", "less": ("delta", -1.0)}
    found = audit(make_vec(1, reward=both, scorer="sequence"), num_texts=64)
    assert len(found.optima) == 1
    assert any("pays all texts alike" in warning for warning in found.warnings)


def test_the_same_seed_gives_the_same_audit():
    envs = make_vec(1, reward="token")
    one, other, third = (audit(envs, num_texts=64, seed=seed).as_dict() for seed in (1, 1, 2))
    assert one == other
    assert one != third


def test_a_word_that_pays_is_found_as_a_null_policy():
    pays = TokenRule(lambda prompt, response: [float(t == 30) for t in response], on="tokens")
    found = audit(make_vec(1, reward=pays, scorer="token"), num_texts=64)
    null = next(null for null in found.nulls if null.name == "repeated")
    assert null.proxy == null.length == 7
    assert null.beats == 1.0
    assert len(set(null.example.rstrip("…").split())) == 1


def test_with_many_tokens_those_that_pay_are_tried(monkeypatch):
    monkeypatch.setattr("tokenenv.audit.nulls.TOKENS", 5)
    envs = make_vec(1, reward="token").unwrapped
    paid = pay(envs, reference_texts(envs, 64, 0, no_listener))
    chosen = candidates(envs, paid)
    earned: dict[int, list[float]] = {}
    for text, row in zip(paid.texts, paid.token_BT, strict=True):
        for token, reward in zip(text.tokens, row, strict=False):
            earned.setdefault(token, []).append(reward)
    means = {token: np.mean(rewards) for token, rewards in earned.items()}
    assert chosen == sorted(means, key=means.get, reverse=True)[:5]


def test_a_folder_holds_page_numbers_and_picture(tmp_path):
    found = audit("tests/Toy-v0", num_texts=64, reward="token")
    found.save(tmp_path / "new")
    page = (tmp_path / "new" / "audit.md").read_text()
    values = json.loads((tmp_path / "new" / "audit.json").read_text())
    assert "## Verdicts" in page
    assert values["price"]["per_token"]["value"] == pytest.approx(found.price.per_token.value)
    assert len(values["optima"]) == len(found.optima)
    assert (tmp_path / "new" / "audit.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("given", "message"),
    [({"num_texts": 8}, "num_texts=8"), ({"kl": "none"}, "options")],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(InvalidArgument, match=message):
        audit(make_vec(1, reward="token"), **given)


def test_texts_whose_gold_is_no_number_are_left_out_everywhere():
    """Those of null policies, and those that are gone on with, too."""

    def gold(prompt, response):
        words = len(response.split())
        return float("nan") if words in (3, 7) else float(words)

    task = dataclasses.replace(tasks.toy(), gold=gold)
    found = audit(TokenVectorEnv(1, task=task, reward="token"), num_texts=128)
    assert found.without_gold > 0
    assert np.isfinite(found.price.excess).all()
    golds = {null.name: null.gold for null in found.nulls}
    assert golds["repeated"] is None
    assert golds["empty"] == 0.0
    assert "nan" not in " ".join(verdict.sentence for verdict in found.verdicts)
