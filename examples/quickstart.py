"""The loop in full: texts grow by a token a step, a function of yours pays them, PPO learns."""

import gymnasium as gym

import tokenenv  # registers the ids
from tokenenv.agents import PPO

# 64 texts; a reward model pays each token, minus 0.2 per nat of KL to the reference.
envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=64, reward="token", kl_coef=0.2)
obs, info = envs.reset(seed=0)
for _ in range(10):
    obs, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
print(envs.unwrapped.decode(obs)[0], "| paid now:", rewards[0].round(2))


def praise(prompt: str, response: str) -> float:
    """Any function of the text is a reward."""
    return response.count("good") + response.count("great")


envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=64, reward=praise, kl_coef=0.2)
agent = PPO(envs, seed=0, lr=1e-3)
agent.learn(total_tokens=20_000, progress=True)
for text in agent.generate(["this bar is near the castle"] * 3):
    print(envs.unwrapped.token_spec.tokenizer.decode(text))
print("tokenenv", tokenenv.__version__)
