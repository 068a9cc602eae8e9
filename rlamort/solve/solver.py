"""Trained solvers: predictions, and certified solutions.

x contexts, as the user has them, or as vectors (B, d) · y solution (B, n) · f cost (B,) · B batch
"""

import itertools
import math
import zipfile
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rlamort.constraints import Constraints
from rlamort.domain import within
from rlamort.errors import Diverged, Fault, UserError, nearest
from rlamort.host.publish import published_file
from rlamort.host.saved import open_saved, save_agent
from rlamort.model import Full, Model
from rlamort.objective import FLOATS, Cost
from rlamort.problem import Problem, unseen
from rlamort.solve import constrained
from rlamort.solve.certificate import Aim, Certificate, Conformal, DualityGap, Residual, Stationarity, Tolerance
from rlamort.solve.classical import STARTS, Reference, best_found, extended, placed, solution_of
from rlamort.solve.constrained import UnderConstraints, feasible
from rlamort.solve.contexts import Given, packed
from rlamort.solve.precision import in_float64, widened
from rlamort.solve.quadratic import exactly, possible
from rlamort.solve.solution import Solution, status_of

CALIBRATION = 200  # contexts of a statistical certificate that was not calibrated before
MARK = "exported-by-rlamort"  # a file inside an exported archive
CACHED, FEWEST = 2**18, 256  # numbers in x and y of a chunk of predictions on a CPU; contexts in a chunk at least
MARGIN = 0.5  # share of the tolerance that is aimed at where the solution is rounded afterwards
EXACT = "quadratic program"  # label of references that are their exact solutions
PROBES = 4  # contexts whose sets are asked whether they are bounded
CERTIFICATES = ("residual", "duality gap", "KKT residual", "split-conformal")  # kinds


