"""The commands: what a user types, and the messages that answer."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlamort.config import Run, check_names, defaults, describe, fields, fields_of, methods, read_row, resolve, short_name
from rlamort.errors import Diverged, Fault, Preempted, UserError, nearest

if TYPE_CHECKING:
    from rlamort.run import Learner

USAGE = """\
rlamort: reinforcement learning in which a policy is an amortization model

  rlamort list                                        methods, and the problem that each amortizes
  rlamort train METHOD env=ENV [key=value ...]        train; -m seed=0,1,2 runs several
  rlamort train METHOD --help                         every key, its meaning and default
  rlamort resume RUN [key=value ...]                  go on with a run that was stopped, or make it longer
  rlamort push RUN [wandb_project=... ...]            send its records to Weights & Biases afterwards
  rlamort eval RUN [--episodes N]                     play evaluation episodes with a trained agent
  rlamort video RUN                                   film an episode
  rlamort plot RUN [RUN ...] [--out FILE]             learning curves, with intervals over seeds
  rlamort check PROBLEM                               look a problem over: shapes, derivatives, batches; what fits it
  rlamort amortize PROBLEM [model=full,semi ...]      train solvers for it; gap, speed-up and break-even beside the reference
  rlamort compare PROBLEM|RUN [loss=objective,es ...] same network, contexts and budget under several losses or models
  rlamort gap RUN|sb3:FILE.zip [env=ENV]              how far a policy is from the best action: by its critic, and re-simulated
  rlamort bench [NAME] [--out FILE]                   training speed beside SB3 and sbx; profile, scaling, checkpoint, tracking
  rlamort reproduce METHOD                            measure a method's claims on this machine

RUN is a run directory, the last line that `train` prints. PROBLEM is module:Class or a registered id (rlamort/Sphere-v0).
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0; 1, a claim failed; 2, what was asked cannot be done; 3, an environment or agent failed;
    4, storage did; 75, stopped and saved; 130, interrupted twice. RLAMORT_TRACEBACK=1 shows where an error came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    warnings.showwarning = _warn
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise UserError(f"{name}: there is no such command. {nearest(name, COMMANDS)}")
        return _guarded(lambda: COMMANDS[name](rest))
    except UserError as error:
        return _say(error, error.exit_code)


def _guarded(work: Callable[[], Any]) -> int:
    """The exit code of `work`, with what went wrong said in one message."""
    try:
        work()
    except (UserError, Fault) as error:
        return _say(error, error.exit_code)
    except Preempted as end:
        return end.exit_code
    except OSError as error:
        return _say(error, 4)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """One line a warning: where in the code it was raised is not what a user needs."""
    print(f"rlamort: warning: {message}", file=sys.stderr)


def _say(error: Exception, code: int) -> int:
    if os.environ.get("RLAMORT_TRACEBACK"):
        traceback.print_exception(error)
    print(f"rlamort: {error}", file=sys.stderr)
    return code


def list_methods(arguments: list[str]) -> None:
    """`rlamort list`."""
    _parser("list", "Methods, and the problem that each amortizes: argmin over y in Y of f(y; x), for x ~ p(x).").parse_args(
        arguments
    )
    rows = [(name, read_row(name)) for name in methods()]
    for name, row in rows:
        print(f"{name:<10} {row['about']}")
        parts = [f"{key} = {row[key]}" for key in ("f", "Y", "p(x)", "model", "loss") if key in row]
        if parts:
            print(f"{'':<10} {' · '.join(parts)}")
    print(
        "\nenv = any Gymnasium id (HalfCheetah-v5, Pendulum-v1, ...) or module:Class, a rlamort.Problem included, from here too"
    )


