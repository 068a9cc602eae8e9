"""Which trainings a report or a comparison asks for: pairs of a model and a loss, with the keys that each takes."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from rlamort.config import KIND, Part, convert, fields_of, nested, resolve
from rlamort.errors import UserError, nearest
from rlamort.measure.check import LOSSES, MODELS
from rlamort.parts import Loss, Model

BASES: dict[str, type[Part]] = {"model": Model, "loss": Loss}


def pairs(models: Sequence[str], losses: Sequence[str]) -> list[tuple[str, str]]:
    """Every model with every loss; rl, which trains a policy, with full alone, and a warning for the others.

    Raises:
        UserError: a name is unknown, or no pair remains.
    """
    kept, left = _divided(models, losses)
    if left:
        warnings.warn(f"loss=rl: a policy is a full model, so this is left out: {left}", stacklevel=3)
    return kept


def _divided(models: Sequence[str], losses: Sequence[str]) -> tuple[list[tuple[str, str]], str]:
    """The pairs that remain, and what is left out, in words."""
    for names, allowed, what in ((models, MODELS, "model"), (losses, LOSSES, "loss")):
        for name in names:
            if name not in allowed:
                raise UserError(f"{what}={name}: there is no such {what}. {nearest(name, allowed)}")
    every = list(itertools.product(models, losses))
    kept = [(model, loss) for model, loss in every if loss != "rl" or model == "full"]
    left = ", ".join(f"{model} by {loss}" for model, loss in every if (model, loss) not in kept)
    if not kept:
        raise UserError(f"loss=rl: a policy is a full model, which leaves nothing of {left}; model=full is needed")
    return kept, left


def asked_of(model: str, loss: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields for one of several models and losses, with the keys that it has."""
    chosen: dict[str, Any] = {name: value for name, value in fields.items() if name not in BASES}
    for name, kind in (("model", model), ("loss", loss)):
        keys = _keys(name, kind, fields)
        chosen[name] = {KIND: kind, **keys} if keys else kind
    return chosen


def _keys(name: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    given = fields.get(name, {})
    known = {} if kind == "rl" or not given else fields_of(type(BASES[name].named(kind, name)))
    return {key: value for key, value in given.items() if key in known}


def require_keys(models: Sequence[str], losses: Sequence[str], fields: dict[str, Any]) -> None:
    """Raises UserError for a key that none of the parts has."""
    for name, kinds in (("model", models), ("loss", losses)):
        for key, value in fields.get(name, {}).items():
            if not any(key in _keys(name, kind, fields) for kind in kinds):
                convert(name, {KIND: kinds[0], key: value}, BASES[name])


def require_values(chosen: Sequence[tuple[str, str]], fields: dict[str, Any]) -> None:
    """Raises UserError for a key or a value that one of several trainings would refuse, after those before it."""
    for model, loss in chosen:
        asked = asked_of(model, loss, fields)
        if loss == "rl":
            resolve("td3", {name: value for name, value in asked.items() if name not in BASES})
        else:
            resolve("amortize", asked)


def require_trainings(models: Sequence[str], losses: Sequence[str], seeds: Sequence[int], fields: dict[str, Any]) -> None:
    """Raises UserError for what a comparison would refuse whatever its problem is: a run's takes long to make."""
    if "seed" in fields:
        raise UserError(f"seed={fields['seed']}: a comparison has seeds, a training each, as in seeds=0,1,2")
    if not seeds or len(set(seeds)) < len(seeds):  # the same training twice would narrow the interval
        raise UserError(f"seeds={list(seeds)}: one or more are needed, each another")
    (chosen, _), fields = _divided(models, losses), nested(fields)
    require_keys(models, losses, fields)
    require_values(chosen, fields)
