"""Rounds of updates, run eagerly or captured as one graph. N environments · d = x_dim

A round follows one step of the environments: an update for each entry of `improves`, with or without `improve`, and then
exploring actions for the present contexts x (N, d), if the agent acts (x is not None); h is its carry, before and after that.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.objective import Metrics
from rlamort.run.track import say
from rlamort.source import Batch, Contexts, Labelled

Sampler = Callable[[], Batch | Contexts | Labelled]
Pattern = tuple[tuple[bool, ...], bool]  # of a round that is captured: `improves`, and whether it acts
PIECE = 16  # updates that are captured together: rounds of any length are made of few patterns


class Round(NamedTuple):
    """The results of a round."""

    metrics: Metrics  # of the latest updates
    y: Tensor | None  # (N, n) in [-1, 1]^n; None where nobody acts
    h: Carry = ()  # (N, ...) each


class Eager:
    """Rounds run eagerly.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        metrics: Metrics = {}
        for improve in improves:
            metrics |= self.agent.update_from(self.sample, improve)
        return Round(metrics, *_next(self.agent, x, h))


class Compiled:
    """Sampling, forward, backward, optimiser, target update and the next action as one compiled graph.

    There is one with and one without `improve`; where a round has several updates, it calls them one after another, and acts
    after the last. They draw their noise as the eager round does.
    """

    beginning = "compiling updates (5-60 s; kept for later runs) ..."

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
        torch._dynamo.config.recompile_limit = 1_000  # it counts all agents of a process together, since they share this code
        options: dict[str, Any] = {
            "fallback_random": True,  # the eager update's random numbers
            # in their order: to save memory, torch before 2.13 moves a draw that depends on nothing ahead of other draws
            "reorder_for_peak_memory": False,
            "unroll_reductions_threshold": 1,  # sums over an action's coordinates in vector instructions
            "cpp_wrapper": True,  # kernels are called from C++, not from Python
            "cpp.dynamic_threads": True,  # as many threads as torch has when it runs, not when it was compiled
            # What is compiled for one thread leaves scalars unguarded against a second one, and torch's cache does not tell
            # the two apart: what was compiled with one thread would do every scalar's step twice with two.
            "cpp.threads": max(2, torch.get_num_threads()),
        }
        self.graph = torch.compile(self._update, fullgraph=True, dynamic=False, options=options)

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        if len(improves) == 1:  # the usual round, all of it one graph
            return Round(*self.graph(improves[0], x, h))
        metrics: Metrics = {}
        for improve in improves:
            metrics |= self.graph(improve, None, ())[0]
        return Round(metrics, *_next(self.agent, x, h))

    def _update(self, improve: bool, x: Tensor | None, h: Carry) -> tuple[Metrics, Tensor | None, Carry]:
        return self.agent.update_from(self.sample, improve), *_next(self.agent, x, h)


def _next(agent: Agent, x: Tensor | None, h: Carry) -> tuple[Tensor | None, Carry]:
    """The agent's next actions, and its carry after them."""
    with torch.no_grad():
        return (None, h) if x is None else agent.play(x, h, explore=True)


class CudaGraph:
    """A whole round as one CUDA graph for each pattern: nothing of it is launched by Python.

    Parameters, replay and random state are where the graph found them; x and h are copied into buffers of their own.
    """

    beginning = "recording updates as a CUDA graph ..."

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.eager = Eager(agent, sample)
        self.graphs: dict[Pattern, tuple[torch.cuda.CUDAGraph, Carry, Round]] = {}

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        pattern = tuple(improves), x is not None
        if pattern not in self.graphs:
            self.graphs[pattern] = self._record(improves, x, h)
        graph, buffers, found = self.graphs[pattern]
        if x is not None:
            for buffer, value in zip(buffers, (x, *h), strict=True):
                buffer.copy_(value)
        graph.replay()
        y = None if found.y is None else found.y.clone()
        metrics = {name: value.clone() for name, value in found.metrics.items()}
        return Round(metrics, y, h if x is None else tuple(part.clone() for part in found.h))

    def _record(self, improves: Sequence[bool], x: Tensor | None, h: Carry) -> tuple[torch.cuda.CUDAGraph, Carry, Round]:
        before = AgentSnapshot(self.eager.agent)
        buffers = () if x is None else tuple(value.clone() for value in (x, *h))
        x_buffer, h_buffers = (buffers[0], buffers[1:]) if buffers else (None, ())
        device = self.eager.agent.device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what libraries allocate at first use must be there before recording
            for _ in range(3):
                self.eager(improves, x_buffer, h_buffers)
        torch.cuda.current_stream(device).wait_stream(aside)
        before.restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.eager(improves, x_buffer, h_buffers)
        return graph, buffers, found


class AgentSnapshot:
    """A snapshot of an agent's state and of the random generators.

    Args:
        agent: whose state is copied, on its device.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent, self.device = agent, agent.device
        self.tensors = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        self.random = torch.get_rng_state()
        self.random_on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def restore(self) -> None:
        """Restore everything, in the same memory."""
        self.agent.load_state_dict(self.tensors)
        torch.set_rng_state(self.random)
        if self.random_on_device is not None:
            torch.cuda.set_rng_state(self.random_on_device, self.device)


class Captured:
    """Rounds by `Compiled` or, on a GPU, by `CudaGraph`, each pattern verified against eager execution at its first use.

    Where capturing fails, or the two differ, rounds go on eager, with one warning.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample
        kind = CudaGraph if agent.device.type == "cuda" else Compiled
        self.beginning = kind.beginning
        self.rounds: Callable[[Sequence[bool], Tensor | None, Carry], Round] = kind(agent, sample)
        self.proved: set[Pattern] = set()

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        metrics: Metrics = {}
        while len(improves) > PIECE:
            metrics |= self._piece(improves[:PIECE], None, ()).metrics
            improves = improves[PIECE:]
        found = self._piece(improves, x, h)
        return found._replace(metrics=metrics | found.metrics)

    def _piece(self, improves: Sequence[bool], x: Tensor | None, h: Carry) -> Round:
        pattern = tuple(improves), x is not None
        if isinstance(self.rounds, Eager) or pattern in self.proved:
            return self.rounds(improves, x, h)
        say.get()(self.beginning)
        before, twin = AgentSnapshot(self.agent), copy.deepcopy(self.agent)
        expected = named(Eager(twin, self.sample)(improves, x, h), twin)
        before.restore()
        try:
            found = self.rounds(improves, x, h)
            ours = named(found, self.agent)
            differing = [name for name in expected if not close(ours[name], expected[name])]
            if not differing:
                self.proved.add(pattern)
                return found
            reason = f"its first update differs from the uncompiled one in {', '.join(differing[:3])}"
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        warnings.warn(f"compile: it failed, so updates go on uncompiled ({reason})", stacklevel=4)
        before.restore()
        self.rounds = Eager(self.agent, self.sample)
        return self.rounds(improves, x, h)


def named(found: Round, agent: Agent) -> Mapping[str, Tensor]:
    """All tensors that a round returns or changes, by name."""
    acted = {} if found.y is None else {"y": found.y, **{f"h[{i}]": part for i, part in enumerate(found.h)}}
    return {**found.metrics, **agent.state_dict(), **acted}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than the rounding of float32 arithmetic in another order.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size.
    """
    return bool((one - other).double().norm() <= 1e-2 * other.double().norm() + 1e-5)
