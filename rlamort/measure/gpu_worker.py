"""The measurements of `rlamort bench gpu`, each in a process of its own, so that one that hangs or crashes costs its own line.

    python -m rlamort.measure.gpu_worker LINE DEVICE

It prints `READY` when all is compiled, and waits for a line of input before it times anything: many such processes compile side
by side, and measure one after another. Then it prints one JSON object: figures by name. On a CPU sizes are tiny and nothing is
compiled, which only shows that a line runs.
"""

import copy
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlamort.errors import UserError
from rlamort.measure.claims.user import Portfolio
from rlamort.measure.fit import amortize as fitted
from rlamort.run.capture import Captured, named
from rlamort.run.learner import Learner, learner_class
from rlamort.run.restore import resume as resumed
from rlamort.run.rounds import Eager

Figures = dict[str, float | str]
READY = "ready"
AGENTS = ("sac", "td3", "ddpg", "tqc", "iapo")
PLANS = (("pets", 3, 100), ("pets", 5, 500), ("poplin_p", 3, 100))  # method, members of the ensemble, samples


class Size(NamedTuple):
    """How much is measured."""

    env: str
    hidden: tuple[int, int]
    batch_size: int
    warm: int  # environment steps before the timing
    timed: int  # steps that are timed together
    slow: int  # the same where they are slow: eager on a GPU, Stable-Baselines3
    seconds: float  # that are timed at least
    verified: int  # updates that are compared
    contexts: int
    certified: int
    many: int  # environments side by side
    compiled: bool


FULL = Size("HalfCheetah-v5", (256, 256), 256, 300, 1_000, 300, 3.0, 100, 1_000_000, 10_000, 64, True)
TINY = Size("Pendulum-v1", (8, 8), 8, 20, 20, 10, 0.0, 3, 100, 10, 2, False)


