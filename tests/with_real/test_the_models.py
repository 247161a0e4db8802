"""Log-probs, stop tokens, chat templates and rewards on real models, against plain transformers."""

import copy

import numpy as np
import pytest
import torch

from tokenenv.agents import PPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs

ATOL = 3e-5


@torch.no_grad()
def plain_logprobs(model, episode):
    """log-probs (T,) of an episode's response by one forward of its whole text, alone."""
    text = torch.as_tensor(np.concatenate([episode.prompt, episode.response]))[None]
    # torch's log_softmax in float32 is too large by 3e-5 over the 262,144 tokens of Gemma.
    logprobs_LV = model(input_ids=text, use_cache=False).logits[0].double().log_softmax(-1)
    start = len(episode.prompt)
    return logprobs_LV[start - 1 : -1].gather(-1, text[0, start:, None])[:, 0].numpy()


def assert_as_exact_as_plain(columns, model, episodes):
    """Each list of log-probs (T,) of the episodes is within 3e-5 of float64's or, where float32
    itself is further off (improbable tokens of Gemma), within three times what a plain forward
    is."""
    exact_model = copy.deepcopy(model).double()
    exact, plain = ([plain_logprobs(m, e) for e in episodes] for m in (exact_model, model))
    noise = max(abs(a - b).max() for a, b in zip(plain, exact, strict=True))
    for column in columns:
        for ours, true in zip(column, exact, strict=True):
            np.testing.assert_allclose(ours, true, atol=max(ATOL, 3 * noise), rtol=0)


def stir(policy):
    """Gives adapters random weights, so that the policy is not the reference."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02, generator=generator)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_log_probs_are_those_of_plain_transformers(name, make, load):
    agent = PPO(make(name), lora_rank=4)
    stir(agent.policy)
    episodes = agent.collector.collect(96)  # slots go on with other texts
    learners_BT = token_logprobs(agent.policy, EpisodeBatch.stack(episodes), 16384, 1.0).numpy()
    assert max(abs(e.kl) for e in episodes) > 0.1
    own = [e.logprob for e in episodes]
    learners = [row[: len(e.response)] for row, e in zip(learners_BT, episodes, strict=True)]
    assert_as_exact_as_plain([own, learners], agent.policy.model, episodes)
    assert_as_exact_as_plain([[e.ref_logprob for e in episodes]], load(name)[0], episodes)


def test_a_prompt_is_what_the_chat_template_writes(make, load):
    envs, (_, tokenizer) = make(), load("smollm2")
    obs, _ = envs.reset(seed=0)
    for tokens, length in zip(obs["tokens"], obs["prompt_length"], strict=True):
        text = tokenizer.decode(tokens[:length])
        question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        messages = [{"role": "user", "content": question}]
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert question.startswith("Tell me about ")
        assert tokens[:length].tolist() == list(written["input_ids"])


def test_an_answer_ends_where_the_chat_model_ends_it(make, load):
    _, tokenizer = load("smollm2")
    envs = make()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in envs.unwrapped.token_spec.stop_token_ids
    question = [{"role": "user", "content": "What is the capital of France? One sentence."}]
    (answer,) = PPO(envs).generate([question], greedy=True, max_new_tokens=24)
    assert tokenizer.decode(answer[-1:]) == "<|im_end|>"
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_prompt_of_the_base_model_begins_with_its_bos(make, load):
    envs, (_, tokenizer) = make("gemma3"), load("gemma3")
    obs, _ = envs.reset(seed=0)
    assert (obs["tokens"][:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.eos_token_id in envs.unwrapped.token_spec.stop_token_ids
    assert envs.unwrapped.decode(obs)[0].startswith("Tell me about ")


def test_a_token_reward_model_on_the_same_trunk_pays_what_scoring_says(make, folder):
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(0)
    judge = AutoModelForTokenClassification.from_pretrained(folder("smollm2"), num_labels=1)
    envs = make(reward_model=judge, reward="token", kl="none")
    agent = PPO(envs)
    episodes = agent.collector.collect(64)
    pairs = [e.prompt.tolist() for e in episodes], [e.response.tolist() for e in episodes]
    scores = envs.unwrapped.score_episodes(*pairs)
    for row, episode in enumerate(episodes):
        text = torch.as_tensor(np.concatenate([episode.prompt, episode.response]))[None]
        with torch.no_grad():
            plain = judge(input_ids=text, use_cache=False).logits[0, len(episode.prompt) :, 0]
        paid = scores.step_rewards[row, : len(plain)]
        np.testing.assert_allclose(episode.reward, paid, atol=1e-4, rtol=0)
        np.testing.assert_allclose(paid, plain, atol=1e-4, rtol=0)
        assert episode.score == pytest.approx(float(plain.sum()), abs=1e-3)


def test_minilm_scores_texts_of_another_tokenizer(make, load, folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(folder("minilm"), num_labels=1)
    judge = judge.eval()
    own = AutoTokenizer.from_pretrained(folder("minilm"))
    options = {"chat_template": False, "reward": "terminal", "kl": "none"}
    envs = make(reward_model=judge, reward_tokenizer=own, **options)
    scores = envs.unwrapped.score_episodes(["Tell me about bread."] * 2, [" It rises.", " No."])
    texts = ["Tell me about bread. It rises.", "Tell me about bread. No."]
    with torch.no_grad():
        plain = [judge(**own(text, return_tensors="pt")).logits.item() for text in texts]
    assert plain[0] != plain[1]
    np.testing.assert_allclose(scores.score, plain, atol=1e-4, rtol=0)
