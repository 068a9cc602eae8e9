"""Rounds of updates, run eagerly or captured as one graph. N environments · d = x_dim

A round follows one step of the environments: an update for each entry of `improves`, with or without `improve`, and then
exploring actions for the present contexts x (N, d), if the agent acts (x is not None); h is its carry, before and after that.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.agent import Agent
from rlamort.objective import Metrics
from rlamort.run.track import say
from rlamort.source import Batch, Contexts, Labelled

Sampler = Callable[[], Batch | Contexts | Labelled]
Pattern = tuple[tuple[bool, ...], bool]  # the `improves` of a round, and whether the agent acts after it
MANY = 8  # graphs of one agent: there are up to four, with and without `improve` and an action


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
            "size_asserts": False,  # the guards have seen to shapes and strides, and most of the time is in small kernels
            "cpp.dynamic_threads": True,  # as many threads as torch has when it runs, not when it was compiled
            # What is compiled for one thread leaves scalars unguarded against a second one, and torch's cache does not tell
            # the two apart: what was compiled with one thread would do every scalar's step twice with two.
            "cpp.threads": max(2, torch.get_num_threads()),
        }
        self.latest = Latest(options)
        self.graph = torch.compile(self._update, fullgraph=True, dynamic=False, backend=self.latest)
        # of rounds of several updates, by `improve`: the latest tested call, and the one that repeated the call before it
        self.before: dict[bool, Call | None] = {}
        self.calls: dict[bool, Call] = {}

    @staticmethod
    def patterns(improves: Sequence[bool], acts: bool) -> set[Pattern]:
        """The graphs of such a round."""
        return {((improve,), acts and len(improves) == 1) for improve in improves}

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
        return Round(metrics, *_next(self.agent, x, h))

    def _tested(self, improve: bool) -> Metrics:
        """One update, by way of the guards."""
        metrics: Metrics = self.graph(improve, None, ())[0]
        call, before = self.latest.take(), self.before.get(improve)
        self.before[improve] = call
        if call is not None and call.same(before):
            self.calls[improve] = call
        else:
            self.calls.pop(improve, None)
        return metrics

    def _update(self, improve: bool, x: Tensor | None, h: Carry) -> tuple[Metrics, Tensor | None, Carry]:
        return self.agent.update_from(self.sample, improve), *_next(self.agent, x, h)


def _next(agent: Agent, x: Tensor | None, h: Carry) -> tuple[Tensor | None, Carry]:
    """The agent's next actions, and its carry after them."""
    with torch.no_grad():
        return (None, h) if x is None else agent.play(x, h, explore=True)


class CudaGraph:
    """A whole round as one CUDA graph for each pattern of `improves`: nothing of it is launched by Python.

    Parameters, replay and random state are where the graph found them; x and h are copied into buffers of their own.
    """

    beginning = "recording updates as a CUDA graph ..."

    @staticmethod
    def patterns(improves: Sequence[bool], acts: bool) -> set[Pattern]:
        """The graphs of such a round."""
        return {(tuple(improves), acts)}

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.eager = Eager(agent, sample)
        self.graphs: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, Carry, Round]] = {}

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        pattern = tuple(improves)
        if pattern not in self.graphs:
            self.graphs[pattern] = self._record(pattern, x, h)
        graph, buffers, found = self.graphs[pattern]
        if x is not None:
            for buffer, value in zip(buffers, (x, *h), strict=True):
                buffer.copy_(value)
        graph.replay()
        y = None if found.y is None else found.y.clone()
        metrics = {name: value.clone() for name, value in found.metrics.items()}
        return Round(metrics, y, h if x is None else tuple(part.clone() for part in found.h))

    def _record(self, pattern: tuple[bool, ...], x: Tensor | None, h: Carry) -> tuple[torch.cuda.CUDAGraph, Carry, Round]:
        before = AgentSnapshot(self.eager.agent)
        buffers = () if x is None else tuple(value.clone() for value in (x, *h))
        x_buffer, h_buffers = (buffers[0], buffers[1:]) if buffers else (None, ())
        device = self.eager.agent.device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what libraries allocate at first use must be there before recording
            for _ in range(3):
                self.eager(pattern, x_buffer, h_buffers)
        torch.cuda.current_stream(device).wait_stream(aside)
        before.restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.eager(pattern, x_buffer, h_buffers)
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
        self.restore_random()

    def restore_random(self) -> None:
        """Restore the random generators alone."""
        torch.set_rng_state(self.random)
        if self.random_on_device is not None:
            torch.cuda.set_rng_state(self.random_on_device, self.device)


