"""Ensembles of networks as transition models, and what their outputs mean.

x context (B, d) · y action (B, n) in [-1, 1]^n · E members · k predicted coordinates, those of x and perhaps the reward ·
P particles of a member · H steps
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlamort import nets
from rlamort.dynamics.base import Act, Dynamics, Moved, Transitions
from rlamort.dynamics.rewards import Ends, Rewards


class Squared(nn.Module):
    """The squared error of an ensemble, whose members predict means."""

    outputs = 1  # numbers for each coordinate

    def __init__(self, coordinates: int) -> None:
        super().__init__()

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, k), targets (E, B, k) -> loss of each member (E,)."""
        return (outputs - target).square().mean((1, 2))

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Outputs (..., k) -> a target (..., k): the mean, since nothing says how targets spread around it."""
        return outputs


class Normal(nn.Module):
    """The negative log-likelihood of normals whose mean and log-variance each member predicts (Chua et al., 2018, eq. 1).

    Log-variances are bounded softly, by bounds that are learned and that a small cost draws together (their appendix A.1).

    Args:
        coordinates: k.
    """

    outputs = 2

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.full((coordinates,), -10.0))
        self.high = nn.Parameter(torch.full((coordinates,), 0.5))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, 2 k), targets (E, B, k) -> loss of each member (E,)."""
        mean, log = self._bounded(outputs)
        likelihood = ((mean - target).square() * (-log).exp() + log).mean((1, 2))
        return likelihood + 0.01 * (self.high - self.low).mean()

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Outputs (..., 2 k), standard normals (..., k) -> a target (..., k) of the predicted distribution."""
        mean, log = self._bounded(outputs)
        return mean + (log / 2).exp() * noise

    def _bounded(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the bounded log-variance."""
        mean, log = outputs.chunk(2, -1)
        log = self.high - nn.functional.softplus(self.high - log)
        return mean, self.low + nn.functional.softplus(log - self.low)


class Endless(nn.Module):
    """Tasks go on, wherever they are."""

    outputs = 0  # of a member

    def continues(self, x: Tensor, y: Tensor, x_next: Tensor, outputs: Tensor) -> Tensor:
        """What was met (..., B, d), (B, n), (..., B, d) and outputs (..., B, 0) -> ones (..., B)."""
        return outputs.new_ones(outputs.shape[:-1])

    def loss(self, outputs: Tensor, ended: Tensor) -> Tensor:
        """Outputs (E, B, 0), ended (E, B, 1) -> loss of each member (E,)."""
        return outputs.new_zeros(len(outputs))


