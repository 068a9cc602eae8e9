"""Learned steps of inference on a frozen decoder, beside the encoder that they begin from and beside Adam.

x image (B, pixels) · lam = (mean | log_std) of q(z) (B, 2 m) · f = -ELBO (B,) in nats
"""

import itertools

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rlamort.claims.inference import (
    ASKED,
    BEST_STEPS,
    HELD_OUT,
    SEED,
    SHARED,
    WIDTH,
    Asking,
    Tuning,
    adam,
    decoder,
    encoder,
    learner,
    problem,
    score,
    source,
)
from rlamort.envs.vae import VAE
from rlamort.model import Unroll
from rlamort.verdict import Measured, at_least, at_most

ITERATIVE, STEPS, DRAWS = 6_000, 5, 4  # updates, steps and draws for a gradient in training, on the frozen decoder


def measure() -> Measured:
    """Learned steps on a frozen decoder, from what its direct encoder says, beside Adam, tuned."""
    (posed, _), direct, name, k = decoder(), encoder(WIDTH), source()[1], STEPS
    noisy = problem(DRAWS)
    noisy.load_state_dict(posed.state_dict())
    refining, agent = learner("ivae", noisy.freeze(), ITERATIVE, iterations=k, **SHARED)
    model = agent.model
    assert isinstance(model, Unroll)
    model.init.load_state_dict(direct.state_dict())
    refining.learn(ITERATIVE)
    torch.manual_seed(SEED)
    x = posed.test_images[:HELD_OUT]
    with torch.no_grad():
        begin = direct(x)
        best = posed.optimum(x, [torch.zeros_like(begin), begin], steps=BEST_STEPS)
        longer = Unroll(model.init, model.update, 2 * k, model.domain, model.adjoint)
        path = Asking(longer, posed).iterates(x)
    bounds, least, top = [score(posed, lam, x) for lam in path], score(posed, begin, x), score(posed, best, x)
    before, left = top - least, top - bounds[k]
    rival = {tuning: fifty(posed, x, tuning) for tuning in grid()}  # tuned on these very images, to its advantage
    fastest = max(rival, key=rival.__getitem__)
    text = f"{name}, frozen decoder, the direct encoder and {k} learned steps"
    verdicts = [
        at_least(f"{text}: share of the direct encoder's gap of {before:.2f} nats that they close", 1 - left / before, 0.5),
        at_least(
            f"{text}: bound above that of Adam, the best of {len(rival)} tunings, after 50 steps from the prior",
            bounds[k] - rival[fastest],
            0,
            " nats",
        ),
        at_most(f"{text}: what {2 * k} steps lose against {k}", bounds[k] - bounds[2 * k], 0.1, " nats"),
    ]
    data = {
        "data": name, "direct ELBO": least, "best ELBO": top, "direct gap": before,
        "ELBO after k steps": bounds, "Adam, 50 steps from the prior": {str(tuning): value for tuning, value in rival.items()},
        "Adam, 50 steps from the encoder": fifty(posed, x, fastest, begin),
    }  # fmt: skip
    return Measured(verdicts, data, {"ivae": iterations_figure(bounds, top, rival[fastest], k)})


def grid() -> list[Tuning]:
    """Adam's settings for 50 steps, each with as many draws as a learned step has."""
    return [Tuning(*one, ASKED) for one in itertools.product((0.05, 0.1, 0.2, 0.4), (10.0, 30.0, float("inf")))]


def fifty(posed: VAE, x: Tensor, tuning: Tuning, start: Tensor | None = None) -> float:
    """The mean bound after 50 steps of Adam, from the prior unless told otherwise."""
    lam = next(itertools.islice(adam(posed, x, tuning, start), 49, None))
    return score(posed, lam, x)


def iterations_figure(bounds: list[float], best: float, rival: float, k: int) -> Figure:
    """The bound after each learned step."""
    drawn = Figure(figsize=(5, 4), layout="constrained")
    axes = drawn.subplots()
    axes.plot(bounds, "o-", label="learned steps")
    axes.axvline(k, color="k", linewidth=0.5, label="steps in training")
    axes.axhline(best, linestyle="--", color="k", label="best found")
    axes.axhline(rival, linestyle=":", color="C1", label="Adam, 50 steps from the prior")
    axes.set(xlabel="steps after the direct encoder", ylabel="ELBO, nats")
    axes.legend()
    return drawn
