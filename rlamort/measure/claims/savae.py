"""Semi-amortized inference against the encoder alone, and exact second derivatives against finite differences of gradients.

x image (B, pixels) · lam = (mean | log_std) of q(z) (B, 2 m) · f = -ELBO (B,) in nats · K refinements
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlamort.envs.vae import VAE, Averaged, FixedNoise, Reconstruction
from rlamort.measure.claims.inference import (
    BEST_STEPS,
    HELD_OUT,
    SCORED,
    SEED,
    SHARED,
    MeanOracle,
    learned,
    learner,
    problem,
    score,
    source,
)
from rlamort.measure.verdict import Measured, at_least, at_most
from rlamort.model import Model, Unroll
from rlamort.objective import Cost, Metrics, Objective, Oracle, Soft

REFINED = 4_000  # updates of each contestant, which take several times as long as an encoder's
K, DRAWS = 8, 2  # steps, and draws for a gradient while they are trained
FEWER = 100  # draws, where a mean is over all images held out
FINITE = 1e-5  # the step of Kim et al.'s finite differences


def measure() -> Measured:
    """Refinement trained through its steps, against the encoder alone: each with its own decoder, of the same size."""
    name, plain = source()[1], problem(DRAWS)
    encoding = learned("vae", plain, REFINED, **SHARED)
    vae, model = refined(Cost)
    bound = {"encoder": everywhere(plain, encoding), "refined": everywhere(vae, model)}
    found = {}
    for label, own, one in (("encoder", plain, encoding), ("refined", vae, model)):
        torch.manual_seed(SEED)
        found[label] = own.decompose(MeanOracle(one, own), own.test_images[:HELD_OUT], SCORED, BEST_STEPS)
    gap = {label: one.amortization.mean().item() for label, one in found.items()}
    text = f"{name}, {REFINED} updates each, K = {K}"
    verdicts = [
        at_least(f"{text}: held-out bound above that of the encoder alone", bound["refined"] - bound["encoder"], 0.3, " nats"),
        at_most(f"{text}: remaining gap, as a share of the encoder's", gap["refined"] / gap["encoder"], 0.5),
        at_most("a batch of 64 beside single images: largest difference of a refined lam, in float64", apart(vae, model), 1e-8),
    ]
    x = vae.test_images[:HELD_OUT]
    data = {
        "data": name, "ELBO": bound, "amortization gap": gap,
        "ELBO after K steps": {steps: after(vae, model, x, steps) for steps in (0, 4, 8, 20)},
        "NLL (importance-weighted)": {label: -one.log_likelihood.mean().item() for label, one in found.items()},
        "approximation gap": {label: one.approximation.mean().item() for label, one in found.items()},
    }  # fmt: skip
    return Measured(verdicts, data, {})


def differences() -> Measured:
    """Exact second derivatives against the finite differences of Kim et al., in training and by the error of one gradient."""
    vae, model = refined(Cost)
    bound = {"exact": everywhere(vae, model), "finite differences": everywhere(*refined(Differenced))}
    errors = gradient_errors(vae, model)
    text = f"{source()[1]}, {REFINED} updates each, K = {K}"
    verdicts = [
        at_most("error of the loss's gradient in float32, against float64: exact second derivatives", errors["exact"], 1e-3),
        at_least(
            f"that of finite differences with r = {FINITE:g}, as in the paper's code: as a multiple",
            errors["finite differences"] / errors["exact"],
            1,
            "x",
        ),
        at_least(
            f"{text}: held-out bound with exact second derivatives above that with finite differences, within 0.1 nats",
            bound["exact"] - bound["finite differences"],
            -0.1,
            " nats",
        ),
    ]
    return Measured(verdicts, {"data": source()[1], "ELBO": bound, "gradient errors": errors}, {})


@functools.cache
def refined(kind: type[Cost]) -> tuple[VAE, Unroll]:
    """A decoder, and the semi-amortized model trained with it; `kind` is the class of its cost."""
    vae = problem(DRAWS)
    refining, agent = learner("savae", vae, REFINED, **{"model.steps": K}, **SHARED)
    agent.f = kind(vae)
    refining.learn(REFINED)
    assert isinstance(agent.model, Unroll)
    return vae, agent.model


@torch.no_grad()
def everywhere(vae: VAE, model: Model) -> float:
    """The mean ELBO on all held-out images, since the difference of two decoders varies between images."""
    torch.manual_seed(SEED)
    x = vae.test_images
    return score(vae, MeanOracle(model, vae)(x), x, FEWER)


@torch.no_grad()
def after(vae: VAE, model: Unroll, x: Tensor, steps: int) -> float:
    """The mean ELBO after a number of steps, which may differ from training."""
    longer = Unroll(model.init, model.update, steps, model.domain, model.adjoint)
    return score(vae, MeanOracle(longer, vae)(x), x)


@torch.no_grad()
def apart(vae: VAE, model: Model) -> float:
    """The difference of lam between a batch of 64 and single images, in float64 with the same draws."""
    exact, solver = copy.deepcopy((vae, model))
    exact, solver, x = exact.double(), solver.double(), vae.test_images[:64].double()
    f = exact.bound(torch.randn(4, vae.latent).double())
    alone = torch.cat([solver(one[None], f.oracle(one[None])) for one in x])
    furthest: float = (alone - solver(x, f.oracle(x))).abs().max().item()
    return furthest


class Differenced(Cost):
    """The cost, whose oracle's gradients are differentiated by differences of gradients (Kim et al., 2018, section 3.2).

    Args:
        problem: a VAE; its draws, anew for each gradient, are kept for the difference.
    """

    problem: VAE

    def oracle(self, x: Tensor) -> Oracle:
        vae = self.problem
        owned = [p for p in vae.parameters() if p.requires_grad]

        def fixed_noise() -> Objective:
            noise = torch.randn(len(x) * vae.f.draws, vae.latent, dtype=x.dtype, device=x.device)
            return Averaged(Soft(Reconstruction(vae), FixedNoise(noise), vae.alpha), vae.f.draws)

        return DifferencedOracle(fixed_noise, x, owned)


class Remade(Objective):
    """An objective that is rebuilt for each value."""

    def __init__(self, make: Callable[[], Objective]) -> None:
        self.make = make

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        return self.make().report(y, x)


class DifferencedOracle(Oracle):
    """Gradients with derivatives (grad f(y + r v) - grad f(y)) / r, in y and in parameters of f.

    Args:
        make: f, deterministic, for each gradient.
        x: (B, pixels).
        owned: the parameters.
    """

    def __init__(self, make: Callable[[], Objective], x: Tensor, owned: list[nn.Parameter]) -> None:
        super().__init__(Remade(make), x)
        self.make, self.owned = make, owned

    def grad(self, y: Tensor) -> Tensor:
        f = self.make()
        slope: Tensor = _Difference.apply(lambda at: f(at, self.x), y, *self.owned)  # type: ignore[no-untyped-call]
        return slope


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], y: Tensor, *owned: Tensor) -> Tensor:
        ctx.f, ctx.y, ctx.owned = f, y.detach(), owned
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            return torch.autograd.grad(f(at).sum(), at)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        ends = []
        with torch.enable_grad():
            for point in (ctx.y + FINITE * v, ctx.y):
                at = point.detach().requires_grad_()
                ends.append(torch.autograd.grad(ctx.f(at).sum(), (at, *ctx.owned)))
        return None, *((ahead - here) / FINITE for ahead, here in zip(*ends, strict=True))


def gradient_errors(vae: VAE, model: Model) -> dict[str, float]:
    """Relative errors of the gradient of savae's loss in float32, by the method of second derivatives."""
    noise = torch.randn(4, vae.latent)

    def slope(kind: str, dtype: torch.dtype) -> Tensor:
        own, solver = copy.deepcopy((vae, model))
        own, solver, x = own.to(dtype), solver.to(dtype), vae.test_images[:64].to(dtype)
        f, theirs = own.bound(noise.to(dtype)), [p for p in own.parameters() if p.requires_grad]
        owned = [*(p for p in solver.parameters() if p.requires_grad), *theirs]
        oracle = f.oracle(x) if kind == "exact" else DifferencedOracle(lambda: f, x, theirs)
        loss = f(solver(x, oracle), x).mean()
        return torch.cat([part.double().ravel() for part in torch.autograd.grad(loss, owned)])

    true = slope("exact", torch.float64)
    return {kind: ((slope(kind, torch.float32) - true).norm() / true.norm()).item() for kind in ("exact", "finite differences")}
