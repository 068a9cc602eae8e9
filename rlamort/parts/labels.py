"""Labels, as parts: solutions of a data set of contexts that are found once, in bulk, and kept beside them.

N items · x contexts as vectors (N, d) · y labels (N, n)
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from rlamort.config import Fixed, Size
from rlamort.constraints import Constraints
from rlamort.domain import within
from rlamort.errors import UserError
from rlamort.host.saved import Damaged, read_arrays
from rlamort.objective import Cost
from rlamort.problem import Parts, Problem, presented
from rlamort.solve import constrained
from rlamort.solve.classical import CHUNK, STARTS, answers, best_found, solution_of
from rlamort.source import Labelled, Labels

Missing = Literal["error", "drop"]


@dataclass(frozen=True)
class Solved(Labels):
    """Solutions of contexts that are drawn once, `dataset_size` of them.

    Args:
        teacher: solution, the problem's own; search, classical solvers from several starts where it has none.
        starts: of each solver's search.
        missing: error, or drop the items for which no solution is found, and say how many.
    """

    teacher: Fixed[Literal["solution", "search"]] = "solution"
    starts: Fixed[Size] = STARTS
    missing: Fixed[Missing] = "error"

    def require(self, problem: Problem, dataset_size: int | None) -> None:
        if dataset_size is None:
            raise UserError(
                "dataset_size=null: labels are found once, for a data set; its size is needed, as in dataset_size=10000"
            )

    def __call__(self, problem: Problem, dataset_size: int | None, device: torch.device) -> Labelled:
        assert dataset_size is not None, "or `require` has refused"
        x = presented(problem, dataset_size, device)
        found, messages = self._found(problem, x)
        return checked(Labelled(x, found), problem, self.missing, f"labels={self.teacher}", "; ".join(messages))

    def _found(self, problem: Problem, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Labels (N, n), NaN where there is none, and what went wrong."""
        solution = solution_of(problem)
        if self.teacher == "search":
            if (constraints := Constraints.of(problem)) is not None:
                reference = constrained.reference(problem, constraints, x, self.starts)
            else:
                reference = best_found(Cost(problem), problem.domain, x, self.starts, solution=solution)
            return reference.y, reference.messages
        name, messages = f"{type(problem).__name__}.solution", dict[str, None]()
        parts: list[Tensor] = []
        with torch.no_grad():
            for rows in torch.split(x, CHUNK):
                y = answers(solution, rows, problem.domain.dim, name, messages)
                if y is None:
                    raise UserError(f"labels=solution: {name} returns None; labels=search takes classical solvers")
                parts.append(y)
        return torch.cat(parts), tuple(messages)


