"""What follows a run while it learns: the run folder, the user's `on_update`, the progress line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tokenenv import ranks
from tokenenv.agents.episodes import Episode
from tokenenv.agents.rollout.ending import no_listener
from tokenenv.agents.run.failures import write_failures
from tokenenv.agents.run.files import locked, refuse_episodes
from tokenenv.agents.run.progress import ProgressLine
from tokenenv.agents.run.run_config import write_config
from tokenenv.agents.run.tracking import RunFolder
from tokenenv.errors import NotFinite

if TYPE_CHECKING:
    from tokenenv.agents.agent import Agent

OnUpdate = Callable[[dict[str, float], Sequence[Episode]], None]
"""What is called after each update, with its scalars and the episodes that it learnt from."""


@contextmanager
def listening(
    agent: "Agent",
    total_tokens: int,
    *,
    new: bool,
    progress: bool,
    on_update: OnUpdate | None,
    checkpoint_every: int | None,
) -> Iterator[list[OnUpdate]]:
    """Yield the listeners of a run of `total_tokens` tokens; at its end those that can are closed.

    A `new` run is refused by a folder that holds one. Where a number is not finite, the texts at
    fault are written into the run folder. A run that ends, or is stopped, leaves a checkpoint; one
    that raises leaves the last one that was written.
    """
    listeners: list[OnUpdate] = []
    save = _saver(agent, new)
    with ExitStack() as opened:

        def add(listener: OnUpdate) -> None:
            listeners.append(listener)
            opened.callback(getattr(listener, "close", lambda: None))

        # Of the processes that learn together the first alone writes; all have a part in what is
        # saved.
        if agent.run_dir is not None and ranks.number() == 0:
            # The lock first of all. Then the config, without which nobody could go on from the
            # checkpoint. A later checkpoint must not be newer than the episodes on disk, so the
            # folder's listener comes before the others.
            opened.enter_context(locked(agent.run_dir))
            if new:
                refuse_episodes(agent.run_dir)
            write_config(agent, total_tokens, checkpoint_every, new=new)
        if checkpoint_every:
            save()
        if agent.run_dir is not None and ranks.number() == 0:
            seen = None if new else agent.tokens_seen
            add(RunFolder(agent.run_dir, agent.spec, seen, agent.group_size))
        if on_update is not None:
            add(on_update)
        if checkpoint_every:
            add(lambda *_: save() if agent.updates % checkpoint_every == 0 else None)
        if progress and ranks.number() == 0:
            line = ProgressLine(total_tokens, agent.tokens_seen)
            add(line)
            agent.collector.on_tokens = lambda own: line.seen(own + agent.others_seen)
            opened.callback(setattr, agent.collector, "on_tokens", no_listener)
        try:
            yield listeners
            save()
        except NotFinite as error:
            # What fails in an update fails on all ranks alike; a note says that it was one alone.
            if agent.run_dir is not None and (ranks.number() == 0 or hasattr(error, "__notes__")):
                write_failures(agent.run_dir, error, agent.spec, agent.updates, agent.tokens_seen)
            raise


def _saver(agent: "Agent", new: bool) -> Callable[[], None]:
    """Return a function that writes the run folder's checkpoint, unless it is there already."""
    checkpoint = None if agent.run_dir is None else agent.run_dir / "checkpoint"
    begun = ranks.of_first(lambda: checkpoint is not None and checkpoint.exists()) and not new
    saved = agent.tokens_seen if begun else None

    def save() -> None:
        nonlocal saved
        if checkpoint is not None and agent.tokens_seen != saved:
            agent.save(checkpoint)
            saved = agent.tokens_seen

    return save
