"""Rounds of updates by the fastest way that works: compiled, as a CUDA graph, or eager."""

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.host.graphs import close
from rlamort.objective import Metrics
from rlamort.run.rounds import AgentSnapshot, Compiled, CudaGraph, Eager, Pattern, Round, Rounds, Sampler, acted, for_graph
from rlamort.run.track import say

MANY = 8  # graphs that are compiled for an agent: there are up to four, with and without `improve` and an action


def ways_of(agent: Agent, sample: Sampler) -> list[Rounds]:
    """Ways to run an agent's rounds, the fastest first and eager execution last."""
    eager = Eager(agent, sample)
    if agent.device.type == "cuda":
        return [CudaGraph(Compiled(agent, sample, for_graph())), CudaGraph(eager), eager]
    return [Compiled(agent, sample), eager]


class Captured:
    """Rounds by the first way that works, each pattern verified against eager execution at its first use.

    Where a way fails, or its results differ, rounds go on by the next, as if they had been eager until then, with one warning
    that says why.

    Args:
        agent: what is updated.
        sample: gives a batch.
        ways: from the fastest to eager execution; None takes those for the agent's device.
    """

    def __init__(self, agent: Agent, sample: Sampler, ways: Sequence[Rounds] | None = None) -> None:
        self.agent, self.sample = agent, sample
        self.rounds, *self.others = ways_of(agent, sample) if ways is None else ways
        self.proved: set[Pattern] = set()

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        if self.rounds.compiled > MANY:
            self._give_up("Python values that it reads change from update to update, and each would be compiled anew")
        pieces = self.rounds.pieces(improves, x is not None)
        if isinstance(self.rounds, Eager) or self.proved.issuperset(pieces):
            return self.rounds(improves, x, h)
        metrics: Metrics = {}
        y, carry, acts = None, h, False
        for part, acts in pieces:
            found = self._verified(part, x if acts else None, h if acts else ())
            metrics |= found.metrics
            y, carry = (found.y, found.h) if acts else (y, carry)
        return Round(metrics, *((y, carry) if acts else acted(self.agent, x, h)))

    def _verified(self, improves: Sequence[bool], x: Tensor | None, h: Carry) -> Round:
        """Updates that are captured at once; of a new pattern, beside eager ones from the same state."""
        pattern = tuple(improves), x is not None
        while not isinstance(self.rounds, Eager) and pattern not in self.proved:
            say.get()(self.rounds.beginning)
            before, twin = AgentSnapshot(self.agent), copy.deepcopy(self.agent)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Dynamo does not know")  # it is said below
                    found = self.rounds(improves, x, h)
            except Exception as error:  # a compiler's may be of any kind; the agent's own comes again from eager execution
                before.restore()
                self._give_up(_reason(error))
                continue
            after = AgentSnapshot(self.agent)
            before.drawn.restore()
            eager = Eager(twin, self.sample)(improves, x, h)
            ours, theirs = named(found, self.agent), named(eager, twin)
            differing = [name for name in theirs if not close(ours[name], theirs[name])]
            if not differing:
                after.drawn.restore()
                self.proved.add(pattern)
                return found
            self._give_up(f"its first update differs from the uncompiled one in {', '.join(differing[:3])}")
            self.agent.load_state_dict(twin.state_dict())
            return eager
        return self.rounds(improves, x, h)

    def _give_up(self, reason: str) -> None:
        """Go on by the next way."""
        what = type(self.agent if self.agent.spec.problem is None else self.agent.spec.problem).__name__
        self.rounds, *self.others = self.others
        self.proved.clear()
        warnings.warn(f"compile: it failed for {what}, so updates go on {self.rounds.about} ({reason})", stacklevel=5)


def _reason(error: Exception) -> str:
    """Why capturing failed, in one sentence, with the line of a user's that torch names."""
    message, _, code = str(getattr(error, "inner_exception", error)).partition("from user code:")
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    at = [number for number, line in enumerate(lines) if line.startswith("File ")]
    where = f", at {lines[at[-1] + 1]}" if at and at[-1] + 1 < len(lines) else ""
    kind = "" if isinstance(error, torch._dynamo.exc.TorchDynamoException) else f"{type(error).__name__}: "
    return f"{kind}{message.strip().partition(chr(10))[0]}{where}"


def named(found: Round, agent: Agent) -> Mapping[str, Tensor]:
    """All tensors that a round returns or changes, by name."""
    acts = {} if found.y is None else {"y": found.y, **{f"h[{i}]": part for i, part in enumerate(found.h)}}
    return {**found.metrics, **agent.state_dict(), **acts}
