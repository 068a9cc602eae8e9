"""C(x): a domain whose data come from contexts.

x context (B, d), as a vector · y solution (B, n) · v unconstrained (B, inputs)
"""

import copy
from typing import Any, Protocol

from torch import Tensor

from rlamort.domain.base import Data, Domain, checked
from rlamort.errors import UserError


class Owner(Protocol):
    """What knows the data, as a problem does."""

    def data_at(self, x: Tensor) -> Data:
        """x (B, d or more columns), contexts as vectors -> the data of these items (B, ...)."""


class ContextDomain(Domain):
    """The domain of a problem whose `domain` has data `PerItem`: `at(x)` is the set of some items; it is none by itself.

    Args:
        domain: what was declared.
        owner: the problem, which is not a part: it holds this domain.
    """

    def __init__(self, domain: Domain, owner: Owner) -> None:
        super().__init__()
        self.declared, self.dim, self.inputs, self.reach = domain, domain.dim, domain.inputs, domain.reach
        self.needs = dict(domain.needs)
        self.__dict__["owner"] = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextDomain":
        """With the same owner, unless the owner itself is being copied: then `memo` has its copy."""
        owner = self.__dict__["owner"]
        return ContextDomain(copy.deepcopy(self.declared, memo), memo.get(id(owner), owner))

    def at(self, x: Tensor) -> Domain:
        owner: Owner = self.__dict__["owner"]
        data = owner.data_at(x)
        where = f"{type(owner).__name__}.domain_data"
        checked(self, data, where)
        if wrong := next((name for name, part in data.items() if len(part) != len(x)), ""):
            raise UserError(f"{where}: {wrong!r}: {len(data[wrong])} items are given; {len(x)}, one a context, are needed")
        return self.declared.bind(data)

    def initial(self) -> Tensor:
        return self.declared.initial()

    def project(self, v: Tensor) -> Tensor:
        raise self._unbound("project")

    def nearest(self, y: Tensor) -> Tensor:
        raise self._unbound("nearest")

    def violation(self, y: Tensor) -> Tensor:
        raise self._unbound("violation")

    def linear(self, g: Tensor) -> Tensor:
        raise self._unbound("linear")

    def compact(self) -> Tensor:
        raise self._unbound("compact")

    def _unbound(self, method: str) -> UserError:
        name = f"{type(self.__dict__['owner']).__name__}.domain"
        return UserError(f"{name}.{method}: its data come from x, and no x is given; `domain.at(x).{method}` is needed")
