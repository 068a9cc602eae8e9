"""Training speed: against Stable-Baselines3 and sbx, against the matrix products alone, and a profile.

b batch · d = x_dim · n = dim of an action · h width of a hidden layer
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from rlamort.errors import Fault
from rlamort.host.machine import fast_products, versions
from rlamort.measure import speed_worker
from rlamort.measure.report import Report, table
from rlamort.run.learner import Learner, learner_class

Product = tuple[int, int, int, int]  # copies, rows, inner, columns of a matrix product
Products = list[tuple[float, Product]]  # with the number per update
ROUNDS = 3


def speed(algorithm: str = "sac", env: str = "HalfCheetah-v5", rounds: int = ROUNDS) -> Report:
    """Training steps and pure updates per second, acting latency, memory and start-up: rlamort, SB3, sbx, interleaved.

    Each measurement is a new process. sbx is included if `SBX_PYTHON` names an interpreter that has it.
    """
    threads = torch.get_num_threads()
    libraries = ["rlamort", "sb3", *(["sbx"] if os.environ.get("SBX_PYTHON") else [])]
    found: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
    bounds = []
    for _ in range(rounds):
        for library in libraries:
            found[library].append(_contest(library, algorithm, env, threads))
        bounds.append(bound(products(algorithm)))
    median = {library: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for library, runs in found.items()}
    ratios = {
        f"{key}, rlamort / {library}": statistics.median(
            ours[key] / theirs[key] for ours, theirs in zip(found["rlamort"], found[library], strict=True)
        )
        for key in ("steps_per_s", "updates_per_s", "replay_bytes_per_transition")
        for library in libraries[1:]
    }
    ratios["updates_per_s / bound"] = statistics.median(
        ours["updates_per_s"] / limit for ours, limit in zip(found["rlamort"], bounds, strict=True)
    )
    rows = [[key, *(f"{median[library][key]:.4g}" for library in libraries)] for key in median["rlamort"]]
    lines = [
        f"{algorithm} on {env}: medians of {rounds} interleaved rounds, new processes, {threads} threads, {_machine()}",
        "",
        *table(["", *libraries], rows),
        "",
        f"float32 matrix products alone (torch.mm, same shapes): {statistics.median(bounds):.0f} updates/s",
        *(f"{name} = {ratio:.2f}" for name, ratio in ratios.items()),
    ]
    data = {
        "versions": versions(),
        "threads": threads,
        "machine": _machine(),
        "runs": found,
        "bounds": bounds,
        "ratios": ratios,
    }
    return Report(lines, data)


def _contest(library: str, algorithm: str, env: str, threads: int) -> dict[str, float]:
    python = os.environ["SBX_PYTHON"] if library == "sbx" else sys.executable
    command = [python, "-P", speed_worker.__file__, library, algorithm, env, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Fault(f"bench speed: {library} failed: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def products(algorithm: str, batch: int = 256, h: int = 256, critics: int = 2, d: int = 17, n: int = 6) -> Products:
    """The matrix products of one update with two hidden layers, each with its number per update.

    TD3's policy learns at every second update, from the first critic (Fujimoto et al., 2018, algorithm 1).
    """
    b, members = batch, critics if algorithm != "ddpg" else 1
    actor = 0.5 if algorithm == "td3" else 1.0  # its policy learns at every second update
    steered = members if algorithm == "sac" else 1  # critics that the policy climbs
    out = 2 * n if algorithm == "sac" else n

    def forward(copies: int, inputs: int, outputs: int) -> list[Product]:
        return [(copies, b, inputs, h), (copies, b, h, h), (copies, b, h, outputs)]

    def weights(copies: int, inputs: int, outputs: int) -> list[Product]:
        return [(copies, inputs, b, h), (copies, h, b, h), (copies, h, b, outputs)]

    def back(copies: int, outputs: int) -> list[Product]:
        return [(copies, b, outputs, h), (copies, b, h, h)]

    critic = forward(1, d, out) + 2 * forward(members, d + n, 1) + weights(members, d + n, 1) + back(members, 1)
    policy = [
        *forward(1, d, out), *forward(steered, d + n, 1), *back(steered, 1), (steered, b, h, d + n),
        *weights(1, d, out), *back(1, out),
    ]  # fmt: skip
    return [(1.0, product) for product in critic] + [(actor, product) for product in policy]


def bound(counted: Products, seconds: float = 2.0) -> float:
    """Updates per second of the matrix products alone, on this machine with the present threads."""
    pairs = [(share, torch.randn(c, m, k), torch.randn(c, k, n), torch.empty(c, m, n)) for share, (c, m, k, n) in counted]
    times: list[list[float]] = [[] for _ in pairs]
    until = time.perf_counter() + seconds
    with fast_products():
        while time.perf_counter() < until:
            for taken, (_, a, b, out) in zip(times, pairs, strict=True):
                start = time.perf_counter()
                torch.bmm(a, b, out=out) if len(a) > 1 else torch.mm(a[0], b[0], out=out[0])
                taken.append(time.perf_counter() - start)
    return 1 / sum(share * statistics.median(taken) for (share, *_), taken in zip(pairs, times, strict=True))


def profile(algorithm: str = "sac", env: str = "HalfCheetah-v5", updates: int = 300) -> Report:
    """A profile of a compiled update, and of the rest of a training step."""
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True  # so that fused kernels have names
    learner = _warm(algorithm, env)
    parts = dict.fromkeys(("environment", "replay", "update"), 0.0)
    unwatch = [
        _watch(learner.source.env, "step", parts, "environment"),
        _watch(learner.source, "add", parts, "replay"),
        _watch(learner, "updates", parts, "update"),
    ]
    start = time.perf_counter()
    learner.learn(updates, reset_num_timesteps=False)
    whole = time.perf_counter() - start
    for undo in unwatch:
        undo()
    every = learner.agent.improve_every
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded, learner.training():
        for number in range(1, updates + 1):
            learner.updates([number % every == 0], learner.source.env.x, ())  # type: ignore[misc]
    groups = dict.fromkeys(("matrix products", "elementwise kernels", "random numbers", "guards", "launching the rest"), 0.0)
    for event in recorded.key_averages():
        groups[_group(event.key)] += event.self_cpu_time_total / updates
    total = sum(groups.values())
    rest = {
        **{name: 1e6 * taken / updates for name, taken in parts.items()},
        "loop": 1e6 * (whole - sum(parts.values())) / updates,
    }
    lines = [
        f"a training step of {algorithm} on {env}: {1e6 * whole / updates:.0f} us, {torch.get_num_threads()} threads",
        *table(["part", "us", "share"], [[k, f"{v:.0f}", f"{v * updates / whole / 1e4:.1f} %"] for k, v in rest.items()]),
        "",
        "inside an update (under the profiler, which slows small operations)",
        *table(["part", "us", "share"], [[k, f"{v:.0f}", f"{100 * v / total:.1f} %"] for k, v in groups.items()]),
        "",
        *recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60).splitlines(),
    ]
    return Report(lines, {"versions": versions(), "step_us": rest, "update_us": groups})


def _group(name: str) -> str:
    if name.removeprefix("aoti_torch_cpu_").removeprefix("aten::").removesuffix("_out") in ("mm", "bmm", "addmm", "baddbmm"):
        return "matrix products"
    if "cpp_fused" in name or name == "aten::copy_":
        return "elementwise kernels"
    if name.startswith(("aten::rand", "aten::normal", "aten::uniform")):
        return "random numbers"
    return "guards" if name == "TorchDynamo Cache Lookup" else "launching the rest"


def _watch(owner: Any, name: str, parts: dict[str, float], part: str) -> Callable[[], None]:
    """Count the time of `owner.name` under `part`, until the returned function is called."""
    function = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        parts[part] += time.perf_counter() - start
        return result

    setattr(owner, name, timed)
    return lambda: setattr(owner, name, function)


def scaling(seconds: float = 3.0) -> Report:
    """Updates per second by batch, width and ensemble size, with the bound; environment steps per second by their number."""
    usual = {"batch": 256, "width": 256, "critics": 2}
    grown = {"batch": (64, 256, 1024, 4096), "width": (64, 256, 512, 1024), "critics": (2, 5, 10)}
    updates, seen, threads = [], set(), torch.get_num_threads()  # before worker processes take theirs
    for name, values in grown.items():
        for value in values:
            size = {**usual, name: value}
            if tuple(size.values()) in seen:
                continue
            seen.add(tuple(size.values()))
            limit = bound(products("sac", size["batch"], size["width"], size["critics"]))
            rate = _update_rate(size, seconds)
            updates.append({**size, "updates_per_s": rate, "bound": limit, "share": rate / limit})
            print(f"measured: {size}", file=sys.stderr, flush=True)
    steps = [{"num_envs": count, **_step_rates(count, seconds)} for count in (1, 2, 4, 16, 64)]
    lines = [
        f"SAC on HalfCheetah-v5, {threads} threads, {_machine()}",
        *table(list(updates[0]), [[f"{v:.3g}" for v in one.values()] for one in updates]),
        "",
        "environment steps per second of collecting with random actions",
        *table(list(steps[0]), [[f"{v:.5g}" for v in one.values()] for one in steps]),
    ]
    data = {"versions": versions(), "threads": threads, "machine": _machine(), "updates": updates, "steps": steps}
    return Report(lines, data)


def _update_rate(size: dict[str, int], seconds: float) -> float:
    width = size["width"]
    learner = _warm(
        "sac", "HalfCheetah-v5", hidden=(width, width), batch_size=size["batch"], critic={"members": size["critics"]}
    )
    count, start = 0, time.perf_counter()
    with learner.training():
        while time.perf_counter() - start < seconds:
            learner.updates([True], learner.source.env.x, ())  # type: ignore[misc]
            count += 1
    rate = count / (time.perf_counter() - start)
    learner.close()
    torch._dynamo.reset()
    return rate


def _step_rates(count: int, seconds: float) -> dict[str, float]:
    rates = {}
    for vectorization in ("sync", "async"):
        learner = learner_class("sac")(
            "HalfCheetah-v5", num_envs=count, vectorization=vectorization, compile=False, buffer_size=100_000
        )
        source, played, start = learner.source, 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            played += source.collect(functools.partial(source.env.domain.uniform, count)).transitions
        rates[vectorization] = played / (time.perf_counter() - start)
        learner.close()
    return rates


def _warm(algorithm: str, env: str, **fields: Any) -> Learner:
    """A learner with a compiled update and a filled replay."""
    learner = learner_class(algorithm)(env, seed=0, warmup_steps=1000, compile=True, **fields)
    return learner.learn(1_020)


def _machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()})"