class Solver(nn.Module):
    """A model that predicts a problem's solutions, with a certificate and a classical solver as fallback.

    Args:
        model: y_theta.
        problem: the problem that it was trained on.
        facts: values from which the model can be rebuilt, for `save`.

    Attributes:
        training_seconds: training time, for the break-even.
    """

    training_seconds: float = math.nan

    def __init__(self, model: Model, problem: Problem, facts: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.problem, self.facts = model, problem, dict(facts or {})
        self.f = Cost(problem)
        self.conformal: Conformal | None = None

    @torch.no_grad()
    def predict(self, x: Given) -> Tensor:
        """y (B, n) for contexts x, tensors or NumPy arrays, without certificates; NaN for a non-finite context.

        Raises:
            UserError: x does not have the keys, shapes, dtype or device of the problem's contexts.
        """
        return self.predict_rows(self.rows(x, scored=False))

    @torch.no_grad()
    def solve(
        self,
        x: Given,
        tol: float | None = None,
        certify: bool = False,
        max_iterations: int = 2000,
        *,
        rtol: float | None = None,
        dtype: torch.dtype | None = None,
        by: str | None = None,
    ) -> Solution:
        """Predict, certify every item, and solve again those above the tolerance.

        The certificate is the problem's `residual` if it defines one; the duality gap if it is `convex` and Y is bounded (of a
        few contexts, where it depends on them; an item whose own is not has no bound), and the KKT residual if Y is not; else a
        split-conformal bound on the gap to the reference, for which `calibrate` is called if it was not before.
        Whatever the dtype of the model, certificates are computed and items solved again in float64, if the cost can be; what
        is said of an item is said of its solution as it is returned, rounded to `dtype`.

        Args:
            x: contexts, as for `predict`.
            tol: tolerance of the certificate, in the unit of the cost, or of the residual. Items above it are solved again,
                from the prediction. Without `tol` and `rtol` none are.
            certify: compute certificates also without a tolerance.
            max_iterations: of projected gradient, for items that are solved again.
            rtol: tolerance relative to |f| of each item; the larger of both is what counts.
            dtype: of solutions; None gives the model's. float64 serves tolerances that no float32 solution meets.
            by: the kind of certificate, one of CERTIFICATES; None takes the first of those above.

        Raises:
            UserError: as `predict`; or `tol`, `rtol` or `max_iterations` is not positive, `dtype` is another, or the cost has
                the wrong shape.
        """
        for name, number in {"tol": tol, "rtol": rtol}.items():
            if number is not None and not (isinstance(number, Real) and number > 0):
                raise UserError(f"{name}: {number!r} is given; a positive number, or None, is needed")
        if max_iterations < 1:
            raise UserError(f"max_iterations: {max_iterations} is given; at least 1 is needed")
        if dtype not in (None, torch.float32, torch.float64):
            raise UserError(f"dtype: {dtype} is given; torch.float32, torch.float64 or None is needed")
        if by is not None and by not in CERTIFICATES:
            raise UserError(f"by: {by} is given. {nearest(by, CERTIFICATES)}")
        if rtol is not None and by != "duality gap":  # the others are not in the unit of the cost
            kind = self.certificate(by).kind
            if kind in ("residual", "KKT residual"):
                raise UserError(f"rtol: {rtol} is given; it is relative to the cost, and the certificate is a {kind}; give tol")
        tolerance = None if tol is None and rtol is None else Tolerance(tol or 0.0, rtol or 0.0)
        return self.solve_rows(self.rows(x, dtype=dtype), tolerance, certify, max_iterations, by)

    @torch.no_grad()
    def solve_rows(
        self,
        rows: Tensor,
        tolerance: Tolerance | None = None,
        certify: bool = False,
        max_iterations: int = 2000,
        by: str | None = None,
    ) -> Solution:
        """`solve` for contexts as vectors (B, d), in the dtype that solutions are to have."""
        finite, rows = rows.isfinite().all(-1), rows.nan_to_num(0.0, 0.0, 0.0)
        y = self.predict_rows(rows.to(self._like())).to(rows)
        certified = certify or tolerance is not None
        problem = self._in_float64(y, rows) if certified or y.dtype is not self._like().dtype else self.problem
        f, x = Cost(problem), rows if problem is self.problem else rows.double()
        domain = problem.domain.at(x)
        constraints = Constraints.of(problem)
        if y.dtype is not self._like().dtype:  # in Y to the rounding of the model's dtype alone
            y = placed(domain, y)
        empty = domain.empty().to(finite.device).expand_as(finite) & finite
        cost, bound, poor = f(y.to(x), x), torch.full_like(x[:, 0], torch.inf), torch.zeros_like(finite)
        allowed, reached, kind = bound, bound, "none"  # reached: by what is solved again, before it is rounded
        if certified:
            certificate = self.certificate(by, problem)
            kind, bound = certificate.kind, certificate.bound(y.to(x), x, y.dtype)
            bound = bound.where(within(domain, y.to(x), y.dtype), torch.inf)  # whatever the kind
        if tolerance is not None:
            allowed = tolerance.of(f, y.to(x), x)
            poor = ~((bound <= allowed) & cost.isfinite()) & finite & ~empty
        if tolerance is not None and certified and bool(poor.any()):
            least = tolerance if y.dtype is x.dtype else tolerance.tighter(MARGIN)
            aim = Aim(least, max_iterations, solution_of(problem), y.dtype)
            again = certificate.improve(f, problem.domain, x[poor], y[poor].to(x), aim)
            y[poor], reached = again.y.to(y), bound.index_put((poor,), again.reached)
            bound = bound.index_put((poor,), again.rounded)
            cost, allowed = f(y.to(x), x), tolerance.of(f, y.to(x), x)
        point = y.nan_to_num(0.0, 0.0, 0.0).to(x)
        violation, outside = domain.violation(point), finite & ~within(domain, point, y.dtype)
        if constraints is not None:
            violation = torch.maximum(violation, constraints.violation(point, x).detach())
            outside = finite & certified & ~feasible(constraints, problem.domain, point, x, y.dtype)
        violation = violation.where(finite, torch.nan)
        y, cost, bound = y.where(finite[:, None], torch.nan), cost.where(finite, torch.nan), bound.where(finite, torch.inf)
        items = zip(*(one.tolist() for one in (finite, empty, outside, poor, cost, bound, reached, allowed)), strict=True)
        status = [status_of(*item, kind=kind, dtype=y.dtype) for item in items]
        return Solution(y, cost.to(y), bound.to(y), status, kind, violation.to(y))

    def _in_float64(self, y: Tensor, rows: Tensor) -> Problem:
        """The problem in float64, or as it is where it cannot be. Raises UserError where y is float64, so that it must be."""
        problem = widened(self.problem, y, rows)
        if problem is self.problem and y.dtype is not self._like().dtype and not in_float64(problem, y, rows):
            name = type(problem).__name__
            raise UserError(
                f"dtype: torch.float64 is given, but {name}.cost does not give float64 for y and x in float64; tensors that it "
                f"holds move with it as buffers (register_buffer), or leave dtype out"
            )
        return problem

    def certificate(self, by: str | None = None, problem: Problem | None = None) -> Certificate:
        """The certificate of a kind of CERTIFICATES, or the strongest that the problem allows.

        Args:
            by: the kind; None chooses.
            problem: a copy of the problem in another dtype; None takes the problem itself.

        Raises:
            UserError: the problem does not allow that kind.
        """
        problem = self.problem if problem is None else problem
        name, f, domain = type(problem).__name__, Cost(problem), problem.domain
        own, constraints = type(problem).residual is not Problem.residual, Constraints.of(problem)
        if by == "residual" and not own:
            raise UserError(f"by: residual is given, and {name} defines none; allowed: {', '.join(CERTIFICATES[1:])}")
        if by == "duality gap" and not problem.convex:
            raise UserError(f"by: duality gap is given, and {name} does not declare `convex = True`; only then is it a bound")
        if constraints is not None:
            if by in ("duality gap", "split-conformal"):
                raise UserError(f"by: {by} is given; {name} has constraints: residual or KKT residual is allowed with them")
            inner = Residual(problem, domain) if own and by != "KKT residual" else None
            return UnderConstraints(inner, f, constraints, domain)
        if by == "residual" or (by is None and own):
            return Residual(problem, domain)
        if problem.convex and by in (None, "duality gap"):
            bounded = _bounded(problem, self._like())
            if bounded.all() or (by is not None and bounded.any()):
                return DualityGap(f, domain)
            if by is not None:
                raise UserError(f"by: duality gap is given, and the set of {name} is unbounded; KKT residual is allowed there")
        if by == "KKT residual" or (by is None and problem.convex):
            return Stationarity(f, domain)
        return self.conformal or self.calibrate()

    @torch.no_grad()
    def calibrate(self, count: int = CALIBRATION, level: float = 0.95) -> Conformal:
        """Measure the gaps to the reference on `count` new contexts, and store the split-conformal bound at `level`.

        Raises:
            UserError: `level` is not in (0, 1), or `count` is too small for it.
        """
        if not 0 < level < 1:
            raise UserError(f"level: {level} is given; a share between 0 and 1 is needed")
        rank = math.ceil((count + 1) * level - 1e-9)
        if rank > count:
            raise UserError(
                f"count: {count} is given; for level {level}, at least {math.ceil(level / (1 - level) - 1e-9)} are needed"
            )
        x = self.draw(count)
        y = self.predict_rows(x)
        cost = extended(self.f, self.problem.domain, y, x)
        gap = (cost - self.reference(x, y=y).cost).nan_to_num(torch.inf, torch.inf, torch.inf)
        self.conformal = Conformal(gap.clamp_min(0).sort().values[rank - 1].item(), level, count)
        return self.conformal

    def reference(self, x: Tensor, starts: int = STARTS, y: Tensor | None = None) -> Reference:
        """The reference for contexts as vectors (B, d); `y` are further starts.

        It is the problem's own solution, or of convex quadratic programs the exact one in float64, or the best of all solvers;
        of problems with constraints, their own solution where it meets them, or that of the augmented-Lagrangian method.
        """
        if (constraints := Constraints.of(self.problem)) is not None:
            return constrained.reference(self.problem, constraints, x, starts, y)
        if type(self.problem).solution is Problem.solution and (exact := self.exact(x)) is not None:
            return Reference(exact, self.f(exact, x), EXACT, 1.0, ())
        return best_found(self.f, self.problem.domain, x, starts, extra=y, solution=solution_of(self.problem))

    def exact(self, x: Tensor) -> Tensor | None:
        """Solutions (B, n) for contexts as vectors (B, d), if all are convex quadratic programs with a solution; else None."""
        if not possible(self.problem.domain, x):
            return None
        problem = widened(self.problem, x.new_empty(len(x), self.problem.domain.dim), x)
        y = exactly(Cost(problem), problem.domain, x.double())
        return None if y is None or not bool(y.isfinite().all()) else y.to(x)

    def draw(self, count: int) -> Tensor:
        """Held-out contexts (count, d) as vectors, with the solver's dtype and device."""
        return unseen(self.problem, count, self._like().device).to(self._like())

    def rows(self, x: Given, scored: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Contexts as a user has them -> vectors (B, d), after validation.

        Args:
            x: contexts.
            scored: whether the cost is evaluated, too, so that hidden keys are needed.
            dtype: of the result; None gives the model's.

        Raises:
            UserError: as `predict`.
        """
        like = self._like()
        return packed(self.problem, x, scored, like if dtype is None else like.to(dtype))

    @torch.no_grad()
    def export(self, path: str | Path) -> None:
        """Write the forward pass, contexts as vectors (B, d), without what is hidden, -> y (B, n) for any B > 1, as a
        `torch.export` archive.

        Raises:
            UserError: the model queries the objective, so it is more than a forward pass; or the file exists and was not
                exported by rlamort.
            Fault: the exported program differs from the model.
        """
        path = Path(path)
        if path.exists() and not _exported(path):
            raise UserError(f"export: {path} exists already, and rlamort did not export it; choose another name")
        if not isinstance(self.model, Full):
            raise UserError(
                f"export: a {type(self.model).__name__} model evaluates the cost or its gradients while it solves, which an "
                "exported forward pass cannot; a model of class Full is needed"
            )
        some, fresh = (self.f.seen(self.draw(count)) for count in (4, 7))
        program = torch.export.export(self.model, (some,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
        ours, theirs = self.model(fresh), program.module()(fresh)
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            raise Fault(f"export: the exported program differs from the model by {(ours - theirs).abs().max().item():.1e}")
        with published_file(path) as partial:
            torch.export.save(program, partial, extra_files={MARK: ""})

    def save(self, folder: str | Path) -> None:
        """Write tensors, calibration, and the values that rebuild the model to a folder: safetensors and JSON.

        Raises:
            Diverged: as `check_finite`; nothing is written.
        """
        self.check_finite()
        calibration = self.conformal and {
            "quantile": self.conformal.quantile,
            "level": self.conformal.level,
            "count": self.conformal.count,
        }
        facts = {"facts": self.facts, "training_seconds": self.training_seconds}
        save_agent(Path(folder), self.state_dict(), {"conformal": calibration, **facts})

    def check_finite(self) -> None:
        """Check all trained parameters.

        Raises:
            Diverged: a parameter is not finite.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                advice = f"`rlamort check` finds where derivatives of {type(self.problem).__name__} fail"
                raise Diverged(f"{name} is no longer finite: training has diverged; {advice}")

    @classmethod
    def load(cls, folder: Path, problem: Problem, build: Callable[[dict[str, Any]], Model]) -> Self:
        """Load what `save` wrote, with the model that `build` makes of its values.

        Raises:
            UserError: nothing is saved there, or it does not fit the problem.
        """
        saved = open_saved(folder)
        if not {"conformal", "facts", "training_seconds"} <= set(saved.facts):
            raise UserError(f"{folder}: it holds an agent, which rlamort.load loads; a folder that Solver.save wrote is needed")
        solver = cls(build(saved.facts["facts"]), problem, saved.facts["facts"])
        solver.training_seconds = saved.facts["training_seconds"]
        saved.fill(solver)
        calibration = saved.facts["conformal"]
        solver.conformal = calibration and Conformal(calibration["quantile"], calibration["level"], calibration["count"])
        return solver

    @torch.no_grad()
    def predict_rows(self, rows: Tensor) -> Tensor:
        """`predict` for contexts as vectors (B, d), in chunks: on a CPU as many as its caches hold."""
        numbers = rows.shape[-1] + self.problem.domain.dim
        parts = torch.split(rows, max(FEWEST, (CACHED if rows.device.type == "cpu" else FLOATS) // numbers))
        first = self._predicted(parts[0])
        if len(parts) == 1:
            return first
        y = first.new_empty(len(rows), first.shape[-1])
        y[: len(first)] = first
        for part, out in zip(parts[1:], torch.split(y[len(first) :], len(first)), strict=True):
            out.copy_(self._predicted(part))
        return y

    def _predicted(self, rows: Tensor) -> Tensor:
        finite = rows.isfinite().all(-1, keepdim=True)
        clean = rows.where(finite, 0)  # a decomposition somewhere inside would raise for the whole batch
        y: Tensor = self.model(self.f.seen(clean), self.f.oracle(clean))
        return y.detach().where(finite, torch.nan)

    def _like(self) -> Tensor:
        """A tensor of the dtype and device that contexts must have."""
        own = (t for t in itertools.chain(self.parameters(), self.buffers()) if t.is_floating_point())
        return next(own, torch.empty(0))


def _exported(path: Path) -> bool:
    """Whether `Solver.export` wrote a file."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(MARK) for name in archive.namelist())


def _bounded(problem: Problem, like: Tensor) -> Tensor:
    """Whether C(x) is bounded, of a few contexts, the same at every call. Generators stay as they are."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(0)
        x = unseen(problem, PROBES, like.device).to(like)
    return problem.domain.at(x).compact()
