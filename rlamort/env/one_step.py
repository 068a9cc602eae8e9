"""A `Problem` as an environment whose episodes are one step long: x ~ p(x), the action is y, the reward is -f(y; x).

B contexts side by side · d numbers in a context · n = dim of y · u action in [-1, 1]^inputs
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.config.imports import class_at
from rlamort.constraints import Constraints, Penalised
from rlamort.domain import Domain
from rlamort.env import Env, Episode, Spec, Step
from rlamort.env.imports import here
from rlamort.env.native import NativeEnv, NativeVectorEnv
from rlamort.errors import Diverged, Fault, UserError, nearest
from rlamort.host.randomness import seeded
from rlamort.objective import Cost, Objective
from rlamort.problem import Drawn, Problem, begun, device_of, draw, presented, require_frozen, unseen

ENTRY = "rlamort.env.one_step:single"  # the entry point of problems in Gymnasium's registry


class OneStep(Env):
    """`count` contexts side by side; `step` takes y in Y itself, and every step is an episode.

    Contexts depend on the seed of `reset` and on `count`. They have torch's default dtype. Where the problem has constraints,
    the reward is -f less the quadratic penalty that it declares, and a step says how far they are violated.

    Args:
        problem: the problem; it moves to `device`, and to float64 where that is torch's default.
        count: B.
        device: of x, y and rewards.
        max_faults: number of tolerated steps with non-finite costs; those items are no transitions.
        sampler: draws contexts: `draw`, or `unseen`.

    Raises:
        UserError: its contexts are not tensors, or of unequal count.
        Fault: its methods raise.
    """

    def __init__(
        self, problem: Problem, count: int, device: torch.device, *, max_faults: int = 0, sampler: Drawn = draw
    ) -> None:
        self.sampler = sampler
        exact = torch.get_default_dtype() is torch.float64
        self.problem = begun(problem).to(device, torch.float64 if exact else None)
        self.name, self.count = type(problem).__name__, count
        with blaming(f"{self.name}.contexts"):
            d = problem.layout.seen.dim
        inputs = problem.domain.inputs

        def frozen() -> None:
            require_frozen(problem, f"env={type(problem).__name__}: rewards have", "the method amortize")

        spec = Spec(d, [-1.0] * inputs, [1.0] * inputs, problem, frozen=frozen)
        super().__init__(spec, device)
        self.f, self.constraints = Cost(problem), Constraints.of(problem)
        self.scored: Objective = self.f
        if self.constraints is not None:
            self.scored = Penalised(self.f, self.constraints, problem.violation_penalty)
        self.faults = Faults(self.name, max_faults)
        self.steps = 0
        self._generator = np.random.default_rng(0)
        self._finished: list[float] = []

    def reset(self, seed: int) -> Tensor:
        self._generator = np.random.default_rng(seed)
        self._finished.clear()
        x = self._draw()
        if not self.whole_x.isfinite().all():
            raise Fault(f"{self._odd_part(self.whole_x)}; finite numbers are needed")
        return x

    def _draw(self) -> Tensor:
        """Draw new contexts; their hidden parts are not in x."""
        self.whole_x = contexts(self.problem, self.count, self.device, self._generator, self.sampler)
        self.x = self.f.seen(self.whole_x)
        return self.x

    def _odd_part(self, x: Tensor) -> str:
        """The part of contexts (B, d) with non-finite numbers, for messages."""
        parts = self.problem.layout.unpack(x)
        named = parts.items() if isinstance(parts, dict) else ()
        key = next((f", {name}" for name, part in named if not part.isfinite().all()), "")
        return f"{self.name}.contexts{key}: they hold {_odd(x)}"

    @torch.no_grad()
    def step(self, y: Tensor) -> Step:
        """Solve the contexts with y (B, n) in Y."""
        x = self.whole_x
        with stream(self._generator, self.device), blaming(f"{self.name}.cost"):
            reward = -self.scored(y, x)  # a cost may draw, as an ELBO does
            violation = None if self.constraints is None else self.constraints.violation(y, x)
        rewards = reward.numpy(force=True)
        valid = np.isfinite(rewards)
        if not valid.all():
            self._forgive(~valid, y, x, rewards)
            reward = torch.where(reward.isfinite(), reward, torch.zeros_like(reward))
        self.steps += 1
        self._finished += rewards[valid].tolist()
        x_last = self.x
        self._draw()
        return Step(x_last, reward, np.ones(self.count, dtype=bool), np.zeros(self.count, dtype=bool), valid, violation)

    def episodes(self) -> list[Episode]:
        finished, self._finished = self._finished, []
        return [Episode(total, 1) for total in finished]

    def state(self) -> dict[str, Any]:
        return {
            "x": self.whole_x,
            "generator": self._generator.bit_generator.state,
            "steps": self.steps,
            "faults": self.faults.count,
            "finished": self._finished,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        self.whole_x = state["x"].to(self.device)
        self.x = self.f.seen(self.whole_x)
        self._generator.bit_generator.state = state["generator"]
        self.steps, self.faults.count, self._finished = state["steps"], state["faults"], list(state["finished"])
        return True

    def held_out(self) -> "OneStep":
        return OneStep(self.problem, self.count, self.device, max_faults=self.faults.allowed, sampler=unseen)

    def close(self) -> None:
        """Nothing to release."""

    def _forgive(self, broken: np.ndarray, y: Tensor, x: Tensor, rewards: np.ndarray) -> None:
        at = torch.from_numpy(broken).to(self.device)
        if not y[at].isfinite().all():
            raise Diverged(f"{self.name}, step {self.steps}: the solution holds {_odd(y[at])}; its network has diverged")
        if not x[at].isfinite().all():
            self.faults.add(broken, self.steps, f"its contexts hold {_odd(x[at])}; finite numbers are needed")
        else:
            self.faults.add(broken, self.steps, f"its cost is {-rewards[broken][0]}; a finite number is needed")


@contextlib.contextmanager
def stream(generator: np.random.Generator, device: torch.device) -> Iterator[None]:
    """A context with torch's generators seeded by `generator`; their state is restored at its end."""
    with seeded(int(generator.integers(2**63)), device):
        yield


