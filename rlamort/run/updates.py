"""What a run's rounds of updates are made of."""

from collections.abc import Callable

from rlamort.agent import Agent
from rlamort.config import Run
from rlamort.run.capture import Captured
from rlamort.run.overlap import Overlap
from rlamort.run.resets import Resets
from rlamort.run.rounds import Eager
from rlamort.run.sharing import Sharing
from rlamort.train import Source, Updates


def updates_of(
    agent: Agent, source: Source, run: Run, compiled: bool, threads: int, fresh: Callable[[], Agent], done: Callable[[], int]
) -> Updates:
    """Rounds of updates as a run's fields ask for them.

    Args:
        agent: what is updated.
        source: of its batches.
        run: the fields.
        compiled: whether they are captured.
        threads: CPU threads.
        fresh: builds a new agent of the same shapes.
        done: returns the number of updates so far.
    """
    updates: Updates = (Captured if compiled else Eager)(agent, lambda: source.sample(run.batch_size))
    if run.threads is None and threads > 1 and agent.device.type == "cpu":
        updates = Sharing(updates, agent, threads)
    if run.reset_every:
        updates = Resets(updates, agent, fresh, run.reset_every, done)
    return Overlap(updates, source.env) if run.overlap else updates
