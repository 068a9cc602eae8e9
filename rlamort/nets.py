"""Networks that several agents share. E ensemble members · B batch · d inputs · h hidden units"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlamort.norm import NoNorm, Norm


def bfloat16_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, with both and the result rounded to bfloat16's eight bits but sums in float32; returned in a's dtype."""
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype)


class Bfloat16Linear(nn.Linear):
    """`nn.Linear` with a product in bfloat16, forward and backward; weights, bias, input and output stay as they are."""

    def forward(self, h: Tensor) -> Tensor:
        return bfloat16_product(h, self.weight.mT) + self.bias


class Arithmetic(NamedTuple):
    """The dtype of a network's matrix products, and of nothing else.

    Not `torch.autocast`, which would round outputs and a cost's own products too, and whose copies of weights would outlive
    the step that moves them.
    """

    linear: Callable[[int, int], nn.Module]  # (inputs, outputs) -> layer
    product: Callable[[Tensor, Tensor], Tensor]  # (E, B, i), (E, i, o) -> (E, B, o)


FLOAT32 = Arithmetic(nn.Linear, torch.bmm)
# TF32 is how a GPU multiplies float32 tensors while a run works: see `rlamort.host.machine.tf32_products`
ARITHMETIC = {"float32": FLOAT32, "tf32": FLOAT32, "bfloat16": Arithmetic(Bfloat16Linear, bfloat16_product)}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, arithmetic: Arithmetic = FLOAT32) -> nn.Sequential:
    """ReLU network (B, inputs) -> (B, outputs) with PyTorch's default initialisation."""
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [arithmetic.linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class EnsembleLinear(nn.Module):
    """E linear layers in one batched product, each initialised like `nn.Linear`."""

    bias: nn.Parameter | None

    def __init__(self, members: int, inputs: int, outputs: int, arithmetic: Arithmetic = FLOAT32, biased: bool = True) -> None:
        super().__init__()
        self.product = arithmetic.product
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound)) if biased else None
        self.register_parameter("bias", bias)

    def forward(self, h: Tensor, members: int) -> Tensor:
        """h (members, B, inputs) -> (members, B, outputs), by the first `members` of the ensemble."""
        weight = self.weight[:members]
        # a batched product with one column takes several times as long as the sum
        product = (h * weight.mT).sum(-1, keepdim=True) if weight.shape[-1] == 1 else self.product(h, weight)
        return product if self.bias is None else product + self.bias[:members]  # not baddbmm, which copies the bias first


class Ensemble(nn.Module):
    """E independent networks (B, inputs) -> (E, B, outputs).

    Args:
        members: E.
        inputs: coordinates of what each is given.
        hidden: widths; each layer is linear, then `norm`, then `activation`.
        outputs: coordinates of what each gives.
        norm: of hidden units, and of inputs if it is of the batch.
        arithmetic: of the products.
        activation: of hidden units.
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        norm: Norm = NoNorm,
        arithmetic: Arithmetic = FLOAT32,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        self.members, self.of_batch, self.activation = members, norm.of_batch, activation
        sizes = [inputs, *hidden, outputs]
        biased = [not norm.of_batch] * len(hidden) + [True]
        self.layers = nn.ModuleList(
            EnsembleLinear(members, *size, arithmetic, bias) for size, bias in zip(pairwise(sizes), biased, strict=True)
        )
        self.norms = nn.ModuleList(norm(members, width) for width in hidden)
        self.input_norm = (norm if norm.of_batch else NoNorm)(members, inputs, shifted=False)

    def forward(self, h: Tensor, members: int | None = None, training: bool = False) -> Tensor:
        """h (B, inputs) -> (members, B, outputs); fewer members cost less, since the others are not computed.

        Where h is (members, B, inputs), each member has an input of its own. With `training`, batch norms normalise by this
        batch, and take it into their running statistics.
        """
        members = members or self.members
        first, *others = self.layers
        h = h if h.ndim == 3 else h.expand(members, *h.shape)
        h = first(self.input_norm(h, members, training), members)
        for norm, layer in zip(self.norms, others, strict=True):
            h = layer(self.activation(norm(h, members, training)), members)
        return h


class NormedMlp(nn.Module):
    """A ReLU network (B, inputs) -> (B, outputs) with normalisation, an ensemble of one.

    Whether a batch norm is training follows from whether gradients are recorded: a loss differentiates, and acting, targets and
    predictions do not.

    Args:
        inputs: coordinates of what it is given.
        hidden: widths; each layer is linear, then `norm`, then ReLU.
        outputs: coordinates of what it gives.
        norm: of hidden units, and of inputs if it is of the batch.
        arithmetic: of the products.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, norm: Norm, arithmetic: Arithmetic = FLOAT32) -> None:
        super().__init__()
        self.ensemble = Ensemble(1, inputs, hidden, outputs, norm, arithmetic)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ensemble(x, training=torch.is_grad_enabled())[0]
        return out


