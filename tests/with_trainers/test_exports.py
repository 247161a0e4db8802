"""What the exporters make is what the published functions take."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenenv.conformance.sources import functions_of

ROOT = Path(os.environ["TOKENENV_TRAINERS"])
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def row(prompt: list[int], rewards: list[float], own: list[bool]) -> dict:
    return {
        "prompt_ids": prompt,
        "response_ids": list(range(10, 10 + len(rewards))),
        "own": own,
        "token_rewards": rewards,
        "logprobs": [-1.0] * len(rewards),
        "ref_logprobs": [-2.0] * len(rewards),
        "kl_coef": 0.5,
        "terminated": True,
    }


ROWS = [row([1, 2], [3.0, 0.0, 4.0], [True, False, True]), row([3], [1.0, 2.0], [True, True])]


def source(trainer: str, path: str, **given: object) -> SimpleNamespace:
    if not (ROOT / trainer).is_dir():
        pytest.skip(f"no {ROOT / trainer}")
    return functions_of(ROOT / trainer / path, **given)


def test_skyrl_validates_and_pads_a_generators_output() -> None:
    from export_skyrl import generator_output

    output = generator_output(ROWS)
    nothing = SimpleNamespace(warning=print)
    trainer = source("skyrl", "skyrl/train/utils/trainer_utils.py", logger=nothing)
    trainer.validate_generator_output(2, output)
    preprocess = source("skyrl", "skyrl/train/dataset/preprocess.py", logger=nothing)
    names = ("prompt_token_ids", "response_ids", "rewards", "loss_masks", "rollout_logprobs")
    tensors = preprocess.convert_prompts_responses_to_batch_tensors(
        SimpleNamespace(pad_token_id=0), *(output[name] for name in names)
    )
    shaped = [one.tolist() for one in tensors if isinstance(one, torch.Tensor)]
    assert [[3.0, 0.0, 4.0], [0.0, 1.0, 2.0]] in shaped  # SkyRL pads on the left
    assert [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]] in shaped


def test_prime_rl_assigns_over_the_nodes_of_a_trace() -> None:
    from export_prime_rl import assign

    routing = source("prime_rl", "src/prime_rl/orchestrator/algo/routing.py")

    def node(mask: list[bool]) -> SimpleNamespace:
        return SimpleNamespace(mask=mask, token_ids=[0] * len(mask), advantages=None)

    traces = [
        SimpleNamespace(
            id="1", nodes=[node([False, False]), node([True]), node([False]), node([True])]
        ),
        SimpleNamespace(id="2", nodes=[node([False]), node([True, True])]),
    ]
    assign(traces, ROWS, routing.assign_advantages)
    # With the penalty of 0.5 a token: 6 and 3.5 from there on in one text, 2 and 1.5 in the other.
    mean = (6 + 3.5 + 2 + 1.5) / 4
    given = [one.advantages for trace in traces for one in trace.nodes]
    assert given == [None, [6 - mean], None, [3.5 - mean], None, [2 - mean, 1.5 - mean]]


def test_slime_calls_the_function_in_the_place_of_its_own() -> None:
    from export_slime import TokenAdvantages, rollout_data_of

    asked = []

    def load_function(path: str) -> TokenAdvantages:
        asked.append(path)
        return TokenAdvantages(lambda: ROWS)

    loss = source(
        "slime",
        "slime/backends/megatron_utils/loss.py",
        mpu=SimpleNamespace(is_pipeline_last_stage=lambda: True),
        load_function=load_function,
    )
    args = SimpleNamespace(
        kl_coef=0.0,
        use_rollout_logprobs=False,
        use_opd=False,
        normalize_advantages=False,
        custom_advantage_function_path="mine.token_advantages",
    )
    data = rollout_data_of(ROWS) | {"log_probs": [torch.zeros(3), torch.zeros(2)]}
    loss.compute_advantages_and_returns(args, data)
    assert asked == ["mine.token_advantages"]
    assert [one.tolist() for one in data["returns"]] == [[7.0, 4.0, 4.0], [3.0, 2.0]]
    assert [one.tolist() for one in data["advantages"]] == [[3.0, 0.0, 0.0], [-1.0, -2.0]]