@dataclass(frozen=True)
class File(Labels):
    """Contexts and solutions of a file.

    Args:
        path: of a .npz or .safetensors file with arrays x (N, ...), or x.KEY (N, ...) for each key of contexts that are a dict,
            and y (N, n).
        missing: error, or drop the items whose label is not finite, and say how many.
    """

    path: Fixed[str] = ""
    missing: Fixed[Missing] = "error"

    def require(self, problem: Problem, dataset_size: int | None) -> None:
        if not self.path:
            raise UserError("labels.path: it is missing; a .npz or .safetensors file with x and y is needed")
        if dataset_size is not None:
            raise UserError(f"dataset_size={dataset_size}: with labels=file the data set is all of {self.path}; null is needed")

    def __call__(self, problem: Problem, dataset_size: int | None, device: torch.device) -> Labelled:
        arrays = self._arrays()
        dtype, count, n = torch.get_default_dtype(), len(arrays["y"]), problem.domain.dim
        if arrays["y"].shape != (count, n):
            raise self._wrong(f"y has shape {arrays['y'].shape}; (N, {n}) is needed")
        layout, parts = problem.layout, dict[str, Tensor]()
        for key, shape, kind in zip(layout.keys or ("",), layout.shapes, layout.dtypes, strict=True):
            name = f"x.{key}" if key else "x"
            if name not in arrays:
                raise self._wrong(f"it has no {name}, but {', '.join(arrays)}")
            if arrays[name].shape != (count, *shape):
                raise self._wrong(f"{name} has shape {arrays[name].shape}; {(count, *shape)} is needed, for {count} labels")
            if len(odd := np.flatnonzero(~np.isfinite(arrays[name].reshape(count, -1)).all(-1))):
                raise self._wrong(f"{name} is not finite in {len(odd)} of {count} items, of which {odd[0]} is the first")
            parts[key] = torch.from_numpy(arrays[name]).to(kind)
        x: Parts = parts if layout.keys else parts[""]
        labelled = Labelled(layout.pack(x).to(device, dtype), torch.from_numpy(arrays["y"]).to(device, dtype))
        return checked(labelled, problem, self.missing, f"labels.path={self.path}", "")

    def _arrays(self) -> dict[str, np.ndarray]:
        """The file's arrays."""
        path = Path(self.path)
        try:
            if path.suffix == ".safetensors":
                arrays: dict[str, np.ndarray] = load_file(path)
            elif path.suffix == ".npz":
                arrays = read_arrays(path)
            else:
                raise self._wrong("a .npz or .safetensors file is needed")
        except (OSError, SafetensorError, Damaged) as error:
            raise self._wrong(f"it cannot be read: {error}") from error
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub" or not array.ndim:
                raise self._wrong(
                    f"{name} holds {array.dtype} of shape {array.shape}; numbers, one item after another, are needed"
                )
        if "y" not in arrays or not len(arrays["y"]):
            raise self._wrong(f"it has no labels y, but {', '.join(arrays) or 'nothing'}")
        return arrays

    def _wrong(self, what: str) -> UserError:
        return UserError(f"labels.path={self.path}: {what}")


def checked(found: Labelled, problem: Problem, missing: Missing, name: str, why: str) -> Labelled:
    """The items that have labels.

    Args:
        found: contexts and labels, NaN where there is none.
        problem: whose domain has to hold them, and whose constraints they have to meet.
        missing: what to do with items that have none.
        name: of the labels, for messages.
        why: what went wrong, for messages.

    Raises:
        UserError: labels are missing, lie outside Y, or violate constraints.
    """
    count, finite = len(found.y), found.y.isfinite().all(-1)
    lacking, reason = (~finite).nonzero()[:, 0].tolist(), f" ({why})" if why else ""
    if lacking:
        said = f"{name}: {len(lacking)} of {count} items have no label, of which {lacking[0]} is the first{reason}"
        if missing == "error" or len(lacking) == count:
            raise UserError(f"{said}; labels.missing=drop leaves such items out, if there are others")
        warnings.warn(f"{said}; they are left out", stacklevel=2)
    x, y = found.x[finite], found.y[finite]
    domain = problem.domain.at(x)
    outside = (~within(domain, y)).nonzero()[:, 0].tolist()
    if outside:
        first, kind = int(finite.nonzero()[outside[0], 0]), type(domain).__name__
        far = domain.violation(y)[outside].max().item()
        raise UserError(
            f"{name}: {len(outside)} of {count} labels lie outside {kind}, by up to {far:.3g}, of which {first} is the first; "
            "points in it are needed"
        )
    constraints = Constraints.of(problem)
    if constraints is not None and (wrong := (~constrained.met(constraints, y, x)).nonzero()[:, 0].tolist()):
        first, far = int(finite.nonzero()[wrong[0], 0]), constraints.violation(y, x)[wrong].max().item()
        raise UserError(
            f"{name}: {len(wrong)} of {count} labels violate {constraints.name}, by up to {far:.3g}, of which {first} is the "
            "first; points that meet them are needed"
        )
    return Labelled(x, y)


Labels.presets = {"solution": Solved(), "search": Solved("search"), "file": File()}
