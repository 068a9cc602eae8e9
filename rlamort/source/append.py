"""Transitions written into a ring: in place on a CPU; on a GPU from one row of pinned memory, by one copy and one launch.

N rows of environments · k of them with a transition · d = x_dim · n = dim of an action
"""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; of the parts of a row


class Slots(NamedTuple):
    """Where transitions of k rows go, as flat indices (k,)."""

    at: np.ndarray
    successor: np.ndarray
    before: np.ndarray  # what the transition continues; `at` where it begins an episode
    entry: np.ndarray  # of the FIFO of starts
    head: np.ndarray  # what is entered there: the slot within its row


class InPlace:
    """Writes through NumPy's views of tensors on the CPU, which is fast for small assignments.

    Args:
        ring: the ring's tensors by name: x, y, reward, terminated, stop, starts.
    """

    def __init__(self, ring: Mapping[str, Tensor]) -> None:
        self.cells = {name: tensor.numpy() for name, tensor in ring.items()}

    def __call__(
        self, slots: Slots, x: Tensor, y: Tensor, reward: Tensor, x_next: Tensor, terminated: np.ndarray, fifo: np.ndarray
    ) -> None:
        """Write the transitions (k, ...) of k rows. `fifo` is the memory that the device reads."""
        cells, at = self.cells, slots.at
        cells["stop"][slots.before] = False
        cells["x"][at] = x.numpy()
        cells["y"][at] = y.numpy()
        cells["reward"][at] = reward.numpy()
        cells["terminated"][at] = terminated
        cells["stop"][at] = True
        cells["x"][slots.successor] = x_next.numpy()
        cells["starts"][slots.entry] = slots.head


class InOneCopy:
    """Flags, indices and the FIFO's bookkeeping cross in one copy; a launch puts them and a step's tensors in their places.

    The row is pinned memory, so that nothing waits for the copy. There are two, in turn, and one is written only when its copy
    is over. Where every row has a transition, which is the usual case, what follows the copy is one CUDA graph.

    Args:
        ring: the ring's tensors by name, on the device: x, y, reward, terminated, stop, starts.
        fifo: (2, N) on the device, the FIFO's bookkeeping.
    """

    def __init__(self, ring: Mapping[str, Tensor], fifo: Tensor) -> None:
        self.ring, self.fifo, self.device = ring, fifo, fifo.device
        rows = fifo.shape[1]
        dtypes = {
            **dict.fromkeys(("at", "successor", "before", "entry", "first", "size"), torch.int64),
            "head": torch.int32,
            **dict.fromkeys(("terminated", "begins"), torch.bool),
        }
        sizes = [-(-rows * dtype.itemsize // ALIGNMENT) * ALIGNMENT for dtype in dtypes.values()]
        starts = list(itertools.accumulate(sizes, initial=0))

        def parts(row: Tensor) -> dict[str, Tensor]:
            cut = zip(dtypes.items(), starts[:-1], strict=True)
            return {name: row[start : start + rows * dtype.itemsize].view(dtype) for (name, dtype), start in cut}

        on_gpu = self.device.type == "cuda"
        self.pinned = [torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.here = [{name: part.numpy() for name, part in parts(row).items()} for row in self.pinned]
        self.copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]
        self.turn = 0
        self.row = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self.there = parts(self.row)
        # the tensors of a step are copied to where the graph finds them
        like = {**{name: ring[name] for name in ("x", "y", "reward")}, "x_next": ring["x"]}
        self.step = {name: torch.empty_like(tensor[:rows]) for name, tensor in like.items()}
        self.launch: Callable[[], None] | None = None

    def __call__(
        self, slots: Slots, x: Tensor, y: Tensor, reward: Tensor, x_next: Tensor, terminated: np.ndarray, fifo: np.ndarray
    ) -> None:
        """Write the transitions (k, ...) of k rows, and the FIFO's bookkeeping (2, N)."""
        self.turn = 1 - self.turn
        here, count, rows = self.here[self.turn], len(slots.at), fifo.shape[1]
        if self.copied:
            self.copied[self.turn].synchronize()
        for name, values in (*slots._asdict().items(), ("terminated", terminated), ("begins", slots.before == slots.at)):
            here[name][:count] = values
        here["first"][:], here["size"][:] = fifo
        self.row.copy_(self.pinned[self.turn], non_blocking=True)
        if self.copied:
            self.copied[self.turn].record()
        for name, tensor in (("x", x), ("y", y), ("reward", reward), ("x_next", x_next)):
            self.step[name][:count].copy_(tensor, non_blocking=True)
        if count < rows:
            self._scatter(count)
            return
        if self.launch is None:
            self.launch = captured(lambda: self._scatter(rows), self.device)
        self.launch()

    def _scatter(self, count: int) -> None:
        """Put the first `count` rows of what has crossed where they belong. The order is that of `InPlace`."""
        ring, there = self.ring, {name: part[:count] for name, part in self.there.items()}
        step = {name: part[:count] for name, part in self.step.items()}
        # an index may occur twice only with the same value: where nothing is continued, `before` is `at`
        ring["stop"].index_copy_(0, there["before"], there["begins"])
        ring["stop"].index_fill_(0, there["at"], True)
        for name in ("x", "y", "reward"):
            ring[name].index_copy_(0, there["at"], step[name])
        ring["terminated"].index_copy_(0, there["at"], there["terminated"])
        ring["x"].index_copy_(0, there["successor"], step["x_next"])
        ring["starts"].index_copy_(0, there["entry"], there["head"])
        self.fifo[0].copy_(self.there["first"])
        self.fifo[1].copy_(self.there["size"])


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work`, which may be repeated and reads and writes tensors that stay where they are: on a GPU as one launch."""
    if device.type != "cuda":
        return work
    try:
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what is allocated at first use must be there before recording
            work()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            work()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"replay: its writes go on one by one, since they could not be captured ({reason})", stacklevel=2)
        return work
    return graph.replay  # type: ignore[no-any-return]
