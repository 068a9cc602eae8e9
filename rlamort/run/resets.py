"""Periodic network resets on the collected data (Nikishin et al., 2022, section 4)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.errors import UserError
from rlamort.objective import Metrics
from rlamort.train import Updates, crosses


def require_resets(agent: Agent, every: int) -> None:
    """Raises UserError if networks are to be reset that `agent` learns in fits, and asks before the next one."""
    if every and agent.needs_fit and agent.fit_every:
        raise UserError(
            f"reset_every={every}: a reset would leave the model that fits learn (fit_every) untrained until the next one; "
            "with a learned model only 0 is supported"
        )


class Resets:
    """Rounds of updates with periodic resets of networks, targets, temperature and optimiser state.

    Replay and observation statistics are kept, since they are data. Tensors are written in place, for captured rounds.
    There is no counter here and new values come from torch's generator, so a resumed run resets as an uninterrupted one.

    Args:
        updates: the rounds.
        agent: the agent that they update.
        fresh: builds a new agent of the same shapes.
        every: number of updates between resets.
        done: returns the number of updates before this round.
    """

    def __init__(self, updates: Updates, agent: Agent, fresh: Callable[[], Agent], every: int, done: Callable[[], int]) -> None:
        self.updates, self.agent, self.fresh, self.every, self.done = updates, agent, fresh, every, done

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> tuple[Metrics, Tensor | None, Carry]:
        done = self.done()
        if crosses(done, done + len(improves), self.every):
            agent = self.fresh()
            agent.normaliser = self.agent.normaliser
            self.agent.load_state_dict(agent.state_dict())
        return self.updates(improves, x, h)
