"""Amortization of a known objective, or of one with parameters that are trained jointly (Amos, 2023, tutorial).

f = the cost · Y = its domain · p(x) = its contexts · y_theta = any model · L = any loss.
"""

from types import MappingProxyType

from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Count, Fixed, Positive, Widths
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.objective import Cost, Metrics
from rlamort.source import Contexts, Labelled, Labels


class Amortize(Agent):
    """A model of a problem's solutions, trained on the problem itself.

    Args:
        spec: of the problem's environment.
        model: full, one forward pass; choice, the cheapest of several; semi, a forward pass refined by gradient steps of
            learned size; recurrent, refined by steps of a recurrent network; latent, gradient steps in a latent space; psd,
            lista, lista_cp, alista and slista, unfolded solvers of the lasso.
        loss: objective, the cost of the prediction; iterates, the cost of every iterate; regress, the distance to the reference
            solution; truth, the distance of every iterate to the true code; es, the smoothed cost by evolution strategies, for
            costs without gradients. `rlamort amortize` also has rl, which is TD3 on the problem as an environment.
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
        self.problem, self.f = spec.problem, Cost(spec.problem)
        setting = parts.Setting.of(spec.problem, hidden, labels is not None)
        if labels is not None and not loss.labelled:
            raise UserError(
                f"labels={labels.label()}: loss={loss.label()} does not use them; loss=regress loss.teacher=labels does"
            )
        chosen = model.tune(setting)
        self.chosen = {"model": chosen}
        self.model, self.loss = chosen(setting), loss(setting)
        # what `improve` trains: the model, and the problem's own trainable parameters
        self.owned = [p for p in (*self.model.parameters(), *self.problem.parameters()) if p.requires_grad]
        self.adam = Adam(self.owned, learning_rate, horizon=decay_updates)

    def act(self, x: Tensor, explore: bool) -> Tensor:
        y: Tensor = self.model(x, self.f.oracle(x))
        return y

    def evaluate(self, batch: Contexts | Labelled) -> Metrics:
        return {}  # f is known

    def improve(self, batch: Contexts | Labelled) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.owned, self.adam)
        return {f"model/{name}": value for name, value in metrics.items()}
