"""Fields: what a run can be told, each declared once, in the signature and docstring of what takes it.

A method is a row, one YAML file that names its agent, its source and its loop. The keys of a run are those of `Run` and of
the constructors that the row names; their types, ranges, defaults and help are read from there.
"""

import importlib
import importlib.resources
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml

from rlamort.errors import UserError, nearest


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both allowed; `above` and `below` leave the ends out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'>' if self.above else '>='} {self.low}")
        if self.high < math.inf:
            parts.append(f"{'<' if self.below else '<='} {self.high}")
        return " and ".join(parts)


@dataclass(frozen=True)
class AtMost:
    """More than anybody means, and less than what overflows: said only to those who exceed it."""

    high: int

    def __contains__(self, value: float) -> bool:
        return value <= self.high

    def __str__(self) -> str:
        return ""


Count = Annotated[int, Range(1), AtMost(2**53)]  # what a double counts to
Whole = Annotated[int, Range(0), AtMost(2**53)]
Size = Annotated[int, Range(1), AtMost(10**6)]  # of what lies in memory, or is done in one step of the loop
Seed = Annotated[int, Range(0, 2**31 - 1)]  # what C's int holds, and with a row's number added numpy.random.seed (2**32 - 1)
Seconds = Annotated[float, Range(0, above=True), AtMost(10**6)]  # the kernel waits for 2**31 milliseconds at most
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Widths = tuple[Size, ...]
Tracked = Literal["none", "wandb", "tensorboard"]


@dataclass(frozen=True)
class Run:
    """The keys that every method shares.

    Args:
        env: Gymnasium id, or module:Class from the current folder or an installed package.
        env_kwargs: keywords of the environment's constructor, e.g. env_kwargs.ctrl_cost_weight=0.
        eval_env: where it is evaluated, as env, without env_kwargs; null makes others like env.
        max_episode_steps: truncates longer episodes; null keeps the environment's own limit.
        reset_options: the options that every reset of the environment is given, e.g. reset_options.level=2.
        steps: environment steps to train for.
        seed: of all that is random in training; row i of the environments has seed + i. Evaluation has its own.
        device: where networks and data live; auto takes a GPU where there is one.
        dir: the run directory, which must not exist yet; null makes a new one under runs/.
        num_envs: environments stepped side by side.
        vectorization: sync steps them in this process, async in a worker process each, on one thread.
        max_env_faults: steps that may raise, return NaN or lose a worker process; each ends its episode and is said.
        env_timeout: seconds that worker processes may take over a step before they are replaced.
        utd: updates per environment step.
        reset_every: updates after which networks and optimisers begin anew, on the replay as it is (Nikishin et al., 2022);
            0 never.
        batch_size: transitions in an update.
        warmup_steps: environment steps with uniformly random actions, before the agent acts.
        update_after: environment steps before the first update; null takes warmup_steps.
        eval_every: steps between evaluations.
        eval_episodes: episodes in an evaluation, each with its own fixed seed.
        log_every: steps between records of what training measures.
        compile: true captures sampling, update and action as one graph (5-60 s, then faster); auto does so from 15,000 updates
            on. What was compiled is kept for later runs.
        threads: CPU threads of torch; null takes its own choice, within the cores and the quota that the process has, and one
            while that is faster, as it is where other processes use the same cores.
        checkpoint_every: steps between checkpoints, from which `rlamort resume` goes on.
        keep_checkpoints: how many of the newest stay.
        resume: auto goes on with the run in `dir` where there is one, for machines that may be taken away.
        on_nan: what follows when learning diverges; stop ends the run, retry goes back to the newest checkpoint once, with half
            the learning rate.
        track: where else records go; none, wandb, tensorboard, or a list of them. Rows appear there at checkpoints.
        track_timeout: seconds that the end of a run waits for them to arrive there; what did not, `rlamort push` sends later.
        wandb_project: Weights & Biases project.
        wandb_entity: user or team there; null takes the account's default.
        wandb_group: runs that are shown together; null gives the runs of one -m a group of their own.
        wandb_tags: labels.
        wandb_notes: free text.
        wandb_mode: online, offline (files that `wandb sync` sends later), or disabled.
        wandb_artifacts: how many checkpoints, the first ones, have their agents uploaded as artifacts.
        video: whether a video of one episode is made at the end.
    """

    env: str | None = None
    env_kwargs: dict[str, Any] | None = None
    eval_env: str | None = None
    max_episode_steps: Size | None = None
    reset_options: dict[str, Any] | None = None
    steps: Count = 100_000
    seed: Seed = 0
    device: str = "auto"
    dir: str | None = None
    num_envs: Size = 1
    vectorization: Literal["sync", "async"] = "sync"
    max_env_faults: Whole = 10
    env_timeout: Seconds = 60.0
    utd: Size = 1
    reset_every: Whole = 0
    batch_size: Size = 256
    warmup_steps: Whole = 1_000
    update_after: Whole | None = None
    eval_every: Count = 5_000
    eval_episodes: Size = 10
    log_every: Count = 1_000
    compile: Literal["auto"] | bool = "auto"
    threads: Annotated[int, Range(1), AtMost(1_024)] | None = None
    checkpoint_every: Count = 10_000
    keep_checkpoints: Count = 2
    resume: Literal["never", "auto"] = "never"
    on_nan: Literal["stop", "retry"] = "stop"
    track: Tracked | tuple[Tracked, ...] = "none"
    track_timeout: Seconds = 10.0
    wandb_project: str = "rlamort"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_notes: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    wandb_artifacts: Whole = 0
    video: bool = True