def train(arguments: list[str]) -> None:
    """`rlamort train METHOD key=value ...`: checks every key, then hands over to Hydra, which may run it several times."""
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise UserError(f"train: a method is needed first. Allowed: {', '.join(methods())}")
    method, *rest = arguments
    row = read_row(method)
    if short_name(method) != method:  # a file of the user's own, which later commands must find from other folders
        method = str(Path(method).resolve())
    known = fields(row)
    if "-h" in rest or "--help" in rest:
        return _help(method, row)
    flags, overrides = _parted(rest, known)
    if "--multirun" in flags and not any(override.startswith("wandb_group=") for override in overrides):
        overrides.append(f"wandb_group={short_name(method).replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")

    from hydra import main as hydra_main
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf

    store = ConfigStore.instance()
    values = defaults(row)
    store.store(name="fields", node={**values, "env_kwargs": values["env_kwargs"] or {}, "method_name": method})
    choice = short_name(method)
    if choice not in methods():
        store.store(group="method", name=choice, node=row, package="_global_")

    def job(composed: DictConfig) -> None:
        given = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(given, dict)
        values = {str(key): value for key, value in given.items() if key in known}
        code = _guarded(lambda: run_one(method, values))
        if code:  # before Hydra sees an exception and prints where it came from
            raise SystemExit(code)

    program, before = sys.argv[0], sys.argv
    sys.argv = [program, *flags, f"method={choice}", *overrides]
    try:
        hydra_main(version_base="1.3", config_path="pkg://rlamort.configs", config_name="train")(job)()
    finally:
        sys.argv = before


