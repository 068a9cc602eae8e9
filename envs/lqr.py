"""Linear systems with quadratic costs, and their optimal control in closed form.

x state (B, d) · u action (B, n) · H steps · gamma discount · P cost to go, x' P x
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from rlamort.envs.equations import Equations, Moved
from torch import Tensor

from rlamort.config import Positive
from rlamort.errors import UserError

Matrix = Sequence[Sequence[float]] | np.ndarray
SECONDS = 0.1  # of a step of the point mass
POINT = np.eye(4) + SECONDS * np.eye(4, k=2), SECONDS * np.eye(4, 2, k=-2)


class Riccati(NamedTuple):
    """Optimal control over H steps, in float64."""

    gains: Tensor  # (H, n, d): u_t = -gains[t] x_t
    costs: Tensor  # (H + 1, d, d): what follows from x_t costs x_t' costs[t] x_t, counted from t on
    regularised: int  # steps whose system was singular to rounding, so that its diagonal was raised


class Lqr(Equations):
    """x_next = A x + B u with the reward -(x' Q x + u' R u): by default a point mass in the plane, pushed by forces.

    Args:
        A: (d, d). By default positions and velocities of the point mass, 0.1 s a step.
        B: (d, n).
        Q: (d, d), positive semidefinite; by default 1 for positions and 0.1 for velocities. Of one that is not symmetric the
            symmetric part is kept, which has the same rewards.
        R: (n, n), likewise; by default 0.1 for each coordinate.
        bound: of each coordinate of actions.
        length: steps of an episode.

    Raises:
        UserError: matrices whose sizes do not agree, or Q or R with a negative eigenvalue.
    """

    def __init__(
        self,
        A: Matrix = POINT[0],
        B: Matrix = POINT[1],
        Q: Matrix | None = None,
        R: Matrix | None = None,
        bound: Positive = 20.0,
        length: int = 50,
    ) -> None:
        self.A, self.B = (np.array(part, dtype=np.float64) for part in (A, B))
        if self.A.ndim != 2 or self.B.ndim != 2 or not len(self.A) == self.A.shape[1] == len(self.B):
            raise UserError(f"Lqr.A: shapes {self.A.shape} of A and {self.B.shape} of B; (d, d) and (d, n) are needed")
        d, n = self.B.shape
        self.Q = _symmetric("Q", np.diag([1.0] * (d - d // 2) + [0.1] * (d // 2)) if Q is None else Q, d)
        self.R = _symmetric("R", 0.1 * np.eye(n) if R is None else R, n)
        super().__init__(d, [bound] * n, length)

    def begin(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, len(self.A))

    def dynamics(self, x: Tensor, u: Tensor) -> Moved:
        A, B, Q, R = (torch.as_tensor(matrix, dtype=x.dtype, device=x.device) for matrix in (self.A, self.B, self.Q, self.R))
        reward = -(((x @ Q) * x).sum(-1) + ((u @ R) * u).sum(-1))
        return x @ A.mT + u @ B.mT, reward, torch.ones_like(reward)

    def riccati(self, horizon: int, discount: float = 1.0, tail: Tensor | None = None) -> Riccati:
        """Optimal control without bounds of H steps, by dynamic programming; `tail` (d, d) is the cost after them."""
        A, B, Q, R = (torch.as_tensor(matrix) for matrix in (self.A, self.B, self.Q, self.R))
        P = torch.zeros_like(Q) if tail is None else tail.double()
        gains, costs, regularised, eye = [], [P], 0, torch.eye(len(R), dtype=R.dtype)
        for _ in range(horizon):
            system = R + discount * B.mT @ P @ B
            least, most = torch.linalg.eigvalsh(system)[[0, -1]].tolist()
            lacking = max(most * 1e-12, 1e-12) - least
            if lacking > 0:
                system, regularised = system + lacking * eye, regularised + 1
            gain = torch.linalg.solve(system, discount * B.mT @ P @ A)
            left = A - B @ gain  # the symmetric form, which stays positive
            P = Q + gain.mT @ R @ gain + discount * left.mT @ P @ left
            gains.append(gain)
            costs.append(P)
        return Riccati(torch.stack(gains[::-1]), torch.stack(costs[::-1]), regularised)

    def stationary(self, discount: float = 1.0) -> Tensor:
        """P (d, d) of endless control, the fixed point of the recursion. Raises UserError if it does not come near one."""
        P = torch.zeros_like(torch.as_tensor(self.Q))
        for _ in range(200):
            before, P = P, self.riccati(100, discount, P).costs[0]
            if (P - before).abs().max() <= 1e-13 * P.abs().max():
                return P
            if P.abs().max() > 1e15 * (1 + self.Q.max()):
                break
        raise UserError("Lqr.stationary: endless control costs without bound; a pair A, B that can be stabilised is needed")

    def plan(self, x: Tensor, horizon: int, discount: float = 1.0, tail: Tensor | None = None) -> Tensor:
        """x (B, d) -> the optimal plan without bounds (B, H n), in the environment's units."""
        actions, at = [], x.double()
        for gain in self.riccati(horizon, discount, tail).gains:
            actions.append(-at @ gain.mT)
            at = self.dynamics(at, actions[-1])[0]
        return torch.cat(actions, -1).to(x)


def _symmetric(name: str, given: Matrix, size: int) -> np.ndarray:
    """The symmetric part of a positive semidefinite matrix, since the recursion takes 2 Q x for the derivative of x' Q x."""
    matrix = np.array(given, dtype=np.float64)
    if matrix.shape == (size, size):
        matrix = (matrix + matrix.T) / 2
        if np.linalg.eigvalsh(matrix).min() >= -1e-9:
            return matrix
    raise UserError(f"Lqr.{name}: a matrix of shape {matrix.shape} is given; {(size, size)}, positive semidefinite, is needed")
