"""Amortized inference on images held out: an encoder, one refined by gradient steps, one by learned steps.

x image (B, pixels) · lam = (mean | log_std) of q(z) (B, 2 m) · f = -ELBO (B,) in nats · S draws of z · K refinements

Every gap is against the best lam that Adam finds for each image, from the prior and from an encoder, under 64 draws common to
all images; it and the encoder are scored under other draws, the same for both. Settings are chosen on images set aside, an
eighth of those for training, on which nothing is trained; images held out are for the claims alone.
"""

import copy
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlamort.agents.amortize import Amortize
from rlamort.envs.images import load
from rlamort.envs.vae import VAE, Averaged, Bernoulli, Held, Reconstruction
from rlamort.model import Model, Unroll
from rlamort.objective import Cost, Objective, Oracle, Soft
from rlamort.run import Learner, learner_class
from rlamort.verdict import Measured, at_least, at_most

LATENT, DECODER, WARP = 10, (400,), 0.05
UPDATES = 12_000  # of decoder and encoder together, and again of an encoder on the frozen decoder
REFINED = 4_000  # of each of savae's contestants, which take several times as long
ITERATIVE = 6_000  # of ivae's steps, on the frozen decoder
WIDTH = 100  # of savae's and ivae's encoders, and of the one with which the decoder is trained
WIDTHS = (50, 100, 200, 400)  # on the curve; vae's claims are about one of them
CHOSEN_GAP = 3.5  # nats on images set aside: of the encoders with no more than that, the one that best keeps its speed-ups
ASIDE = 8  # of so many images for training, one is set aside
HELD_OUT, SCORED, BEST_STEPS = 256, 1_000, 100  # images, draws, and Adam's steps that find the best lam
FEWER = 100  # draws, where a mean is over all images held out
SEED = 1_000_000
SPEEDUPS = {1: 500, 1_024: 300}  # claimed, by batch size
SIZES = tuple(SPEEDUPS)
SPLITS = (1, 4)  # parts into which a batch is cut, where that is faster; for encoder and Adam alike
EVERY, LIMIT = 5, 600  # steps of Adam between two looks at what it has reached, and at most
GAP_FOR_SPEED = 5.0  # nats: what is less accurate has no claim to be fast
PROTOCOL = 2_000  # steps of Adam in the tutorial
FINITE = 1e-5  # the step of Kim et al.'s finite differences
ASKED, DRAWS = 16, 4  # draws for a gradient that a trained model asks for; while ivae's steps are trained
K, SEMI_DRAWS = 8, 2  # savae's steps, and draws while they are trained
SHARED = {"hidden": (WIDTH,), "batch_size": 64}  # of all that is refined, and of the encoders beside it
LOOKS = frozenset(round(2 ** (i / 2)) for i in range(22)) | {PROTOCOL}  # steps at which a curve has a point


def source() -> tuple[str, str]:
    """Where images come from, and what they are called: the file that RLAMORT_MNIST names, or scikit-learn's digits."""
    given = os.environ.get("RLAMORT_MNIST")
    return (given, "MNIST") if given else ("digits", "scikit-learn's digits")


