"""Steps of solvers that sample, of those that know a plan's dynamics, and plans by few of their values, as parts."""

from dataclasses import dataclass
from typing import Literal

from rlamort import dynamics as made
from rlamort import model as models
from rlamort import update as updates
from rlamort.config import Fixed, Fraction, NonNegative, Part, Positive, Size, Whole
from rlamort.domain import Domain, unit_box
from rlamort.errors import UserError
from rlamort.parts.models import Model, Previous
from rlamort.parts.setting import Setting
from rlamort.parts.updates import LineSearch, Update
from rlamort.update import draws

Kind = Literal["clipped", "truncated"]


@dataclass(frozen=True)
class Cem(Update):
    """The cross-entropy method.

    Args:
        samples: per iteration.
        elites: samples that the next mean and standard deviation are fitted to.
        sigma: initial standard deviation.
        smoothing: weight of the previous mean and spread.
        temperature: of differentiable soft weights on the elites (DCEM); null takes uniform weights.
        power: the spread that is smoothed is the standard deviation to this power; 2 is the variance.
        colour: exponent of noise with the spectrum 1 / frequency^colour along a plan; 0 is white.
        bounds: clipped projects samples onto Y, truncated draws from the normal conditioned on a box.
    """

    samples: Size = 64
    elites: Size = 8
    sigma: Positive = 1.0
    smoothing: Fraction = 0.0
    temperature: Positive | None = None
    power: Positive = 1.0
    colour: NonNegative = 0.0
    bounds: Kind = "clipped"

    def __call__(self, setting: Setting, steps: int) -> updates.Cem:
        return updates.Cem(
            setting.domain, self.samples, self.elites, self.sigma, self.smoothing, power=self.power,
            selection=updates.HardTop() if self.temperature is None else updates.SoftTop(self.temperature),
            noise=_noise(self.colour, setting), bounds=_bounds(self.bounds, setting.domain),
        )  # fmt: skip


@dataclass(frozen=True)
class Icem(Update):
    """The cross-entropy method that keeps its elites and returns the best point (iCEM; Pinneri et al., 2020).

    Args:
        samples: per iteration, beside what is kept and the mean.
        elites: points that the next mean and standard deviation are fitted to.
        keep: elites that compete with later samples.
        sigma: initial standard deviation.
        smoothing: weight of the previous mean and spread.
        power: the spread that is smoothed is the standard deviation to this power; 2 is the variance.
        colour: exponent of noise with the spectrum 1 / frequency^colour along a plan; 0 is white.
        bounds: clipped projects samples onto Y, truncated draws from the normal conditioned on a box.
        shrink: what the number of samples is divided by from one iteration to the next, down to twice the elites.
        remember: whether the plan of the next step goes on from the elites that are kept.
    """

    samples: Size = 40
    elites: Size = 10
    keep: Size = 3
    sigma: Positive = 0.5
    smoothing: Fraction = 0.1
    power: Positive = 1.0
    colour: NonNegative = 2.0
    bounds: Kind = "clipped"
    shrink: Positive = 1.25
    remember: Fixed[bool] = True

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        hard = Cem(self.samples, self.elites, self.sigma, self.smoothing, None, self.power, self.colour, self.bounds)
        return updates.Icem(hard(setting, steps), self.keep, self.shrink, self.remember)


@dataclass(frozen=True)
class Mppi(Update):
    """Model predictive path integral control (Williams et al., 2017).

    Args:
        samples: per iteration.
        sigma: standard deviation.
        temperature: of the weights of samples, in units of f.
        colour: exponent of noise with the spectrum 1 / frequency^colour along a plan; 0 is white.
        bounds: clipped projects samples onto Y, truncated draws from the normal conditioned on a box.
    """

    samples: Size = 64
    sigma: Positive = 0.5
    temperature: Positive = 1.0
    colour: NonNegative = 0.0
    bounds: Kind = "clipped"

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        noise, bounds = _noise(self.colour, setting), _bounds(self.bounds, setting.domain)
        return updates.Mppi(setting.domain, self.samples, self.sigma, self.temperature, noise, bounds)


@dataclass(frozen=True)
class Ilqr(Update):
    """Iterative linear-quadratic regulation through differentiable dynamics, within bounds of actions.

    Args:
        candidates: step sizes that are tried side by side.
        mu: initial regularisation.
    """

    candidates: Size = 10
    mu: Positive = 1e-6

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        setting.actions("update=Ilqr")
        return updates.Ilqr(setting.domain, self.candidates, self.mu)


