"""What `Solver.solve` returns. y solution (B, n) · B batch"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTED, RESOLVED = "predicted", "re-solved"


class Solution(NamedTuple):
    """Solutions with certificates."""

    y: Tensor  # (B, n); NaN for a non-finite context
    cost: Tensor  # (B,)
    bound: Tensor  # (B,) the certificate of that `kind`; inf without one; split-conformal, 0 if re-solved: of the reference
    status: list[str]  # per item: "predicted", "re-solved", or "failed: " or "infeasible: " with a reason
    kind: str  # "residual", "duality gap", "split-conformal (statistical, 95 %)"; "none" without certificates
    violation: Tensor  # (B,) distance to Y, as the domain's `violation` measures it


def status_of(
    finite: bool,
    empty: bool,
    outside: bool,
    poor: bool,
    cost: float,
    bound: float,
    reached: float,
    allowed: float,
    *,
    kind: str,
    dtype: torch.dtype,
) -> str:
    """The status of one item.

    Args:
        finite: whether its context is.
        empty: whether it is proven that its set has no point.
        outside: whether its solution is not feasible.
        poor: whether it was solved again.
        cost: f of its solution.
        bound: its certificate.
        reached: the certificate of what was solved again, before it was rounded to `dtype`.
        allowed: the tolerance; infinite without one.
        kind: of the certificate.
        dtype: of the solution.
    """
    if not finite:
        return "failed: context is not finite"
    if empty:
        return "infeasible: no point satisfies its constraints, which is proven"
    if outside:
        return "failed: no point that satisfies its constraints was found"
    if not math.isfinite(cost):
        return "failed: cost is not finite"
    if bound <= allowed or math.isinf(allowed):
        return RESOLVED if poor else PREDICTED
    if reached <= allowed:
        floor = f"below what {str(dtype).removeprefix('torch.')} solutions reach here, about {bound:.1e}"
        return f"failed: {kind} {allowed:.1e} is {floor}; dtype=torch.float64 does it"
    if kind == "duality gap" and math.isinf(bound):
        return "failed: no duality gap is finite here, as where a set is unbounded; by='KKT residual' is a certificate there"
    return f"failed: {kind} {bound:.1e} after solving again, above {allowed:.1e}"