def contexts(
    problem: Problem, count: int, device: torch.device, generator: np.random.Generator, sampler: Drawn = draw
) -> Tensor:
    """x ~ p(x) (count, d) as vectors in torch's default dtype, seeded by `generator`; torch's generator state is unchanged.

    Raises:
        UserError: `contexts` returned another number of contexts.
        Fault: `contexts` raised.
    """
    name = type(problem).__name__
    with stream(generator, device), torch.no_grad(), blaming(f"{name}.contexts"):
        x = presented(problem, count, device, sampler)
        if len(x) != count:
            raise UserError(f"{name}.contexts({count}): {len(x)} are returned; the leading axis must be the count")
    return x


class Faults:
    """A count of failures of a user's problem, tolerated up to a limit.

    Args:
        name: of the problem's class.
        allowed: the limit.
    """

    def __init__(self, name: str, allowed: int) -> None:
        self.name, self.allowed, self.count = name, allowed, 0

    def add(self, broken: np.ndarray, step: int, reason: str) -> None:
        """Count a step in which the items `broken` failed. Raises Fault beyond the limit."""
        self.count += 1
        message = f"{self.name}, step {step}, item {', '.join(map(str, np.flatnonzero(broken)))}: {reason}"
        if self.count > self.allowed:
            raise Fault(f"{message}; that is failure {self.count}, and max_env_faults={self.allowed} are allowed")
        warnings.warn(f"{message}; new contexts follow (failure {self.count} of {self.allowed} allowed)", stacklevel=3)


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """A context that turns exceptions of `what`, a user's method, into a Fault that names it."""
    try:
        yield
    except (Fault, UserError):
        raise
    except Exception as error:
        raise Fault(f"{what}: it raised {type(error).__name__}: {error}") from error


def problem_of(problem: Problem | type[Problem] | str, kwargs: dict[str, Any] | None = None) -> Problem:
    """A problem from an instance, class or name.

    Args:
        problem: an instance, a class, `module:Class` (the current folder is searched), or an id such as rlamort/Sphere-v0.
        kwargs: keywords of its constructor.

    Raises:
        UserError: there is none of that name, or it cannot be constructed.
    """
    name = problem if isinstance(problem, str) else getattr(problem, "__name__", type(problem).__name__)
    try:
        instance = _construct(problem, kwargs or {})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"problem={name}: it cannot be made: {type(error).__name__}: {error}") from error
    domain = getattr(instance, "domain", None)
    if not isinstance(domain, Domain):
        what = "none is given" if domain is None else f"a {type(domain).__name__} is given"
        allowed = "a domain is needed, such as Box or Simplex, or the `parameters` of a density"
        raise UserError(f"{type(instance).__name__}.domain: {what}; {allowed}")
    return instance


