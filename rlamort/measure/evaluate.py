"""Evaluation of a trained agent, with or without refinement of its actions. `rlamort eval RUN`."""

from dataclasses import replace
from typing import Any

from rlamort import parts
from rlamort.config import Positive, check_names, convert, short_name
from rlamort.domain import Domain
from rlamort.env import Spec
from rlamort.errors import Fault, UserError
from rlamort.run.restore import load
from rlamort.score import finished, interval
from rlamort.update import AUTO, Anytime, Refine, Update, Worth, anytime, best

PLACES = ("env", "eval_env")
REFINEMENT = ("refine", "budget_us", "tolerance", "update")


def evaluate(run: str, episodes: int | None, method: str | None, fields: dict[str, Any]) -> list[str]:
    """Lines of the mean return, with its interval, of episodes with fixed seeds and deterministic actions.

    Args:
        run: a run directory, a saved agent, or sb3:FILE.zip.
        episodes: how many; None as in training.
        method: as for `Learner.load`.
        fields: environments as `env` and `eval_env`, and what `refinement` takes.

    Raises:
        UserError: there is no such agent, or a field is not known or not allowed.
        Fault: the environment failed in all episodes.
    """
    check_names(fields, [*PLACES, *REFINEMENT])
    learner = load(run, method=method, **{name: fields[name] for name in PLACES if name in fields})
    asked = refinement({name: fields[name] for name in REFINEMENT if name in fields}, learner.agent.spec)
    found = learner.score(episodes, refine=asked)
    learner.close()
    returns = finished(found.returns)
    if not returns:
        raise Fault(f"{run}: its evaluation is undefined, since all of its {found.failed} episodes failed, as said above")
    how = [f"{name}={fields[name]}" for name in REFINEMENT if name in fields]
    where = f"{short_name(learner.config.method)} on {learner.config.run.env}, {learner.clock.env_step:,} steps, {run}"
    lines = [", ".join([where, *how])]
    if learner.agent.spec.problem is None:
        what, digits, (mean, low, high) = "return", ".2f", interval(returns)
        count = "1 episode" if len(returns) == 1 else f"{len(returns)} episodes"
    else:
        what, digits, (mean, low, high) = "mean cost, lower is better:", ".4g", interval([-one for one in returns])
        count = "1 context" if len(returns) == 1 else f"{len(returns)} contexts"
    bounds = f", 95 % interval [{low:{digits}}, {high:{digits}}]" if len(returns) > 1 else ""
    lost = f"; {found.failed} of {len(found.returns)} failed, and are left out" if found.failed else ""
    return [*lines, f"{what} {mean:{digits}}{bounds} over {count}{lost}"]


def refinement(fields: dict[str, Any], spec: Spec) -> Anytime | None:
    """The refinement that keys ask for; None where they ask for none.

    Args:
        fields: refine, a number of steps or auto; budget_us, for the actions of all environments that are played side by side;
            tolerance, of auto; update, the solver's step: a part of any kind that has nothing to learn.
        spec: of the environment.

    Raises:
        UserError: a value that is not allowed, or a key without the one that it belongs to.
    """
    numbers = {name: convert(name, fields[name], Positive) for name in ("budget_us", "tolerance") if name in fields}
    refine: Refine = fields.get("refine")
    asked = anytime(refine, numbers.get("budget_us"))
    rest = [name for name in ("tolerance", "update") if name in fields]
    if asked is None and rest:
        raise UserError(f"{', '.join(rest)}: nothing is refined; refine=5, refine=auto or budget_us=500 is needed, too")
    if "tolerance" in fields:
        if refine != "auto":
            raise UserError(f"tolerance={fields['tolerance']}: it belongs to refine=auto")
        asked = replace(asked or AUTO, worth=Worth(numbers["tolerance"]))
    if asked is None or "update" not in fields:
        return asked
    part: parts.Update = convert("update", fields["update"], parts.Update, parts.LineSearch())

    def update(domain: Domain) -> Update:
        return part(parts.Setting(domain, spec.x_dim, ()), asked.steps or 1)

    if any(True for _ in update(spec.domain).parameters()):
        raise UserError(f"update={part.label()}: its step has weights to learn, and nothing trains them here; adam has none")
    return replace(asked, update=best(update))
