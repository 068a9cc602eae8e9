"""Ways to run a round of updates: eagerly, compiled, or as a recorded CUDA graph. N environments · d = x_dim

A round follows one step of the environments, or many where nobody acts: an update for each entry of `improves`, with or without
`improve`, and then exploring actions for the present contexts x (N, d), if the agent acts (x is not None); h is its carry,
before and after that.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.host.graphs import Drawn, record
from rlamort.objective import Metrics
from rlamort.problem import drawing_on
from rlamort.source import Batch, Contexts, Labelled

Sampler = Callable[[], Batch | Contexts | Labelled]
Pattern = tuple[tuple[bool, ...], bool]  # the `improves` of what is captured at once, and whether the agent acts after it
PIECE = 16  # updates in a CUDA graph: rounds of any length are made of few patterns


class Round(NamedTuple):
    """The results of a round."""

    metrics: Metrics  # of the latest updates
    y: Tensor | None  # (N, n) in [-1, 1]^n; None where nobody acts
    h: Carry = ()  # (N, ...) each


class Rounds(Protocol):
    """A way to run rounds.

    Attributes:
        about: how its updates go, for messages.
        beginning: what is said before the first, which takes long.
        compiled: how many graphs were compiled.
    """

    about: str
    beginning: str

    @property
    def compiled(self) -> int: ...

    def pieces(self, improves: Sequence[bool], acts: bool) -> list[Pattern]:
        """The patterns of a round, in their order. Where none acts, the agent acts after them, in no graph."""

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round: ...


class Eager:
    """Rounds run eagerly.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    about, beginning, compiled = "uncompiled", "", 0

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample

    def pieces(self, improves: Sequence[bool], acts: bool) -> list[Pattern]:
        return [(tuple(improves), acts)]

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        metrics: Metrics = {}
        for improve in improves:
            metrics |= self.agent.update_from(self.sample, improve)
        return Round(metrics, *acted(self.agent, x, h))


def acted(agent: Agent, x: Tensor | None, h: Carry) -> tuple[Tensor | None, Carry]:
    """The agent's next actions, and its carry after them."""
    with torch.no_grad():
        return (None, h) if x is None else agent.play(x, h, explore=True)


AS_EAGER = {
    "fallback_random": True,  # the eager update's random numbers
    # in their order: to save memory, torch before 2.13 moves a draw that depends on nothing ahead of other draws
    "reorder_for_peak_memory": False,
    "size_asserts": False,  # the guards have seen to shapes and strides, and most of the time is in small kernels
}


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


class Call(NamedTuple):
    """What a compiled graph ran: its code, past the guards, and the tensors that it read and wrote."""

    code: Callable[..., Any]
    inputs: tuple[Any, ...]

    def __call__(self) -> None:
        self.code(*self.inputs)

    def same(self, other: "Call | None") -> bool:
        """Whether the other ran the same code on the same objects, all of them tensors."""
        if other is None or self.code is not other.code:
            return False
        pairs = zip(self.inputs, other.inputs, strict=True)
        return all(isinstance(one, Tensor) and one is another for one, another in pairs)


