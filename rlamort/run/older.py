"""Translation of older versions' keys, so that their runs, agents and solvers still load."""

from collections.abc import Mapping
from typing import Any

from rlamort.config import KIND, renamed, unsupported

SCORED = ("objective", "regress", "es", "smoothed", "penalty", "lagrangian")  # losses that have `start` today
AMORTIZE, PLANNER = "rlamort.agents.amortize.Amortize", "rlamort.agents.plan.MPC"
INERT = ("update_after", "keep_checkpoints", "on_nan", "wandb_artifacts", "warmup_steps")  # what baselines took without effect
STEPPED = {"psd": "psd", "lista": "lista", "lista_cp": "lista_cp", "alista": "alista", "slista": "step_ista"}  # and their steps


def modern(row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file with former keys replaced by the parts that they chose."""
    values = _acting(row, _whole(row, _headed(values)))
    names = renamed(dict(row))
    old = {name: values[name] for name in names if name in values}
    current = {name: value for name, value in values.items() if name not in names}
    if not old:
        return current | ({"loss": _ended(current["loss"])} if "loss" in current else {})
    if row["agent"] != AMORTIZE:
        return current | {names[name]: value for name, value in old.items()}
    model, loss = _model(current.get("model", "full"), old), _loss(current.get("loss", "objective"), old)
    return current | {"model": model, "loss": _ended(loss)}


def _whole(row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from when planners fitted their dynamics to all episodes, and none was held out."""
    before = row["agent"] == PLANNER and "fit_hold_out" not in values
    return dict(values) | ({"fit_hold_out": 0} if before else {})


def _acting(row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without those that had no effect in this row, and are refused today."""
    inert = set(INERT) & set(unsupported(dict(row)))
    return {name: value for name, value in values.items() if name not in inert}


def _headed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from when critics had a number of outputs instead of a head: several were TQC's quantiles."""
    critic = dict(values["critic"]) if "critic" in values and isinstance(values["critic"], Mapping) else {}
    if "outputs" not in critic:
        return dict(values)
    outputs, current = critic.pop("outputs"), dict(values)
    if "dropped" in current:
        critic["head"] = {KIND: "Quantiles", "count": outputs, "dropped": current.pop("dropped")}
        current["pessimism"] = 0.0
    return current | {"critic": critic}


def _ended(loss: Any) -> Any:
    """A loss from when none scored the first iterate: without `start` it scores the last alone."""
    chosen = {KIND: loss} if isinstance(loss, str) else loss
    scores = isinstance(chosen, dict) and chosen.get(KIND, "").lower() in SCORED
    return chosen | {"start": 0.0} if scores and "start" not in chosen else loss


def _model(name: str, old: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model that was chosen by name, with the fields of all models as flat keys."""
    init = "middle" if old.get("start") == "middle" else "full"
    adjoint = old.get("adjoint", "unrolled")
    if name == "choice":
        return {"kind": "choice", **_rename(old, candidates="candidates")}
    if name == "semi":
        return {
            "kind": "semi",
            "init": init,
            "adjoint": adjoint,
            **_rename(old, iterations="steps", space="space", inner_rate="rate"),
        }
    if name == "recurrent":
        return {
            "kind": "recurrent",
            "init": init,
            "update": _rename(old, head="head", memory="memory"),
            **_rename(old, iterations="steps"),
        }
    if name == "latent":
        step = {"kind": "LearnedGradient", "rate": old.get("inner_rate") or 0.1}
        inner = {"kind": "Unroll", "update": step, "adjoint": adjoint, **_rename(old, iterations="steps")}
        return {"kind": "latent", "inner": inner, **_rename(old, latent_dim="dim")}
    if name in STEPPED:
        step = {"rate": old.get("rate", 1.0)} if name != "alista" else {}
        if old.get("momentum") == "fista":
            step = {"kind": "momentum", "update": {"kind": STEPPED[name], **step}}
        solver = {"kind": name, "update": step, **_rename(old, layers="steps")}
        return {"kind": "Safeguarded", "inner": solver} if old.get("safeguard") == "ista" else solver
    return {"kind": name}


def _loss(name: str, old: Mapping[str, Any]) -> dict[str, Any]:
    if name == "es":
        return {"kind": "es", **_rename(old, sigma="sigma", pairs="pairs")}
    if name in ("iterates", "truth"):
        return {"kind": name, **_rename(old, decay="decay")}
    if name == "regress" and "teacher_steps" in old:
        return {"kind": "regress", "teacher": {"kind": "fista", "steps": old["teacher_steps"]}}
    return {"kind": name}


def _rename(old: Mapping[str, Any], **names: str) -> dict[str, Any]:
    return {new: old[name] for name, new in names.items() if name in old}