def open_problem(
    problem: Problem | type[Problem] | str,
    *,
    count: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    vectorization: str = "sync",
    workers: int | None = None,
    max_episode_steps: int | None = None,
    max_faults: int = 0,
    timeout: float = 60.0,
    reset_options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> OneStep:
    """Test a problem by one step, and return its environment.

    The keywords are those of `rlamort.env.make.open_env`, so that a row may name either.

    Args:
        problem: as in `problem_of`.
        count: number of contexts side by side.
        env_kwargs: keywords of its constructor.
        vectorization: "sync"; there are no worker processes.
        workers: None, likewise.
        max_episode_steps: None; an episode is one step.
        max_faults: number of tolerated steps with non-finite costs.
        timeout: has no effect without worker processes.
        reset_options: None; contexts have no options.
        device: of tensors; the CPU by default.

    Raises:
        UserError: it cannot be constructed, a keyword does not apply, or its sizes do not match.
        Fault: its methods raise, or its costs are not finite.
    """
    if workers is not None:
        raise UserError(f"num_workers={workers}: a problem is solved in batches, without workers")
    if vectorization != "sync":
        raise UserError(f"vectorization={vectorization}: a problem is solved in batches, without workers; allowed: sync")
    if max_episode_steps is not None:
        raise UserError(f"max_episode_steps={max_episode_steps}: an episode of a problem is one step; leave it out")
    if reset_options is not None:
        raise UserError(f"reset_options={reset_options}: a problem draws its contexts by itself; leave it out")
    instance, device = problem_of(problem, env_kwargs), device or torch.device("cpu")
    trial = OneStep(instance, 2, device)
    trial.reset(0)
    y = instance.domain.at(trial.x).act(torch.zeros(2, instance.domain.inputs, device=device))
    trial.step(y)
    if instance.hidden:
        _try_support(trial, y)
    return OneStep(instance, count, device, max_faults=max_faults)


def _try_support(env: OneStep, y: Tensor) -> None:
    """Raises UserError if `support` reads hidden parts."""
    with blaming(f"{env.name}.support"), stream(np.random.default_rng(0), env.device), torch.no_grad():
        try:
            env.f.oracle(env.whole_x).value(y)
        except KeyError as error:
            raise UserError(
                f"{env.name}.support: its cost reads {error}, which is hidden; define `support(y, x)`, which solvers query"
            ) from error


def single(problem: Problem | type[Problem] | str, **keywords: Any) -> NativeEnv:
    """A problem as a `gymnasium.Env`; `keywords` are its constructor's."""
    return NativeEnv(_opened(_construct(problem, keywords), 1))


def vector(problem: Problem | type[Problem] | str, num_envs: int = 1, **keywords: Any) -> NativeVectorEnv:
    """A problem as a `gymnasium.vector.VectorEnv`; `keywords` are its constructor's."""
    return NativeVectorEnv(_opened(_construct(problem, keywords), num_envs))


def _opened(problem: Problem, count: int) -> OneStep:
    """The environment on the problem's device."""
    return OneStep(problem, count, device_of(problem) or torch.device("cpu"))


def _construct(problem: Problem | type[Problem] | str, keywords: dict[str, Any]) -> Problem:
    """The problem; exceptions of its constructor propagate, since Gymnasium and Stable-Baselines3 catch its TypeError."""
    if isinstance(problem, Problem):
        if keywords:
            raise UserError(
                f"env_kwargs: {', '.join(keywords)} given for a {type(problem).__name__} that is made already; give its class"
            )
        return begun(problem)
    if isinstance(problem, str) and problem in gymnasium.registry and gymnasium.registry[problem].entry_point == ENTRY:
        registered = dict(gymnasium.registry[problem].kwargs)  # its constructor's keywords, too
        return _construct(registered.pop("problem"), registered | keywords)
    kind = _class_of(problem) if isinstance(problem, str) else problem
    if not (isinstance(kind, type) and issubclass(kind, Problem)):
        raise UserError(f"problem: a {type(kind).__name__} is given; a Problem, its class, 'module:Class' or an id is needed")
    return begun(kind(**keywords))


def _class_of(name: str) -> type[Problem]:
    if name in gymnasium.registry:
        raise UserError(f"problem={name}: it is an environment with dynamics; a rlamort.problem.Problem is needed")
    if ":" not in name:
        problems = [one for one, spec in gymnasium.registry.items() if spec.entry_point == ENTRY]
        hint = here(name) or f"'module:Class' takes your own. {nearest(name, problems)}"
        raise UserError(f"problem={name}: there is none of that name; {hint}")
    return class_at(name, "problem", (Problem,), "rlamort.Problem")


def _odd(tensor: Tensor) -> float:
    return float(tensor[~tensor.isfinite()][0])
