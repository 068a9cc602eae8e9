"""Networks begun anew now and then, on the data that were gathered (Nikishin et al., 2022, section 4)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.objective import Metrics
from rlamort.train import Updates, crosses


class Resets:
    """Rounds in which networks, targets, temperature and the state of their optimisers are first drawn anew, when that is due.

    Replay and observation statistics stay: they are data. Tensors stay where they are, so that captured rounds go on with them.
    Nothing is counted here and fresh values come from torch's generator, so a resumed run resets as the unbroken one would.

    Args:
        updates: the rounds.
        agent: what they update.
        fresh: makes an agent of the same kind and shapes, as one is made at the start.
        every: updates; before each multiple of it there is a reset.
        done: how many updates there were before this round.
    """

    def __init__(self, updates: Updates, agent: Agent, fresh: Callable[[], Agent], every: int, done: Callable[[], int]) -> None:
        self.updates, self.agent, self.fresh, self.every, self.done = updates, agent, fresh, every, done

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> tuple[Metrics, Tensor | None, Carry]:
        done = self.done()
        if crosses(done, done + len(improves), self.every):
            drawn = self.fresh()
            drawn.normaliser = self.agent.normaliser
            self.agent.load_state_dict(drawn.state_dict())
        return self.updates(improves, x, h)
