"""What is known of rewards beside dynamics that are learned, as parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlamort import dynamics as made
from rlamort.config import Fixed, NonNegative, Part
from rlamort.config.imports import module_of
from rlamort.domain import Box
from rlamort.env import Spec
from rlamort.errors import UserError


def own(spec: Spec, what: str, by_equations: Callable[[made.Known], made.Rewards | made.Ends]) -> made.Rewards | made.Ends:
    """An environment's own rewards or ends, as `what` says: of its equations, or of its physics.

    Raises:
        UserError: neither is known here.
    """
    if spec.equations is not None:
        known = made.Known(spec.equations, Box(spec.low, spec.high), "own")
        known.require(spec.x_dim)
        return by_equations(known)
    if spec.simulator is None:
        raise UserError(
            f"dynamics.{what}=own: neither equations nor a simulator of this environment are known here; learned is needed"
        )
    try:
        physics = spec.simulator()
    except UserError as error:
        raise UserError(f"dynamics.{what}=own: {error}") from error
    found: made.Rewards | made.Ends = getattr(physics, what)()
    return found


@dataclass(frozen=True)
class Rewards(Part):
    """A known function of a state, an action and the next state, or none."""

    def __call__(self, spec: Spec) -> made.Rewards | None:
        """The function; None where rewards are learned, too."""
        raise NotImplementedError


@dataclass(frozen=True)
class LearnedRewards(Rewards):
    """Rewards are learned from those that were met."""

    def __call__(self, spec: Spec) -> None:
        return None


@dataclass(frozen=True)
class OwnRewards(Rewards):
    """The environment's own: of its equations, or of its physics, where these are known."""

    @property
    def of_environment(self) -> bool:
        return True

    def __call__(self, spec: Spec) -> made.Rewards:
        return own(spec, "rewards", made.Paid)


@dataclass(frozen=True)
class Saturating(Rewards):
    """exp(-sum_i weights_i (x_i - target_i)^2 / 2) - 1.

    Args:
        target: a number for every coordinate of states.
        weights: inverse squares of widths, likewise; 0 where a coordinate does not count.
    """

    target: Fixed[tuple[float, ...]] = ()
    weights: Fixed[tuple[NonNegative, ...]] = ()

    def __call__(self, spec: Spec) -> made.Rewards:
        for field in ("target", "weights"):
            given = getattr(self, field)
            if len(given) != spec.x_dim:
                raise UserError(
                    f"dynamics.rewards.{field}={list(given)}: {spec.x_dim} numbers are needed, one a coordinate of states"
                )
        return made.Saturating(self.target, self.weights)


@dataclass(frozen=True)
class Written(Rewards):
    """A function of the user's.

    Args:
        function: module:function, of x (B, d) and u (B, n), in the environment's units and in torch, to rewards (B,).
    """

    function: str = ""

    def __call__(self, spec: Spec) -> made.Rewards:
        module, _, name = self.function.partition(":")
        found = getattr(module_of(self.function, "dynamics.rewards.function"), name, None) if module and name else None
        if not callable(found):
            raise UserError(f"dynamics.rewards.function={self.function}: there is no such function; module:function is needed")
        actions, written = Box(spec.low, spec.high), found
        shape = tuple(written(torch.zeros(2, spec.x_dim), torch.zeros(2, actions.dim)).shape)
        if shape != (2,):
            raise UserError(f"dynamics.rewards.function={self.function}: for two states it gives shape {shape}; (2,) is needed")

        def step(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, written(x, u), torch.ones_like(x[:, 0])

        return made.Paid(made.Known(step, actions, self.function))


Rewards.presets = {"learned": LearnedRewards(), "own": OwnRewards(), "saturating": Saturating()}
