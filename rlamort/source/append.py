"""Transitions written into a ring: in place on a CPU; on a GPU from one row of pinned memory, by one copy and one launch.

N rows of environments · k of them with a transition · d = x_dim · n = dim of an action
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlamort.host.graphs import record

ALIGNMENT = 16  # bytes; of the parts of a row


class Slots(NamedTuple):
    """Where transitions of k rows go, as flat indices (k,)."""

    at: np.ndarray
    successor: np.ndarray
    before: np.ndarray  # what the transition continues; `at` where it begins an episode
    entry: np.ndarray  # of the FIFO of starts
    head: np.ndarray  # what is entered there: the slot within its row


class Stored(NamedTuple):
    """Transitions of k rows, and the contexts that follow."""

    x: Tensor  # (k, d)
    y: Tensor  # (k, n)
    reward: Tensor  # (k,)
    x_next: Tensor  # (k, d)
    waiting: Tensor  # (N, d), those to act on now


class InPlace:
    """Writes through NumPy's views of tensors on the CPU, which is fast for small assignments.

    Args:
        ring: the ring's tensors by name: x, y, reward, terminated, stop, starts.
    """

    def __init__(self, ring: Mapping[str, Tensor]) -> None:
        self.cells = {name: tensor.numpy() for name, tensor in ring.items()}

    def __call__(self, slots: Slots, stored: Stored, terminated: np.ndarray, fifo: np.ndarray) -> None:
        """Write transitions of k rows. `fifo` is the memory that the device reads."""
        cells, at = self.cells, slots.at
        cells["stop"][slots.before] = False
        cells["x"][at] = stored.x.numpy()
        cells["y"][at] = stored.y.numpy()
        cells["reward"][at] = stored.reward.numpy()
        cells["terminated"][at] = terminated
        cells["stop"][at] = True
        cells["x"][slots.successor] = stored.x_next.numpy()
        cells["starts"][slots.entry] = slots.head

    def on_device(self, x: Tensor) -> Tensor:
        """The contexts x (N, d) themselves."""
        return x


class InOneCopy:
    """A step, its flags and indices, and the FIFO's bookkeeping cross in one copy; one launch puts them in their places.

    The row is pinned memory, so that nothing waits for the copy. There are two, in turn, and one is written only when its copy
    is over. Where every row has a transition, which is the usual case, what follows the copy is one CUDA graph. Steps of
    environments that are on the device themselves do not cross.

    Args:
        ring: the ring's tensors by name, on the device: x, y, reward, terminated, stop, starts.
        fifo: (2, N) on the device, the FIFO's bookkeeping.
        place: where steps are: the device, or the CPU.
    """

    def __init__(self, ring: Mapping[str, Tensor], fifo: Tensor, place: torch.device) -> None:
        self.ring, self.fifo, self.device, self.crosses = ring, fifo, fifo.device, place.type == "cpu"
        rows = fifo.shape[1]
        step = {**{name: ring[name] for name in ("x", "y", "reward")}, "x_next": ring["x"], "waiting": ring["x"]}
        like = {name: tensor[:rows] for name, tensor in step.items()}
        shapes: dict[str, tuple[torch.dtype, Any]] = {
            "slots": (torch.int64, (len(Slots._fields), rows)),
            "fifo": (torch.int64, (2, rows)),
            **dict.fromkeys(("terminated", "begins"), (torch.bool, (rows,))),
            **({name: (part.dtype, part.shape) for name, part in like.items()} if self.crosses else {}),
        }
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in shapes.items()}
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()), initial=0))

        def parts(row: Tensor) -> dict[str, Tensor]:
            cut = zip(shapes.items(), sizes.values(), starts[:-1], strict=True)
            return {name: row[at : at + size].view(dtype).view(shape) for (name, (dtype, shape)), size, at in cut}

        on_gpu = self.device.type == "cuda"
        self.pinned = [torch.empty(starts[-1], dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.here = [{name: part.numpy() for name, part in parts(row).items()} for row in self.pinned]
        self.copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]
        self.turn = 0
        self.row = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)
        there = {name: torch.empty_like(part) for name, part in like.items()} | parts(self.row)
        self.there = there | dict(zip(Slots._fields, there["slots"].unbind(), strict=True))
        self.crossed: Tensor | None = None  # the contexts that wait, as they were given
        self.launch: Callable[[], None] | None = None

    def __call__(self, slots: Slots, stored: Stored, terminated: np.ndarray, fifo: np.ndarray) -> None:
        """Write transitions of k rows, and the FIFO's bookkeeping (2, N)."""
        self.turn = 1 - self.turn
        here, count, rows = self.here[self.turn], len(slots.at), fifo.shape[1]
        if self.copied:
            self.copied[self.turn].synchronize()
        here["slots"][:, :count] = slots
        here["terminated"][:count] = terminated
        np.equal(slots.before, slots.at, out=here["begins"][:count])
        here["fifo"][...] = fifo
        if self.crosses:
            for name, tensor in zip(Stored._fields[:-1], stored[:-1], strict=True):
                here[name][:count] = tensor.numpy()
            here["waiting"][...] = stored.waiting.numpy()
            self.crossed = stored.waiting
        self.row.copy_(self.pinned[self.turn], non_blocking=True)
        if self.copied:
            self.copied[self.turn].record()
        if not self.crosses:
            for name, tensor in zip(Stored._fields[:-1], stored[:-1], strict=True):
                self.there[name][:count].copy_(tensor)
        if count < rows:
            self._scatter(count)
            return
        if self.launch is None:
            self.launch = captured(lambda: self._scatter(rows), self.device)
        self.launch()

    def on_device(self, x: Tensor) -> Tensor:
        """The contexts x (N, d) that wait, on the device; where they have crossed, until the next step crosses."""
        return self.there["waiting"] if x is self.crossed else x.to(self.device)

    def _scatter(self, count: int) -> None:
        """Put the first `count` rows of what has crossed where they belong. The order is that of `InPlace`."""
        ring = self.ring
        there = {name: part[:count] for name, part in self.there.items() if name not in ("slots", "fifo")}
        # an index may occur twice only with the same value: where nothing is continued, `before` is `at`
        ring["stop"].index_copy_(0, there["before"], there["begins"])
        ring["stop"].index_fill_(0, there["at"], True)
        for name in ("x", "y", "reward"):
            ring[name].index_copy_(0, there["at"], there[name])
        ring["terminated"].index_copy_(0, there["at"], there["terminated"])
        ring["x"].index_copy_(0, there["successor"], there["x_next"])
        ring["starts"].index_copy_(0, there["entry"], there["head"].int())
        self.fifo.copy_(self.there["fifo"])


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work`, which may be repeated and reads and writes tensors that stay where they are: on a GPU as one launch."""
    if device.type != "cuda":
        return work
    try:
        launch, _ = record(work, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"replay: its writes go on one by one, since they could not be captured ({reason})", stacklevel=2)
        return work
    return launch