class Bench:
    """The lines, as methods that return figures by name.

    Args:
        device: cuda, cuda:N, or cpu.
        turn: called before anything is timed; returns when nothing else is.
    """

    def __init__(self, device: str, turn: Callable[[], None]) -> None:
        self.device, self.turn = torch.device(device), turn
        self.on_gpu = self.device.type == "cuda"
        self.size = FULL if self.on_gpu else TINY

    def ready(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def rate(self, work: Callable[[], object], count: int) -> float:
        """How often a second `work` does what it does `count` times, repeated for long enough to tell."""
        self.ready()
        start, taken, done = time.perf_counter(), 0.0, 0
        while taken <= self.size.seconds:
            work()
            self.ready()
            taken, done = time.perf_counter() - start, done + count
        return done / taken

    def each(self, work: Callable[[], object], count: int) -> float:
        """The median of `count` single times of `work`, in milliseconds."""
        times = []
        for _ in range(count):
            self.ready()
            start = time.perf_counter()
            work()
            self.ready()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    def learner(self, method: str, captured: bool, **fields: Any) -> Learner:
        """One that is about to train."""
        size, warm = self.size, self.size.warm
        usual = {"hidden": size.hidden, "batch_size": size.batch_size, "warmup_steps": warm, "buffer_size": 100_000}
        compiled = captured and size.compiled
        return learner_class(method)(
            size.env, **{**usual, "device": str(self.device), "seed": 0, "threads": 1, "compile": compiled, **fields}
        )

    def overlapped(self, method: str, matmul: str = "float32") -> Figures:
        """Steps per second with the environment stepped beside the updates."""
        size, fields = self.size, {"overlap": True, "matmul": matmul} if self.on_gpu else {}
        learner = self.learner(method, True, **fields)
        learner.learn(size.warm + 10)
        self.turn()
        rate = self.rate(lambda: learner.learn(size.timed, reset_num_timesteps=False), size.timed)
        learner.close()
        return {f"{method} captured, overlap, {matmul}, steps/s": rate}

    def training(self, method: str, captured: bool) -> Figures:
        """Steps and updates per second, kernels of an update, and a step's parts, each waited for."""
        size = self.size
        learner = self.learner(method, captured)
        learner.learn(size.warm + 10)  # compiles, records and verifies
        self.turn()
        count, name = size.timed if captured else size.slow, f"{method} {'captured' if captured else 'eager'}"
        found: Figures = {f"{name}, steps/s": self.rate(lambda: learner.learn(count, reset_num_timesteps=False), count)}
        every, source = learner.agent.improve_every, learner.source

        def update(many: int) -> None:
            for number in range(1, many + 1):
                learner.updates([number % every == 0], source.waiting, ())  # type: ignore[misc]

        with learner.training():
            found[f"{name}, updates/s"] = self.rate(lambda: update(count), count)
            activities = [torch.profiler.ProfilerActivity.CUDA if self.on_gpu else torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as recorded:
                update(20)
                self.ready()
            on_gpu = [one.name for one in recorded.events() or () if one.device_type.name == "CUDA"]
            kernels = [name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))]
            found[f"{name}, kernels an update"] = len(kernels) / 20
            if captured:
                y = source.env.domain.uniform(1, self.device).to(source.env.place)
                step = source.env.step(y)
                stored = source.env.x, y, step.reward, step.x_next, step.terminated, step.truncated, step.valid
                found[f"{name}, environment ms"] = self.each(lambda: source.env.step(y), size.slow)
                found[f"{name}, replay.add ms"] = self.each(lambda: source.add(*stored), size.slow)
                found[f"{name}, updates are"] = _way(learner.updates)
        learner.close()
        return found

    def others(self, method: str) -> Figures:
        """Stable-Baselines3's steps per second on the same device."""
        kind = getattr(importlib.import_module("stable_baselines3"), method.upper())
        narrow = {} if method == "sac" else {"policy_kwargs": {"net_arch": [256, 256]}}
        size = self.size
        model = kind("MlpPolicy", size.env, seed=0, learning_starts=size.warm, batch_size=size.batch_size, train_freq=1,
                     gradient_steps=1, device=self.device, **narrow)  # fmt: skip
        model.learn(size.warm + 10)
        self.turn()
        learn = functools.partial(model.learn, size.slow, reset_num_timesteps=False)
        return {f"sb3 {method}, steps/s": self.rate(learn, size.slow)}

    def many(self, count: int, utd: str) -> Figures:
        """Steps per second of SAC with several environments side by side."""
        count = count if self.on_gpu else self.size.many
        learner = self.learner("sac", True, num_envs=count, vectorization="async", utd=utd)
        learner.learn(self.size.warm + 20 * count)
        self.turn()
        steps = 100 * count if self.on_gpu else 20
        rate = self.rate(lambda: learner.learn(steps, reset_num_timesteps=False), steps)
        learner.close()
        return {f"sac, {count} environments, utd={utd}, steps/s": rate}

    def amortize(self) -> Figures:
        """Updates per second of a model of a problem's solutions, with the loop around them."""
        count, learners = self.size.timed, {}
        for name, captured in (("captured", True), ("eager", False)):
            learner = learner_class("amortize")(Portfolio(), hidden=(128, 128), batch_size=256, device=str(self.device), seed=0,
                                                threads=1, compile=captured and self.size.compiled)  # fmt: skip
            learners[name] = learner.learn(count)  # rounds of all the lengths that it has
        self.turn()
        found: Figures = {}
        for name, learner in learners.items():
            work = functools.partial(learner.learn, count, reset_num_timesteps=False)
            found[f"amortize {name}, updates/s"] = self.rate(work, count)
        return found | {"amortize, updates are": _way(learners["captured"].updates)}

    def answers(self) -> Figures:
        """Predictions and certified solutions."""
        solver = fitted(Portfolio(), steps=self.size.timed, hidden=(128, 128), batch_size=256, device=str(self.device), seed=0,
                        compile=False)  # fmt: skip
        x = solver.draw(self.size.contexts)
        rows = x[: self.size.certified]
        solver.solve(rows[:10], tol=1e-3)
        self.turn()
        found = solver.solve(rows, tol=1e-3)
        certified = int((found.bound <= 1e-3).sum())
        return {
            f"{len(x):,} contexts predicted, ms": self.each(lambda: solver.predict(x), 10),
            f"{len(rows):,} answers certified to 1e-3, s": self.each(lambda: solver.solve(rows, tol=1e-3), 3) / 1e3,
            "certified": f"{certified} of {len(rows)}",
        }

    def plans(self) -> Figures:
        """Milliseconds of a plan through learned dynamics: recorded, as it is, and on one thread of the CPU."""
        size, found, works = self.size, Figures(), dict[str, Callable[[], object]]()
        for method, members, samples in PLANS if size.compiled else PLANS[:1]:
            fields = {"hidden": (200, 200), "horizon": 30, "fit_every": 1_000, "samples": samples, "dynamics.members": members}
            for place in dict.fromkeys((str(self.device), "cpu")):
                learner = learner_class(method)(size.env, **{**fields, "device": place, "threads": 1, "seed": 0})
                agent: Any = learner.agent
                name = f"{method}, {members} members, {samples} samples, ms of a plan"
                given = torch.zeros(1, agent.spec.x_dim, device=place), *agent.start(1)
                if self.on_gpu and place != "cpu":
                    works[f"{name}, recorded"] = functools.partial(agent.plans_of, *given)
                works[f"{name}, {'one thread of the CPU' if place == 'cpu' else 'eager'}"] = functools.partial(
                    agent.planned, *given
                )
        with torch.no_grad():
            for work in works.values():
                work()
            self.turn()
            for name, work in works.items():
                found[name] = self.each(work, 5)
        return found

    def same(self, method: str) -> Figures:
        """The largest relative difference of captured updates from eager ones, of everything that they return or change."""
        learner = self.learner(method, True)
        agent, source, size = learner.agent, learner.source, self.size
        sample = functools.partial(source.sample, size.batch_size)

        def collect() -> None:
            source.collect(lambda: source.env.domain.uniform(1, self.device))

        for _ in range(size.warm):
            collect()
        twin, apart, farthest = copy.deepcopy(agent), 0.0, "nothing"
        eager = Eager(twin, sample)
        captured = Captured(agent, sample) if size.compiled else Eager(agent, sample)
        with learner.training():
            for number in range(1, size.verified + 1):
                collect()
                found = []
                for rounds in (eager, captured):
                    torch.manual_seed(number)
                    found.append(rounds([number % agent.improve_every == 0], source.waiting))
                ours, theirs = named(found[1], agent), named(found[0], twin)
                for name, value in theirs.items():
                    scale = value.double().norm() + 1e-3
                    apart, farthest = max(
                        (apart, farthest), (float((ours[name].double() - value.double()).norm() / scale), name)
                    )
        learner.close()
        return {
            f"{method} captured from eager, after {size.verified} updates": apart,
            f"{method}, farthest": farthest,
            f"{method}, updates are": _way(captured),
        }

    def resume(self) -> Figures:
        """The largest relative difference of a resumed run from one that was not interrupted."""
        size, steps = self.size, self.size.warm + self.size.slow
        with tempfile.TemporaryDirectory() as folder:
            ends = []
            for stops in ((steps, steps), (2 * steps,)):
                path = Path(folder) / str(len(stops))
                learner = self.learner("sac", True, dir=str(path), eval_every=10**6, checkpoint_every=steps, eval_episodes=1)
                for number, stop in enumerate(stops):
                    if number:
                        learner.close()
                        learner, _ = resumed(path)
                    learner.learn(stop, reset_num_timesteps=learner.clock.env_step == 0)
                ends.append({name: value.double().clone() for name, value in learner.agent.state_dict().items()})
                learner.close()
        apart = max(float((one - ends[1][name]).norm() / (ends[1][name].norm() + 1e-3)) for name, one in ends[0].items())
        return {f"resumed from uninterrupted, after {size.slow + steps} updates": apart}


