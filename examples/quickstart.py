"""The ten-line loop: 64 reviews grow by one token a step, each token paid by a reward model, and
PPO learns from it."""

import gymnasium as gym

import tokenenv  # registers the ids
from tokenenv.agents import PPO

envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=64, reward="token", kl_coef=0.2)
obs, info = envs.reset(seed=0)
for _ in range(10):
    obs, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
print("random tokens:", envs.unwrapped.decode(obs)[0], "| rewards now:", rewards[:4].round(2))

agent = PPO(envs)
agent.learn(total_tokens=100_000, progress=True)
prompts = ["yesterday my neighbour ordered the bread here", "this bar is near the castle"]
for prompt, response in zip(prompts, agent.generate(prompts), strict=True):
    print(
        f"{prompt} ... "
        f"{envs.unwrapped.token_spec.tokenizer.decode(response, skip_special_tokens=True)}"
    )
print("tokenenv", tokenenv.__version__)