class Latest:
    """Inductor as a backend of `torch.compile`, with the latest call of what it compiled.

    Torch keeps a backend as long as the compiled code, so that this must not hold an agent: a call is held until it is taken.

    Args:
        options: Inductor's.

    Attributes:
        compiled: how many graphs.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.compiled, self._call = options, 0, cast(Call | None, None)

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        code = torch._inductor.compile(graph, examples, options=self.options)

        def run(*inputs: Any) -> Any:
            self._call = Call(code, inputs)
            return code(*inputs)

        return run

    def take(self) -> Call | None:
        """The call since the last time; None if nothing was to be computed."""
        call, self._call = self._call, None
        return call


class Compiled:
    """Sampling, forward, backward, optimiser, target update and the next action as one compiled graph.

    There is one with and one without `improve`; where a round has several updates, it calls them one after another, and acts
    after the last. They draw their noise as the eager round does.

    Before every call torch tests what the graph was specialised on (guards: identities of tensors, Python values, modes), which
    takes as long as the products of a small network. No user's code runs between the updates of a round, so that only an
    update itself could change any of it. Where two tested calls in a row have run the same code on the same tensors, updates
    change none; those between the first and the last of a round then run this code on these tensors, untested.

    Args:
        agent: what is updated.
        sample: gives a batch.
        options: settings of Inductor; None takes those for a CPU.
    """

    about = "compiled"
    beginning = "compiling updates (5-60 s; kept for later runs) ..."

    def __init__(self, agent: Agent, sample: Sampler, options: dict[str, Any] | None = None) -> None:
        self.agent, self.sample = agent, sample
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad is traced instead of breaking the graph
        torch._dynamo.config.recompile_limit = 1_000  # it counts all agents of a process together, since they share this code
        self.latest = Latest(for_processor() if options is None else options)
        self.compiled_update = torch.compile(self._update, fullgraph=True, dynamic=False, backend=self.latest)
        self.drawing = drawing_on(None if agent.spec.problem is None else agent.device)  # of contexts
        # of rounds of several updates, by `improve`: the latest tested call, and the one that repeated the call before it
        self.before: dict[bool, Call | None] = {}
        self.calls: dict[bool, Call] = {}

    @property
    def compiled(self) -> int:
        return self.latest.compiled

    def pieces(self, improves: Sequence[bool], acts: bool) -> list[Pattern]:
        return [((improve,), acts and len(improves) == 1) for improve in improves]

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        if len(improves) == 1:  # the usual round, all of it one graph
            found = Round(*self.graph(improves[0], x, h))
            self.latest.take()
            return found
        metrics: Metrics = {}
        tested: set[bool] = set()
        last = {improve: number for number, improve in enumerate(improves)}
        for number, improve in enumerate(improves):
            if improve in tested & self.calls.keys() and number != last[improve]:
                self.calls[improve]()
            else:
                metrics |= self._tested(improve)
                tested.add(improve)
        return Round(metrics, *acted(self.agent, x, h))

    def graph(self, improve: bool, x: Tensor | None, h: Carry) -> tuple[Metrics, Tensor | None, Carry]:
        """One update, and the next action, compiled."""
        with self.drawing:
            found: tuple[Metrics, Tensor | None, Carry] = self.compiled_update(improve, x, h)
        return found

    def _tested(self, improve: bool) -> Metrics:
        """One update, by way of the guards."""
        metrics = self.graph(improve, None, ())[0]
        call, before = self.latest.take(), self.before.get(improve)
        self.before[improve] = call
        if call is not None and call.same(before):
            self.calls[improve] = call
        else:
            self.calls.pop(improve, None)
        return metrics

    def _update(self, improve: bool, x: Tensor | None, h: Carry) -> tuple[Metrics, Tensor | None, Carry]:
        return self.agent.update_from(self.sample, improve), *acted(self.agent, x, h)


class RecordedRound(NamedTuple):
    """A captured round, and the memory that it reads and writes."""

    launch: Callable[[], None]
    buffers: Carry  # of x and h; empty where nobody acts
    found: Round


class CudaGraph:
    """Rounds as CUDA graphs of at most `PIECE` updates, one for each pattern: nothing of them is launched by Python.

    Parameters, replay and random state are where the graph found them; x and h are copied into buffers of their own. What a
    round returns is memory of its graph, which the next round of this pattern overwrites: metrics are always the latest.

    Args:
        rounds: what is captured: eager rounds, or compiled ones, whose elementwise work is fused into few kernels.
    """

    def __init__(self, rounds: Eager | Compiled) -> None:
        self.rounds = rounds
        self.about = f"{rounds.about} in a CUDA graph"
        self.beginning = f"recording updates, {self.about} ..."
        self.graphs: dict[Pattern, RecordedRound] = {}

    @property
    def compiled(self) -> int:
        return self.rounds.compiled

    def pieces(self, improves: Sequence[bool], acts: bool) -> list[Pattern]:
        parts = [tuple(improves[begin : begin + PIECE]) for begin in range(0, len(improves), PIECE)] or [()]
        return [*((part, False) for part in parts[:-1]), (parts[-1], acts)]

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        metrics: Metrics = {}
        *before, (last, _) = self.pieces(improves, x is not None)
        for part, _ in before:
            metrics |= self._replayed(part, None, ()).metrics
        found = self._replayed(last, x, h)
        return found._replace(metrics=metrics | found.metrics)

    def _replayed(self, improves: tuple[bool, ...], x: Tensor | None, h: Carry) -> Round:
        pattern = improves, x is not None
        if pattern not in self.graphs:
            self.graphs[pattern] = self._record(improves, x, h)
        launch, buffers, found = self.graphs[pattern]
        if x is not None:
            for buffer, value in zip(buffers, (x, *h), strict=True):
                buffer.copy_(value)
        launch()
        return found if x is not None else found._replace(h=h)

    def _record(self, improves: tuple[bool, ...], x: Tensor | None, h: Carry) -> RecordedRound:
        before = AgentSnapshot(self.rounds.agent)
        buffers = () if x is None else tuple(value.clone() for value in (x, *h))
        x_buffer, h_buffers = (buffers[0], buffers[1:]) if buffers else (None, ())
        work = functools.partial(self.rounds, improves, x_buffer, h_buffers)
        launch, found = record(work, self.rounds.agent.device, before.restore, tries=3)
        return RecordedRound(launch, buffers, found)


class AgentSnapshot:
    """A snapshot of an agent's state and of the random generators.

    Args:
        agent: whose state is copied, on its device.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent, self.drawn = agent, Drawn(agent.device)
        self.tensors = {name: tensor.clone() for name, tensor in agent.state_dict().items()}

    def restore(self) -> None:
        """Restore everything, in the same memory."""
        self.agent.load_state_dict(self.tensors)
        self.drawn.restore()
