"""vLLM in this process: the same numbers as the local models, before and after an update, by every
way weights go."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from running import ASSETS, mismatch

from tokenenv.agents import ALGORITHMS, PPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.errors import EngineError, InvalidArgument
from tokenenv.models.vllm_models import VLLMReference, VLLMRewardModel
from tokenenv.rollout import vllm as rollout
from tokenenv.rollout.vllm import LocalVLLM

SMALL = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def remote(texts):
    """An env whose reward model and reference vLLM runs."""
    reward_model = VLLMRewardModel(LocalVLLM(ASSETS / "reviews-reward", runner="pooling", **SMALL))
    reference = VLLMReference(LocalVLLM(ASSETS / "reviews-lm", **SMALL))
    models = {
        "model": str(ASSETS / "reviews-lm"),
        "reward_model": reward_model,
        "reference": reference,
    }
    lengths = {"max_prompt_tokens": 10, "max_new_tokens": 40}
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=2, prompts=texts[0], kl_coef=0.2, **models, **lengths
    )


def stepped(envs, prompts, responses):
    """The rewards that stepping pays for each token of each text."""
    width = envs.unwrapped.token_spec.max_new_tokens
    paid, score = np.zeros((len(prompts), width)), np.zeros(len(prompts))
    envs.reset(seed=0, options={"prompts": prompts})
    ended = np.zeros(len(prompts), bool)
    for t in range(width):
        tokens = np.array([response[t] if t < len(response) else 5 for response in responses])
        _, rewards, terminations, truncations, infos = envs.step(tokens)
        now = ~ended & (terminations | truncations)
        paid[~ended, t] = rewards[~ended]
        if now.any():
            score[now] = infos["score"][now]
        ended |= now
    assert ended.all()
    return paid, score


def test_stepping_scoring_and_vllms_models_give_the_same_rewards(make, remote, texts):
    prompts, responses = texts
    envs = make(len(prompts))
    paid, score = stepped(envs, prompts, responses)
    local = envs.unwrapped.score_episodes(prompts, responses)
    np.testing.assert_allclose(local.token_rewards, paid, atol=1e-5)
    np.testing.assert_allclose(local.score, score, atol=1e-5)
    scores = remote.unwrapped.score_episodes(prompts, responses)
    np.testing.assert_allclose(scores.token_rewards, paid, atol=1e-4)
    np.testing.assert_allclose(scores.score, score, atol=1e-4)
    np.testing.assert_allclose(scores.ref_logprobs, local.ref_logprobs, atol=1e-4)
    assert np.ptp(paid) > 1.0
    assert remote.unwrapped.biased_terms == ()


def test_a_model_that_scores_whole_texts(tmp_path, texts):
    """The raw score of the last token."""
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        LlamaForSequenceClassification,
    )

    tokens = AutoModelForTokenClassification.from_pretrained(
        ASSETS / "reviews-reward", dtype=torch.float32
    )
    config = tokens.config
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(tokens.model.state_dict())
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ASSETS / "reviews-reward").save_pretrained(tmp_path)
    backend = LocalVLLM(tmp_path, runner="pooling", skip_tokenizer_init=False, **SMALL)
    scorer = VLLMRewardModel(backend, per_token=False)
    pairs = list(zip(*texts, strict=True))[:6]
    found = scorer.token_scores(pairs, 40)
    for row, (prompt, response) in zip(found, pairs, strict=True):
        expected = model(torch.tensor([prompt + response])).logits.item()
        assert row[len(response) - 1].item() == pytest.approx(expected, abs=1e-4)
        assert np.count_nonzero(row) == 1


class Mailbox:
    """Weight transfer without GPUs, by vLLM's own protocol: sender and receiver share this
    process."""

    box: list = []  # noqa: RUF012

    @staticmethod
    def register(monkeypatch):
        from dataclasses import dataclass
        from typing import ClassVar

        from vllm.distributed.weight_transfer import base, factory
        from vllm.model_executor.model_loader import reload

        @dataclass
        class Info(base.TrainerInitInfo):
            backend: ClassVar[str] = "mailbox"

        @dataclass
        class Nothing(base.WeightTransferInitInfo):
            pass

        @dataclass
        class Names(base.WeightTransferUpdateInfo):
            names: list[str]

        class Receiver(base.WeightTransferEngine):
            init_info_cls, update_info_cls = Nothing, Names

            def init_transfer_engine(self, init_info):
                pass

            def start_weight_update(self):
                reload.initialize_layerwise_reload(self.model)

            def finish_weight_update(self):
                reload.finalize_layerwise_reload(self.model, self.model_config)

            def receive_weights(self, update_info):
                assert [name for name, _ in Mailbox.box] == update_info.names
                self.model.load_weights(Mailbox.box)

            def shutdown(self):
                pass

        class Sender(base.TrainerWeightTransferEngine):
            @classmethod
            def trainer_init(cls, init_info, *, client, source=None):
                client.init_weight_transfer_engine({})
                return cls(client=client, source=source)

            def send_weights(self):
                names = [one.name for one in self.source.metadata()]
                Mailbox.box = [(name, weight.clone()) for name, weight in self.source]
                self.client.start_weight_update()
                self.client.update_weights({"names": names})
                self.client.finish_weight_update()

        for registry, cls in (
            (factory.WeightTransferEngineFactory, Receiver),
            (factory.WeightTransferTrainerFactory, Sender),
        ):
            monkeypatch.setattr(
                registry, "_registry", {**registry._registry, "mailbox": lambda cls=cls: cls}
            )
        monkeypatch.setitem(rollout.TRANSFERS, "mailbox", lambda num_workers: Info(rank=0))


@pytest.mark.parametrize(
    "how", ["memory", "disk", "mailbox", "lora", "own process", "own process, lora"]
)
def test_log_probs_are_the_policys_before_and_after_updates(how, make, monkeypatch):
    """Tied embeddings included, whose output layer vLLM keeps packed. Without a hand-over the
    log-probs are far off."""
    options = {"lora_rank": 4} if how.endswith("lora") else {}
    if how.startswith("own process"):
        options["rollout_options"] = {"own_process": True}
    elif how != "lora":
        options["rollout_options"] = {"weight_sync": how}
    if how == "mailbox":
        Mailbox.register(monkeypatch)
    agent = PPO(make(), rollout="vllm", max_staleness=0, lr=3e-3, temperature=0.7, **options)
    found, batch = mismatch(agent)
    assert found < 1e-4
    for _ in range(2):
        agent.update(batch)
        assert mismatch(agent)[0] > 0.02
        agent.collector.refresh()
        found, batch = mismatch(agent)
        assert found < 1e-4
        assert batch.terminated_B.any()


def test_a_text_that_straddles_an_update_goes_on_with_the_new_weights(make):
    """Each token's log-prob is that of the weights it was drawn with: the caches are read again in
    the middle of a text."""
    agent = PPO(make(32), rollout="vllm", max_staleness=1, lr=3e-3)
    old = {name: weight.detach().clone() for name, weight in agent.policy.state_dict().items()}
    batch = mismatch(agent)[1]
    agent.update(batch)
    agent.collector.refresh()
    running = set(agent.collector._running)
    assert running
    found = []
    while len(found) < len(running):
        found += [e for e in agent.collector.collect(1) if e.index * 32 + e.slot in running]
    assert {e.version for e in found} == {0}
    both = EpisodeBatch.stack(found)
    new_BT = token_logprobs(agent.policy, both, 16384)
    agent.policy.load_state_dict(old)
    old_BT = token_logprobs(agent.policy, both, 16384)
    drawn_with_new = (new_BT - both.logprob_BT).abs() < 1e-4
    drawn_with_old = (old_BT - both.logprob_BT).abs() < 1e-4
    assert (drawn_with_new | drawn_with_old)[both.mask_BT].all()
    switched_B = (drawn_with_old & ~drawn_with_new).any(1) & (drawn_with_new & ~drawn_with_old).any(
        1
    )
    assert switched_B.any()


def test_a_process_of_its_own_writes_the_same_texts(make):
    """In the same order, with the same rewards; and where it dies, that is said."""
    apart = PPO(make(16), rollout="vllm", rollout_options={"own_process": True})
    collectors = [apart.collector, PPO(make(16), rollout="vllm").collector]
    for _ in range(2):
        episodes, others = (collector.collect(900) for collector in collectors)
        assert [(e.slot, e.index) for e in episodes] == [(e.slot, e.index) for e in others]
        for e, other in zip(episodes, others, strict=True):
            np.testing.assert_array_equal(e.response, other.response)
            np.testing.assert_allclose(e.logprob, other.logprob, atol=1e-5)
            np.testing.assert_allclose(e.reward, other.reward, atol=1e-5)
            np.testing.assert_allclose(e.ref_logprob, other.ref_logprob, atol=1e-5)
    apart.collector.engine._writer._process._process.kill()
    with pytest.raises(EngineError, match="exit code -9"):
        apart.collector.collect(900)


def test_memory_is_not_shared_with_another_process(make):
    with pytest.raises(InvalidArgument, match="weight_sync='memory'"):
        PPO(make(), rollout="vllm", rollout_options={"own_process": True, "weight_sync": "memory"})


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_algorithm_learns_from_vllms_texts(algo, make):
    agent = ALGORITHMS[algo](make(16, group_size=4), rollout="vllm", batch_tokens=150)
    seen = []
    while len(seen) < 2:
        agent.learn(agent.tokens_seen + 1, on_update=lambda metrics, episodes: seen.append(metrics))
    assert seen[0]["rollout/mismatch_max"] < 1e-4
    assert all(metrics["rollout/staleness_max"] <= 1 for metrics in seen)


def test_ppo_improves_and_a_resumed_run_is_the_uninterrupted_one(make, tmp_path):
    def run(agent, total, save_at=None):
        def on_update(metrics, episodes):
            if agent.updates == save_at:
                agent.save(tmp_path / "checkpoint")
            golds.append(metrics["objective/gold"])

        golds = []
        agent.learn(total, on_update=on_update)
        return golds

    options = {"rollout": "vllm", "importance_cap": 2.0, "lr_schedule": "constant"}
    agent = PPO(make(64), **options)
    golds = run(agent, 26_000, save_at=3)
    assert np.mean(golds[-3:]) > golds[0] + 0.1
    resumed = PPO.load(tmp_path / "checkpoint", make(64))
    run(resumed, 26_000)
    assert resumed.tokens_seen == agent.tokens_seen
    for one, other in zip(agent.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