def _parted(arguments: list[str], known: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Hydra's own flags, and the overrides, whose keys must exist."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    given, rest = parser.parse_known_args(arguments)
    flags = (["--multirun"] if given.multirun else []) + (["--cfg", given.cfg] if given.cfg else [])
    return flags, [_checked(argument, known) for argument in rest]


def _checked(argument: str, known: dict[str, Any]) -> str:
    if argument.startswith("-"):
        raise UserError(f"{argument}: there is no such option. Keys are given as key=value; options: -m, --cfg job, --help")
    key, equals, value = argument.partition("=")
    if not equals:
        raise UserError(f"{argument}: key=value is needed")
    root = key.lstrip("+~").split(".")[0].split("/")[0].split("@")[0]
    if root == "hydra":
        return argument
    check_names([root], known)
    return f"++{key.lstrip('+')}={value}" if root == "env_kwargs" else argument


def _help(method: str, row: dict[str, Any]) -> None:
    print(f"rlamort train {method} key=value ...\n\n{row['about']}\n")
    chosen = defaults(row)
    owner = ""
    for field in fields(row).values():
        if field.owner != owner:
            owner = field.owner
            print(f"{'keys of every run' if owner == 'Run' else 'keys of ' + owner}:")
        default = chosen[field.name]
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        shown = list(shown) if isinstance(shown, tuple) else shown
        print(f"  {field.name}={shown}  ({describe(field.type)})\n      {field.help}")
    print("\n-m key=a,b,c runs once for each value; hydra/launcher=... chooses where.")


def run_one(method: str, given: dict[str, Any]) -> Path:
    """Train once, measure, save, draw and film; the run directory, which is also the last line printed."""
    from rlamort.directory import new_path
    from rlamort.run import learner_class

    config = resolve(method, given)
    if config.run.env is None:
        raise UserError("env: it is missing; a Gymnasium id such as env=HalfCheetah-v5, or env=module:Class, is needed")
    if config.run.resume == "auto":
        if config.run.dir is None:
            raise UserError("resume=auto: it needs dir=..., the run directory to look for")
        if (Path(config.run.dir) / "config.yaml").is_file():
            return go_on(Path(config.run.dir), {name: value for name, value in config.values.items() if name in given}, method)
    path = Path(config.run.dir or new_path(config))
    learner = learner_class(method)(**{**config.values, "dir": str(path)})
    return _run(learner, f"{short_name(method)} on {config.run.env}, seed {config.run.seed}, {learner.device}: {path}")


def go_on(path: Path, changes: dict[str, Any], method: str | None = None) -> Path:
    """Resume a run and see it through."""
    from rlamort.run import resume

    learner, exactness = resume(path, changes, method)
    return _run(learner, f"{path}: resumed at step {learner.clock.env_step:,} ({exactness})")


def _run(learner: "Learner", headline: str) -> Path:
    from rlamort.track import Terminal

    assert learner.directory is not None
    run, path = learner.config.run, learner.directory.path
    with Interrupts() as interrupts:  # to the very end: a finished run is not worth killing
        try:
            with Terminal(run.steps) as terminal:
                terminal.print(headline)
                try:
                    learner.learn(
                        run.steps - learner.clock.env_step,
                        reset_num_timesteps=False,
                        trackers=[terminal],
                        stop=interrupts.asked,
                    )
                except Preempted as end:
                    terminal.print(f"{end}; `rlamort resume {path}` goes on from there")
                    raise
                except Diverged as error:
                    terminal.print(f"{error}; what is known is in {learner.report_nan(error)}")
                    if run.on_nan == "stop" or learner.directory.checkpoints.newest() is None:
                        raise
                    learner.close()
                    slower = {"learning_rate": learner.config.values["learning_rate"] / 2, "on_nan": "stop"}
                    terminal.print(f"once more from the newest checkpoint, with learning_rate={slower['learning_rate']:g}")
                    return go_on(path, slower, learner.method)
                finally:
                    with contextlib.suppress(Diverged):  # the agent of the newest checkpoint is what is left then
                        if not learner.closed:
                            learner.check_finite()
                            learner.save(path / "agent")
            _leave_behind(path, run.video, learner.method)
        finally:
            if not learner.closed:
                learner.close()
    print(path)
    return path


class Interrupts:
    """SIGINT and SIGTERM as a request to stop at the next moment when all state is consistent; a second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:
        self.count = 0
        self.before = [signal.signal(number, self._take) for number in self.SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def asked(self) -> bool:
        return self.count > 0

    def _take(self, number: int, frame: types.FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


def resume_run(arguments: list[str]) -> None:
    """`rlamort resume RUN key=value ...`."""
    parser = _parser("resume", "Go on with a run from its newest checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("changes", nargs="*", help="key=value: what is to differ from now on, e.g. steps=200_000")
    _method_option(parser)
    given = parser.parse_args(arguments)
    go_on(given.run, _dotlist(given.changes), given.method)


def _leave_behind(path: Path, video: bool, method: str) -> None:
    from rlamort.plot import plot
    from rlamort.video import film_apart

    print(f"curve: {plot([path], path / 'plots' / 'return.png')}")
    if video:
        print(film_apart(path, method))


def push(arguments: list[str]) -> None:
    """`rlamort push RUN key=value ...`."""
    parser = _parser("push", "Send what a run has recorded to Weights & Biases: what is missing there, or all of it anew.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("changes", nargs="*", help="key=value, of the wandb_ keys, e.g. wandb_project=mine")
    parser.add_argument("--new", action="store_true", help="as a new run over there")
    given = parser.parse_args(arguments)
    changes = _dotlist(given.changes)
    check_names(changes, [name for name in fields_of(Run) if name.startswith("wandb_")])
    from rlamort.mirror import copy, require
    from rlamort.plot import config_of

    config_of(given.run)
    require("wandb")
    if given.new:
        (given.run / "mirror" / "wandb.json").unlink(missing_ok=True)
    size = (given.run / "metrics.jsonl").stat().st_size
    copy(given.run, "wandb", io.StringIO(f"{size}\nend\n"), os.getpid(), changes)
    print(f"{given.run}: all records are sent")


def _dotlist(changes: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    for change in changes:
        if "=" not in change:
            raise UserError(f"{change}: key=value is needed")
    given = OmegaConf.to_container(OmegaConf.from_dotlist(changes))
    assert isinstance(given, dict)
    return {str(key): value for key, value in given.items()}


def evaluate(arguments: list[str]) -> None:
    """`rlamort eval RUN`."""
    parser = _parser("eval", "Play evaluation episodes: fixed seeds, deterministic actions.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--episodes", type=int, default=None, help="how many (default: as in training)")
    _method_option(parser)
    given = parser.parse_args(arguments)
    if given.episodes is not None and given.episodes < 1:
        raise UserError(f"--episodes {given.episodes}: a whole number >= 1 is needed")
    from rlamort.run import load
    from rlamort.score import interval

    learner = load(given.run, method=given.method)
    result = learner.score(given.episodes)
    mean, low, high = interval(result.returns)
    print(f"{short_name(learner.config.method)} on {learner.config.run.env}, {learner.clock.env_step:,} steps, {given.run}")
    print(f"return {mean:.2f}, 95 % interval [{low:.2f}, {high:.2f}] over {len(result.returns)} episodes")


def video(arguments: list[str]) -> None:
    """`rlamort video RUN`."""
    parser = _parser("video", "Film one evaluation episode.")
    parser.add_argument("run", type=Path, help="run directory")
    _method_option(parser)
    given = parser.parse_args(arguments)
    if not os.environ.get("MUJOCO_GL"):
        from rlamort.plot import config_of
        from rlamort.video import film_apart

        config_of(given.run)
        said = film_apart(given.run, given.method)
        if said.startswith("no video"):
            raise UserError(said)
        print(said)
        return
    from rlamort.run import load
    from rlamort.video import film

    learner = load(given.run, method=given.method)
    run = learner.config.run
    out = given.run / "videos" / f"step-{learner.clock.env_step:09d}.mp4"
    total = film(learner.agent, run.env, run.env_kwargs, run.max_episode_steps, out)
    print(f"video: {out} (return {total:.1f})")


def plot_runs(arguments: list[str]) -> None:
    """`rlamort plot RUN...`."""
    parser = _parser("plot", "Draw learning curves; runs of the same method and environment are seeds of one line.")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="image to write (default: curves.png)")
    given = parser.parse_args(arguments)
    from rlamort.plot import plot

    print(plot(given.runs, given.out))


def check_problem(arguments: list[str]) -> None:
    """`rlamort check PROBLEM`."""
    parser = _parser("check", "Look a problem over before anything is trained on it; exits with 1 when something is wrong.")
    parser.add_argument("problem", help="module:Class, or a registered id")
    given = parser.parse_args(arguments)
    from rlamort.check import check
    from rlamort.envs.one_step import problem_of

    found = check(problem_of(given.problem))
    print(found)
    if not found.ok:
        raise SystemExit(1)


def amortize_problem(arguments: list[str]) -> None:
    """`rlamort amortize PROBLEM key=value ...`."""
    parser = _parser("amortize", "Train solvers for a problem, and hold them against its reference.")
    parser.add_argument("problem", help="module:Class, or a registered id")
    keys = "model=full,semi,... loss=objective,es,rl,...; they and the other keys: `rlamort train amortize --help`"
    parser.add_argument("keys", nargs="*", help=keys)
    parser.add_argument("--out", type=Path, help="folder for solvers, plots and data (default: a new one under runs/)")
    given = parser.parse_args(arguments)
    from rlamort.amortizing import report

    fields = _dotlist(given.keys)
    models, losses = (_names(fields.pop(key, default)) for key, default in (("model", "full,semi"), ("loss", "objective")))
    name = given.problem.split(":")[-1].replace("/", "-")
    out = given.out or Path("runs") / f"amortize-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _tell(report(given.problem, models, losses, out, **fields), out / "report.json")


def compare_losses(arguments: list[str]) -> None:
    """`rlamort compare PROBLEM|RUN key=value ...`."""
    parser = _parser("compare", "The same network, contexts and budget under several models or losses, the objective frozen.")
    parser.add_argument("target", help="module:Class or a registered id; or a run or sb3:FILE.zip, for its critic")
    parser.add_argument("keys", nargs="*", help="model=... loss=... seeds=0,1,2, and keys of `rlamort train amortize --help`")
    parser.add_argument("--out", type=Path, help="a file that takes the data, as JSON")
    given = parser.parse_args(arguments)
    from rlamort.amortizing import compare

    fields = _dotlist(given.keys)
    models, losses = (_names(fields.pop(key, default)) for key, default in (("model", "full"), ("loss", "objective,regress")))
    seeds = [int(seed) for seed in _names(fields.pop("seeds", "0,1,2"))]
    _tell(compare(_target(given.target), models, losses, seeds, **fields), given.out)


def _target(given: str) -> Any:
    """A problem, or those of a run's critic: contexts to train on, and contexts held out."""
    if not given.startswith("sb3:") and not (Path(given) / "config.yaml").is_file():
        return given
    from rlamort.gap import max_q

    return max_q(given)


def _names(given: Any) -> list[str]:
    """`a,b`, `[a,b]` or one value, as users of the shell and of Hydra write lists."""
    return [str(one) for one in given] if isinstance(given, list) else str(given).split(",")


def _tell(report: Any, out: Path | None) -> None:
    print(*report.lines, sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report.data, indent=1) + "\n")


