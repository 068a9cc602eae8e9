"""Learned steps of inference on a frozen decoder, from an encoder's prediction or from the prior, against encoder and Adam.

x image (B, pixels) · lam = (mean | log_std) of q(z) (B, 2 m) · f = -ELBO (B,) in nats
"""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rlamort.envs.vae import VAE
from rlamort.measure.claims.inference import (
    BEST_STEPS,
    HELD_OUT,
    ORACLE_DRAWS,
    SEED,
    SHARED,
    WIDTH,
    MeanOracle,
    Tuning,
    adam,
    decoder,
    encoder,
    learner,
    problem,
    score,
    source,
)
from rlamort.measure.verdict import Measured, at_least, at_most
from rlamort.model import Model, Unroll
from rlamort.run.learner import Learner

ITERATIVE, STEPS, DRAWS = 6_000, 5, 4  # updates, steps and draws for a gradient in training, on the frozen decoder


class Frozen(NamedTuple):
    """A frozen decoder, with reference values on held-out images."""

    vae: VAE
    x: Tensor  # (N, pixels)
    direct: Model
    least: float  # the direct encoder's bound
    top: float  # the best that was found
    rival: dict[Tuning, float]  # Adam's after 50 steps from the prior: tuned on these very images, to its advantage


@functools.cache
def frozen() -> Frozen:
    """The decoder of all learned steps here."""
    (vae, _), direct = decoder(), encoder(WIDTH)
    torch.manual_seed(SEED)
    x = vae.test_images[:HELD_OUT]
    with torch.no_grad():
        begin = direct(x)
        best = vae.optimum(x, [torch.zeros_like(begin), begin], steps=BEST_STEPS)
    rival = {tuning: fifty(vae, x, tuning) for tuning in grid()}
    return Frozen(vae, x, direct, score(vae, begin, x), score(vae, best, x), rival)


def measure() -> Measured:
    """Steps from the direct encoder's prediction."""
    refining, model = steps()
    model.init.load_state_dict(frozen().direct.state_dict())
    return judged("the direct encoder and", "ivae", refining, model)


def from_prior() -> Measured:
    """Steps from the prior with a gated head, as in the paper."""
    return judged(
        "from the prior", "ivae_prior", *steps(**{"model.init": "prior", "model.update": {"head": "gated", "memory": 256}})
    )


def steps(**fields: Any) -> tuple[Learner, Unroll]:
    """Untrained learned steps on the frozen decoder."""
    noisy = problem(DRAWS)
    noisy.load_state_dict(frozen().vae.state_dict())
    refining, agent = learner("ivae", noisy.freeze(), ITERATIVE, **{"model.steps": STEPS}, **fields, **SHARED)
    assert isinstance(agent.model, Unroll)
    return refining, agent.model


def judged(name: str, figure: str, refining: Learner, model: Unroll) -> Measured:
    """Results after training."""
    vae, x, direct, least, top, rival = frozen()
    refining.learn(ITERATIVE)
    torch.manual_seed(SEED)
    longer = Unroll(model.init, model.update, 2 * STEPS, model.domain, model.adjoint)
    with torch.no_grad():
        path = MeanOracle(longer, vae).iterates(x)
    bounds, before = [score(vae, lam, x) for lam in path], top - least
    left, reached = top - bounds[STEPS], max(rival.values())
    text = f"{source()[1]}, frozen decoder, {name} {STEPS} learned steps"
    verdicts = [
        at_least(f"{text}: share of the direct encoder's gap of {before:.2f} nats that they close", 1 - left / before, 0.5),
        at_least(
            f"{text}: bound above that of Adam, the best of {len(rival)} tunings, after 50 steps from the prior",
            bounds[STEPS] - reached,
            0,
            " nats",
        ),
        at_most(f"{text}: what {2 * STEPS} steps lose against {STEPS}", bounds[STEPS] - bounds[2 * STEPS], 0.1, " nats"),
    ]
    data = {
        "data": source()[1], "direct ELBO": least, "best ELBO": top, "direct gap": before, "ELBO after k steps": bounds,
        "Adam, 50 steps from the prior": {str(tuning): value for tuning, value in rival.items()},
        "Adam, 50 steps from the encoder": fifty(vae, x, max(rival, key=rival.__getitem__), direct(x).detach()),
    }  # fmt: skip
    return Measured(verdicts, data, {figure: iterations_figure(bounds, least, top, reached)})


def grid() -> list[Tuning]:
    """Adam's settings for 50 steps, with as many draws as a learned step."""
    return [Tuning(*one, ORACLE_DRAWS) for one in itertools.product((0.05, 0.1, 0.2, 0.4), (10.0, 30.0, float("inf")))]


def fifty(vae: VAE, x: Tensor, tuning: Tuning, start: Tensor | None = None) -> float:
    """The mean ELBO after 50 steps of Adam, from the prior by default."""
    lam = next(itertools.islice(adam(vae, x, tuning, start), 49, None))
    return score(vae, lam, x)


def iterations_figure(bounds: list[float], direct: float, best: float, rival: float) -> Figure:
    """The ELBO after each learned step."""
    fig = Figure(figsize=(5, 4), layout="constrained")
    axes = fig.subplots()
    axes.plot(bounds, "o-", label="learned steps")
    axes.axvline(STEPS, color="k", linewidth=0.5, label="steps in training")
    axes.axhline(best, linestyle="--", color="k", label="best found")
    axes.axhline(direct, linestyle="-.", color="C2", label="direct encoder")
    axes.axhline(rival, linestyle=":", color="C1", label="Adam, 50 steps from the prior")
    low = min(direct, rival, bounds[1])
    axes.set(xlabel="steps", ylabel="ELBO, nats", ylim=(low - 0.3 * (best - low), best + 0.1 * (best - low)))
    axes.legend()
    return fig