# What a resumed run may be told anew: these change nothing that is learned,
FREE = {
    "eval_env", "steps", "max_env_faults", "env_timeout", "eval_every", "eval_episodes", "log_every", "checkpoint_every",
    "keep_checkpoints", "resume", "on_nan", "video", "dir", "track", "track_timeout",
    "wandb_project", "wandb_entity", "wandb_group", "wandb_tags", "wandb_notes", "wandb_mode", "wandb_artifacts",
}  # fmt: skip
# and these make it another run. The rest changes what is learned from here on, which is said.
FIXED = {
    "env",
    "env_kwargs",
    "max_episode_steps",
    "reset_options",
    "num_envs",
    "seed",
    "buffer_size",
    "n_step",
    "hidden",
    "critics",
    "critic_norm",
    "normalise",
}


class Field(NamedTuple):
    """One key: where it is declared, what it may be, and what it means."""

    name: str
    type: Any
    default: Any
    help: str
    owner: str


class Config(NamedTuple):
    """A method with every field settled."""

    method: str
    row: dict[str, Any]
    run: Run
    values: dict[str, Any]  # every field, run's and method's, in the order of `fields`

    def keywords(self, target: Callable[..., Any]) -> dict[str, Any]:
        """The part of the values that `target` takes."""
        return {name: self.values[name] for name in fields_of(target)}


TARGETS = ("opens", "source", "agent", "train")  # who opens the environment, gives batches, learns, loops
# A row also says what it is, as a tuple; whose claims it shares, where they have another name; fields that nobody may change.
ROW_KEYS = ("about", "f", "Y", "p(x)", "model", "loss", "claims", "settled", *TARGETS)


def locate(path: str) -> Any:
    """The object that a dotted path names. Raises UserError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: a method names this, and it cannot be imported: {error}") from error


def short_name(method: str) -> str:
    """What a method is called in file names and legends: a row's name, or that of the user's file."""
    return Path(method).stem if method.endswith((".yaml", ".yml")) else method


def methods() -> list[str]:
    """The names of all rows."""
    root = importlib.resources.files("rlamort.configs") / "method"
    with importlib.resources.as_file(root) as folder:
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def read_row(method: str) -> dict[str, Any]:
    """The YAML of a method: a name in configs/method, or the path of a file of the user's own."""
    if method.endswith((".yaml", ".yml")):
        path = Path(method)
        if not path.is_file():
            raise UserError(f"method {method}: there is no such file")
        if str(path.resolve().parent) not in sys.path:
            sys.path.insert(0, str(path.resolve().parent))  # its agent may be a module beside it
        text = path.read_text()
    elif method in methods():
        text = (importlib.resources.files("rlamort.configs") / "method" / f"{method}.yaml").read_text()
    else:
        raise UserError(f"method {method!r} is unknown. {nearest(method, methods())}")
    row = yaml.safe_load(text)
    missing = [key for key in TARGETS if key not in (row or {})]
    if missing:
        raise UserError(f"method {method}: its file lacks {', '.join(missing)}")
    return dict(row)


