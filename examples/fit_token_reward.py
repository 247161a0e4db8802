"""From preferences to a token reward model to PPO, in one file.

    python examples/fit_token_reward.py

The reference writes two continuations of each review, and the better one is known: that is all that
the reward model learns from. No token has a label. The model then pays every token of the policy's,
and the gold metric, which neither of them has seen, says what came of it. Two minutes on two cores.
"""

from pathlib import Path

import gymnasium as gym
import tyro

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.sample import sample


def main(
    pairs: int = 2048, total_tokens: int = 40_000, texts: int = 256, out: Path = Path("runs/reward")
) -> None:
    """Sample pairs, fit a reward model, train a policy on it, and compare before and after."""
    make = {"num_envs": 64, "autoreset_mode": "SameStep"}
    envs = gym.make_vec("tokenenv/Reviews-v0", **make)
    rows = sample(envs, "ranking", pairs)
    print("a pair:", {name: rows[0][name] for name in ("prompt", "chosen", "rejected")})

    # The trunk is the reference's own, and a new head on it gives each token its reward.
    core = envs.unwrapped
    model, tokenizer = core.reference, core.token_spec.tokenizer
    fitted = fit(
        FitConfig(data=rows, objective="bt-sum", model=model, tokenizer=tokenizer, out=out),
        progress=True,
    )
    print(f"of held-out pairs it tells {fitted.measures['accuracy']:.0%} apart")

    agent = PPO(gym.make_vec("tokenenv/Reviews-v0", **make, reward="token", reward_model=str(out)))
    held_out = gym.make_vec("tokenenv/Reviews-v0", **make, split="test")
    before = evaluate(agent, held_out, num_texts=texts)
    agent.learn(total_tokens, progress=True)
    after = evaluate(agent, held_out, num_texts=texts)
    print(f"positive reviews: {before.gold:.0%} before, {after.gold:.0%} after")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