class FreeWeights:
    """No constraint on a network's weights.

    Args:
        network: whose parameters they are.
    """

    def __init__(self, network: nn.Module) -> None:
        pass

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Project the network's parameters onto the constraint, in place."""


class UnitWeights:
    """The incoming weights of every unit of linear layers have length one; biases, gains and shifts are free.

    With batch norm before every ReLU the lengths do not matter to what a network computes, only to how fast Adam turns its
    weights (Palenicek et al., 2025: XQC). Those of the network are projected here, too.

    Args:
        network: whose parameters they are.
    """

    def __init__(self, network: nn.Module) -> None:
        linear = (part for part in network.modules() if isinstance(part, nn.Linear | EnsembleLinear))
        weights = {id(part.weight) for part in linear}
        parameters = list(network.parameters())
        self.constrained = tuple(id(parameter) in weights for parameter in parameters)
        self(parameters)

    @torch.no_grad()
    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Project the network's parameters, in their order, in place."""
        for parameter, constrained in zip(parameters, self.constrained, strict=True):
            if constrained:  # (outputs, inputs) of one layer, (members, inputs, outputs) of an ensemble's
                parameter.div_(torch.linalg.vector_norm(parameter, dim=1, keepdim=True).clamp_min(1e-12))


WEIGHTS: dict[str, type[FreeWeights] | type[UnitWeights]] = {"free": FreeWeights, "unit": UnitWeights}


def spread(x: Tensor) -> Tensor:
    """The standard deviation (k,) of every coordinate of x (B, k), to divide by: 1 where a coordinate never moves."""
    std = x.std(0, correction=0)
    return torch.where(std > 1e-6, std, 1)


class Standardise(nn.Module):
    """(x - mean) / std by the statistics of a sample, fixed at construction.

    Args:
        sample: contexts (B, d).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        sample = sample.detach()
        scale = 1 / spread(sample)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", -sample.mean(0) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class Zeros(nn.Module):
    """Zeros for every input.

    Args:
        outputs: how many.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.outputs)


class Concatenated(nn.Module):
    """(z, x) -> net(z | features(x)): a network of two arguments.

    Args:
        net: of both, side by side.
        features: of x alone.
    """

    def __init__(self, net: nn.Module, features: nn.Module) -> None:
        super().__init__()
        self.net, self.features = net, features

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([z, self.features(x)], dim=-1))
        return out


class Unnormalised(nn.Module):
    """The identity, for agents that do not normalise."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def update(self, x: Tensor) -> None:
        pass


class Normaliser(nn.Module):
    """(x - mean) / std by running statistics, clipped to +-10. Only `update` changes the statistics.

    Chan, Golub and LeVeque (1979) for the merge of two samples' moments; kept in float64, since runs are long.

    Args:
        dim: coordinates of x.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dim, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        std = self.variance.sqrt().clamp_min(1e-4)  # a coordinate that never moved stays at zero, not at infinity
        return ((x - self.mean.float()) / std.float()).clamp(-10, 10)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the statistics with x (B, dim), on any device; no rows change nothing."""
        if not len(x):
            return
        x = x.to(self.mean)
        fresh = x.shape[0]
        total = self.count + fresh
        delta = x.mean(0) - self.mean
        moment = self.variance * self.count + x.var(0, correction=0) * fresh
        self.variance.copy_((moment + delta.square() * self.count * fresh / total) / total)
        self.mean.add_(delta * fresh / total)
        self.count.copy_(total)
