"""X with dynamics: what an agent acts in. B rows, one environment each · d = x_dim · n = dim of an action"""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.domain import Domain, unit_box
from rlamort.errors import UserError
from rlamort.problem import Problem

Policy = Callable[[Tensor], Tensor]  # x (B, d) -> y (B, n)


class Step(NamedTuple):
    """What B environments answered. Numbers on the training device; flags on the host, where the loop decides by them."""

    x_next: Tensor  # (B, d) the true successor, also where the episode ended
    reward: Tensor  # (B,)
    terminated: np.ndarray  # (B,) bool: the task ended, the future is worth nothing
    truncated: np.ndarray  # (B,) bool: only the clock ran out, the future has a value
    valid: np.ndarray  # (B,) bool: False where the row was merely reset (NEXT_STEP autoreset): no transition

    @property
    def over(self) -> np.ndarray:
        """(B,) bool: what follows belongs to another episode; also where a forgiven fault has ended one."""
        over: np.ndarray = self.terminated | self.truncated | ~self.valid
        return over


class Episode(NamedTuple):
    """One finished episode: undiscounted return, and length in steps."""

    total: float
    length: int


class Space(NamedTuple):
    """A box of observations or actions, as Gymnasium declares it."""

    shape: tuple[int, ...]
    dtype: str
    low: list[float]  # flat; one number where all are equal
    high: list[float]

    @classmethod
    def of(cls, box: gymnasium.spaces.Box) -> Self:
        """What Gymnasium's says, without its random generator."""
        low, high = (np.unique(bound).tolist() if bound.min() == bound.max() else bound.ravel().tolist()
                     for bound in (box.low, box.high))  # fmt: skip
        return cls(box.shape, str(box.dtype), low, high)

    def box(self) -> gymnasium.spaces.Box:
        """As Gymnasium has it."""
        low, high = (np.broadcast_to(bound, self.dim).reshape(self.shape) for bound in (self.low, self.high))
        dtype = np.dtype(self.dtype)
        return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)

    @classmethod
    def flat(cls, low: list[float], high: list[float]) -> Self:
        """Rows of numbers in float32, as native environments have them."""
        return cls((len(low),), "float32", low, high)

    @property
    def dim(self) -> int:
        """How many numbers an element holds."""
        return math.prod(self.shape)

    def facts(self) -> dict[str, Any]:
        """It as JSON, which has no word for infinity."""
        bounds = {name: [x if math.isfinite(x) else str(x) for x in getattr(self, name)] for name in ("low", "high")}
        return {"shape": list(self.shape), "dtype": self.dtype, **bounds}

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Self:
        """What `facts` gave."""
        low, high = ([float(x) for x in facts[name]] for name in ("low", "high"))
        return cls(tuple(facts["shape"]), facts["dtype"], low, high)

    def rows(self, given: Any, what: str) -> tuple[np.ndarray, bool]:
        """One of its elements, or a batch along the first axis -> (B, d) in float32, and whether it is a batch.

        Args:
            given: in the space's own shape, or flat.
            what: it is, for messages.

        Raises:
            ValueError: it has another shape.
        """
        x, d = np.asarray(given, dtype=np.float32), self.dim
        for shape in (self.shape, (d,)):
            if x.shape == shape:
                return x.reshape(1, d), False
            if x.shape[1:] == shape and x.ndim:
                return x.reshape(-1, d), True
        raise ValueError(f"{what}: shape {x.shape} given; {self.shape} or {('batch', *self.shape)} is needed".replace("'", ""))

    def __str__(self) -> str:
        low, high = (np.array2string(np.array(bound), threshold=20) for bound in (self.low, self.high))
        return f"Box({low}, {high}, {self.shape}, {self.dtype})"


class Units:
    """From [-1, 1]^n, where agents act, to what an action space contains, and back: affine, in the space's dtype and shape.

    Args:
        space: of actions, with finite bounds.
    """

    def __init__(self, space: Space) -> None:
        self.shape, self.dtype = space.shape, np.dtype(space.dtype)
        low, high = (np.broadcast_to(np.array(bound, np.float64), space.dim) for bound in (space.low, space.high))
        self._low, self._high = low.astype(self.dtype), high.astype(self.dtype)
        wide = np.float64 if self.dtype == np.float64 else np.float32
        self._scale, self._offset = ((high - low) / 2).astype(wide), ((high + low) / 2).astype(wide)

    def decode(self, y: np.ndarray) -> np.ndarray:
        """y (B, n) in [-1, 1] -> actions (B, *shape) in the space, whatever rounding makes of its bounds."""
        action: np.ndarray = (y * self._scale + self._offset).astype(self.dtype, copy=False)
        action = np.minimum(np.maximum(action, self._low), self._high)
        return action.reshape(-1, *self.shape)

    def encode(self, action: np.ndarray) -> np.ndarray:
        """Actions (B, *shape) -> y (B, n) in [-1, 1], in float32."""
        y: np.ndarray = (action.reshape(len(action), -1) - self._offset) / self._scale
        return y.clip(-1, 1).astype(np.float32)