class Captured:
    """Rounds by `Compiled` or, on a GPU, by `CudaGraph`, each pattern verified against eager execution at its first use.

    Where capturing fails, or the two differ, rounds go on eager, with one warning, as if they had been eager from the start.

    Args:
        agent: what is updated.
        sample: gives a batch.
    """

    def __init__(self, agent: Agent, sample: Sampler) -> None:
        self.agent, self.sample = agent, sample
        kind = CudaGraph if agent.device.type == "cuda" else Compiled
        self.beginning = kind.beginning
        self.rounds: Eager | Compiled | CudaGraph = kind(agent, sample)
        self.patterns = kind.patterns
        self.proved: set[Pattern] = set()

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> Round:
        if isinstance(self.rounds, Compiled) and self.rounds.latest.compiled > MANY:
            self._give_up("Python values that it reads change from update to update, and each would be compiled anew")
        whole, patterns = (tuple(improves), x is not None), self.patterns(improves, x is not None)
        if isinstance(self.rounds, Eager) or patterns <= self.proved:
            return self.rounds(improves, x, h)
        if whole in patterns:
            return self._verified(improves, x, h)
        first, rest = self(improves[:1], None), self(improves[1:], x, h)  # graphs of one update: one of them, and then more
        return rest._replace(metrics=first.metrics | rest.metrics)

    def _verified(self, improves: Sequence[bool], x: Tensor | None, h: Carry) -> Round:
        """A round whose pattern is new, beside the eager one from the same state."""
        say.get()(self.beginning)
        before, twin = AgentSnapshot(self.agent), copy.deepcopy(self.agent)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Dynamo does not know")  # it is said below
                found = self.rounds(improves, x, h)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            self._give_up(_reason(error))
            before.restore()
            return self.rounds(improves, x, h)
        after = AgentSnapshot(self.agent)
        before.restore_random()
        eager = Eager(twin, self.sample)(improves, x, h)
        ours, theirs = named(found, self.agent), named(eager, twin)
        differing = [name for name in theirs if not close(ours[name], theirs[name])]
        if not differing:
            after.restore_random()
            self.proved.add((tuple(improves), x is not None))
            return found
        self._give_up(f"its first update differs from the uncompiled one in {', '.join(differing[:3])}")
        self.agent.load_state_dict(twin.state_dict())
        return eager

    def _give_up(self, reason: str) -> None:
        what = type(self.agent if self.agent.spec.problem is None else self.agent.spec.problem).__name__
        warnings.warn(f"compile: it failed for {what}, so updates go on uncompiled ({reason})", stacklevel=5)
        self.rounds = Eager(self.agent, self.sample)


def _reason(error: Exception) -> str:
    """Why capturing failed, in one sentence, with the line of a user's that torch names."""
    message, _, code = str(getattr(error, "inner_exception", error)).partition("from user code:")
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    at = [number for number, line in enumerate(lines) if line.startswith("File ")]
    where = f", at {lines[at[-1] + 1]}" if at and at[-1] + 1 < len(lines) else ""
    return f"{message.strip().splitlines()[0]}{where}"


def named(found: Round, agent: Agent) -> Mapping[str, Tensor]:
    """All tensors that a round returns or changes, by name."""
    acted = {} if found.y is None else {"y": found.y, **{f"h[{i}]": part for i, part in enumerate(found.h)}}
    return {**found.metrics, **agent.state_dict(), **acted}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than the rounding of float32 arithmetic in another order.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size.
    """
    return bool((one - other).double().norm() <= 1e-2 * other.double().norm() + 1e-5)