def policy_gap(arguments: list[str]) -> None:
    """`rlamort gap RUN|sb3:FILE.zip`."""
    parser = _parser("gap", "The amortization gap of a trained policy: in its own critic, and re-simulated.")
    parser.add_argument("run", help="a run directory, or sb3:FILE.zip")
    parser.add_argument(
        "keys", nargs="*", help="env=ID (for sb3: files), episodes, states, resimulated, horizon, acting, patience"
    )
    parser.add_argument("--out", type=Path, help="a file that takes the data, as JSON")
    given = parser.parse_args(arguments)
    fields = _dotlist(given.keys)
    check_names(fields, ["env", "episodes", "states", "resimulated", "horizon", "acting", "patience"])
    from rlamort.gap import gap

    _tell(gap(given.run, fields.pop("env", None), **fields), given.out)


def reproduce_row(arguments: list[str]) -> None:
    """`rlamort reproduce ROW`."""
    parser = _parser("reproduce", "Measure a row's claims on this machine; exits with 1 when one fails.")
    parser.add_argument("row", nargs="?", help="a method with claims")
    parser.add_argument("--all", action="store_true", help="every row that has claims")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="where measurements are kept and looked up")
    given = parser.parse_args(arguments)
    if (given.row is not None) == given.all:
        raise UserError("reproduce: either a row or --all is needed")
    from rlamort.reproduce import reproduce, rows

    verdicts = [one for row in (rows() if given.all else [given.row]) for one in reproduce(row, given.results)]
    print(*verdicts, sep="\n")
    if not all(verdict.passed for verdict in verdicts):
        raise SystemExit(1)


