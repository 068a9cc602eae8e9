"""Rounds of updates, run eagerly or captured as one graph. N environments · d = x_dim

A round follows one step of the environments: an update for each entry of `improves`, with or without `improve`, and then
exploring actions for the present contexts x (N, d), if the agent acts (x is not None); h is its carry, before and after that.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.objective import Metrics
from rlamort.run.track import say
from rlamort.source import Batch, Contexts, Labelled

Sampler = Callable[[], Batch | Contexts | Labelled]


class Round(NamedTuple):
    """The results of a round."""

    metrics: Metrics  # of the latest updates
    y: Tensor | None  # (N, n) in [-1, 1]^n; None where nobody acts
    h: Carry = ()  # (N, ...) each


class Rounds(Protocol):
    """A way to run rounds."""

    about: str  # how its updates go, for messages
    beginning: str  # what is said before the first, which takes long

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round: ...


class Eager:
    """Rounds run eagerly.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    about, beginning = "uncompiled", ""

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        metrics: Metrics = {}
        for improve in improves:
            metrics |= self.agent.update_from(self.sample, improve)
        return Round(metrics, *_next(self.agent, x, h))


def for_processor() -> dict[str, Any]:
    """Settings of Inductor, torch's compiler, for graphs that run by themselves on a CPU."""
    return {
        **AS_EAGER,
        "unroll_reductions_threshold": 1,  # sums over an action's coordinates in vector instructions
        "cpp_wrapper": True,  # kernels are called from C++, not from Python
        "cpp.dynamic_threads": True,  # as many threads as torch has when it runs, not when it was compiled
        # What is compiled for one thread leaves scalars unguarded against a second one, and torch's cache does not tell
        # the two apart: what was compiled with one thread would do every scalar's step twice with two.
        "cpp.threads": max(2, torch.get_num_threads()),
    }


def for_graph() -> dict[str, Any]:
    """Settings of Inductor for kernels that a CUDA graph captures.

    A replay calls no wrapper, so that Inductor's own CUDA graphs and its wrapper in C++, which has failed on GPUs
    (pytorch/pytorch issues 176214 and 178845), are off. Loops are not reordered once they are fused: where updates of lists of
    tensors (`torch._foreach_*`) meet sums of other shapes, as gradients of biases are, that raised an AssertionError before
    torch 2.12 (issue 176591).
    """
    return {**AS_EAGER, "triton.cudagraphs": False, "cpp_wrapper": False, "loop_ordering_after_fusion": False}


AS_EAGER = {
    "fallback_random": True,  # the eager update's random numbers
    # in their order: to save memory, torch before 2.13 moves a draw that depends on nothing ahead of other draws
    "reorder_for_peak_memory": False,
}


class Compiled:
    """Sampling, forward, backward, optimiser, target update and the next action as one compiled graph.

    There is one with and one without `improve`; where a round has several updates, it calls them one after another, and acts
    after the last. They draw their noise as the eager round does.

    Args:
        agent: what is updated.
        sample: gives a batch.
        options: settings of Inductor.
    """

    about = "compiled"
    beginning = "compiling updates (5-60 s; kept for later runs) ..."

    def __init__(self, agent: Agent, sample: Sampler, options: dict[str, Any] | None = None) -> None:
        self.agent, self.sample = agent, sample
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
        torch._dynamo.config.recompile_limit = 1_000  # it counts all agents of a process together, since they share this code
        options = for_processor() if options is None else options
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
    """A whole round as one CUDA graph for each pattern of `improves`: nothing of it is launched by Python.

    Parameters, replay and random state are where the graph found them; x and h are copied into buffers of their own.

    Args:
        rounds: what is captured: eager rounds, or compiled ones, whose elementwise work is fused into few kernels.
    """

    def __init__(self, rounds: Eager | Compiled) -> None:
        self.rounds = rounds
        self.about = f"{rounds.about} in a CUDA graph"
        self.beginning = f"recording updates, {self.about} ..."
        self.graphs: dict[tuple[bool, ...], Recording] = {}

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        pattern = tuple(improves)
        if pattern not in self.graphs:
            self.graphs[pattern] = self._record(pattern, x, h)
        graph, buffers, found, values = self.graphs[pattern]
        if x is not None:
            for buffer, value in zip(buffers, (x, *h), strict=True):
                buffer.copy_(value)
        graph.replay()
        y = None if found.y is None else found.y.clone()
        metrics = dict(zip(found.metrics, values.clone(), strict=True))  # one copy: the next replay overwrites them
        return Round(metrics, y, h if x is None else tuple(part.clone() for part in found.h))

    def _record(self, pattern: tuple[bool, ...], x: Tensor | None, h: Carry) -> "Recording":
        before = AgentSnapshot(self.rounds.agent)
        buffers = () if x is None else tuple(value.clone() for value in (x, *h))
        x_buffer, h_buffers = (buffers[0], buffers[1:]) if buffers else (None, ())
        device = self.rounds.agent.device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what is compiled and allocated at first use must be there before recording
            for _ in range(3):
                self.rounds(pattern, x_buffer, h_buffers)
        torch.cuda.current_stream(device).wait_stream(aside)
        before.restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            found = self.rounds(pattern, x_buffer, h_buffers)
            values = torch.stack(list(found.metrics.values())) if found.metrics else torch.empty(0, device=device)
        return Recording(graph, buffers, found, values)