LINES: dict[str, Callable[[Bench], Figures]] = {
    **{f"same {method}": functools.partial(Bench.same, method=method) for method in AGENTS},
    "sac": lambda bench: bench.training("sac", True),
    "td3": lambda bench: bench.training("td3", True),
    "sac overlap": lambda bench: bench.overlapped("sac"),
    "td3 overlap": lambda bench: bench.overlapped("td3"),
    "sac overlap, tf32": lambda bench: bench.overlapped("sac", "tf32"),
    "amortize": Bench.amortize,
    "answers": Bench.answers,
    "plans": Bench.plans,
    "environments, utd=1/16": lambda bench: bench.many(64, "1/16"),
    "environments, utd=1": lambda bench: bench.many(16, "1"),
    "resume": Bench.resume,
    "sac eager": lambda bench: bench.training("sac", False),
    "td3 eager": lambda bench: bench.training("td3", False),
    "sb3 sac": lambda bench: bench.others("sac"),
    "sb3 td3": lambda bench: bench.others("td3"),
}


def _way(rounds: Any) -> str:
    """How updates go."""
    return str((rounds.rounds if isinstance(rounds, Captured) else rounds).about)


def measure(line: str, device: str, turn: Callable[[], None] = lambda: None) -> Figures:
    """One line; what it lacks is its only figure, where it lacks something."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = LINES[line](Bench(device, turn))
        reasons = [str(one.message) for one in said if str(one.message).startswith(("compile:", "replay:", "plans:"))]
        return found | {f"{line}, warning {number}": reason for number, reason in enumerate(reasons, 1)}
    except (UserError, ImportError) as error:
        return {f"{line}, skipped": str(error).splitlines()[0]}


def wait() -> None:
    """Wait for a turn."""
    print(READY, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], wait)))
