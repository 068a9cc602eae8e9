"""Value expansions, as parts."""

from dataclasses import dataclass

from rlamort.config import Fraction, Part, Positive, Size, Whole, Widths
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.fits import expansion as expansions
from rlamort.fits.dynamics import Fits
from rlamort.parts.dynamics import Dynamics, Ensemble


@dataclass(frozen=True)
class Expansion(Part):
    """How far a policy's objective follows a model before it asks the critic."""

    def require_states(self, normalise: bool) -> None:
        """Raises UserError if it needs states as the environment gives them, and they are normalised."""

    def __call__(self, spec: Spec, hidden: Widths, discount: Fraction) -> expansions.Expansion:
        """The expansion in an environment; `hidden` are widths of hidden layers, unless the model sets its own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unexpanded(Expansion):
    """No model: the critic alone."""

    def __call__(self, spec: Spec, hidden: Widths, discount: Fraction) -> expansions.Expansion:
        return expansions.Expansion()


@dataclass(frozen=True)
class Expanded(Expansion):
    """H steps of a model, and then the critic (Amos et al., 2021: SVG(H)).

    Args:
        horizon: H, steps of the model; 0 asks the critic alone.
        dynamics: the model; own takes the environment's equations, ensemble is learned from transitions.
        fit_every: environment steps between fits of learned dynamics; 0 for known dynamics.
        fit_steps: gradient steps in a fit.
        fit_batch_size: transitions in a step of a fit, sampled independently for every member of an ensemble.
        learning_rate: Adam's step size in fits.
    """

    horizon: Whole = 2
    dynamics: Dynamics = Ensemble(ends="learned")
    fit_every: Whole = 200
    fit_steps: Size = 200
    fit_batch_size: Size = 256
    learning_rate: Positive = 1e-3

    def require_states(self, normalise: bool) -> None:
        if normalise:
            raise UserError("normalise=True: the model of an expansion takes states as they are; normalise=false is needed")

    def __call__(self, spec: Spec, hidden: Widths, discount: Fraction) -> expansions.Expansion:
        model = self.dynamics(spec, hidden)
        fits = Fits(model, self.fit_every, self.fit_steps, self.fit_batch_size, self.learning_rate, "expansion.")
        return expansions.Modelled(model, fits, self.horizon, discount)


Expansion.presets = {"none": Unexpanded(), "model": Expanded()}
