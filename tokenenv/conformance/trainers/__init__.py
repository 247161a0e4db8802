"""Functions of other trainers as they are published, called as their trainers call them.

Each module names the files that it reads, and what was tried. `subjects_of(trainer, root)` reads
them below a folder: site-packages, a wheel that was unpacked, or a checkout of the repository.
"""

import importlib
import os
from pathlib import Path

from tokenenv.conformance.subjects import Subject
from tokenenv.errors import InvalidArgument

TRAINERS = ("nemo_rl", "openrlhf", "prime_rl", "rlhf_book", "skyrl", "trl", "verl")


def subjects_of(trainer: str, root: str | os.PathLike[str]) -> list[Subject]:
    """Return the functions of a trainer, read below `root`.

    Raises:
        InvalidArgument: an unknown trainer, or its files are not there.
    """
    if trainer not in TRAINERS:
        raise InvalidArgument(f"trainer={trainer!r} is not known; allowed: {', '.join(TRAINERS)}.")
    module = importlib.import_module(f"tokenenv.conformance.trainers.{trainer}")
    subjects: list[Subject] = module.subjects(Path(root))
    return subjects
