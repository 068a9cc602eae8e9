"""Updates as the loop runs them: one call after another, or captured as a whole. N rows of environments · d = x_dim"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlamort.agent import Agent
from rlamort.objective import Metrics
from rlamort.source import Batch

Sampler = Callable[[], Batch]


def update(agent: Agent, sample: Sampler, improve: bool, x: Tensor | None) -> tuple[Metrics, Tensor | None]:
    """One update on a fresh batch, with or without `improve`; then an exploring action for x (N, d), where one is given."""
    metrics = agent.update(sample(), improve)
    with torch.no_grad():
        return metrics, None if x is None else agent.act(x, explore=True)


class Eager:
    """Updates as Python runs them.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample

    def __call__(self, improves: Sequence[bool], x: Tensor) -> tuple[Metrics, Tensor]:
        """An update for each entry, with or without `improve`; the latest metrics, and exploring actions for x (N, d)."""
        metrics: Metrics = {}
        y = None
        for improve in improves:
            fresh, y = self.once(improve, x if len(improves) == 1 else None)
            metrics |= fresh
        if y is None:
            with torch.no_grad():
                y = self.agent.act(x, explore=True)
        return metrics, y

    def once(self, improve: bool, x: Tensor | None) -> tuple[Metrics, Tensor | None]:
        return update(self.agent, self.sample, improve, x)


class Compiled(Eager):
    """Sampling, forward, backward, optimiser, target update and the next action as one compiled graph.

    There is one with and one without `improve`. They draw their noise as the eager update does. The first result of each is
    held against the eager one's; where compiling fails, or the two differ, updates go on uncompiled, with a warning.
    """

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        super().__init__(agent, sample)
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
        self.graph = torch.compile(update, fullgraph=True, dynamic=False, options={"fallback_random": True})
        self.checked: set[tuple[bool, bool]] = set()  # the graphs that have proved right
        self.failed = False

    def once(self, improve: bool, x: Tensor | None) -> tuple[Metrics, Tensor | None]:
        if (improve, x is None) in self.checked:
            return self.graph(self.agent, self.sample, improve, x)
        return super().once(improve, x) if self.failed else self._first(improve, x)

    def _first(self, improve: bool, x: Tensor | None) -> tuple[Metrics, Tensor | None]:
        twin, devices = copy.deepcopy(self.agent), [self.agent.box.scale.device] if self.agent.box.scale.is_cuda else []
        with torch.random.fork_rng(devices):
            expected = update(twin, self.sample, improve, x)
        try:
            found = self.graph(self.agent, self.sample, improve, x)
            ours, theirs = _named(found, self.agent), _named(expected, twin)
            differing = [name for name in theirs if not close(ours[name], theirs[name])]
            if not differing:
                self.checked.add((improve, x is None))
                return found
            reason = f"its first update differs from the uncompiled one in {', '.join(differing[:3])}"
            self.agent.load_state_dict(twin.state_dict())
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything has moved: compiling comes first
            reason, expected = str(error).splitlines()[0], super().once(improve, x)
        warnings.warn(f"compile: it failed, so updates go on uncompiled ({reason})", stacklevel=4)
        self.failed = True
        return expected


def _named(found: tuple[Metrics, Tensor | None], agent: Agent) -> Mapping[str, Tensor]:
    """All that an update gives or changes."""
    metrics, y = found
    return {**metrics, **agent.state_dict(), **({} if y is None else {"y": y})}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they are no further apart than float32 arithmetic in another order explains.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size.
    """
    return bool((one - other).double().norm() <= 1e-2 * other.double().norm() + 1e-5)
