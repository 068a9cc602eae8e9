"""The Gymnasium adapter: a `gymnasium.vector` environment of any autoreset mode as a batched `Env`, tolerant of faults."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from rlamort.env import Env, Episode, Spec, Step
from rlamort.env.local import LocalVectorEnv
from rlamort.env.snapshot import FAULT, SharedState, drawn_from, learn, learned
from rlamort.env.vector import parts
from rlamort.env.workers import WorkerError, WorkerVectorEnv
from rlamort.errors import Diverged, Fault, UserError

LARGEST = float(np.finfo(np.float32).max)


class GymEnv(Env):
    """The adapter. The same episodes give the same transitions in every autoreset mode.

    An environment of ours that raises, or returns non-finite numbers, is reset; that step is no transition, and is counted.

    Args:
        vector: a vector environment that declares its autoreset mode.
        name: for messages.
        spec: its sizes and bounds.
        device: of agents; x and rewards are on the CPU, where environments are stepped.
        limit: steps after which an unfinished episode is an error; None if a time limit is declared.
        max_faults: number of tolerated failures of an environment of ours (see `vector_of`).

    Raises:
        UserError: a vector environment declares no autoreset mode.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        name: str,
        spec: Spec,
        device: torch.device,
        *,
        limit: int | None = None,
        max_faults: int = 0,
    ) -> None:
        super().__init__(spec, device, torch.device("cpu"))
        self.ours = vector if isinstance(vector, LocalVectorEnv | WorkerVectorEnv) else None
        self.vector = vector
        mode = self.vector.metadata.get("autoreset_mode")
        if mode is None:
            raise UserError(
                f"env={name}: its metadata declares no 'autoreset_mode'; "
                f"allowed: {', '.join(str(mode) for mode in AutoresetMode)} (gymnasium.vector.AutoresetMode)"
            )
        self.mode = AutoresetMode(mode)
        self.name, self.count, self.limit = name, self.vector.num_envs, limit
        self.max_faults = max_faults
        self.faults = 0
        self._steps = 0
        self._ended = np.zeros(self.count, dtype=bool)  # rows whose episode is over and that NEXT_STEP resets next
        self._every = np.ones(self.count, dtype=bool)
        self._total = np.zeros(self.count)
        self._length = np.zeros(self.count, dtype=np.int64)
        self._finished: list[Episode] = []
        if isinstance(self.ours, WorkerVectorEnv) and (found := self.statistics()) is not None:
            self.ours.statistics = found["rows"]

    def reset(self, seed: int) -> torch.Tensor:
        self.vector.action_space.seed(seed)
        observation, _ = self._call(lambda: self.vector.reset(seed=seed))
        self._ended[:] = False
        self._total[:] = 0
        self._length[:] = 0
        self._finished.clear()
        self.x = torch.from_numpy(self._finite(self._rows(observation), "reset", observation))
        return self.x

    def step(self, y: torch.Tensor) -> Step:
        u = y.numpy(force=True)
        if not np.isfinite(u).all():
            raise Diverged(f"env {self.name}, step {self._steps}: the agent's action is {u}; its network has diverged")
        action = self.units.decode(u)
        observation, reward, terminated, truncated, info = self._call(lambda: self.vector.step(action))
        self._steps += 1
        successor, raw_reward = self._rows(observation), reward
        reward, (terminated, truncated) = self._outcome(reward, terminated, truncated)
        valid, ended = ~self._ended if self.mode is AutoresetMode.NEXT_STEP else self._every, terminated | truncated
        if not (np.isfinite(reward).all() and np.isfinite(successor).all()):
            sound = np.isfinite(reward) & np.isfinite(successor).all(-1)
            if self.ours is None:
                self._finite(reward, "reward", raw_reward)
                self._finite(successor, "observation", observation)
            self._forgive(~sound, self._reason(~sound, observation, raw_reward, info))
            valid, ended, reward[~sound], successor[~sound] = valid & sound, ended | ~sound, 0, 0
        following = successor
        if self.mode is AutoresetMode.NEXT_STEP:
            self._ended = ended
        elif not ended.any():
            pass
        elif self.mode is AutoresetMode.SAME_STEP:
            successor = following.copy()
            for row in np.flatnonzero(ended):
                successor[row] = self._rows([self._last(info, int(row))])[0]
            self._finite(successor, "observation", successor)
        else:
            # a fresh dict and mask each time: the call takes the mask out of the dict
            fresh, _ = self._call(lambda: self.vector.reset(options={"reset_mask": ended.copy()}))
            following = self._finite(np.where(ended[:, None], self._rows(fresh), successor), "reset", fresh)
        self._record(reward, ended, valid)
        x_next = torch.from_numpy(successor)
        self.x = x_next if following is successor else torch.from_numpy(following)
        return Step(x_next, torch.from_numpy(reward), terminated, truncated, valid)

    def episodes(self) -> list[Episode]:
        finished, self._finished = self._finished, []
        return finished

    def state(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "steps": self._steps,
            "faults": self.faults,
            "ended": self._ended,
            "total": self._total,
            "length": self._length,
            "finished": [[e.total, e.length] for e in self._finished],
            "rows": self._every_one("snapshot") if self.ours else None,
            "statistics": None if self.ours else self.statistics(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        self._steps, self.faults = state["steps"], state["faults"]
        self.reset(0)  # they must have been reset once before a state is put in
        if self.ours and state["rows"] is not None:
            reasons = self._each("restore", [(row,) for row in state["rows"]])
            first = [i for i, row in enumerate(state["rows"]) if "globals" in row and row["globals"] is not None]
            if first and first != self.ours.first and any(drawn_from(state["rows"][i]) for i in first):
                reasons.append("its environments draw from random generators of their processes, and num_workers was another")
        else:
            reasons = ["a vector environment that rlamort did not make gives no state"]
            if state.get("statistics"):
                self.take(state["statistics"], frozen=False)
        self.unsaved = tuple(dict.fromkeys(reason for reason in reasons if reason))
        if self.unsaved:
            self.reset(self._steps)  # as good a seed as any, and the same whenever it is done again
            return False
        self._finished = [Episode(total, length) for total, length in state["finished"]]
        self._ended[:], self._total[:], self._length[:] = state["ended"], state["total"], state["length"]
        self.x = state["x"].cpu()
        return True

    def statistics(self) -> dict[str, Any] | None:
        """Running statistics of wrappers: of each environment, and of a user's vector environment its own wrappers, too."""
        around, *rows = parts(self.vector)
        if self.ours:
            found = {"around": learned([]), "rows": self._every_one("statistics")}
        else:
            found = {"around": learned(around), "rows": [learned(row) for row in rows]}
        return found if any(one["layers"] for one in (found["around"], *found["rows"])) else None

    def take(self, statistics: dict[str, Any], frozen: bool) -> None:
        around, *rows = parts(self.vector)
        learn([] if self.ours else around, statistics["around"], frozen)
        if not statistics["rows"]:
            return
        each = list(itertools.islice(itertools.cycle(statistics["rows"]), self.count))  # an evaluation may have more of them
        if self.ours:
            self._each("take", [(one, frozen) for one in each])
        for row, one in zip(rows if self.ours is None else (), each, strict=False):
            learn(row, one, frozen)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A context in which others of its kind may be stepped; state shared with them is restored at its end."""
        row = next((inside[0] for inside in parts(self.vector)[1:]), None)
        with contextlib.nullcontext() if row is None else SharedState(row).restoring():
            yield

    def prove(self) -> None:
        """Test, by stepping a copy beside the first environment for a while, whether a resume is exact."""
        if self.ours:
            self._every_one("prove")

    def close(self) -> None:
        self.vector.close()

    def _each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every environment's `Snapshot`, each with its own arguments."""
        assert self.ours is not None
        call = self.ours.call
        return list(self._call(lambda: call(name, arguments)))

    def _every_one(self, name: str) -> list[Any]:
        """Call a method of every environment's `Snapshot`."""
        return self._each(name, [()] * self.count)

    def _forgive(self, broken: np.ndarray, reason: str) -> None:
        self.faults += 1
        message = f"env {self.name}, step {self._steps}, index {', '.join(map(str, np.flatnonzero(broken)))}: {reason}"
        if self.faults > self.max_faults:
            raise Fault(f"{message}; that is failure {self.faults}, and max_env_faults={self.max_faults} are allowed")
        warnings.warn(f"{message}; a new episode begins (failure {self.faults} of {self.max_faults} allowed)", stacklevel=2)

    def _reason(self, broken: np.ndarray, observation: Any, reward: Any, info: dict[str, Any]) -> str:
        row = int(np.flatnonzero(broken)[0])
        if row in info[FAULT]:
            return str(info[FAULT][row])
        if (odd := _odd(reward[row])) is not None:
            return f"its reward is {odd}"
        return f"its observation holds {_odd(observation[row])}"

    def _last(self, info: Any, row: int) -> Any:
        """The last observation of an episode, from a vector environment that has already reset (SAME_STEP)."""
        try:
            return info["final_obs"][row] if isinstance(info, dict) else info[row]["final_obs"]
        except (KeyError, IndexError, TypeError) as error:
            raise Fault(
                f"env {self.name}, step {self._steps}: episode {row} ended, and info has no 'final_obs', which SAME_STEP needs"
            ) from error

    def _record(self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray) -> None:
        self._total += reward * valid
        self._length += valid
        if ended.any():
            for row in np.flatnonzero(ended & valid):
                self._finished.append(Episode(float(self._total[row]), int(self._length[row])))
            self._total[ended] = 0
            self._length[ended] = 0
            if isinstance(self.ours, WorkerVectorEnv) and self.ours.statistics is not None and ended[0]:
                self.ours.statistics = self._every_one("statistics")  # a worker may die, and what it knows with it
        if self.limit is not None and self._length.max() >= self.limit:
            raise Fault(
                f"env {self.name}: an episode has not ended after {self.limit} steps, and it declares no limit; "
                f"set max_episode_steps=N (longer episodes are then truncated)"
            )

    def _rows(self, observation: Any) -> np.ndarray:
        """(B, ...) as the environment returned it -> (B, d), copied to float32."""
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is said by `_finite`
                rows = np.array(observation, dtype=np.float32).reshape(len(observation), -1)
        except (ValueError, TypeError) as error:
            raise Fault(f"env {self.name}, step {self._steps}: observations are no arrays of one shape: {error}") from error
        if rows.shape[1] != self.spec.x_dim:
            raise Fault(
                f"env {self.name}, step {self._steps}: {rows.shape[1]} numbers in an observation; it declares {self.spec.x_dim}"
            )
        return rows

    def _outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[np.ndarray, np.ndarray]:
        """A number (B,) and two flags (2, B) of each environment, copied."""
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is said by the caller
                numbers = np.array(reward, dtype=np.float32)
            flags = np.array((terminated, truncated), dtype=bool)
        except (ValueError, TypeError):
            numbers, flags = np.empty(0, np.float32), np.empty(0, bool)
        if numbers.shape != (self.count,) or flags.shape != (2, self.count):
            raise Fault(
                f"env {self.name}, step {self._steps}: reward is {reward}, terminated {terminated}, truncated {truncated}; "
                f"a number and two flags for each of {self.count} are needed"
            )
        return numbers, flags

    def _finite(self, array: np.ndarray, what: str, raw: Any) -> np.ndarray:
        """`array` if it is finite; messages show the `raw` values."""
        if not np.isfinite(array).all():
            raise Fault(f"env {self.name}, step {self._steps}: {what} holds {_odd(raw)}")
        return array

    def _call(self, function: Callable[[], Any]) -> Any:
        """The result of a call; exceptions become a Fault that names the environment."""
        try:
            return function()
        except UserError:
            raise
        except Exception as error:
            what = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
            raise Fault(f"env {self.name}: it raised at step {self._steps + 1}: {what}") from error


def _odd(raw: Any) -> str | None:
    """The first value that is not finite in float32, and what is needed; None if there is none."""
    values = np.asarray(raw, dtype=np.float64).ravel()
    if len(odd := values[~np.isfinite(values)]):
        return f"{odd[0]}; finite numbers are needed"
    if len(odd := values[np.abs(values) > LARGEST]):
        return f"{odd[0]:g}; numbers of float32, up to {LARGEST:g}, are needed"
    return None