@dataclass(frozen=True)
class MultipleShooting(Update):
    """Adam over a plan in segments, each from a state of its own, whose gaps an augmented Lagrangian closes.

    Args:
        segments: a divisor of the number of actions.
        rate: Adam's step size, of actions and states.
        weight: of half the squared gaps.
    """

    segments: Size = 4
    rate: Positive = 0.05
    weight: Positive = 10.0

    def __call__(self, setting: Setting, steps: int) -> updates.Update:
        horizon = setting.actions("update=MultipleShooting")
        if horizon % self.segments:
            raise UserError(f"update.segments: {self.segments} given; a divisor of the {horizon} actions of a plan is needed")
        return updates.MultipleShooting(setting.domain, self.segments, self.rate, self.weight)


@dataclass(frozen=True)
class SupportPoints(Model):
    """A plan's values at few support points, which a kernel interpolates (the plans of KMPPI, of the package pytorch_mppi).

    Args:
        points: number of support points.
        width: of the kernel, in distances between neighbouring points.
        init: model of the plan that their first values fit.
        update: the solver's step, over their values.
        steps: number of steps.
        keep_best: whether each iterate is the best so far.
    """

    points: Fixed[Size] = 5
    width: Positive = 1.0
    init: Model = Previous()
    update: Update = Mppi()
    steps: Fixed[Whole] = 3
    keep_best: bool = True

    def __call__(self, setting: Setting) -> models.Model:
        horizon = setting.actions("model=SupportPoints")
        curve = models.Interpolation(horizon, self.points, self.width)
        over = setting._replace(domain=unit_box(self.points * (setting.domain.dim // horizon)), horizon=self.points)
        inner = models.Unroll(
            models.Fitted(self.init(setting), curve, over.domain), self.update(over, self.steps), self.steps, over.domain,
            keep_best=self.keep_best,
        )  # fmt: skip
        return models.SupportPoints(curve, inner, setting.domain)


@dataclass(frozen=True)
class Noise(Part):
    """What of a policy is perturbed along a plan (Wang and Ba, 2020)."""

    def __call__(self, policy: made.Policy, trajectory: made.Trajectory) -> made.Noise:
        raise NotImplementedError


@dataclass(frozen=True)
class Init(Noise):
    """The actions that it takes from the first state on, as the mean of the dynamics goes (POPLIN-A-Init)."""

    def __call__(self, policy: made.Policy, trajectory: made.Trajectory) -> made.Noise:
        return made.Init(policy, trajectory)


@dataclass(frozen=True)
class Replan(Noise):
    """The actions that it takes wherever the plan has come to (POPLIN-A-Replan)."""

    def __call__(self, policy: made.Policy, trajectory: made.Trajectory) -> made.Noise:
        return made.Replan(policy, trajectory)


@dataclass(frozen=True)
class Uniform(Noise):
    """Its weights, once for the whole plan (POPLIN-P-Uni)."""

    def __call__(self, policy: made.Policy, trajectory: made.Trajectory) -> made.Noise:
        return made.Uniform(policy, trajectory)


@dataclass(frozen=True)
class Separate(Noise):
    """Its weights, in each step of the plan (POPLIN-P-Sep)."""

    def __call__(self, policy: made.Policy, trajectory: made.Trajectory) -> made.Noise:
        return made.Separate(policy, trajectory)


def _noise(colour: float, setting: Setting) -> draws.Noise:
    return updates.Coloured(setting.actions(f"update.colour={colour:g}"), colour) if colour else updates.White()


def _bounds(kind: str, domain: Domain) -> draws.Bounds:
    kinds: dict[str, type[draws.Bounds]] = {"clipped": updates.Clipped, "truncated": updates.Truncated}
    return kinds[kind](domain)


Update.presets |= {"cem": Cem(sigma=0.5), "icem": Icem(), "ilqr": Ilqr(), "mppi": Mppi()}
Update.presets |= {"multiple_shooting": MultipleShooting(), "shooting": LineSearch()}
Model.presets |= {"kmppi": SupportPoints()}
Noise.presets = {"init": Init(), "replan": Replan(), "uniform": Uniform(), "separate": Separate()}
