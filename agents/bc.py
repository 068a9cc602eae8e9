"""Behaviour cloning: the regression of a policy on an expert's labels (Pomerleau, 1989; Amos, 2023, tutorial, eq. 71).

f = unknown · Y = box, or the squashed Gaussian over it · p(x) = states of demonstrations · y_theta = any model that asks f
nothing · L = regress on labels. Where the policy itself plays and the expert labels what it meets, it is DAgger (Ross, Gordon
and Bagnell, 2011, algorithm 3.1): another source, as configs/method/dagger.yaml says.
"""

from typing import Protocol

import torch
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam, Agent, descend
from rlamort.config import Fixed, Positive, Size, Whole, Widths
from rlamort.critic import frozen_copy
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.losses import Regress
from rlamort.model import Model
from rlamort.objective import Metrics, Unknown
from rlamort.source import Labelled
from rlamort.train import Enough

# of the two steps of model=mip, weighed as in arXiv 2512.01809: by 1 / t^2 and 1 / (1 - t)^2, with t = 0.9
FIRST_OF_TWO = 0.1**2 / (0.9**2 + 0.1**2)


class Teaching(Protocol):
    """What `BC.fit` asks of its source."""

    @property
    def labels(self) -> int: ...  # how many the expert has given
    @property
    def complete(self) -> bool: ...  # whether no more will come
    def held_out(self) -> Labelled: ...


class BC(Agent):
    """A policy that is fitted to labels. It acts with the parameters whose loss on held-out labels is the least so far.

    Args:
        spec: sizes and action bounds.
        model: of the policy: full, one forward pass; mip, two, the second from the first.
        loss: regress, the squared error; likelihood, minus the log-likelihood under a squashed Gaussian.
        hidden: widths of hidden layers, unless a part sets its own.
        learning_rate: Adam's step size.
        normalise: normalise observations by statistics of those that labels are learned of.
        fit_every: steps between measurements of the loss on held-out labels; 0 for none, and then it acts with the newest
            parameters, as it does where nothing is held out.
        patience: measurements in a row without a lower loss after which learning ends, once all labels are there.
    """

    follows: Tensor
    stale: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        model: parts.Model = parts.Full(),
        loss: parts.Loss = parts.Regress(parts.Labelled(), start=FIRST_OF_TWO),
        hidden: Fixed[Widths] = (256, 256),
        learning_rate: Positive = 1e-3,
        normalise: Fixed[bool] = True,
        fit_every: Whole = 250,
        patience: Size = 20,
    ) -> None:
        super().__init__(spec, normalise=normalise)
        if not loss.labelled:
            raise UserError(
                f"loss={loss.label()}: f is unknown, and it needs f; loss=likelihood, or loss=regress loss.teacher=labels, "
                "is needed"
            )
        self.fit_every, self.patience, self.f = fit_every, patience, Unknown()
        self.density = loss.density(self.domain)
        setting = parts.Setting(self.density.parameters, spec.x_dim, hidden, labelled=True, objective=self.f)
        loss.require_trained(model)
        self.model, built = model(setting), loss(setting)
        assert isinstance(built, Regress), "a loss of labels is one"
        self.loss = built
        with torch.random.fork_rng(devices=[]):  # a model that asks f says so before any work starts
            self.model(torch.zeros(2, spec.x_dim), self.f.oracle(torch.zeros(2, spec.x_dim)))
        self.best: Model = frozen_copy(self.model, model(setting))
        self.adam = Adam(self.model.parameters(), learning_rate)
        self.register_buffer("follows", torch.ones(()))  # 1 until something is held out: the best is the newest
        self.register_buffer("stale", torch.zeros(()))  # measurements since the best one

    @property
    def acting(self) -> Model:
        return self.best

    def act(self, x: Tensor, explore: bool) -> Tensor:
        x = self.normaliser(x)
        lam = self.acting(x, self.f.oracle(x))
        return self.density.draw(lam) if explore else self.density.median(lam)

    def evaluate(self, batch: Labelled) -> Metrics:
        return {}  # f is unknown, and stays so

    def improve(self, batch: Labelled) -> Metrics:
        loss, metrics = self.loss(self.model, self.f, batch)
        descend(loss, self.model.parameters(), self.adam)
        with torch.no_grad():
            for best, newest in zip(self.best.parameters(), self.model.parameters(), strict=True):
                best.lerp_(newest, self.follows)
        return {f"model/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def fit(self, source: Teaching) -> Metrics:
        """Measure the loss on what is held out, which may have grown, and keep the better parameters.

        Raises:
            Enough: none were better `patience` times in a row.
        """
        labels, held = torch.tensor(float(source.labels)), source.held_out().through(self.normaliser)
        if not len(held.x):
            return {"labels": labels}
        self.follows.zero_()
        newest, least = (
            self.loss.distance(one(held.x, self.f.oracle(held.x)), held.y).mean() for one in (self.model, self.best)
        )
        self.stale += 1
        if newest < least:
            self.best.load_state_dict(self.model.state_dict())
            self.stale.zero_()
        if source.complete and self.stale >= self.patience:
            raise Enough(
                f"the loss on held-out labels, at best {least:.4g}, has not fallen in {self.patience} measurements (patience): "
                "learning ends, and the best parameters act"
            )
        return {"labels": labels, "held_out/distance": newest, "held_out/best": torch.minimum(newest, least)}
