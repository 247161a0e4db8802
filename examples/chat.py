"""A conversation with a Python function: guess a number in a few turns.

    python examples/chat.py

`answer` is what talks to the policy: it gets the messages and the prompt's column `number`, and
returns the next message with a reward for the turn. The model is a tiny one with random weights and
a chat template, so that nothing is downloaded; for real work give `model=` and `tokenizer=` the
name of any chat model.
"""

import gymnasium as gym
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_chat_model(words: list[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make a model of about 100,000 random weights, and its tokenizer of some words."""
    known = ["<unk>", "<|im_start|>", "<|im_end|>", "\n", "user", "assistant", *words]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|\d|#+ |\s|."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": known[1:3]})
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes["vocab_size"] = len(tokenizer)
    config = LlamaConfig(**sizes, **heads, eos_token_id=2, bos_token_id=1)
    return LlamaForCausalLM(config), tokenizer


def answer(messages: list[dict[str, str]], number: int) -> tuple[str | None, float]:
    """Tell the policy where the number lies, and pay it for guesses and for the right one."""
    guess = messages[-1]["content"]
    if not (guess.isdigit() and len(guess) == 1):
        return "?", 0.0
    if int(guess) == number:
        return None, 1.0
    return ("higher" if int(guess) < number else "lower"), 0.1


def main(total_tokens: int = 20_000, num_envs: int = 32) -> None:
    """Learn to guess a digit in four turns, and print the mean reward before and after."""
    model, tokenizer = tiny_chat_model([*"0123456789?", "guess", "higher", "lower"])
    envs = gym.make_vec(
        "tokenenv/ChatGen-v0",
        num_envs=num_envs,
        model=model,
        tokenizer=tokenizer,
        prompts=[{"prompt": "guess", "number": number} for number in range(10)],
        respond=answer,
        max_new_tokens=8,
        max_context_tokens=64,
        kl_coef=0.005,
    )
    agent = PPO(envs, lr=3e-3, batch_tokens=256)
    before = evaluate(agent, envs, num_texts=256)
    agent.learn(total_tokens)
    after = evaluate(agent, envs, num_texts=256)
    for name, found in {"before": before, "after": after}.items():
        print(f"{name}: {found.rewards['turn']:.2f} of reward a text, in {found.turns:.1f} turns")
    print(f"one conversation:\n{tokenizer.decode(after.episodes[0].text)}")


if __name__ == "__main__":
    tyro.cli(main)
