"""Moments of PILCO in closed form beside draws. w = (x, y) a normal input · D outputs"""

import torch
from torch import Tensor

from rlamort.agent import Adam, descend
from rlamort.domain import unit_box
from rlamort.dynamics import GaussianProcess, Saturating
from rlamort.dynamics.moments import Moments, sines
from rlamort.envs.cartpole import SwingUp
from rlamort.measure.verdict import Measured, at_most
from rlamort.radial import Radial, Sine
from rlamort.source import Batch

DRAWS, INPUTS, POINTS = 100_000, 5, 150  # draws of each normal input; inputs; data of the process
WIDTH = 0.3  # of the inputs' random covariances
LARGEST = 0.02  # difference, as a share of the largest entry


def moments() -> Measured:
    """Mean, covariance and input-output covariance of process, policy, sines and reward are within 2 % of 1e5 draws."""
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(0)
    reward = Saturating([0, 0, 1, 0, 0], [0.5, 0, 0.5, 0.5, 0])
    process, policy = learned(reward, made), Sine(Radial(5, 50, 1), unit_box(1)).double()
    worst: dict[str, dict[str, float]] = {}
    for _ in range(INPUTS):
        root = WIDTH * torch.randn(6, 6, generator=made, dtype=torch.float64)
        mean, cov = torch.randn(6, generator=made, dtype=torch.float64) / 2, root @ root.mT
        half = torch.randn(DRAWS // 2, 6, generator=made, dtype=torch.float64) @ root.mT
        w = mean + torch.cat([half, -half])
        x, of_x = w[:, :5], (mean[:5], cov[:5, :5])
        with torch.no_grad():
            change, variance = process.predict(x, w[:, 5:])
            which = torch.tensor([False, False, False, True, True])
            pairs = {
                "process": (process.moments(mean, cov), cov, w, change, variance.mean(0)),
                "policy": (policy.net.moments(*of_x), cov[:5, :5], x, policy.net(x), None),
                "sines": (sines(*of_x, which), cov[:5, :5], x, torch.where(which, x.sin(), x), None),
            }
        for name, one in pairs.items():
            found = differences(*one)
            worst[name] = {key: max(value, worst.get(name, {}).get(key, 0.0)) for key, value in found.items()}
        exact, drawn = float(reward.expected(mean, cov)), float(reward(x, w[:, 5:], x).mean())
        worst["reward"] = {"mean": max(abs(exact / drawn - 1), worst.get("reward", {}).get("mean", 0.0))}
    verdicts = [
        at_most(f"{name}: {key} in closed form, largest difference from {DRAWS:,} draws of {INPUTS} inputs", value, LARGEST)
        for name, found in worst.items()
        for key, value in found.items()
    ]
    return Measured(verdicts, {"differences": worst}, {})


def differences(found: Moments, cov: Tensor, w: Tensor, drawn: Tensor, within: Tensor | None) -> dict[str, float]:
    """The largest differences as shares of the largest entry, where outputs `drawn` (S, D) have further variance `within`."""
    away = w - w.mean(0)
    spread = torch.cov(drawn.mT).view(drawn.shape[1], -1) + torch.diag(torch.zeros_like(drawn[0]) if within is None else within)
    pairs = {
        "mean": (found.mean, drawn.mean(0)),
        "covariance": (found.cov, spread),
        "input-output covariance": (cov @ found.slope, away.mT @ drawn / len(w)),
    }
    return {name: float((ours - theirs).abs().max() / theirs.abs().max()) for name, (ours, theirs) in pairs.items()}


def learned(reward: Saturating, made: torch.Generator) -> GaussianProcess:
    """A process that is fitted to transitions of the cart-pole from states all around."""
    position, speed, theta, turn = 1.5 * torch.randn(4, POINTS, generator=made, dtype=torch.float64)
    x = torch.stack([position, speed, theta.cos(), theta.sin(), 2 * turn], -1)
    y = 2 * torch.rand(POINTS, 1, generator=made, dtype=torch.float64) - 1
    x_next, paid, _ = SwingUp().dynamics(x, 10 * y)
    process = GaussianProcess(5, 1, reward, (2, 3))
    adam, targets = Adam(process.parameters(), 0.05), process.hold(Batch(x, y, paid, paid, paid > 1, x_next))
    for _ in range(100):
        descend(process.loss(targets), process.parameters(), adam)
    process.condition(targets)
    return process
