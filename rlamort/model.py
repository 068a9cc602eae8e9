"""y_theta, the models that predict a solution. K iterations · B batch · n numbers in a solution"""

from torch import Tensor, nn

from rlamort.domain import Domain


class Model(nn.Module):
    """y_theta : X -> Y. Calling it gives the last of its iterates."""

    def iterates(self, x: Tensor) -> Tensor:
        """x (B, d) -> (K + 1, B, n), oldest first."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.iterates(x)[-1]


class Full(Model):
    """Fully amortized: y = project(net(x)), K = 0 (tutorial, section 2.2.1).

    Args:
        net: (B, d) -> (B, domain.inputs).
        domain: Y, or a density over it.
    """

    def __init__(self, net: nn.Module, domain: Domain) -> None:
        super().__init__()
        self.net, self.domain = net, domain

    def iterates(self, x: Tensor) -> Tensor:
        return self.domain.project(self.net(x))[None]