def config_of(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run directory.

    Raises:
        UserError: it is none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: it is not a run directory; one that `rlamort train` made, with a config.yaml, is needed")
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{file}: it cannot be read: {' '.join(str(error).split())}") from error


def fields_of(target: Callable[..., Any]) -> dict[str, Field]:
    """The keyword fields of a class or function, with the help that its docstring's Args section gives."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    help_of = _arguments(inspect.getdoc(target) or "")
    return {
        p.name: Field(p.name, hints[p.name], p.default, help_of.get(p.name, ""), target.__name__)
        for p in inspect.signature(target).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


def _arguments(doc: str) -> dict[str, str]:
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.S | re.M)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section.group(1), re.S | re.M) if section else []
    return {name: " ".join(text.split()) for name, text in entries}


def fields(row: dict[str, Any]) -> dict[str, Field]:
    """Every field of a method, the run's first; a name that two constructors share is one field.

    Where a source says that fields of a run have another `meaning` with it, their help is that.
    """
    source = locate(row["source"])
    gathered: dict[str, Field] = {}
    for target in (Run, locate(row["agent"]), source):
        for name, field in fields_of(target).items():
            gathered.setdefault(name, field)
    meaning: dict[str, str] = getattr(source, "meaning", {})
    return {name: field._replace(help=meaning.get(name, field.help)) for name, field in gathered.items()}


def settled(row: dict[str, Any]) -> list[str]:
    """The fields that nobody may change, since the row says so, or they do nothing with its source, which lists them."""
    return [*row.get("settled", ()), *getattr(locate(row["source"]), "settled", ())]


def defaults(row: dict[str, Any]) -> dict[str, Any]:
    """What each field is when nobody says otherwise: the row's own choice, or that of the signature."""
    known = fields(row)
    chosen = {name: field.default for name, field in known.items()}
    given = {key: value for key, value in row.items() if key not in ROW_KEYS or key in known}
    check_names(given, known)
    return chosen | given


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for the first key that no field has."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UserError(f"{name}: there is no such key. {nearest(name, known)}")


def resolve(method: str, given: dict[str, Any]) -> Config:
    """A method with what was given, over the row's choices, over the signatures' defaults; every value checked.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range: names it, what was given, what is allowed.
    """
    row = read_row(method)
    known = fields(row)
    check_names(given, known)
    chosen = defaults(row)
    values = {name: convert(name, value, known[name].type) for name, value in {**chosen, **given}.items()}
    for name in settled(row):
        if values[name] != chosen[name]:
            raise UserError(f"{name}={values[name]}: {method} has no choice there; only {chosen[name]} is allowed")
    run = Run(**{name: values[name] for name in fields_of(Run)})
    return Config(method, row, run, values)


def describe(kind: Any) -> str:
    """What a field may be, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *filter(None, map(str, arguments[1:]))])
    if origin is Literal:
        return ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[kind]


def takes_text(kind: Any) -> bool:
    """Whether any text is a value of the type."""
    return kind is str or (typing.get_origin(kind) in (typing.Union, types.UnionType) and str in typing.get_args(kind))


def element_of(kind: Any) -> Any:
    """The type of the items, where a list may be a value of the type; None where it may not."""
    lists = (one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is tuple)
    return next((typing.get_args(one)[0] for one in lists), None)


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type.

    Raises:
        UserError: it is not one, or is out of range.
    """
    try:
        return _convert(value, kind)
    except (TypeError, ValueError, OverflowError):
        most = min((one.high for one in _annotations(kind) if isinstance(one, AtMost)), default=math.inf)
        items = value if isinstance(value, list | tuple) else [value]
        limit = f", at most {most}" if any(isinstance(one, int | float) and one > most for one in items) else ""
        element = element_of(kind)
        listed = "" if element is None else _example(value, element)
        example = f", such as {name}=[{listed}]" if listed else ""
        long = isinstance(value, int) and abs(value) >= 10**100  # Python itself refuses to write out some of these
        raise UserError(f"{name}={'1e100 or more' if long else value}: {describe(kind)} is needed{limit}{example}") from None


def _annotations(kind: Any) -> Iterable[Any]:
    """What is said of a type, or of the parts of one that allows several."""
    return itertools.chain(getattr(kind, "__metadata__", ()), *map(_annotations, typing.get_args(kind)))


def _example(value: Any, element: Any) -> str:
    """What a list of such items may hold: the value, if that is what is wrong with it."""
    try:
        _convert(value or None, element)
    except (TypeError, ValueError, OverflowError):
        bare = typing.get_args(element)[0] if typing.get_origin(element) is Annotated else element
        return {int: "256,256", float: "0.1,0.2", str: "a,b"}.get(bare, "")
    return str(value)


def _convert(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _convert(value, arguments[0])
        if any(value not in constraint for constraint in arguments[1:]):
            raise ValueError
        return value
    if origin in (typing.Union, types.UnionType):
        for one in sorted(arguments, key=lambda a: a is str):  # text takes anything, so it is asked last
            try:
                return _convert(value, one)
            except (TypeError, ValueError, OverflowError):
                continue
        raise ValueError
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError
        return tuple(_convert(one, arguments[0]) for one in value)
    if origin is dict:
        return dict(value)
    if kind is type(None):
        if value is not None:
            raise ValueError
        return None
    if isinstance(value, bool) != (kind is bool) or value is None:
        raise ValueError
    if kind is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if kind is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if not isinstance(value, kind):
        raise ValueError
    return value
