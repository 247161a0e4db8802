"""A run that was stopped goes on bit for bit, in its own folder, with its own settings and data."""

import json
import os
from dataclasses import replace

import fakes
import fitting
import numpy as np
import pytest
from fitting import trained, weights
from runs import same

from tokenenv.agents.run.checkpoint import write_checkpoint
from tokenenv.errors import CheckpointError, InvalidArgument
from tokenenv.fit.checkpoint import (
    check_data,
    check_folder,
    fingerprint,
    plain,
    read_state,
    settings,
)
from tokenenv.fit.examples import Example, Text

TIME = {"seconds"}


class After:
    """Asks to stop after some optimizer steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


def stopped(config, steps):
    with pytest.raises(KeyboardInterrupt):
        trained(config, stop=After(steps))
    return config


def resumed(folder, **options):
    config = fitting.config(folder, resume=True, **options)
    check_folder(config.out, resume=True)
    return trained(config, state=read_state(config))


def check(config):
    check_folder(config.out, resume=config.resume)


def untimed(measures):
    return {name: value for name, value in measures.items() if name not in TIME}


@pytest.mark.parametrize("steps", [1, 3, 4], ids=["first", "end of an epoch", "inside an epoch"])
def test_a_run_goes_on_as_if_it_had_never_been_stopped(tmp_path, steps):
    """Three steps are an epoch. The weights, the measures and the history are equal, bit for
    bit."""
    options = {"epochs": 3, "objective": "bt-mean"}
    whole = trained(fitting.config(tmp_path / "whole", **options))
    stopped(fitting.config(tmp_path / "parts", **options), steps)
    parts = resumed(tmp_path / "parts", **options)
    assert same(weights(whole), weights(parts))
    assert same(whole.history, parts.history)
    assert untimed(whole.measures) == untimed(parts.measures)
    for name in ("model.safetensors", "config.json"):
        both = [(tmp_path / run / name).read_bytes() for run in ("whole", "parts")]
        assert both[0] == both[1]


def outcomes(count, seed):
    """Texts of a few prompts, each with whether it is a good one."""
    texts = [text for pair in fitting.pairs(count // 2, seed) for text in pair.texts]
    prompts = [np.array([3]), np.array([4, 7])]
    return [
        Example((replace(text, prompt=prompts[i % 2]),), (float(fitting.gold(text) > 0),), f"{i}")
        for i, text in enumerate(texts)
    ]


RATIOS = {"dpo": fitting.pairs, "outcome": outcomes, "a-star": outcomes}


@pytest.mark.parametrize("steps", [1, 4], ids=["first", "inside an epoch"])
@pytest.mark.parametrize("lora_rank", [0, 2], ids=["all weights", "adapters"])
@pytest.mark.parametrize("objective", RATIOS)
def test_log_ratios_go_on_as_if_they_had_never_been_stopped(tmp_path, objective, lora_rank, steps):
    """The reference is in no checkpoint. At the first step every log-ratio is exactly 0, and all that
    is trained is moved by it nevertheless."""
    options = {"objective": objective, "lora_rank": lora_rank, "lr": 1e-2}
    examples = {"train_on": RATIOS[objective](20, 0), "held_out": RATIOS[objective](8, 1)}

    def config(run, **more):
        return fitting.config(tmp_path / run, model=fakes.causal_lm(), **options, **more)

    whole = trained(config("whole"), **examples)
    with pytest.raises(KeyboardInterrupt):
        trained(config("parts"), **examples, stop=After(steps))
    again = config("parts", resume=True)
    state, begun = read_state(again), fitting.reader(again).trained()
    assert all((begun[name] != weight).any() for name, weight in state["weights"].items())
    parts = trained(again, **examples, state=state)
    assert same(weights(whole), weights(parts))
    assert same(whole.history, parts.history)
    assert untimed(whole.measures) == untimed(parts.measures)


def test_a_run_may_be_stopped_again_and_again(tmp_path):
    options = {"epochs": 3}
    whole = trained(fitting.config(tmp_path / "whole", **options))
    stopped(fitting.config(tmp_path / "parts", **options), 2)
    for _ in range(2):
        config = fitting.config(tmp_path / "parts", resume=True, **options)
        with pytest.raises(KeyboardInterrupt):
            trained(config, state=read_state(config), stop=After(2))
    assert same(weights(whole), weights(resumed(tmp_path / "parts", **options)))


def test_a_run_that_was_stopped_with_its_last_step_is_saved(tmp_path):
    stopped(fitting.config(tmp_path / "m"), 6)
    assert not (tmp_path / "m" / "README.md").exists()
    whole = trained(fitting.config(tmp_path / "whole"))
    assert same(weights(whole), weights(resumed(tmp_path / "m")))


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    """The checkpoint before that of step 4 is that of the epoch's end, step 3."""
    whole = trained(fitting.config(tmp_path / "whole"))
    config = stopped(fitting.config(tmp_path / "m"), 4)
    (config.out / "checkpoint").write_bytes(b"half")
    with pytest.warns(UserWarning, match="The one before it is taken"):
        parts = resumed(tmp_path / "m")
    assert same(weights(whole), weights(parts))


