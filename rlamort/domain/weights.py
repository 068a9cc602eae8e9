"""Y as a space of parameters: the solution of a problem is a network.

y parameters of a network (B, p) · inputs (B, S, ...) · S samples
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from rlamort.domain.base import Domain
from rlamort.errors import UserError


class Weights(Domain):
    """The parameters of a module as one vector: R^p.

    Args:
        module: the architecture; its own parameter values are not used.

    Raises:
        UserError: it has no parameters, or it has buffers, which a vector of parameters does not hold.
    """

    template: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            raise UserError(f"Weights.module: a {type(module).__name__} is given; a module with parameters is needed")
        if name := next((name for name, _ in module.named_buffers()), ""):
            raise UserError(f"Weights.module: it has the buffer {name}; a module whose state is its parameters alone is needed")
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.dim = self.inputs = sum(self.sizes)
        self.__dict__["template"] = module  # not a part: nothing of it is learned

    def project(self, v: Tensor) -> Tensor:
        return v

    def nearest(self, y: Tensor) -> Tensor:
        return y

    def initial(self) -> Tensor:
        """Newly initialised parameters of the module (p,); from torch's generator."""
        fresh = copy.deepcopy(self.template)
        for part in fresh.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        return self.ravel(fresh)

    def ravel(self, module: nn.Module) -> Tensor:
        """The parameters of a module of the same architecture as a vector (p,), detached."""
        return torch.cat([p.detach().ravel() for p in module.parameters()])

    def apply(self, y: Tensor, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Each item's network on its inputs: y (B, p), inputs (B, S, ...) -> (B, S, ...)."""

        def call(row: Tensor, sample: Tensor) -> Tensor:
            parts = zip(self.shapes.items(), torch.split(row, self.sizes), strict=True)
            parameters = {name: part.view(shape) for (name, shape), part in parts}
            out: Tensor = functional_call(self.template, parameters, (sample,))
            return out

        found: Tensor = vmap(call)(y, inputs)
        return found
