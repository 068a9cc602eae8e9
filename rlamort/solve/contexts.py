"""Contexts as a user has them, as vectors (B, d), after validation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlamort.errors import UserError, nearest
from rlamort.problem import Problem

Given = Tensor | np.ndarray | dict[str, Tensor] | dict[str, np.ndarray]


def packed(problem: Problem, x: Given, scored: bool, like: Tensor) -> Tensor:
    """x -> (B, d), with the dtype of `like` and on its device.

    Args:
        problem: whose contexts they are.
        x: contexts.
        scored: whether the cost is evaluated, too, so that hidden keys are needed.
        like: a tensor of that dtype and device.

    Raises:
        UserError: x does not have the keys, shapes, dtype or device of the problem's contexts.
    """
    layout = problem.layout
    unread = [key for key in problem.hidden if isinstance(x, dict) and key not in x]
    if unread and scored:
        raise UserError(f"x: the key {unread[0]!r} is missing: models never read it, but the cost does; predict needs none")
    layout = layout.seen if unread else layout
    if isinstance(x, dict) != (layout.keys is not None):
        needed = "a tensor" if layout.keys is None else f"a dict with the keys {', '.join(layout.keys)}"
        raise UserError(f"x: a {type(x).__name__} is given; {needed} is needed")
    parts: dict[str, Any] = x if isinstance(x, dict) else {"": x}
    for key in sorted(set(parts) ^ set(layout.keys or ("",))):
        if key not in parts:
            raise UserError(f"x: the key {key!r} is missing; {', '.join(layout.keys or ())} are needed")
        raise UserError(f"x: the key {key!r} is not known. {nearest(key, layout.keys or ())}")
    names = layout.keys or ("",)
    checked = [
        _part(f"x[{name!r}]" if name else "x", parts[name], shape, dtype, like)
        for name, shape, dtype in zip(names, layout.shapes, layout.dtypes, strict=True)
    ]
    for name, part in zip(names, checked, strict=True):
        if len(part) != len(checked[0]):
            raise UserError(f"x[{name!r}]: {len(part)} contexts are given; x[{names[0]!r}] has {len(checked[0])}")
    return layout.pack(checked[0] if layout.keys is None else dict(zip(names, checked, strict=True))).to(like)


def _part(name: str, given: Any, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """One part of the contexts, with the solver's dtype and device."""
    # what `contexts` gives is taken as it is; networks compute in their own dtype
    allowed = dict.fromkeys([like.dtype, dtype] if dtype.is_floating_point else [dtype])
    needed = next(iter(allowed))
    if isinstance(given, np.ndarray):
        if not (np.issubdtype(given.dtype, np.number) or given.dtype == bool) or np.iscomplexobj(given):
            raise UserError(f"{name}: an array of {given.dtype} is given; real numbers are needed")
        array = np.ascontiguousarray(given)
        given = torch.from_numpy(array).to(like.device, needed)  # NumPy's floats are float64 unasked
        if not needed.is_floating_point and not np.array_equal(given.numpy(force=True), array):  # it was rounded, or wrapped
            raise UserError(
                f"{name}: numbers of {array.dtype} are given that are none of {needed}; whole ones in its range are needed"
            )
    if not isinstance(given, Tensor):
        raise UserError(f"{name}: a {type(given).__name__} is given; a tensor, or a NumPy array, is needed")
    if given.ndim != len(shape) + 1 or tuple(given.shape[1:]) != shape or not len(given):
        raise UserError(
            f"{name}: shape {tuple(given.shape)} is given; (B{''.join(f', {size}' for size in shape)}), B >= 1, is needed"
        )
    if given.dtype not in allowed:
        raise UserError(f"{name}: {given.dtype} is given; {' or '.join(map(str, allowed))} is needed")
    if given.device != like.device:
        raise UserError(f"{name}: it is on {given.device}; {like.device} is needed, where the solver is")
    if not dtype.is_floating_point and not torch.equal(given.to(like.dtype).to(dtype), given):
        raise UserError(f"{name}: numbers of {dtype} are given that do not survive in {like.dtype}, in which models see them")
    return given.detach()