class Recording(NamedTuple):
    """A captured round, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    buffers: Carry  # of x and h; empty where nobody acts
    found: Round
    values: Tensor  # of its metrics, in their order


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


def ways_of(agent: Agent, sample: Sampler) -> list[Rounds]:
    """Ways to run an agent's rounds, the fastest first and eager execution last."""
    eager = Eager(agent, sample)
    if agent.device.type == "cuda":
        return [CudaGraph(Compiled(agent, sample, for_graph())), CudaGraph(eager), eager]
    return [Compiled(agent, sample), eager]


class Captured:
    """Rounds by the first way that works, each pattern verified against eager execution at its first use.

    Where a way fails, or its results differ, rounds go on by the next, with one warning that says why.

    Args:
        agent: what is updated.
        sample: gives a batch.
        ways: from the fastest to eager execution; None takes those for the agent's device.
    """

    def __init__(self, agent: Agent, sample: Sampler, ways: Sequence[Rounds] | None = None) -> None:
        self.agent, self.sample = agent, sample
        self.rounds, *self.others = ways_of(agent, sample) if ways is None else ways
        self.proved: set[tuple[bool, ...]] = set()

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        pattern = tuple(improves)
        while not isinstance(self.rounds, Eager) and pattern not in self.proved:
            say.get()(self.rounds.beginning)
            found, reason = self._verified(improves, x, h)
            if found is not None:
                self.proved.add(pattern)
                return found
            self.rounds, *self.others = self.others
            self.proved.clear()
            warnings.warn(f"compile: it failed, so updates go on {self.rounds.about} ({reason})", stacklevel=3)
        return self.rounds(improves, x, h)

    def _verified(self, improves: Sequence[bool], x: Tensor | None, h: Carry) -> tuple[Round | None, str]:
        """A round, beside an eager one from the same state; where it fails or differs None, why, and all as it was before."""
        before, twin = AgentSnapshot(self.agent), copy.deepcopy(self.agent)
        expected = named(Eager(twin, self.sample)(improves, x, h), twin)
        before.restore()
        try:
            found = self.rounds(improves, x, h)
            ours = named(found, self.agent)
            differing = [name for name in expected if not close(ours[name], expected[name])]
            if not differing:
                return found, ""
            reason = f"its first update differs from the uncompiled one in {', '.join(differing[:3])}"
        except Exception as error:  # a compiler's may be of any kind; the agent's own would have come from the eager round
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        before.restore()
        return None, reason


def named(found: Round, agent: Agent) -> Mapping[str, Tensor]:
    """All tensors that a round returns or changes, by name."""
    acted = {} if found.y is None else {"y": found.y, **{f"h[{i}]": part for i, part in enumerate(found.h)}}
    return {**found.metrics, **agent.state_dict(), **acted}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than the rounding of float32 arithmetic in another order.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size.
    """
    return bool((one - other).double().norm() <= 1e-2 * other.double().norm() + 1e-5)