class Ending(nn.Module):
    """Where tasks end is learned, by the log-likelihood of the terminations met.

    Classes are not balanced, so that what is predicted is a probability: products of it weigh what follows.
    """

    outputs = 1  # the logit of an end

    def continues(self, x: Tensor, y: Tensor, x_next: Tensor, outputs: Tensor) -> Tensor:
        """As of `Endless`, of outputs (..., B, 1): the probability to go on."""
        return (-outputs[..., 0]).sigmoid()

    def loss(self, outputs: Tensor, ended: Tensor) -> Tensor:
        """As of `Endless`."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, ended, reduction="none").mean((1, 2))


class ToldEnds(Endless):
    """Where tasks end is a known function, asked about the states that the members predict.

    Args:
        ends: the function.
    """

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        self.ends = ends

    def continues(self, x: Tensor, y: Tensor, x_next: Tensor, outputs: Tensor) -> Tensor:
        return _asked(self.ends, x, y, x_next)


def _asked(told: Rewards | Ends, x: Tensor, y: Tensor, x_next: Tensor) -> Tensor:
    """What a function of single transitions says of those of all members (..., B)."""
    lead = x_next.shape[:-1]
    flat = (part.expand(*lead, -1).flatten(0, -2) for part in (x, y, x_next))
    return told(*flat).view(lead)


class Predicted:
    """Rewards are predicted by the members, as one more coordinate."""

    outputs = 1

    def __call__(self, x: Tensor, y: Tensor, x_next: Tensor, predicted: Tensor) -> Tensor:
        """What was met (..., B, d), (B, n), (..., B, d) and predicted (..., B, 1) -> the reward (..., B)."""
        return predicted[..., 0]


class Told:
    """Rewards are a known function, asked about the states that the members predict.

    Args:
        rewards: the function.
    """

    outputs = 0

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards

    def __call__(self, x: Tensor, y: Tensor, x_next: Tensor, predicted: Tensor) -> Tensor:
        """As of `Predicted`."""
        return _asked(self.rewards, x, y, x_next)


class Ensemble(Dynamics):
    """E networks of the change of state and the reward, learned from transitions; inputs and targets are standardised.

    Each member predicts (x_next - x, reward) from (x, y), and they differ by what the data leave open. What follows is their
    mean; plans are followed through each of them by itself (Chua et al., 2018, section 5: TS-infinity), without noise, or by
    several particles of each member with the noise that it predicts.

    Args:
        x_dim: d.
        y_dim: n.
        hidden: widths of the hidden layers.
        members: E.
        likelihood: `Squared` or `Normal`, what the members' outputs mean and how well they fit.
        ends: `Endless`, `Ending` or `ToldEnds`, whether tasks end.
        rewards: `Predicted`, or `Told` by a known function.
        particles: P, drawn of each member where plans are followed; 0 follows the members' means.
        activation: of hidden units.
    """

    learned = True
    scales: Tensor
    shifts: Tensor

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        members: int,
        likelihood: Callable[[int], Squared | Normal] = Normal,
        ends: Callable[[], Endless | Ending | ToldEnds] = Endless,
        rewards: Predicted | Told | None = None,
        particles: int = 0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        self.rewards, self.particles = rewards or Predicted(), particles
        self.x_dim, self.members, self.inputs, k = x_dim, members, x_dim + y_dim, x_dim + self.rewards.outputs
        self.least = self.inputs + 1  # with fewer transitions even linear dynamics are not determined
        self.coordinates, self.likelihood, self.ends = k, likelihood(k), ends()
        self.moving = self.likelihood.outputs * k  # outputs that say how the state moves, and the reward
        self.net = nets.Ensemble(members, self.inputs, hidden, self.moving + self.ends.outputs, activation=activation)
        self.register_buffer("shifts", torch.zeros(self.inputs + k))
        self.register_buffer("scales", torch.ones(self.inputs + k))

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return Moved(*(part.mean(0) for part in self.futures(x, y)))

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        outputs = self._outputs(torch.cat([x, y.expand(*x.shape[:-1], -1)], -1))
        return self._moved(x, y, outputs, outputs[..., : self.coordinates])

    def drawn(self, x: Tensor, y: Tensor, noise: Tensor) -> Moved:
        """As `futures`, of P particles each: x (B, d) or (E P, B, d), noise (E, P, 1, k), standard normal -> (E P, B, .)."""
        members, particles = noise.shape[:2]
        lead = (members * particles, y.shape[-2])
        x, y = x.expand(*lead, -1), y.expand(*lead, -1)
        outputs = self._outputs(torch.cat([x, y], -1).view(members, particles * lead[1], -1))
        noise = noise.expand(-1, -1, lead[1], -1).flatten(1, 2)  # (E, P B, k)
        scaled = self.likelihood.draw(outputs[..., : self.moving], noise)
        return self._moved(x, y, outputs.view(*lead, -1), scaled.view(*lead, -1))

    def settled(self, steps: int) -> Dynamics:
        if not self.particles:
            return self
        shape = (steps, self.members, self.particles, 1, self.coordinates)
        return Settled(self, torch.randn(shape, dtype=self.shifts.dtype, device=self.shifts.device))

    def unfold(self, x: Tensor, act: Act, steps: int) -> list[Moved]:
        return self.settled(steps).unfold(x, act, steps) if self.particles else super().unfold(x, act, steps)

    def _moved(self, x: Tensor, y: Tensor, outputs: Tensor, scaled: Tensor) -> Moved:
        """What outputs (..., B, .) of members at x, y mean; `scaled` (..., B, k) are the coordinates, standardised."""
        change = self.shifts[self.inputs :] + self.scales[self.inputs :] * scaled
        x_next = x + change[..., : self.x_dim]
        reward = self.rewards(x, y, x_next, change[..., self.x_dim :])
        return Moved(x_next, reward, self.ends.continues(x, y, x_next, outputs[..., self.moving :]))

    def prepare(self, met: Transitions) -> Tensor:
        """Standardise by transitions, and return them as `pairs`."""
        pairs = self.pairs(met)
        self.standardise(pairs)
        return pairs

    def loss(self, pairs: Tensor) -> Tensor:
        """Pairs (E, B, d + n + d + 2) of `pairs`, for each member its own -> the sum of the members' losses."""
        inputs, target, ended = torch.split(pairs, [self.inputs, self.x_dim + 1, 1], -1)
        scaled = (target[..., : self.coordinates] - self.shifts[self.inputs :]) / self.scales[self.inputs :]
        moving, ending = torch.split(self._outputs(inputs), [self.moving, self.ends.outputs], -1)
        losses: Tensor = self.likelihood(moving, scaled) + self.ends.loss(ending, ended)  # (E,)
        return losses.sum()

    @staticmethod
    def pairs(batch: Transitions) -> Tensor:
        """Transitions as inputs and targets, concatenated, the last of which is 1 where a task ended: (B, d + n + d + 2)."""
        ended = batch.terminated.to(batch.reward)
        return torch.cat([batch.x, batch.y, batch.x_next - batch.x, batch.reward[:, None], ended[:, None]], -1)

    @torch.no_grad()
    def standardise(self, pairs: Tensor) -> None:
        """Set the mean and standard deviation of inputs and targets to those of pairs (B, .)."""
        pairs = pairs[:, : len(self.shifts)]  # not of ends
        self.shifts.copy_(pairs.mean(0))
        self.scales.copy_(nets.spread(pairs))

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net((inputs - self.shifts[: self.inputs]) / self.scales[: self.inputs])
        return outputs


class Settled(Dynamics):
    """An ensemble whose members are followed by particles with noise that is drawn already, the same for all items.

    Args:
        ensemble: whose members draw.
        noise: standard normals (H, E, P, 1, k).
    """

    learned = True

    def __init__(self, ensemble: Ensemble, noise: Tensor) -> None:
        super().__init__()
        self.ensemble, self.noise = ensemble, noise

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        moved: Moved = self.ensemble(x, y)
        return moved

    def unfold(self, x: Tensor, act: Act, steps: int) -> list[Moved]:
        path: list[Moved] = []
        for t in range(steps):
            at = path[-1].x_next if path else x
            path.append(self.ensemble.drawn(at, act(t, at), self.noise[t]))
        return path
