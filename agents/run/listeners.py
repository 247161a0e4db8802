"""What follows a run while it learns: the run folder, the user's `on_update`, the progress line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tokenenv.agents.episodes import Episode
from tokenenv.agents.rollout.ending import no_listener
from tokenenv.agents.run.failures import write_failures
from tokenenv.agents.run.progress import ProgressLine
from tokenenv.agents.run.tracking import RunFolder
from tokenenv.errors import NotFinite

if TYPE_CHECKING:
    from tokenenv.agents.agent import Agent

OnUpdate = Callable[[dict[str, float], Sequence[Episode]], None]
"""What is called after each update, with its scalars and the episodes that it learnt from."""


@contextmanager
def listening(
    agent: "Agent", total_tokens: int, *, new: bool, progress: bool, on_update: OnUpdate | None
) -> Iterator[list[OnUpdate]]:
    """Yield the listeners of a run of `total_tokens` tokens; at its end those that can are closed.

    A `new` run is refused by a folder that holds one. Where a number is not finite, the texts at
    fault are written into the run folder.
    """
    listeners: list[OnUpdate] = []
    with ExitStack() as opened:

        def add(listener: OnUpdate) -> None:
            listeners.append(listener)
            opened.callback(getattr(listener, "close", lambda: None))

        if agent.run_dir is not None:
            # First of all: it has the folder's lock, and a checkpoint that on_update saves must
            # not be newer than the episodes on disk.
            add(RunFolder(agent.run_dir, agent.spec, None if new else agent.tokens_seen))
        if on_update is not None:
            add(on_update)
        if progress:
            line = ProgressLine(total_tokens, agent.tokens_seen)
            add(line)
            agent.collector.on_tokens = line.seen
            opened.callback(setattr, agent.collector, "on_tokens", no_listener)
        try:
            yield listeners
        except NotFinite as error:
            if agent.run_dir is not None:
                write_failures(agent.run_dir, error, agent.spec, agent.updates, agent.tokens_seen)
            raise