class Solutions:
    """The units of a problem: solutions y (B, n) are given and taken as they are."""

    def decode(self, y: np.ndarray) -> np.ndarray:
        """y itself."""
        return y

    def encode(self, action: np.ndarray) -> np.ndarray:
        """The action itself."""
        return action


class Spec(NamedTuple):
    """What an agent must know of an environment: the size of x, and the action box in the environment's units."""

    x_dim: int
    low: list[float]
    high: list[float]
    problem: Problem | None = None  # the known objective behind it, where it has one
    declared: tuple[Space, Space] | None = None  # of observations and of actions, where they are not just rows of numbers
    equations: Callable[..., Any] | None = None  # of its dynamics, where they are known: see `rlamort.env.known`

    @classmethod
    def of(cls, observation: Space, action: Space) -> Self:
        """From what Gymnasium declares."""
        low, high = (np.broadcast_to(bound, action.dim).tolist() for bound in (action.low, action.high))
        return cls(observation.dim, low, high, None, (observation, action))

    @property
    def domain(self) -> Domain:
        """Y, where an agent's answers lie: of a problem its own domain, of other environments [-1, 1]^n."""
        return unit_box(len(self.low)) if self.problem is None else self.problem.domain

    @property
    def units(self) -> Units | Solutions:
        """From Y to what the environment's user plays or holds."""
        return Units(self.action) if self.problem is None else Solutions()

    @property
    def observation(self) -> Space:
        """Where observations lie."""
        return self.declared[0] if self.declared else Space((self.x_dim,), "float32", [-math.inf], [math.inf])

    @property
    def action(self) -> Space:
        """Where actions lie."""
        return self.declared[1] if self.declared else Space.flat(self.low, self.high)

    def apart(self) -> Self:
        """The same with a copy of its problem, which shares its tensors: whatever is tried with it leaves no trace."""
        if self.problem is None:
            return self
        shared = {id(tensor): tensor for tensor in (*self.problem.parameters(), *self.problem.buffers())}
        return self._replace(problem=copy.deepcopy(self.problem, shared))

    def facts(self) -> dict[str, Any]:
        """What can be written of it; of a problem, its name."""
        named = {} if self.problem is None else {"problem": type(self.problem).__name__}
        spaces = {"declared": [space.facts() for space in self.declared]} if self.declared else {}
        return {"x_dim": self.x_dim, "low": self.low, "high": self.high, **named, **spaces}

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Self:
        """What `facts` gave, without its problem. Raises KeyError, TypeError or ValueError where it is something else."""
        spaces = [Space.read(one) for one in facts.get("declared", ())]
        if spaces and [space.dim for space in spaces] != [facts["x_dim"], len(facts["low"])]:
            raise ValueError("sizes that agree: its spaces have others than x_dim and low")
        return cls(facts["x_dim"], facts["low"], facts["high"], None, (spaces[0], spaces[1]) if spaces else None)

    def require(self, other: "Spec", where: str) -> None:
        """Raises UserError where an environment `where` has not the spaces that an agent of this one was made for."""
        flat = (self.x_dim, self.low, self.high) == (other.x_dim, other.low, other.high)
        if flat and (self.declared is None or other.declared is None or self.declared == other.declared):
            return  # what was saved by an older rlamort says no more than the sizes and bounds
        for what, ours, theirs in (("observation", self.observation, other.observation), ("action", self.action, other.action)):
            if ours != theirs:
                raise UserError(f"{where}: its {what} space is {theirs}; the agent's is {ours}, and they must be the same")


class Env:
    """`count` environments side by side. Actions y lie in `domain`; a row whose episode ended starts the next by itself.

    Attributes:
        name: for messages and records.
        count: B.
        x: (B, d), the contexts to act on now.
        domain: Y, as its `spec` has it.
        units: take y to the environment's own actions.
        unsaved: what of it no checkpoint can hold, for messages; empty where `restore` is exact.
    """

    unsaved: tuple[str, ...] = ()

    name: str
    count: int
    x: Tensor

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.units = spec.units
        self.domain = spec.domain.to(device)

    def reset(self, seed: int) -> Tensor:
        """Start every row anew, row i from seed + i, and give x (B, d)."""
        raise NotImplementedError

    def step(self, y: Tensor) -> Step:
        """Play y (B, n) in Y."""
        raise NotImplementedError

    def episodes(self) -> list[Episode]:
        """The episodes that ended since this was last asked."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain values, arrays and tensors."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on where `state` was taken; False where only new episodes could be begun."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any] | None:
        """What layers of it have learned about its numbers; None where there is nothing of the kind."""
        return None

    def take(self, statistics: dict[str, Any], frozen: bool) -> None:
        """Go on with what `statistics` gave; `frozen` keeps it as it is from then on."""

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """While others of its kind play: nothing that they do shows in this one."""
        return contextlib.nullcontext()

    def prove(self) -> None:
        """Find out, while it plays on, whether `restore` would be exact; what is not so is added to its state."""

    def held_out(self) -> "Env":
        """Itself, or its like over contexts that training never meets, where there are such: what evaluations are played in."""
        return self

    def close(self) -> None:
        """Give back what the environments hold."""
