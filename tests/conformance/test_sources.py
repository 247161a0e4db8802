"""Functions are read from a file without what the file imports."""

import asyncio
from pathlib import Path

import pytest
import torch

from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.trainers import TRAINERS, subjects_of
from tokenenv.errors import InvalidArgument

FILE = """
from __future__ import annotations
import math, torch
from a_package_that_is_not_here import registry, Base, helper
LIMIT = 2.0
OTHER = registry.value

@registry.register("returns")
def returns(rewards: registry.Float, mask: torch.Tensor) -> registry.Float:
    from another_package_that_is_not_here import logger
    total: registry.Int = helper(rewards) * LIMIT
    return total

def unusable(x=registry.default):
    return x

class Estimator(Base, metaclass=registry.Meta):
    field: registry.Field
    factor: int = 3

    @staticmethod
    def doubled(x): return 2 * x

    @torch.no_grad()
    def of(self, x): return self.factor * self.doubled(x)

class Child(Estimator):
    async def later(self, x): return self.of(x)
"""


def read(tmp_path: Path, **given: object) -> object:
    path = tmp_path / "library.py"
    path.write_text(FILE)
    return functions_of(path, **given)


def test_functions_run_with_what_is_given(tmp_path: Path) -> None:
    found = read(tmp_path, helper=lambda x: x + 1)
    assert found.returns(torch.tensor(1.0), None) == 4.0
    assert found.LIMIT == 2.0
    assert not hasattr(found, "unusable")
    assert not hasattr(found, "OTHER")


def test_classes_keep_the_bases_that_are_theirs(tmp_path: Path) -> None:
    found = read(tmp_path)
    x = torch.ones((), requires_grad=True)
    assert found.Estimator().of(x) == 6.0
    assert not found.Estimator().of(x).requires_grad
    assert asyncio.run(found.Child().later(x)) == 6.0


def test_what_is_given_takes_the_place_of_what_the_file_has(tmp_path: Path) -> None:
    assert read(tmp_path, helper=lambda x: x, LIMIT=10.0).returns(1.0, None) == 10.0


def test_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a file"):
        functions_of(tmp_path / "none.py")
    with pytest.raises(InvalidArgument, match="trainer='torchrl' is not known; allowed: nemo_rl"):
        subjects_of("torchrl", tmp_path)
    for trainer in TRAINERS:
        with pytest.raises(InvalidArgument, match="is not a file"):
            subjects_of(trainer, tmp_path)
