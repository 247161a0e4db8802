"""What a run keeps from one iteration to the next: nothing more than before."""

import gc
from collections import Counter

import pytest
import torch
from gymnasium.vector import AutoresetMode
from tasks import make_vec

from tokenenv.agents import GRPO, KLQ, PPO
from tokenenv.rewards import Rule

N, T = 4, 6
RUNS = {
    "step": (PPO, {}, {}),
    "lora": (PPO, {"lora_rank": 2}, {}),
    "episode": (PPO, {"rollout": "episode"}, {}),
    "groups": (GRPO, {"epochs": 1}, {"group_size": 2}),
    "replay": (KLQ, {"replay_tokens": 2 * N * T}, {}),
    "weights of its own": (PPO, {"separate_value": True, "scale_rewards": True}, {}),
    "a term with a memory": (PPO, {}, {"reward": Rule(lambda p, r: len(r), "tokens", dense=True)}),
    "a reference": (PPO, {"full_kl_coef": 0.1}, {}),
}


def make_envs(**options):
    """Texts that nothing stops, so that all are as long and iterations are alike."""
    return make_vec(N, AutoresetMode.SAME_STEP, stops=(), max_new_tokens=T, **options)


def kept(agent):
    """How many objects of each type, and bytes of tensors, an iteration adds: what there is more
    after the eighth iteration of a run than after the third, over five, rounded down. One object
    more in all is none: the collector lets go of tuples when it comes across them."""
    found = []

    def look(metrics, episodes):
        if agent.updates not in (3, 8):
            return
        gc.collect()
        objects = gc.get_objects()
        tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
        counts = Counter(type(one).__name__ for one in objects)
        # A plain dict, which is none of the objects that are counted the next time.
        found.append({**counts, "bytes of tensors": sum(one.nbytes for one in tensors)})

    agent.learn(8 * N * T, on_update=look)
    before, after = map(Counter, found)
    return +Counter({name: more // 5 for name, more in (after - before).items()})


@pytest.mark.parametrize("run", RUNS)
def test_an_iteration_keeps_nothing(run):
    algorithm, settings, options = RUNS[run]
    if "lora_rank" in settings:
        pytest.importorskip("peft")
    defaults = {"batch_tokens": N * T, "minibatches": 2, "lr": 1e-3}
    assert kept(algorithm(make_envs(**options), **(defaults | settings))) == Counter()


def test_a_run_folder_keeps_nothing_in_memory(tmp_path):
    agent = PPO(make_envs(), run_dir=tmp_path / "run", batch_tokens=N * T, minibatches=2, lr=1e-3)
    assert kept(agent) == Counter()
