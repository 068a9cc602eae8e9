"""A ring of transitions, on the training device.

N rows of environments · T slots a row · B batch · d = x_dim · n = dim of an action · m steps in an n-step return
"""

from collections.abc import Callable, Iterable

import numpy as np
import psutil
import torch
from torch import Tensor

from rlamort.config import Count, Fixed, Fraction
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.source.append import InOneCopy, InPlace, Slots, Stored
from rlamort.source.base import Batch, Collected, Tree
from rlamort.source.scale import SCALES, Scaled

BOOKS = ("written", "first", "size", "follows")
FRAME = ("x", "y", "reward", "terminated", "stop")


class Replay:
    """A ring of the latest transitions on the training device, observations stored once.

    Each environment row has a ring of T slots; a slot is a frame: x, and the y and reward that followed. The successor of
    a frame is the next slot, so an episode of L steps takes L + 1 slots, the last of which begins no transition. `starts`
    lists the slots that begin one, oldest first, which makes uniform sampling exact and its shapes fixed.

    Args:
        env: where transitions come from.
        buffer_size: frames kept, over all rows; the oldest are overwritten.
        n_step: steps in a return before it bootstraps.
        discount: per step, inside those returns.
        reward_scale: divides sampled rewards; return by the standard deviation of the running discounted return, bounded also
            by no less than a fifth of its largest size so far. Statistics are kept in checkpoints.

    Raises:
        UserError: the ring does not fit into memory (computed before it is allocated), or is smaller than a few steps.
    """

    resumable = True
    unsupported = ("dtype",)  # frames are float32

    def __init__(
        self,
        env: Env,
        *,
        buffer_size: Count = 1_000_000,
        n_step: Count = 1,
        discount: Fraction = 0.99,
        reward_scale: Fixed[Scaled] = "none",
    ) -> None:
        rows, slots = env.count, buffer_size // env.count
        if slots < n_step + 3:
            raise UserError(
                f"buffer_size={buffer_size}: {slots} frames for each of {rows} environments; "
                f"at least {(n_step + 3) * rows} are needed"
            )
        d, n, device = env.spec.x_dim, env.domain.dim, env.device
        check_memory(rows * slots, d, n, device)
        self.env, self.n_step, self.discount = env, n_step, discount
        self.rows, self.slots, self.device = rows, slots, device
        # flat over (row, slot): one index, one gather
        self.x = torch.empty(rows * slots, d, device=device)
        self.y = torch.empty(rows * slots, n, device=device)
        self.reward = torch.empty(rows * slots, device=device)
        self.terminated = torch.empty(rows * slots, dtype=torch.bool, device=device)
        self.stop = torch.empty(rows * slots, dtype=torch.bool, device=device)  # nothing follows this transition (yet)
        self.starts = torch.empty(rows * slots, dtype=torch.int32, device=device)  # a FIFO of slots per row
        # bookkeeping, on the host, where the flags are
        self.base = np.arange(rows) * slots  # where each row begins
        self.written = np.zeros(rows, dtype=np.int64)  # slots used so far; modulo slots, the one that x goes to next
        self.fifo = np.zeros((2, rows), dtype=np.int64)
        self.first, self.size = self.fifo  # the oldest entry of the FIFO, and its length: transitions that can be sampled
        self.fifo_on_device = torch.from_numpy(self.fifo).to(device)  # what `sample` reads; on a CPU, the same memory
        self.follows = np.zeros(rows, dtype=bool)  # the slot before is an earlier step of the same episode
        self.opened = np.zeros(rows, dtype=np.int64)  # episodes begun so far
        self.begins = np.zeros((rows, slots), dtype=bool)
        self._begins = self.begins.reshape(-1)  # the same memory, flat
        self.collected = 0
        self.scale = SCALES[reward_scale](env, discount)
        ring = {name: getattr(self, name) for name in (*FRAME, "starts")}
        self.write = InPlace(ring) if device.type == "cpu" else InOneCopy(ring, self.fifo_on_device, env.place)

    def __len__(self) -> int:
        return int(self.size.sum())

    @property
    def waiting(self) -> Tensor:
        """(N, d), the contexts to act on now, on the training device."""
        return self.write.on_device(self.env.x)

    def prepare(self) -> None:
        """Nothing: transitions come from playing."""

    def collect(self, choose: Callable[[], Tensor], most: int = 1) -> Collected:
        """Take the chosen actions y (N, n), one step in every environment, and store the transitions."""
        x, y = self.env.x, choose().to(self.env.place)
        step = self.env.step(y)
        self.add(x, y, step.reward, step.x_next, step.terminated, step.truncated, step.valid)
        self.scale.update(step.reward, step.valid, step.over)
        transitions = int(np.count_nonzero(step.valid))
        self.collected += transitions
        return Collected(x, transitions, self.env.episodes(), step.over)

    def add(
        self,
        x: Tensor,
        y: Tensor,
        reward: Tensor,
        x_next: Tensor,
        terminated: np.ndarray,
        truncated: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Store one transition of every valid environment; shapes and place as in `Step`. An invalid one ends its episode."""
        rows: slice | np.ndarray = slice(None)
        if not valid.all():
            rows = np.flatnonzero(valid)
            self.written += self.follows & ~valid
            self.follows &= valid
            keep = torch.from_numpy(valid).to(x.device)
            x, y, reward, x_next = x[keep], y[keep], reward[keep], x_next[keep]
            terminated, truncated = terminated[valid], truncated[valid]
        head = self.written[rows] % self.slots
        base, after = self.base[rows], (head + 1) % self.slots
        at, follows = base + head, self.follows[rows]
        if self.written.max() + 2 > self.slots:  # these slots may hold something, which is overwritten
            self._expire(rows, at, base + after)
        before = base + (head - follows) % self.slots
        slots = Slots(at, base + after, before, base + (self.first[rows] + self.size[rows]) % self.slots, head)
        ended = terminated | truncated
        self._begins[at] = True
        self.opened[rows] += ~follows
        self.follows[rows] = ~ended
        self.written[rows] += 1 + ended
        self.size[rows] += 1
        self.write(slots, Stored(x, y, reward, x_next, self.env.x), terminated, self.fifo)

    def sample(self, count: int) -> Batch:
        """`count` transitions, uniformly and with replacement. It reads only tensors, so that it can be captured in a graph."""
        return self._from(*self._draw(count), self.n_step)

    def everything(self, n_step: int | None = None) -> Batch:
        """All stored transitions, oldest first, environment by environment; of `n_step` steps, or as many as samples have."""
        return self._from(*self._stored(self.size), n_step or self.n_step)

    def episodes(self) -> Tensor:
        """The number of the episode of each transition of `everything` (B,), for ever: k N + i of row i's k-th, from 0."""
        base, _, before = self._runs(None)
        row, opened = base // self.slots, torch.from_numpy(self.opened).to(self.device)
        # a row loses its oldest alone, so its newest is the last that it has begun
        k = (before == 0).cumsum(0) - 1 + (opened - self._kept().cumsum(0))[row]
        return k * self.rows + row

    def _kept(self) -> Tensor:
        """How many episodes are stored of each row (N,)."""
        base, _, before = self._runs(None)
        return torch.bincount(base[before == 0] // self.slots, minlength=self.rows)

    def later(self, collected: int) -> Tensor:
        """Whether each of `everything` (B,) came after the first `collected` transitions, which rows share equally."""
        many = torch.from_numpy(self.size).to(self.device)
        left = torch.repeat_interleave(many.cumsum(0), many) - torch.arange(int(self.size.sum()), device=self.device)
        return left <= -(-(self.collected - collected) // self.rows)  # counted from the newest of a row, which is 1

    def sequences(self, count: int, length: int, latest: int | None = None) -> Batch:
        """`count` sequences of `length` consecutive transitions of one episode, uniformly and with replacement.

        Their transitions are of one step each, whatever `n_step` is. How many sequences there are is counted at every call, so
        this is for `Agent.fit` and not for a captured graph.

        Args:
            count: C.
            length: L.
            latest: take only the latest so many transitions of each environment; None takes all.

        Returns:
            A batch whose tensors have the leading axes (C, L).

        Raises:
            UserError: no episode has so many stored.
        """
        base, slot, before = self._runs(latest)
        ends = (before >= length - 1).nonzero()[:, 0]
        if not len(ends):
            raise UserError(
                f"Replay.sequences: length={length} is given; of its {len(before)} transitions at most {self.longest(latest)} "
                "follow each other in one episode, and no longer sequence is stored"
            )
        end = ends[torch.randint(len(ends), (count,), device=self.device)]
        steps = torch.arange(1 - length, 1, device=self.device)
        slots = (slot[end][:, None] + steps) % self.slots  # (C, L)
        flat = self._from(base[end].repeat_interleave(length), slots.flatten(), n_step=1)
        return Batch(*(part.view(count, length, *part.shape[1:]) for part in flat))

    def longest(self, latest: int | None = None) -> int:
        """The length of the longest sequence that `sequences` can return; 0 if the replay is empty."""
        before = self._runs(latest)[2]
        return int(before.max()) + 1 if len(before) else 0

    def begun(self) -> Tensor:
        """The first contexts (E, d) of the episodes that are stored, also of one whose own beginning was overwritten."""
        base, slot, before = self._runs(None)
        return self.x[(base + slot)[before == 0]]

    def _stored(self, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of each row's `counts` latest transitions, where the row begins and the slot in it, oldest first, row by row."""
        first, many = (
            torch.from_numpy(self.first + self.size - counts).to(self.device),
            torch.from_numpy(counts).to(self.device),
        )
        base = torch.repeat_interleave(torch.arange(self.rows, device=self.device) * self.slots, many)
        entry = torch.repeat_interleave(first - (many.cumsum(0) - many), many) + torch.arange(len(base), device=self.device)
        return base, self.starts[base + entry % self.slots].long()

    def _runs(self, latest: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `_stored`, and how many transitions of the same episode are right before each."""
        base, slot = self._stored(self.size if latest is None else np.minimum(self.size, latest))
        at = torch.arange(len(base), device=self.device)
        begins = torch.ones_like(base, dtype=torch.bool)  # an episode's end, or one that was cut off, leaves a slot out
        begins[1:] = (base[1:] != base[:-1]) | ((slot[1:] - slot[:-1]) % self.slots != 1)
        return base, slot, at - torch.where(begins, at, 0).cummax(0).values if len(at) else at

    def _from(self, base: Tensor, slot: Tensor, n_step: int) -> Batch:
        """The transitions of `n_step` steps that begin at slots (B,) of the rows that begin at `base` (B,), rewards scaled."""
        start = base + slot
        reward, end, length = self.reward[start], slot, torch.ones_like(slot)
        for k in range(1, n_step):
            going = ~self.stop[base + end]
            end = torch.where(going, (end + 1) % self.slots, end)
            reward = reward + torch.where(going, self.discount**k * self.reward[base + end], 0.0)
            length = length + going
        return Batch(
            self.x[start],
            self.y[start],
            self.scale(reward),
            self.discount**length,
            self.terminated[base + end],
            self.x[base + (end + 1) % self.slots],
        )

    def state(self) -> Tree:
        """Everything but the frames."""
        counters = {name: getattr(self, name) for name in (*BOOKS, "opened")}
        return {**counters, "collected": self.collected, "scale": self.scale.state(), "env": self.env.state()}

    def restore(self, state: Tree, frames: Iterable[Tree]) -> bool:
        """Restore what `state` and successive calls of `frames_since` returned; returns whether the environment continues too.

        Raises:
            ValueError: they do not fit this ring.
        """
        for name in BOOKS:
            if state[name].shape != (self.rows,):
                raise ValueError(f"replay {name}: shape {state[name].shape}; ({self.rows},) is needed")
            getattr(self, name)[:] = state[name]
        self.collected = int(state["collected"])
        for part in frames:
            self._put_back(part)
        for row in range(self.rows):
            oldest = max(0, int(self.written[row]) - self.slots)
            slots = np.arange(oldest, int(self.written[row])) % self.slots
            slots = slots[self.begins[row, slots]]
            if len(slots) != self.size[row]:
                raise ValueError(f"replay row {row}: {len(slots)} transitions found; {self.size[row]} are needed")
            entries = (self.first[row] + np.arange(len(slots))) % self.slots
            self.starts[self._flat(np.full(len(slots), row), entries)] = torch.from_numpy(slots.astype(np.int32)).to(
                self.device
            )
        self._publish()
        # older checkpoints have none: what they hold is numbered from the oldest, as it was then
        self.opened[:] = state["opened"] if "opened" in state else self._kept().numpy(force=True)
        self.scale.restore(state.get("scale", {}))  # older checkpoints have none
        exact = self.env.restore(state["env"])
        if not exact:  # the episode that was going on ends here, as a truncated one
            self.scale.cut()
            self.written += self.follows
            self.follows[:] = False
        return exact

    def frames_since(self, written: np.ndarray) -> Tree:
        """The slots used since `written` was what `self.written` is now, and the two beside them that have changed."""
        low = np.maximum.reduce([written - 1, self.written + 1 - self.slots, np.zeros_like(written)])
        at, rows, slots = self._range(low, self.written)
        cut = {name: getattr(self, name)[at] for name in FRAME} | {"begins": self.begins[rows, slots]}
        return {"slots": self.slots, "low": low, "high": self.written.copy(), **cut}

    def _range(self, low: np.ndarray, high: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Every row's slots from low to high, both among them: flat, and as rows and slots."""
        rows = np.repeat(np.arange(self.rows), high - low + 1)
        slots = np.concatenate([np.arange(a, b + 1) for a, b in zip(low, high, strict=True)]) % self.slots
        return self._flat(rows, slots), rows, slots

    def _put_back(self, part: Tree) -> None:
        low, high = part["low"], part["high"]
        if low.shape != (self.rows,) or high.shape != (self.rows,) or (high - low >= self.slots).any() or (high < low).any():
            raise ValueError("replay frames: their range is not one of this ring")
        at, rows, slots = self._range(low, high)
        for name in FRAME:
            ours, value = getattr(self, name), part[name]
            if value.shape != (len(at), *ours.shape[1:]) or value.dtype != ours.dtype:
                raise ValueError(f"replay frames: {name} has shape {tuple(value.shape)} and dtype {value.dtype}")
            ours[at] = value.to(self.device)
        self.begins[rows, slots] = part["begins"]

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Of `count` transitions, where their row begins and the slot in it, both (count,)."""
        first, size = self.fifo_on_device
        upto = size if self.rows == 1 else size.cumsum(0)
        # one in 2^62 over the number of transitions: no bias that anything could notice, and no bound read from the host
        k = torch.randint(2**62, (count,), device=self.device) % upto[-1]
        if self.rows == 1:
            return torch.zeros_like(k), self.starts[(first + k) % self.slots].long()
        row = torch.searchsorted(upto, k, right=True)
        base = row * self.slots
        return base, self.starts[base + (first[row] + k - (upto - size)[row]) % self.slots].long()

    def _expire(self, rows: slice | np.ndarray, at: np.ndarray, successor: np.ndarray) -> None:
        """Two slots of each row are overwritten: the transitions that they began, the row's oldest, are gone."""
        gone = self._begins[at].astype(np.int64) + self._begins[successor]
        self.first[rows] = (self.first[rows] + gone) % self.slots
        self.size[rows] -= gone
        self._begins[at] = self._begins[successor] = False

    def _publish(self) -> None:
        """Copy the bookkeeping to the device, for `sample`."""
        if self.device.type != "cpu":
            self.fifo_on_device.copy_(torch.from_numpy(self.fifo))

    def _flat(self, rows: np.ndarray, slots: np.ndarray) -> Tensor:
        return torch.from_numpy(rows * self.slots + slots).to(self.device)


def bytes_per_frame(d: int, n: int) -> int:
    """Bytes of one slot of the ring: x, y, reward in float32, two flags, an index, and a flag on the host."""
    return 4 * (d + n + 1) + 2 + 4 + 1


def check_memory(frames: int, d: int, n: int, device: torch.device) -> None:
    """Raises UserError if a ring of `frames` does not fit into the free memory of `device`."""
    needed = frames * bytes_per_frame(d, n)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        fits = free // bytes_per_frame(d, n)
        raise UserError(
            f"buffer_size={frames}: {frames} frames of {bytes_per_frame(d, n)} bytes are {needed / 2**30:.1f} GiB, "
            f"and {device} has {free / 2**30:.1f} GiB free; at most {fits} fit"
        )
