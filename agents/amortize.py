"""Amortization of a known objective, or of one with parameters that are trained jointly (Amos, 2023, tutorial).

f = the cost · Y = its domain · p(x) = its contexts · y_theta = any model · L = any loss.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Fixed, Positive, Widths
from rlamort.constraints import Constraints, Dual
from rlamort.env import Spec
from rlamort.errors import UserError, first_of
from rlamort.model import Full, Model
from rlamort.objective import Cost, Metrics, Objective, Oracle, nothing
from rlamort.problem import presented
from rlamort.source import Contexts, Labelled, Labels

TRIED = 4  # contexts on which it is tried what a loss trains


class Asking(Model):
    """A model that asks an objective of its own, such as a penalised cost, whatever oracle it is passed.

    So a model that was trained under constraints predicts under them wherever it is used.

    Args:
        inner: the model.
        f: the objective.
    """

    def __init__(self, inner: Model, f: Objective) -> None:
        super().__init__()
        self.inner, self.f = inner, f

    def iterates(self, x: Tensor, oracle: Oracle | None = None) -> Tensor:
        return self.inner.iterates(x, self.f.oracle(x))


class Amortize(Agent):
    """A model of a problem's solutions, trained on the problem itself.

    Args:
        spec: of the problem's environment.
        model: full, one forward pass; choice, the cheapest of several; semi, a forward pass refined by gradient steps of
            learned size; recurrent, refined by steps of a recurrent network; latent, gradient steps in a latent space; psd,
            lista, lista_cp, alista and slista, unfolded solvers of the lasso.
        loss: objective, the cost of the prediction; iterates, the cost of every iterate; regress, the distance to the reference
            solution; truth, the distance of every iterate to the true code; es, the smoothed cost by evolution strategies, for
            costs without gradients; of a problem with constraints, penalty, the cost with a quadratic penalty, and lagrangian,
            the augmented Lagrangian with multipliers that a second network learns. `rlamort amortize` also has rl, which is TD3
            on the problem as an environment.
        hidden: widths of hidden layers, also of the problem's own network.
        learning_rate: Adam's step size.
        labels: solutions of the data set, found once and kept with it, for loss=regress loss.teacher=labels: solution, the
            problem's own; search, classical solvers'; file, contexts and solutions of a file, labels.path.
        decay_updates: updates over which the step size falls to zero along a cosine; null keeps it constant.
    """

    renamed = MappingProxyType({
        "iterations": "model.steps", "layers": "model.steps", "space": "model.space", "inner_rate": "model.rate",
        "start": "model.init", "head": "model.update.head", "memory": "model.update.memory", "latent_dim": "model.dim",
        "candidates": "model.candidates", "adjoint": "model.adjoint", "rate": "model.update.rate",
        "momentum": "model.update=momentum", "safeguard": "model=Safeguarded", "sigma": "loss.sigma", "pairs": "loss.pairs",
        "decay": "loss.decay", "teacher_steps": "loss.teacher.steps",
    })  # fmt: skip

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Objective(),
        hidden: Fixed[Widths] = (128, 128),
        learning_rate: Positive = 1e-3,
        labels: Fixed[Labels | None] = None,
        decay_updates: Count | None = None,
    ) -> None:
        super().__init__(spec, normalise=False)
        if spec.problem is None:
            raise UserError("env: its objective is not known; a subclass of rlamort.Problem is needed")
        self.problem = spec.problem
        setting = parts.Setting.of(spec.problem, hidden, labels is not None)
        if labels is not None and not loss.labelled:
            raise UserError(
                f"labels={labels.label()}: loss={loss.label()} does not use them; loss=regress loss.teacher=labels does"
            )
        if setting.constraints is not None and not loss.constrained:
            name = type(spec.problem).__name__
            raise UserError(
                f"loss={loss.label()}: it ignores the constraints of {name}; loss=penalty or loss=lagrangian is needed"
            )
        loss.require_trained(model)
        self.require_frozen = loss.require_frozen  # asked before it is trained, not of one that is loaded
        self.asked = f"loss={loss.label()}, model={model.label()}"  # for messages
        multipliers = loss.multipliers(setting)
        self.f = loss.objective(setting, multipliers)
        setting = setting._replace(objective=self.f)
        chosen = model.tune(setting)
        self.chosen = {"model": chosen}
        built, self.loss = chosen(setting), loss(setting)
        self.model = built if isinstance(self.f, Cost) or isinstance(built, Full) else Asking(built, self.f)
        # what `improve` trains: the model, and the problem's own trainable parameters
        self.owned = [p for p in (*built.parameters(), *self.problem.parameters()) if p.requires_grad]
        self.adam = Adam(self.owned, learning_rate, horizon=decay_updates)
        if multipliers is not None:  # they travel with the model, which asks for them
            self.model.add_module("multipliers", multipliers)
            self.multipliers_adam = Adam(multipliers.net.parameters(), learning_rate, horizon=decay_updates)

    def require_trained(self) -> None:
        self.require_frozen(self.problem)
        x = presented(self.problem, TRIED, self.device)
        batch = Labelled(x, self.domain.at(x).project(x.new_zeros(len(x), self.domain.inputs)))
        kind, buffers = type(self.problem).__name__, [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        if isinstance(self.f, Cost) and Constraints.of(self.problem) is not None:
            try:
                self.model(self.f.seen(x), nothing(self.f.seen(x)))
            except UserError as error:
                raise UserError(
                    f"{self.asked}: the model asks for the cost, which knows nothing of the constraints of {kind}; a model "
                    "that asks for nothing, such as full, or loss=penalty or loss=lagrangian, is needed"
                ) from error
        loss, _ = self.loss(self.model, self.f, batch)
        slopes = torch.autograd.grad(loss, self.owned, allow_unused=True) if self.owned and loss.requires_grad else ()
        for buffer, before in buffers:  # running statistics, which a loss may have moved
            buffer.copy_(before)
        reached = {id(p) for p, slope in zip(self.owned, slopes, strict=False) if slope is not None}
        named = [*self.model.named_parameters("model"), *self.problem.named_parameters(kind)]
        if lost := [name for name, p in named if any(p is one for one in self.owned) and id(p) not in reached]:
            raise UserError(
                f"{self.asked}: no gradient reaches {first_of(lost)}, which would never be trained; another model, loss or "
                "model.adjoint is needed, or a problem that is frozen (requires_grad_(False)), where it is the problem's"
            )
        if not self.owned:
            raise UserError(f"{self.asked}: there is nothing to train; a model with parameters, such as full, is needed")

    def act(self, x: Tensor, explore: bool) -> Tensor:
        y: Tensor = self.model(x, self.f.oracle(x))
        return y

    def evaluate(self, batch: Contexts | Labelled) -> Metrics:
        if not isinstance(self.f, Dual):
            return {}  # f is known
        multipliers, x = self.f.multipliers, self.f.seen(batch.x)
        with torch.no_grad():
            h, g = self.f.constraints(self.model(x, self.f.oracle(batch.x)), batch.x)
        loss = multipliers.loss(x, h, g)
        descend(loss, multipliers.net.parameters(), self.multipliers_adam)
        multipliers.follow(x, h, g)
        return {"multipliers/loss": loss.detach(), "multipliers/penalty": multipliers.rho.clone()}

    def improve(self, batch: Contexts | Labelled) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.owned, self.adam)
        return {f"model/{name}": value for name, value in metrics.items()}
