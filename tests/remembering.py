"""An agent that remembers: how many steps each episode has had, and a trace of what it met."""

import torch

from rlamort.agent import Agent
from rlamort.config import Size


class Remembering(Agent):
    """It plays sin of the number of steps so far, with noise where it explores, plus the mean of its trace.

    Args:
        trace: numbers of the trace.
        weight: of the trace in what it plays.
    """

    def __init__(self, spec, *, trace: Size = 2, weight: float = 0.0) -> None:
        super().__init__(spec, normalise=False)
        self.trace, self.weight, self.n = trace, weight, self.domain.dim

    def start(self, count):
        return torch.zeros(count), torch.zeros(count, self.trace)

    def play(self, x, h, explore):
        steps, trace = h
        trace = 0.9 * trace + x.mean(-1, keepdim=True)
        y = steps.sin()[:, None].expand(-1, self.n) + self.weight * trace.mean(-1, keepdim=True)
        y = y + 0.1 * torch.randn_like(y) if explore and self.weight else y
        return y.clamp(-1, 1), (steps + 1, trace)

    def evaluate(self, batch):
        return {"steps": batch.x.mean()}

    def improve(self, batch):
        return {}


ROW = """
about: An agent that remembers
opens: rlamort.env.make.open_env
source: rlamort.source.Replay
agent: remembering.Remembering
train: rlamort.train.train
"""