def bench(arguments: list[str]) -> None:
    """`rlamort bench [NAME] [ALGORITHM]`."""
    parser = _parser("bench", "Measure rlamort itself on this machine, which should be idle.")
    names = ["speed", "profile", "scaling", "checkpoint", "tracking"]
    about = "speed, the default: beside Stable-Baselines3 and, where SBX_PYTHON names an interpreter that has it, sbx"
    parser.add_argument("name", nargs="?", default="speed", choices=names, help=about)
    parser.add_argument("algorithm", nargs="?", choices=["sac", "td3", "ddpg"], help="of speed and profile; sac by default")
    parser.add_argument("--out", type=Path, help="a file that takes the data, as JSON")
    given = parser.parse_args(arguments)
    if given.algorithm and given.name not in ("speed", "profile"):
        raise UserError(f"bench {given.name}: it takes no algorithm, and {given.algorithm} is given")
    from rlamort.bench import BENCHES

    _tell(BENCHES[given.name](*([given.algorithm] if given.algorithm else [])), given.out)


def _method_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", help="the YAML file of a method of your own, with which the run was trained")


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"rlamort {name}", description=about)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "list": list_methods,
    "train": train,
    "resume": resume_run,
    "push": push,
    "eval": evaluate,
    "video": video,
    "plot": plot_runs,
    "check": check_problem,
    "amortize": amortize_problem,
    "compare": compare_losses,
    "gap": policy_gap,
    "reproduce": reproduce_row,
    "bench": bench,
}