def problem(draws: int = 1) -> VAE:
    """One of these images, less those set aside; its decoder is untrained."""
    torch.manual_seed(0)
    vae = VAE(data=source()[0], latent=LATENT, hidden=DECODER, warp=WARP, draws=draws)
    vae.train_images = vae.train_images[len(vae.train_images) // ASIDE :]
    return vae


def aside() -> Tensor:
    """Images (N, pixels) to choose settings by, binarised once and for all."""
    images = load(source()[0]).train
    return Bernoulli().pixels(images[: len(images) // ASIDE].flatten(1), torch.Generator().manual_seed(0))


def learner(row: str, vae: VAE, updates: int, **fields: Any) -> tuple[Learner, Amortize]:
    """A method on these images, which is to take that many updates, and its agent."""
    made = learner_class(row)(vae, decay_updates=updates, seed=0, **fields)
    assert isinstance(made.agent, Amortize)
    return made, made.agent


def learned(row: str, vae: VAE, updates: int, **fields: Any) -> Model:
    """The model of a method, trained on these images."""
    made, agent = learner(row, vae, updates, **fields)
    made.learn(updates)
    return agent.model


@functools.cache
def decoder() -> tuple[VAE, Model]:
    """A trained and frozen decoder, and the encoder that was trained with it."""
    vae = problem()
    model = learned("vae", vae, UPDATES, hidden=(WIDTH,))
    return vae.freeze(), model


@functools.cache
def encoder(width: int) -> Model:
    """The encoder of this width that is trained for the frozen decoder alone."""
    return learned("vae", decoder()[0], UPDATES, hidden=(width,))


def score(posed: VAE, lam: Tensor, x: Tensor, samples: int = SCORED) -> float:
    """The mean bound, under the same draws for every lam."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return posed.elbo(lam, x, samples).mean().item()


# vae


def vae() -> Measured:
    """The gap and the speed of encoders of several widths, beside Adam, tuned, and beside the tutorial's protocol."""
    (posed, first), name = decoder(), source()[1]
    torch.manual_seed(SEED)
    x = posed.test_images[:HELD_OUT]
    encoders = {width: encoder(width) for width in WIDTHS}
    chosen, tried = choose(posed, encoders)
    with torch.no_grad():
        lams = {width: model(x) for width, model in encoders.items()}
        best = posed.optimum(x, [torch.zeros_like(lams[chosen]), lams[max(WIDTHS)]], steps=BEST_STEPS)
    gaps = {width: posed.decompose(model, x, SCORED, best=best) for width, model in encoders.items()}
    joint = posed.decompose(first, x, SCORED, best=best)
    same = posed.bound(torch.randn(64, posed.latent, generator=torch.Generator().manual_seed(0)))  # as in `optimum`
    races = race(posed, encoders, x)
    main, gap = gaps[chosen], {width: one.amortization.mean().item() for width, one in gaps.items()}
    steps, reached = tutorial(posed, x)
    seconds = step_seconds(posed, spread(x, SIZES[-1]), 1) * steps
    label = f"{name}, encoder of width {chosen}, chosen on images set aside"
    verdicts = [
        at_most(f"{label}: mean amortization gap on {len(x)} held-out images (goal 2)", gap[chosen], 4, " nats"),
        *(
            at_least(
                f"{label}, batch of {size}, at a gap of at most {GAP_FOR_SPEED:g} nats: faster than Adam, the fastest of "
                f"{len(tunings())} tunings, until that has the encoder's own ELBO",
                races[chosen].ratio(size) if gap[chosen] <= GAP_FOR_SPEED else float("nan"),
                least,
                "x",
            )
            for size, least in SPEEDUPS.items()
        ),
        at_least(
            f"{label}, batch of {SIZES[-1]}: faster than the tutorial's protocol, 2000 steps of Adam at 5e-3 from zero; at "
            f"unequal quality, its ELBO {reached:.1f}, the encoder's {main.elbo.mean():.1f}",
            seconds / races[chosen].encoder[SIZES[-1]],
            10_000,
            "x",
        ),
    ]
    with torch.no_grad():
        data = {
            "data": name,
            "ELBO": {width: one.elbo.mean().item() for width, one in gaps.items()},
            "best ELBO": main.best.mean().item(),
            "NLL (importance-weighted)": -main.log_likelihood.mean().item(),
            "approximation gap": main.approximation.mean().item(),
            "amortization gap": gap,
            "on images set aside": tried,
            "amortization gap, largest": {width: one.amortization.max().item() for width, one in gaps.items()},
            "amortization gap under the draws that found the best": {
                width: (same(lam, x) - same(best, x)).mean().item() for width, lam in lams.items()
            },
            "amortization gap of the encoder trained with the decoder": joint.amortization.mean().item(),
            "races": {width: one.told() for width, one in races.items()},
            "tutorial": {"steps": steps, "ELBO": reached, "seconds": seconds},
        }
        figures = {
            "vae_trade": trade_figure(gap, races),
            "vae_speed": speed_figure(posed, x[:64], lams[chosen][:64], races[chosen]),
            "vae_images": images_figure(posed, encoders[chosen], x[:12]),
        }
    return Measured(verdicts, data, figures)


@torch.no_grad()
def choose(posed: VAE, encoders: Mapping[int, Model]) -> tuple[int, dict[str, dict[int, float]]]:
    """The width that claims are about, and by what it was chosen: gaps and speed-ups on images set aside."""
    x = aside()[: HELD_OUT // 2]
    lams = {width: model(x) for width, model in encoders.items()}
    widest = lams[max(lams)]
    top = score(posed, posed.optimum(x, [torch.zeros_like(widest), widest], steps=BEST_STEPS), x)
    gap = {width: top - score(posed, lam, x) for width, lam in lams.items()}
    races = race(posed, encoders, x)
    kept = {width: min(one.ratio(size) / least for size, least in SPEEDUPS.items()) for width, one in races.items()}
    near = [width for width in gap if gap[width] <= CHOSEN_GAP] or [min(gap, key=gap.__getitem__)]
    return max(near, key=kept.__getitem__), {"amortization gap": gap, "speed-up over what is claimed": kept}


class Tuning(NamedTuple):
    """How Adam is set: its rate is rate / (1 + t / pace) at step t, its gradients the mean of some draws."""

    rate: float
    pace: float
    draws: int

    def __str__(self) -> str:
        return f"rate {self.rate:g}, pace {self.pace:g}, {self.draws} draws"


def tunings() -> list[Tuning]:
    """The grid."""
    return [Tuning(*one) for one in itertools.product((0.03, 0.1, 0.3), (50.0, float("inf")), (1, 4))]


class Race(NamedTuple):
    """Seconds, by batch size."""

    encoder: dict[int, float]
    steps: dict[Tuning, int]  # that Adam needs at least
    step: dict[int, dict[int, float]]  # seconds of one, by batch size and draws

    def fastest(self, size: int) -> tuple[float, Tuning]:
        """Adam's seconds, and how it is set."""
        return min((n * self.step[size][tuning.draws], tuning) for tuning, n in self.steps.items())

    def ratio(self, size: int) -> float:
        return self.fastest(size)[0] / self.encoder[size]

    def told(self) -> dict[str, Any]:
        return {
            f"batch of {size}": {
                "encoder seconds": self.encoder[size], "Adam seconds": self.fastest(size)[0],
                "Adam": str(self.fastest(size)[1]), "ratio": self.ratio(size),
            }
            for size in self.encoder
        } | {"steps": {str(tuning): n for tuning, n in self.steps.items()}}  # fmt: skip


def race(posed: VAE, encoders: Mapping[int, Model], x: Tensor) -> dict[int, Race]:
    """How long Adam, from the prior, takes to each encoder's mean ELBO on x, by width; steps are counted first, then timed."""
    few = x[:128]
    judge = posed.bound(torch.randn(32, posed.latent))
    with torch.no_grad():
        targets = {width: judge(model(few), few).mean().item() for width, model in encoders.items()}
    steps = {tuning: needed(posed, few, judge, targets, tuning) for tuning in tunings()}
    step = {size: {s: step_seconds(posed, spread(x, size), s) for s in {one.draws for one in steps}} for size in SIZES}
    races = {}
    for width, model in encoders.items():
        with torch.inference_mode():
            ours = {size: shortest(lambda part, model=model: model(part), spread(x, size)) for size in SIZES}  # type: ignore[misc]
        races[width] = Race(ours, {tuning: found[width] for tuning, found in steps.items()}, step)
    return races


@torch.no_grad()
def needed(posed: VAE, x: Tensor, judge: Objective, targets: Mapping[int, float], tuning: Tuning) -> dict[int, int]:
    """Steps of Adam until the mean cost is each target: the least that looking every EVERY steps allows for, LIMIT at most."""
    found: dict[int, int] = {}
    for k, lam in enumerate(itertools.islice(adam(posed, x, tuning), LIMIT), 1):
        if k % EVERY == 0:
            cost = judge(lam, x).mean().item()
            found |= {one: k - EVERY + 1 for one, target in targets.items() if one not in found and cost <= target}
        if len(found) == len(targets):
            break
    return {one: found.get(one, LIMIT) for one in targets}


def adam(posed: VAE, x: Tensor, tuning: Tuning, start: Tensor | None = None) -> Iterator[Tensor]:
    """lam (B, 2 m) after every step of Adam on each image alone, from the prior unless told otherwise."""
    f = Averaged(posed.f.f, tuning.draws)
    lam = x.new_zeros(len(x), 2 * posed.latent) if start is None else start.clone()
    lam.requires_grad_()
    optimiser = torch.optim.Adam([lam], lr=tuning.rate, fused=True)
    for t in itertools.count():
        optimiser.param_groups[0]["lr"] = tuning.rate / (1 + t / tuning.pace)
        with torch.enable_grad():
            (lam.grad,) = torch.autograd.grad(f(lam, x).sum(), lam)
        optimiser.step()
        yield lam.detach()


def step_seconds(posed: VAE, x: Tensor, draws: int) -> float:
    """Of one step of Adam."""

    def run(part: Tensor) -> Callable[[], Any]:
        path = adam(posed, part, Tuning(0.01, float("inf"), draws))
        return lambda: next(path)

    found = []
    for parts in splits(x):
        paths = [run(part) for part in parts]
        found.append(median(lambda paths=paths: [step() for step in paths]))  # type: ignore[misc]
    return min(found)


def shortest(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """Median seconds on x, cut into as many parts as is fastest."""
    return min(median(lambda parts=parts: [call(part) for part in parts]) for parts in splits(x))  # type: ignore[misc]


def splits(x: Tensor) -> list[tuple[Tensor, ...]]:
    return [x.tensor_split(parts) for parts in SPLITS if parts <= len(x)]


def spread(x: Tensor, size: int) -> Tensor:
    """(size, pixels), the images again and again."""
    return x[torch.arange(size) % len(x)]


def median(call: Callable[[], Any], repeats: int = 21) -> float:
    """Seconds, warm."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def tutorial(posed: VAE, x: Tensor) -> tuple[int, float]:
    """The tutorial's protocol: 2000 steps of Adam at 5e-3 from zero, a draw each; steps, and the ELBO that they reach."""
    lam = next(itertools.islice(adam(posed, x, Tuning(5e-3, float("inf"), 1)), PROTOCOL - 1, None))
    return PROTOCOL, score(posed, lam, x)


# savae


@functools.cache
def refined(kind: type[Cost]) -> tuple[VAE, Unroll]:
    """A decoder, and the semi-amortized model trained with it; `kind` is the cost that it asks."""
    posed = problem(SEMI_DRAWS)
    refining, agent = learner("savae", posed, REFINED, iterations=K, **SHARED)
    agent.f = kind(posed)
    refining.learn(REFINED)
    assert isinstance(agent.model, Unroll)
    return posed, agent.model


@torch.no_grad()
def everywhere(posed: VAE, model: Model) -> float:
    """The mean bound on all images held out, since what two decoders differ by varies from image to image."""
    torch.manual_seed(SEED)
    x = posed.test_images
    return score(posed, Asking(model, posed)(x), x, FEWER)


def savae() -> Measured:
    """Refinement learned through its steps, beside the encoder alone: each with a decoder of its own, of the same size."""
    name, plain = source()[1], problem(SEMI_DRAWS)
    encoding = learned("vae", plain, REFINED, **SHARED)
    posed, model = refined(Cost)
    bound = {"encoder": everywhere(plain, encoding), "refined": everywhere(posed, model)}
    found = {}
    for label, vae, one in (("encoder", plain, encoding), ("refined", posed, model)):
        torch.manual_seed(SEED)
        found[label] = vae.decompose(Asking(one, vae), vae.test_images[:HELD_OUT], SCORED, BEST_STEPS)
    gap = {label: one.amortization.mean().item() for label, one in found.items()}
    text = f"{name}, {REFINED} updates each, K = {K}"
    verdicts = [
        at_least(f"{text}: held-out bound above that of the encoder alone", bound["refined"] - bound["encoder"], 0.3, " nats"),
        at_most(f"{text}: remaining gap, as a share of the encoder's", gap["refined"] / gap["encoder"], 0.5),
        at_most(
            "a batch of 64 beside single images: largest difference of a refined lam, in float64", apart(posed, model), 1e-8
        ),
    ]
    x = posed.test_images[:HELD_OUT]
    data = {
        "data": name, "ELBO": bound, "amortization gap": gap,
        "ELBO after K steps": {steps: after(posed, model, x, steps) for steps in (0, 4, 8, 20)},
        "NLL (importance-weighted)": {label: -one.log_likelihood.mean().item() for label, one in found.items()},
        "approximation gap": {label: one.approximation.mean().item() for label, one in found.items()},
    }  # fmt: skip
    return Measured(verdicts, data, {})


def differences() -> Measured:
    """Exact second derivatives beside the finite differences of Kim et al., in training and by the error of one gradient."""
    posed, model = refined(Cost)
    bound = {"exact": everywhere(posed, model), "finite differences": everywhere(*refined(Differenced))}
    errors = gradient_errors(posed, model)
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


class Asking(Model):
    """A model that asks the mean of ASKED draws.

    Args:
        model: semi-amortized, or full.
        posed: what it asks about.
    """

    def __init__(self, model: Model, posed: VAE) -> None:
        super().__init__()
        self.model, self.f = model, Averaged(posed.f.f, ASKED)

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.model.iterates(x, self.f.oracle(x))


@torch.no_grad()
def after(posed: VAE, model: Unroll, x: Tensor, steps: int) -> float:
    """The mean bound after as many steps as asked, whatever it was trained for."""
    longer = Unroll(model.init, model.update, steps, model.domain, model.adjoint)
    return score(posed, Asking(longer, posed)(x), x)


class Differenced(Cost):
    """The cost, whose oracle's gradients are differentiated by differences of gradients (Kim et al., 2018, section 3.2).

    Args:
        problem: a VAE; its draws, anew for each gradient, are kept for the difference.
    """

    problem: VAE

    def oracle(self, x: Tensor) -> Oracle:
        posed = self.problem
        owned = [p for p in posed.parameters() if p.requires_grad]

        def held() -> Objective:
            noise = torch.randn(len(x) * posed.f.draws, posed.latent, dtype=x.dtype, device=x.device)
            return Averaged(Soft(Reconstruction(posed), Held(noise), posed.alpha), posed.f.draws)

        return DifferencedOracle(held, x, owned)


class DifferencedOracle(Oracle):
    """Gradients with derivatives (grad f(y + r v) - grad f(y)) / r, in y and in parameters of f.

    Args:
        make: f, deterministic, for each gradient.
        x: (B, pixels).
        owned: the parameters.
    """

    def __init__(self, make: Callable[[], Objective], x: Tensor, owned: list[nn.Parameter]) -> None:
        super().__init__(lambda y: make()(y, x))
        self.make, self.x, self.owned = make, x, owned

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


def gradient_errors(posed: VAE, model: Model) -> dict[str, float]:
    """Relative errors of the gradient of savae's loss in float32, by how second derivatives are had."""
    noise = torch.randn(4, posed.latent)

    def slope(kind: str, dtype: torch.dtype) -> Tensor:
        vae, solver = copy.deepcopy((posed, model))
        vae, solver, x = vae.to(dtype), solver.to(dtype), posed.test_images[:64].to(dtype)
        f, theirs = vae.bound(noise.to(dtype)), [p for p in vae.parameters() if p.requires_grad]
        owned = [*(p for p in solver.parameters() if p.requires_grad), *theirs]
        oracle = f.oracle(x) if kind == "exact" else DifferencedOracle(lambda: f, x, theirs)
        loss = f(solver(x, oracle), x).mean()
        return torch.cat([part.double().ravel() for part in torch.autograd.grad(loss, owned)])

    true = slope("exact", torch.float64)
    return {kind: ((slope(kind, torch.float32) - true).norm() / true.norm()).item() for kind in ("exact", "finite differences")}


@torch.no_grad()
def apart(posed: VAE, model: Model) -> float:
    """By how much lam differs between a batch of 64 and single images, in float64 and under the same draws."""
    vae, solver = copy.deepcopy((posed, model))
    vae, solver, x = vae.double(), solver.double(), posed.test_images[:64].double()
    f = vae.bound(torch.randn(4, posed.latent).double())
    alone = torch.cat([solver(one[None], f.oracle(one[None])) for one in x])
    furthest: float = (alone - solver(x, f.oracle(x))).abs().max().item()
    return furthest


# ivae


def ivae() -> Measured:
    """Learned steps on a frozen decoder, from what its direct encoder says, beside Adam, tuned."""
    (posed, _), direct, name, k = decoder(), encoder(WIDTH), source()[1], 5
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


# figures


def trade_figure(gap: dict[int, float], races: dict[int, Race]) -> Figure:
    """Gap against the encoder's width, and its speed beside Adam against the gap."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.plot(list(gap), list(gap.values()), "o-")
    left.set(
        xscale="log", xlabel="width of the encoder", ylabel="amortization gap, nats", xticks=list(gap), xticklabels=list(gap)
    )
    for size in SIZES:
        ratios = [races[width].ratio(size) for width in gap]
        right.plot(list(gap.values()), ratios, "o-", label=f"batch of {size}")
        for width, ratio in zip(gap, ratios, strict=True):
            right.annotate(f" {width}", (gap[width], ratio))
    right.set(yscale="log", xlabel="amortization gap, nats", ylabel="times faster than Adam at its ELBO")
    right.legend()
    return drawn


@torch.no_grad()
def speed_figure(posed: VAE, x: Tensor, lam: Tensor, raced: Race) -> Figure:
    """The tutorial's figure: the bound against iterations and seconds of Adam, beside the encoder's lam."""
    size, elbo = SIZES[-1], score(posed, lam, x)
    drawn = Figure(figsize=(10, 4), layout="constrained")
    counted, timed = drawn.subplots(1, 2)
    for tuning in (Tuning(5e-3, float("inf"), 1), raced.fastest(size)[1]):
        path = enumerate(itertools.islice(adam(posed, x, tuning), PROTOCOL), 1)
        bounds = {k: score(posed, at, x) for k, at in path if k in LOOKS}
        counted.plot(list(bounds), list(bounds.values()), label=f"Adam, {tuning}")
        timed.plot([k * raced.step[size][tuning.draws] for k in bounds], list(bounds.values()))
    for axes, label in ((counted, "iterations"), (timed, f"seconds, batch of {size}")):
        axes.axhline(elbo, linestyle="--", color="k", label="encoder")
        axes.set(xscale="log", xlabel=label, ylabel="ELBO, nats")
        axes.grid(alpha=0.3)
    timed.plot(raced.encoder[size], elbo, "k*", markersize=12)
    counted.legend()
    return drawn


@torch.no_grad()
def images_figure(posed: VAE, model: Model, x: Tensor) -> Figure:
    """Held-out images, their reconstructions, and samples of the model."""
    rows = {
        "held out": x,
        "reconstructed": posed.mean(model(x).chunk(2, dim=-1)[0]),
        "sampled": posed.mean(torch.randn(len(x), posed.latent)),
    }
    drawn = Figure(figsize=(len(x), 3.2), layout="constrained")
    for axes, (label, images) in zip(drawn.subplots(3, 1), rows.items(), strict=True):
        strip = torch.cat(list(images.view(len(x), *posed.size)), dim=1)
        axes.imshow(strip.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], ylabel=label)
    return drawn


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