def test_a_finished_folder_holds_the_model_and_no_checkpoint(tmp_path):
    trained(fitting.config(tmp_path / "m"))
    names = {name for name in os.listdir(tmp_path / "m") if not name.startswith("events.")}
    assert names == {
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(os.listdir(tmp_path / "m")) == len(names) + 1


def test_events_of_a_resumed_run_hold_every_step_once(tmp_path):
    """A run that dies two steps behind its checkpoint has written events of these steps, which are
    written again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = iter(range(1, 6))

    def dies():
        if next(steps) == 5:
            raise RuntimeError("died")
        return False

    with pytest.raises(RuntimeError, match="died"):
        trained(fitting.config(tmp_path / "m"), stop=dies)
    resumed(tmp_path / "m")
    events = EventAccumulator(str(tmp_path / "m"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("held_out/accuracy")] == [3, 6]


# ------------------------------------------------------------------------------ what is refused


CHANGES = {
    "lr": 2e-3,
    "epochs": 3,
    "batch_examples": 4,
    "seed": 1,
    "objective": "bt-mean",
    "weight_decay": 0.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_name(tmp_path, name):
    stopped(fitting.config(tmp_path / "m"), 1)
    config = fitting.config(tmp_path / "m", **{"resume": True, name: CHANGES[name]})
    with pytest.raises(InvalidArgument, match=f"{name} is .* there and {CHANGES[name]!r} here"):
        read_state(config)


def test_another_place_device_and_memory_are_no_other_settings(tmp_path):
    config = stopped(fitting.config(tmp_path / "m"), 1)
    os.rename(config.out, tmp_path / "moved")
    resumed(tmp_path / "moved", max_batch_tokens=64, held_out="m/held-out.jsonl")


def text(**changes):
    arrays = {"prompt": [1, 2], "response": [3, 4], "target": [0.0, 1.0], "own": [True, False]}
    return Text(**{name: np.array(value) for name, value in (arrays | changes).items()})


@pytest.mark.parametrize(
    "other",
    [
        Example((text(),), (2.0,)),
        Example((text(prompt=[1, 3]),), (1.0,)),
        Example((text(prompt=[1], response=[2, 3, 4]),), (1.0,)),
        Example((text(target=[0.0, 0.5]),), (1.0,)),
        Example((text(own=[True, True]),), (1.0,)),
        Example((text(), text()), (1.0,)),
    ],
)
def test_other_data_is_refused(tmp_path, other):
    example = Example((text(),), (1.0,), "here")
    mine = fingerprint([[example], []])
    assert mine == fingerprint([[Example((text(),), (1.0,), "there")], []])
    assert mine != fingerprint([[other], []])
    with pytest.raises(InvalidArgument, match="has other examples now"):
        check_data({"data": mine}, fingerprint([[other], []]), tmp_path)


def test_examples_that_change_sides_are_other_data():
    one, two = Example((text(),)), Example((text(prompt=[5, 6]),))
    assert fingerprint([[one], [two]]) != fingerprint([[two], [one]])
    assert fingerprint([[one, two], []]) != fingerprint([[one], [two]])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    config = fitting.config(tmp_path, resume=True)
    write_checkpoint(tmp_path / "checkpoint", {"agent": "PPO"})
    with pytest.raises(CheckpointError, match="something else than `tokenenv fit`"):
        read_state(config)
    write_checkpoint(tmp_path / "checkpoint", {"kind": "fit"})
    with pytest.raises(CheckpointError, match="does not hold what"):
        read_state(config)


def test_weights_of_another_model_are_refused(tmp_path):
    stopped(fitting.config(tmp_path / "m"), 1)
    config = fitting.config(tmp_path / "m", resume=True)
    state = read_state(config)
    other = fitting.config(tmp_path / "m", num_layers=2, resume=True)
    with pytest.raises(CheckpointError, match="another model"):
        trained(other, state=state)


def test_what_is_in_the_folder_decides_whether_a_run_may_begin(tmp_path):
    fresh = {name: fitting.config(tmp_path / name) for name in ("new", "other", "run", "file")}
    again = {name: fitting.config(tmp_path / name, resume=True) for name in fresh}
    check(fresh["new"])
    with pytest.raises(InvalidArgument, match="holds no run to go on with"):
        check(again["new"])
    (tmp_path / "other").mkdir()
    check(fresh["other"])
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(InvalidArgument, match=r"not empty, it holds 'thesis\.tex'"):
        check(fresh["other"])
    with pytest.raises(InvalidArgument, match="holds no run"):
        check(again["other"])
    (tmp_path / "file").write_text("mine")
    for config in (fresh["file"], again["file"]):
        with pytest.raises(InvalidArgument, match="is a file"):
            check(config)
    stopped(fresh["run"], 1)
    with pytest.raises(InvalidArgument, match="has not ended; go on with it by resume=True"):
        check(fresh["run"])
    check(again["run"])
    resumed(tmp_path / "run")
    with pytest.raises(InvalidArgument, match="has ended: its model is there"):
        check(again["run"])
    with pytest.raises(InvalidArgument, match="not empty"):
        check(fresh["run"])


def test_a_run_that_never_wrote_a_checkpoint_begins_anew(tmp_path):
    config = stopped(fitting.config(tmp_path / "m"), 1)
    for path in config.out.glob("checkpoint*"):
        path.unlink()
    whole = trained(fitting.config(tmp_path / "whole"))
    assert same(weights(whole), weights(resumed(tmp_path / "m")))


def test_objects_are_named_by_their_type_where_settings_are_compared(tmp_path):
    config = fitting.config(tmp_path, model=object(), tokenizer=tmp_path)
    assert settings(config)["model"] == "<object>"
    assert settings(config)["tokenizer"] == str(tmp_path)
    assert plain([1, 2]) == "<list of 2 rows>"
    json.dumps(settings(config))
