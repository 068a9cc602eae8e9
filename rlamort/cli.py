"""The command line."""

import argparse
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlamort.config import Run, Seed, Size, as_call, check_names, convert, fields_of, methods, read_row, short_name
from rlamort.errors import UserError, nearest
from rlamort.host.command import Parser, free, guarded, out_option, say, warn
from rlamort.host.publish import unused

if TYPE_CHECKING:
    from rlamort.run.learner import Learner

USAGE = """\
rlamort: reinforcement learning in which a policy is an amortization model

  rlamort list                                        methods, and the problem that each amortizes
  rlamort train METHOD env=ENV [key=value ...]        train; -m seed=0,1,2 runs several
  rlamort train METHOD --help                         every key, its meaning and default
  rlamort resume RUN [key=value ...]                  continue a run that was stopped, or make it longer
  rlamort push RUN [wandb_project=... ...]            upload its records to Weights & Biases afterwards
  rlamort eval RUN [refine=5 ...] [--episodes N]      evaluate a trained agent, with its actions refined or not
  rlamort demonstrate EXPERT --out FILE.npz env=ENV   write an expert's observations and actions, for `train bc`
  rlamort video RUN                                   record a video of an episode
  rlamort plot RUN [RUN ...] [--out FILE]             learning curves, with intervals over seeds
  rlamort check PROBLEM                               test a problem: shapes, derivatives, batches; which models and losses fit
  rlamort amortize PROBLEM [model=full,semi ...]      train solvers for it; gap, speed-up and break-even against the reference
  rlamort compare PROBLEM|RUN [loss=objective,es ...] same network, contexts and budget under several losses or models
  rlamort gap RUN|sb3:FILE.zip [env=ENV]              how far a policy is from the best action: by its critic, and in rollouts
  rlamort bench [NAME] [--out FILE]                   training speed against SB3, sbx; profile, scaling, gpu, ...
  rlamort reproduce [METHOD]                          measure a method's claims on this machine; alone, lists them
  rlamort COMMAND --help                              what a command takes; rlamort --version

RUN is a run directory, the last line that `train` prints. PROBLEM is module:Class or a registered id (rlamort/Sphere-v0).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0; 1, a claim failed; 2, an invalid request; 3, an environment or agent failed; 4, storage
    failed; 75, stopped and saved; 130, interrupted twice; 141, nobody reads its output. RLAMORT_TRACEBACK=1 shows where an
    error came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"rlamort {importlib.metadata.version('rlamort')}")
        return 0
    warnings.showwarning = warn
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise UserError(f"{name}: there is no such command. {nearest(name, COMMANDS)}")
        return guarded(lambda: COMMANDS[name](rest))
    except UserError as error:
        return say(error, error.exit_code)


def list_methods(arguments: list[str]) -> None:
    """`rlamort list`."""
    about = "Methods, and the problem that each amortizes: argmin over y in Y of f(y; x), for x ~ p(x)."
    Parser("list", about).parse_args(arguments)
    rows = [(name, read_row(name)) for name in methods()]
    for name, row in rows:
        print(f"{name:<10} {row['about']}")
        parts = [f"{key} = {as_call(row[key])}" for key in ("f", "Y", "p(x)", "model", "loss") if key in row]
        if parts:
            print(f"{'':<10} {' · '.join(parts)}")
    print(
        "\nenv = any Gymnasium id (HalfCheetah-v5, Pendulum-v1, ...) or module:Class, a rlamort.Problem included, from here too"
    )


def train(arguments: list[str]) -> None:
    """`rlamort train METHOD key=value ...`: checks every key, then runs Hydra, which may launch several runs."""
    from rlamort.run.help import method_help, train_help

    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not words and arguments:
        train_help()
        return
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise UserError(f"train: a method is needed first. Allowed: {', '.join(methods())}")
    method, *rest = words
    row = read_row(method)
    if short_name(method) != method:  # a file of the user's own, which later commands must find from other folders
        method = str(Path(method).resolve())
    if len(words) < len(arguments):
        method_help(method, row)
        return
    from rlamort.run.compose import Composition
    from rlamort.run.session import Session

    composition = Composition(method, row, rest)
    code = composition.run(Session(_leave_behind).start)
    if composition.runs:
        where = Path(os.path.commonpath([run.parent for run in composition.runs]))
        if len(composition.runs) > 1:
            from rlamort.measure.plot import told

            print(told(f"all {len(composition.runs)} runs", composition.runs, unused(where / f"{composition.name}.png")))
        if composition.search:
            print(*composition.search.answer(composition.trials, unused(where / f"{composition.name}.json")), sep="\n")
    if code:
        raise SystemExit(code)


def resume_run(arguments: list[str]) -> None:
    """`rlamort resume RUN key=value ...`."""
    parser = Parser("resume", "Continue a run from its newest checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    about = "settings to change, e.g. steps=200_000, or env=module:Class for a run whose environment has no name"
    parser.add_argument("changes", nargs="*", help=f"key=value: {about}")
    _method_option(parser)
    options = parser.parse_args(arguments)
    from rlamort.run.session import Session

    Session(_leave_behind).resume(options.run, _values(options.changes), options.method)


def _leave_behind(learner: "Learner", path: Path) -> None:
    from rlamort.measure.plot import told
    from rlamort.measure.video import film_apart

    print(told("curve", [path], path / "plots" / "return.png"))
    if learner.config.run.video:
        filmed = path / "videos" / f"step-{learner.clock.env_step:09d}.mp4"
        print(f"video: {filmed}" if filmed.exists() else film_apart(path, learner.method))  # a finished run may be resumed


def push(arguments: list[str]) -> None:
    """`rlamort push RUN key=value ...`."""
    parser = Parser("push", "Upload the records of a run to Weights & Biases: those missing there, or all as a new run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("changes", nargs="*", help="key=value: the wandb_ keys, e.g. wandb_project=mine, and track_timeout")
    parser.add_argument("--new", action="store_true", help="as a new run there")
    options = parser.parse_args(arguments)
    changes, known = _values(options.changes), fields_of(Run)
    check_names(changes, [name for name in known if name.startswith("wandb_") or name == "track_timeout"])
    from rlamort.run.mirror import catch_up

    print(catch_up(options.run, {name: convert(name, value, known[name].type) for name, value in changes.items()}, options.new))


def _values(arguments: list[str]) -> dict[str, Any]:
    """Overrides as values, for commands that do not use Hydra."""
    from rlamort.run.overrides import values

    return values(arguments, {name: field.type for name, field in fields_of(Run).items()})


def evaluate(arguments: list[str]) -> None:
    """`rlamort eval RUN`."""
    parser = Parser("eval", "Evaluate an agent: episodes with fixed seeds and deterministic actions.")
    parser.add_argument("run", help="a run directory, or sb3:FILE.zip")
    parser.add_argument("--episodes", help="number of episodes (default: as in training)")
    about = "env=..., eval_env=...: as for video; refine=5 or refine=auto, budget_us=500, tolerance=0.01, update=cem: "
    about += "improve every action in the agent's critic before it is played"
    parser.add_argument("keys", nargs="*", help=about)
    _method_option(parser)
    options = parser.parse_args(arguments)
    episodes = None if options.episodes is None else convert("--episodes", options.episodes, Size)
    from rlamort.measure.evaluate import evaluate as score_of

    print(*score_of(options.run, episodes, options.method, _values(options.keys)), sep="\n")


def show(arguments: list[str]) -> None:
    """`rlamort demonstrate EXPERT --out FILE.npz env=ENV`."""
    parser = Parser("demonstrate", "Let an expert play, and write its observations and actions.")
    parser.add_argument("expert", help="a run directory, sb3:FILE.zip, planner, or module:object with `predict`")
    parser.add_argument("keys", nargs="*", help="env=ENV, labels=5000, seed")
    parser.add_argument("--out", required=True, help="FILE.npz, or minari:ID for a data set of Minari's")
    options = parser.parse_args(arguments)
    from rlamort.run.demonstrate import demonstrate

    fields = _values(options.keys)
    check_names(fields, ["env", "labels", "seed"])
    print(demonstrate(options.expert, options.out, **fields))


def video(arguments: list[str]) -> None:
    """`rlamort video RUN`."""
    parser = Parser("video", "Record a video of one evaluation episode.")
    parser.add_argument("run", type=Path, help="run directory")
    _places_option(parser)
    _method_option(parser)
    options = parser.parse_args(arguments)
    if not os.environ.get("MUJOCO_GL"):
        from rlamort.measure.video import film_apart

        said = film_apart(options.run, options.method, options.places)
        if said.startswith("no video"):
            raise UserError(said)
        print(said)
        return
    from rlamort.measure.video import film
    from rlamort.run.restore import load

    learner = load(options.run, method=options.method, **_places(options.places))
    out = unused(options.run / "videos" / f"step-{learner.clock.env_step:09d}.mp4")
    total = film(learner, out)
    print(f"video: {out} (return {total:.1f})")


def plot_runs(arguments: list[str]) -> None:
    """`rlamort plot RUN...`."""
    parser = Parser("plot", "Draw learning curves; runs of the same method and environment are seeds of one line. For "
                    "one run with learned dynamics, also what they predict, beside what happened.")  # fmt: skip
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    out_option(parser, "image to write (default: curves.png, or curves-2.png and so on where that is taken)")
    options = parser.parse_args(arguments)
    from rlamort.measure.plot import plot

    out = plot(options.runs, free(options) or unused(Path("curves.png")))
    print(out)
    if len(options.runs) == 1:
        from rlamort.measure.futures import beside

        if said := beside(options.runs[0], unused(out.with_name(f"{out.stem}-predictions{out.suffix}"))):
            print(said)


def check_problem(arguments: list[str]) -> None:
    """`rlamort check PROBLEM`."""
    parser = Parser("check", "Check a problem before anything is trained on it; exits with 1 if a check fails.")
    parser.add_argument("problem", help="module:Class, or a registered id")
    parser.add_argument("keys", nargs="*", help="dtype=float64 checks it in that dtype")
    options = parser.parse_args(arguments)
    fields = _values(options.keys)
    check_names(fields, ["dtype"])
    from rlamort.env.one_step import problem_of
    from rlamort.measure.check import check

    found = check(problem_of(options.problem), **fields)
    print(found)
    if not found.ok:
        raise SystemExit(1)


def amortize_problem(arguments: list[str]) -> None:
    """`rlamort amortize PROBLEM key=value ...`."""
    parser = Parser("amortize", "Train solvers for a problem, and compare them with its reference.")
    parser.add_argument("problem", help="module:Class, or a registered id")
    keys = "model=full,semi,... loss=objective,es,rl,...; they and the other keys: `rlamort train amortize --help`"
    parser.add_argument("keys", nargs="*", help=keys)
    out_option(parser, "folder for solvers, plots and data (default: a new one under runs/)")
    options = parser.parse_args(arguments)
    chosen = free(options, folder=True)
    from rlamort.measure.fit import report
    from rlamort.run.overrides import kinds

    fields = _values(options.keys)
    models, losses = (kinds(fields, key, default) for key, default in (("model", "full,semi"), ("loss", "objective")))
    name = options.problem.split(":")[-1].replace("/", "-")
    out = chosen or unused(Path("runs") / f"amortize-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    _tell(report(options.problem, models, losses, out, **fields), out / "report.json")


def compare_losses(arguments: list[str]) -> None:
    """`rlamort compare PROBLEM|RUN key=value ...`."""
    parser = Parser("compare", "Compare models or losses with the same network, contexts and budget, and a frozen objective.")
    parser.add_argument("target", help="module:Class or a registered id; or a run or sb3:FILE.zip, for its critic")
    parser.add_argument("keys", nargs="*", help="model=... loss=... seeds=0,1,2, and keys of `rlamort train amortize --help`")
    out_option(parser, "a file for the data, as JSON")
    options = parser.parse_args(arguments)
    out = free(options)
    from rlamort.measure.fit import compare
    from rlamort.measure.trainings import require_trainings
    from rlamort.run.overrides import kinds, names

    fields = _values(options.keys)
    models, losses = kinds(fields, "model", "full"), kinds(fields, "loss", "") or None
    seeds = convert("seeds", names(fields.pop("seeds", "0,1,2")), tuple[Seed, ...])
    target = options.target
    if target.startswith("sb3:") or (Path(target) / "config.yaml").is_file():
        from rlamort.measure.gap import max_q

        env = fields.pop("env", None)
        require_trainings(models, losses or ("objective",), seeds, fields)  # before anything is played
        target = max_q(target, env)
    _tell(compare(target, models, losses, seeds, **fields), out)


def _tell(report: Any, out: Path | None) -> None:
    print(*report.lines, sep="\n")
    if out:
        from rlamort.host.publish import published_file

        with published_file(out) as fresh:
            fresh.write_text(json.dumps(report.data, indent=1) + "\n")


def policy_gap(arguments: list[str]) -> None:
    """`rlamort gap RUN|sb3:FILE.zip`."""
    parser = Parser("gap", "The amortization gap of a trained policy: by its own critic, and in rollouts.")
    parser.add_argument("run", help="a run directory, or sb3:FILE.zip")
    parser.add_argument(
        "keys", nargs="*", help="env=ID (for sb3: files), episodes, states, resimulated, horizon, acting, patience"
    )
    out_option(parser, "a file for the data, as JSON")
    options = parser.parse_args(arguments)
    out, fields = free(options), _values(options.keys)
    check_names(fields, ["env", "episodes", "states", "resimulated", "horizon", "acting", "patience"])
    from rlamort.measure.gap import gap

    _tell(gap(options.run, fields.pop("env", None), **fields), out)


def reproduce_row(arguments: list[str]) -> None:
    """`rlamort reproduce [ROW]`."""
    about = "Measure a row's claims on this machine; exits with 1 when one fails. Without a row, lists all claims."
    parser = Parser("reproduce", about)
    parser.add_argument("row", nargs="?", help="a method with claims")
    parser.add_argument("--all", action="store_true", help="every row that has claims")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of measurements")
    parser.add_argument(
        "--minutes", help="measure what is missing; begin nothing later, and stop a training, which the next call continues"
    )
    parser.add_argument("--idle", action="store_true", help="measure a ledger's timed runs; nothing else should run meanwhile")
    options = parser.parse_args(arguments)
    if options.row and options.all:
        raise UserError(f"reproduce {options.row} --all: either a row or --all is needed")
    from rlamort.measure.reproduce import deadline, outline, reproduce, rows

    if options.row is None and not options.all:
        print(*outline(), sep="\n")
        return
    chosen, ends = rows() if options.all else [options.row], deadline(options.minutes)
    verdicts = [one for row in chosen for one in reproduce(row, options.results, ends, options.idle)]
    print(*verdicts, sep="\n")
    if not all(verdict.passed for verdict in verdicts):
        raise SystemExit(1)


def bench(arguments: list[str]) -> None:
    """`rlamort bench [NAME] [ALGORITHM]`."""
    parser = Parser("bench", "Measure the speed of rlamort on this machine, which should be idle.")
    names = ["speed", "profile", "scaling", "checkpoint", "tracking", "gpu"]
    about = "speed, the default: against Stable-Baselines3 and, if SBX_PYTHON names an interpreter that has it, sbx"
    parser.add_argument("name", nargs="?", default="speed", choices=names, help=about)
    parser.add_argument("algorithm", nargs="?", choices=["sac", "td3", "ddpg"], help="of speed and profile; sac by default")
    about = "of gpu: cuda, the default, or cuda:N; cpu runs its lines with tiny sizes, which measures nothing"
    parser.add_argument("--device", default="cuda", help=about)
    out_option(parser, "a file for the data, as JSON")
    options = parser.parse_args(arguments)
    out = free(options)
    if options.algorithm and options.name not in ("speed", "profile"):
        raise UserError(f"bench {options.name}: it takes no algorithm, and {options.algorithm} is given")
    from rlamort.measure.bench import BENCHES

    chosen = [options.device, out] if options.name == "gpu" else [options.algorithm] if options.algorithm else []
    _tell(BENCHES[options.name](*chosen), out)


def _places_option(parser: argparse.ArgumentParser) -> None:
    about = "env=..., eval_env=...: the environment, for a run whose environment cannot be constructed by name"
    parser.add_argument("places", nargs="*", help=about)


def _places(arguments: list[str]) -> dict[str, Any]:
    places = _values(arguments)
    check_names(places, ["env", "eval_env"])
    return places


def _method_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", help="the YAML file of your own method, with which the run was trained")


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "list": list_methods,
    "train": train,
    "resume": resume_run,
    "push": push,
    "eval": evaluate,
    "demonstrate": show,
    "video": video,
    "plot": plot_runs,
    "check": check_problem,
    "amortize": amortize_problem,
    "compare": compare_losses,
    "gap": policy_gap,
    "reproduce": reproduce_row,
    "bench": bench,
}
