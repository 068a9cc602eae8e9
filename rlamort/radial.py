"""Radial policies, as of PILCO. x context (B, d) · y solution (B, n) · M basis functions"""

import math

import torch
from torch import Tensor, nn

from rlamort.domain import Box, Domain
from rlamort.dynamics.moments import Moments, radial, sines
from rlamort.errors import UserError
from rlamort.model import Model
from rlamort.nets import spread
from rlamort.objective import Oracle


class Radial(nn.Module):
    """v(x) = sum_j weights_j exp(-|(x - shift) / scale - centres_j|^2 / (2 lengths^2)), (B, d) -> (B, n), in x's dtype.

    The mean of a Gaussian process with M data that are learned (Deisenroth and Rasmussen, 2011, section 2.3.2).

    Args:
        inputs: d.
        basis: M.
        outputs: n.
    """

    shift: Tensor
    scale: Tensor
    placed: Tensor

    def __init__(self, inputs: int, basis: int, outputs: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(basis, inputs))
        self.log = nn.Parameter(torch.full((inputs,), 0.5 * math.log(inputs / 8)))
        self.weights = nn.Parameter(0.3 * torch.randn(basis, outputs))
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("placed", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        fine = (-self.log).exp()
        at, centres = (x - self.shift) * (fine / self.scale), self.centres * fine
        square = at.square().sum(-1, keepdim=True) + centres.square().sum(-1)
        return torch.addmm(square, at, centres.mT, beta=-0.5).exp() @ self.weights

    def moments(self, mean: Tensor, cov: Tensor) -> Moments:
        """Of v where x is normal, with mean (d,) and cov (d, d)."""
        n = self.weights.shape[1]
        centres, lengths = self.shift + self.scale * self.centres, (self.scale * self.log.exp()).expand(n, -1)
        return radial(mean, cov, centres.to(mean), lengths.to(mean), mean.new_ones(n), self.weights.mT.to(mean))[0]

    @torch.no_grad()
    def place(self, x: Tensor, starts: Tensor, circle: Tensor) -> None:
        """Put the basis functions around starts (E, d), as wide as states x (B, d) are spread.

        At the first call alone: later ones would change what is learned. Coordinates that are cosines or sines, `circle` (d,)
        bool, are everywhere on the circle.
        """
        scale = torch.where(circle, 0.5, spread(x))
        self.shift.copy_(torch.where(self.placed > 0, self.shift, torch.where(circle, 0, starts.mean(0))))
        self.scale.copy_(torch.where(self.placed > 0, self.scale, scale))
        self.placed.fill_(1)


class Sine(Model):
    """y = middle + half range sin(net(x)), the bounded policy of PILCO, whose moments are known (section 2.3.2).

    Args:
        net: (B, d) -> (B, n).
        domain: Y, a box.
    """

    def __init__(self, net: Radial, domain: Domain) -> None:
        super().__init__()
        if not isinstance(domain, Box):
            raise UserError(f"model=radial: Y is a {type(domain).__name__}; a Box is needed")
        self.net, self.domain = net, domain

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.domain.decode(self.net(x).sin())[None]

    def moments(self, mean: Tensor, cov: Tensor) -> Moments:
        """Of y where x is normal, with mean (d,) and cov (d, d)."""
        v = self.net.moments(mean, cov)
        y, scale = sines(v.mean, v.cov, torch.ones_like(v.mean, dtype=torch.bool)), self.domain.scale.to(mean)
        return Moments(self.domain.decode(y.mean), scale[:, None] * y.cov * scale, v.slope @ y.slope * scale)
