"""CUDA graphs: work on a GPU that is recorded once, and from then on launched as a whole, without Python in between."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SHAPES = 8  # for which a function is recorded, each with memory of its own; it is called as it is for more


def record(
    work: Callable[[], T], device: torch.device, restore: Callable[[], None] = lambda: None, tries: int = 1
) -> tuple[Callable[[], None], T]:
    """Record `work`, which reads and writes tensors that stay where they are.

    Args:
        work: it neither waits for the GPU nor copies from or to the CPU, unless from pinned memory.
        device: a GPU.
        restore: undoes what `work` changed while it was tried.
        tries: calls before recording, since what is compiled or allocated at first use must be there by then.

    Returns:
        A function that launches it, and its results, in memory that every launch writes anew.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(tries):
            work()
    torch.cuda.current_stream(device).wait_stream(aside)
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        found = work()
    return graph.replay, found


@dataclass(frozen=True)
class Recording:
    """A function as one launch, and the memory that it reads and writes."""

    launch: Callable[[], None]
    given: tuple[Tensor, ...]
    found: tuple[Tensor, ...]

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in zip(self.given, given, strict=True):
            buffer.copy_(value)
        self.launch()
        return tuple(part.clone() for part in self.found)


class Recorded:
    """A function of tensors without gradients: on a GPU a CUDA graph for each of the shapes it meets, elsewhere itself.

    What it reads beside its arguments, such as parameters, must stay where it is. Each graph is verified against the function
    at its first call. Where that fails, the function itself is called, with one warning that says why. It draws the same random
    numbers either way.

    Args:
        function: tensors on one device -> tensors; it may draw random numbers.
        name: for messages.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], name: str) -> None:
        self.function, self.name = function, name
        self.known: dict[tuple[torch.Size, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        if given[0].device.type != "cuda" or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self.function(*given)
        shapes = tuple(part.shape for part in given)
        if shapes not in self.known and len(self.known) < SHAPES:
            return self._verified(shapes, given)
        return self.known.get(shapes, self.function)(*given)

    def _verified(self, shapes: tuple[torch.Size, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results of the function itself, after its graph's, if it has one."""
        device, buffers = given[0].device, tuple(part.clone() for part in given)
        drawn = Drawn(device)
        self.known[shapes] = self.function
        try:
            launch, found = record(lambda: self.function(*buffers), device, drawn.restore)
            recording = Recording(launch, buffers, found)
            ours = recording(*given)
        except RuntimeError as error:
            drawn.restore()
            self._warn(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return self.function(*given)
        drawn.restore()
        theirs = self.function(*given)
        if all(close(one, other) for one, other in zip(ours, theirs, strict=True)):
            self.known[shapes] = recording
        else:
            self._warn("what was recorded gives other results")
        return theirs

    def _warn(self, reason: str) -> None:
        warnings.warn(f"{self.name}: it goes on uncaptured, which is slow on a GPU ({reason})", stacklevel=5)

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which belong to the memory that they were recorded on, and not to a copy's."""
        return {**vars(self), "known": {}}


class Drawn:
    """A snapshot of torch's random generators, of the CPU and of one device.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_cpu = device, torch.get_rng_state()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw again what was drawn since."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than the rounding of float32 arithmetic in another order.

    By norms, since Adam's first step turns a rounding of a vanishing gradient into a step of full size. TF32 moves some of
    SAC's gradients by a hundredth, for which there is room.
    """
    rounding = 5e-2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 1e-2
    return bool((one - other).double().norm() <= rounding * other.double().norm() + 1e-5)
