"""The registered ids. A new task is a file in `envs/` and one line here."""

import gymnasium as gym

TASKS = {
    "tokenenv/Arithmetic-v0": "tokenenv.envs.tasks.arithmetic:task",
    "tokenenv/Brackets-v0": "tokenenv.envs.tasks.brackets:task",
    "tokenenv/DelayedKey-v0": "tokenenv.envs.tasks.delayed_key:task",
    "tokenenv/Negation-v0": "tokenenv.envs.tasks.negation:task",
    "tokenenv/PlantedPhrase-v0": "tokenenv.envs.tasks.planted_phrase:task",
    "tokenenv/PyDocs-v0": "tokenenv.envs.tasks.pydocs:task",
    "tokenenv/Reviews-v0": "tokenenv.envs.tasks.reviews:task",
    "tokenenv/TextGen-v0": "tokenenv.envs.textgen:task",
}


def register_envs() -> None:
    """Registers every id with Gymnasium; doing it again changes nothing."""
    for env_id, task in TASKS.items():
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point="tokenenv.env.single_env:TokenEnv",
                vector_entry_point="tokenenv.env.vector_env:TokenVectorEnv",
                kwargs={"task": task},
            )
