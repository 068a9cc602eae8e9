"""Bias and variance of stochastic value gradients, against finite differences of playing on known dynamics.

theta a policy's parameters (P,) · H steps of a model before the critic · M starts, in batches of B

SVG(H) is the gradient of a value whose first H + 1 actions theta chooses; what follows them is the present policy's. So its
reference moves theta in these actions alone, plays on with the present policy, and takes the difference with the same noise,
which is also that of the gradient beside it, in float64. Errors of the critic and of a learned model remain as bias. Both are
learned from states all around, since what a critic says of states that it has not met is another matter.
"""

import copy
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlamort.agent import Adam, descend
from rlamort.critic import Critic
from rlamort.domain import SquashedGaussian
from rlamort.dynamics import Dynamics, Ensemble, ValueExpansion
from rlamort.env.make import open_env
from rlamort.fits.dynamics import fit_steps
from rlamort.measure.verdict import Measured, at_most
from rlamort.model import Full
from rlamort.nets import mlp
from rlamort.objective import MaxQ, Metrics, Objective, Soft, Temperature
from rlamort.parts import Own
from rlamort.source import Batch

DISCOUNT, LENGTH = 0.9, 50  # what is cut off is worth 0.9^50 = 0.5 % of it
STARTS, BATCH, DIRECTIONS = 2_048, 32, 8
STEPS = (0, 1, 2, 4, 8, LENGTH)  # H; the last is SVG(inf), which asks no critic
TRANSITIONS, NOISE = 8_000, 1  # that critic and model are learned from; the seed of the noise of both sides of a comparison
DENSITY = SquashedGaussian(1)


def gradients() -> Measured:
    """SVG(H) on Pendulum-v1 with one critic: the whole horizon through known dynamics has the gradient of playing."""
    torch.manual_seed(0)
    known = Own()(open_env("Pendulum-v1").spec, (0,))
    policy = Full(mlp(3, (16,), 2), DENSITY.parameters)
    x, y = _states(TRANSITIONS, 8), 2 * torch.rand(TRANSITIONS, 1) - 1
    models: dict[str, Dynamics] = {"known": known, "learned": learned(known, x, y).double()}
    critic, policy = evaluated(known, policy, x, y).double(), policy.double()
    start = _states(STARTS, 4).double()
    lines = nn.functional.normalize(torch.randn(DIRECTIONS, sum(p.numel() for p in policy.parameters())).double(), dim=-1)
    data: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for steps in STEPS:
        exact = torch.stack([_difference(known, policy, start, line, min(steps + 1, LENGTH)) for line in lines])
        tail = Nothing() if steps == LENGTH else MaxQ(critic, 0.0)
        for name, model in models.items():
            f = ValueExpansion(Soft(tail, DENSITY, Temperature(0.0)), model, policy, steps, DISCOUNT)
            torch.manual_seed(NOISE)
            bias = lines @ _gradient(f, policy, start) - exact
            found = torch.stack([lines @ _gradient(f, policy, part) for part in torch.split(start, BATCH)])
            data[name][_name(steps)] = {
                "bias": float(bias.norm() / exact.norm()),
                "spread": float(found.std(0).norm() / exact.norm()),
            }
            print(f"SVG({_name(steps)}), {name} dynamics: {data[name][_name(steps)]}", flush=True)
    last, first = data["known"]["inf"], data["learned"]["0"]
    verdicts = [
        at_most("Pendulum-v1: bias of SVG(inf) by known dynamics, as a share of the difference quotient", last["bias"], 0.05),
        at_most(
            f"Pendulum-v1: bias of SVG(2), learned model ({data['learned']['2']['bias']:.3g}), as a multiple of SVG(0)'s by "
            f"the same critic ({first['bias']:.3g})", data["learned"]["2"]["bias"] / first["bias"], 1,
        ),
    ]  # fmt: skip
    return Measured(verdicts, data, {"svg_gradients": figure(data)})


class Nothing(Objective):
    """What follows the horizon costs nothing."""

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return x.new_zeros(len(x)), {}


def learned(known: Dynamics, x: Tensor, y: Tensor) -> Ensemble:
    """An ensemble, fitted to transitions from x (M, d) by y (M, n)."""
    moved = known(x, y)
    ensemble = Ensemble(3, 1, (64, 64), 5)
    met = Batch(x, y, moved.reward, torch.full((len(x),), DISCOUNT), torch.zeros(len(x), dtype=torch.bool), moved.x_next)
    fit_steps(ensemble, Adam(ensemble.parameters(), 1e-3), met, 2_000, 128)
    return ensemble


def evaluated(known: Dynamics, policy: Full, x: Tensor, y: Tensor) -> Critic:
    """Q of the policy, by regression on returns that were played from x (M, d) and y (M, n)."""
    with torch.no_grad():
        moved = known(x, y)
        target = moved.reward + DISCOUNT * _played(known, [policy] * LENGTH, moved.x_next)
    critic = Critic(3, 1, (64, 64), 2)
    adam = Adam(critic.parameters(), 1e-3)
    for _ in range(3_000):
        index = torch.randint(len(x), (128,))
        descend((critic(x[index], y[index]) - target[index]).square().mean(), critic.parameters(), adam)
    return critic


def figure(data: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Bias and spread over H."""
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what in zip(fig.subplots(1, 2), ("bias", "spread"), strict=True):
        for name, found in data.items():
            axes.plot(list(found), [one[what] for one in found.values()], "o-", label=f"{name} dynamics")
        axes.set(yscale="log", xlabel="H, steps of the model", title=f"{what}, as a share of the gradient's length")
        axes.grid(alpha=0.3)
        axes.legend()
    return fig


def _name(steps: int) -> str:
    return "inf" if steps == LENGTH else str(steps)


def _states(count: int, fastest: float) -> Tensor:
    """States of the pendulum, all around and up to a velocity in rad/s, of which 8 is its largest."""
    angle, velocity = torch.pi * (2 * torch.rand(count) - 1), fastest * (2 * torch.rand(count) - 1)
    return torch.stack([angle.cos(), angle.sin(), velocity], -1)


def _gradient(f: ValueExpansion, policy: Full, x: Tensor) -> Tensor:
    """Of mean f over x (B, d), with respect to theta (P,)."""
    parameters = list(policy.parameters())
    found = torch.autograd.grad(f(policy(x), x).mean(), parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@torch.no_grad()
def _difference(known: Dynamics, policy: Full, x: Tensor, line: Tensor, chosen: int, by: float = 1e-5) -> Tensor:
    """The slope along `line` (P,) of minus the return from x (M, d), where theta moves in the first `chosen` actions alone."""
    returns = []
    for side in (by, -by):
        moved = copy.deepcopy(policy)
        vector = nn.utils.parameters_to_vector(moved.parameters())
        nn.utils.vector_to_parameters(vector + side * line, moved.parameters())
        torch.manual_seed(NOISE)
        returns.append(-_played(known, [moved] * chosen + [policy] * (LENGTH - chosen), x).mean())
    return (returns[0] - returns[1]) / (2 * by)


def _played(known: Dynamics, path: Sequence[Full], x: Tensor) -> Tensor:
    """The return from x (M, d) with the policy of each step."""
    value = x.new_zeros(len(x))
    for t, policy in enumerate(path):
        x, reward, _ = known(x, DENSITY.draw(policy(x)))
        value = value + DISCOUNT**t * reward
    return value
