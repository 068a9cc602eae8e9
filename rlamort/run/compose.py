"""Composition of `rlamort train METHOD` by Hydra: one run, or with -m a run for each of several values."""

import itertools
import json
import os
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlamort.config import KIND, Field, Part, check_names, defaults, fields, full, part_of, renamed, resolve, short, short_name
from rlamort.errors import Preempted, UserError
from rlamort.host.command import INTERRUPTED, Parser, guarded, say
from rlamort.run.directory import continues, require_unused
from rlamort.run.overrides import each, resolved_late, spelled, split, swept, values
from rlamort.run.search import Search, Trial
from rlamort.run.track import last_evaluation


class Composition:
    """The runs of one command.

    Args:
        method: a name, or the path of a user's YAML file.
        row: the content of that file.
        arguments: overrides and Hydra's flags, as typed.

    Raises:
        UserError: there is no such key or flag, or a search has no direction.

    Attributes:
        name: of the group of several runs.
        trials: the several runs that were begun, in no order; empty for one.
        search: what is said of them where Optuna chooses their settings; else None.
    """

    def __init__(self, method: str, row: dict[str, Any], arguments: list[str]) -> None:
        self.method, self.known = method, fields(row)
        self.name = f"{short_name(method).replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.trials: list[Trial] = []
        self.flags, self.overrides = _parted([full(one, short(row)) for one in arguments], self.known, renamed(row))
        self.several = "--multirun" in self.flags
        self.given = {key.lstrip("+"): value for key, value in map(split, self.overrides)}
        self.search = Search(row, self.given) if self.several and self.given.get("hydra/sweeper") == "optuna" else None
        # of a part only overrides are composed, since its keys depend on its kind
        values = {name: {} if isinstance(value, Part) else value for name, value in defaults(row).items()}
        self.node = {**values, "env_kwargs": values["env_kwargs"] or {}, "method": method}
        ConfigStore.instance().store(name="fields", node=self.node)

    def run(self, start: Callable[[str, dict[str, Any]], Path]) -> int:
        """Run all; returns the exit code, of a failed run if one of several failed.

        Args:
            start: trains a method with values, and returns the run directory.

        Raises:
            UserError: Hydra refuses an override of a single run, or a run of several has a value that is not allowed.
        """
        if not self.several:
            return self._hydra(start, [], lambda trial: None)
        if self.given.get("dir", "null").lower() not in ("", "null") and self._share_a_folder():
            raise self._shared(self.given["dir"])
        self._require_values()
        # for Hydra's multirun.yaml and its launchers' files: in the current folder, which a cluster's nodes share
        with tempfile.TemporaryDirectory(prefix=".multirun-", dir=Path.cwd()) as folder:
            shared = {"wandb_group": self.name, "hydra.sweep.dir": folder, **(self.search.overrides if self.search else {})}
            more = [spelled(f"{key}={value}", str, False, ()) for key, value in shared.items() if key not in self.given]

            def note(trial: Trial) -> None:
                (Path(folder) / f"{uuid.uuid4()}.trial").write_text(json.dumps(trial, default=str))

            try:
                code = self._hydra(start, more, note)
            except Exception as error:  # the sweeper's, since those of runs are said; what they have found is not lost
                refusal = error if isinstance(error, UserError) else _refused(error)
                code = say(refusal, refusal.exit_code)
            self.trials = _noted(Path(folder))
        return code or next((trial.code for trial in self.trials if trial.code), 0)

    def _require_values(self) -> None:
        """Raises UserError for a value that one of several runs would refuse, after those before it have been trained.

        What a search chooses, and what a resolver such as ${now:} gives, is known only then.
        """
        if self.given.get("hydra/sweeper", "basic") != "basic":
            return
        asked = [one.lstrip("+") for one in self.overrides if _root(one) in self.known]
        known = [one for one in asked if not resolved_late(one)]
        kinds = {name: field.type for name, field in self.known.items()}
        unsure = len(known) < len(asked) and "${" in self.given.get("dir", "")  # a folder may be named by what comes later
        folders: set[Path] = set()
        for chosen in itertools.product(*map(each, known)):
            said = values(chosen, kinds)
            try:
                composed = OmegaConf.to_container(OmegaConf.create({**self.node, **said}), resolve=True)
            except OmegaConfBaseException as error:
                raise _refused(error) from error
            run = resolve(self.method, {key: composed[key] for key in said}).run
            if unsure or not run.dir:
                continue
            if (folder := Path(run.dir).resolve()) in folders:
                raise self._shared(run.dir)
            folders.add(folder)
            if not continues(run):
                require_unused(Path(run.dir))

    def _share_a_folder(self) -> bool:
        """Whether several runs would have the same `dir`."""
        if "${" in self.given["dir"] or any(swept(one) for one in self.overrides if _root(one) == "dir"):
            return False
        searched = self.given.get("hydra/sweeper", "basic") != "basic"
        listed = any(key.startswith("hydra.sweeper.params") for key in self.given)
        return searched or listed or any(swept(one) for one in self.overrides)

    @staticmethod
    def _shared(folder: str) -> UserError:
        return UserError(
            f"dir={folder}: each of several runs needs its own; dir='{folder}-${{seed}}', say, or leave dir out for new ones "
            "under runs/"
        )

    @property
    def runs(self) -> list[Path]:
        """The folders of several finished runs; empty for one."""
        return [trial.run for trial in self.trials if trial.run is not None]

    def _hydra(self, start: Callable[[str, dict[str, Any]], Path], more: list[str], note: Callable[[Trial], Any]) -> int:
        """Run with `more` overrides, and call `note` after each run, in its process; returns the exit code."""
        alike = {split(override)[0] for override in [*self.overrides, *more] if not swept(override)} if self.several else set()

        def one(composed: DictConfig) -> Path:
            try:
                values = OmegaConf.to_container(composed, resolve=True)
            except OmegaConfBaseException as error:
                raise _refused(error) from error
            assert isinstance(values, dict)
            said = {_root(override) for override in _composed()}
            return start(self.method, {str(key): values[key] for key in values if key in self.known and key in said})

        def job(composed: DictConfig) -> float | None:
            """What sweepers search by: the last evaluation's mean return, or a problem's mean cost; None if it failed."""
            finished: list[Path] = []
            try:
                failure = guarded(lambda: finished.append(one(composed)))
            except Exception:
                if not self.several:
                    raise
                traceback.print_exc()  # a search would go on without a word
                failure = 1
            if self.several:
                chosen = [override.lstrip("+") for override in _composed() if split(override)[0] not in alike]
                note(Trial(chosen, failure, finished[0].resolve() if finished else None))
            if failure and (not self.several or failure in (Preempted.exit_code, INTERRUPTED)):
                raise SystemExit(failure)  # ends what else was to run, too
            if failure:
                raise Failed(failure)
            score = last_evaluation(finished[0])
            return None if score is None else score.mean

        words = [*self.overrides, *more]
        before, sys.argv = sys.argv, [sys.argv[0], *self.flags, *words]
        chosen = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come out as exceptions: they are said here
        try:
            hydra.main(version_base="1.3", config_path="pkg://rlamort.configs", config_name="train")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise _refused(error) from error
        except (Failed, SystemExit) as end:
            return int(end.code or 0)
        finally:
            sys.argv = before
            os.environ.pop("HYDRA_FULL_ERROR") if chosen is None else os.environ.update(HYDRA_FULL_ERROR=chosen)
        return 0


class Failed(Exception):  # noqa: N818  # of a job, which has printed its error
    """One of several jobs has failed; the others continue, and the command exits with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _composed() -> list[str]:
    """The overrides of the run that Hydra has composed, as they were typed or a sweeper chose them."""
    return [str(one) for one in OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)]


def _noted(folder: Path) -> list[Trial]:
    notes = (json.loads(file.read_text()) for file in folder.glob("*.trial"))
    return [Trial(settings, code, run and Path(os.path.relpath(run))) for settings, code, run in notes]


def _refused(error: Exception) -> UserError:
    """An error of Hydra or OmegaConf in one line."""
    return UserError(f"Hydra: {' '.join(str(error).split())}")


def _parted(arguments: list[str], known: dict[str, Field], former: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, and the overrides in Hydra's grammar; keys must exist."""
    parser = Parser("train METHOD", "", add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    options, rest = parser.parse_known_args(arguments)
    flags = (["--multirun"] if options.multirun else []) + (["--cfg", options.cfg] if options.cfg else [])
    beside = {argument.partition("=")[0] for argument in rest}
    return flags, [_checked(argument, known, options.multirun, former, beside) for argument in rest]


def _root(argument: str) -> str:
    """The key of an override; of a dotted one, the first."""
    return split(argument)[0].lstrip("+~").split(".")[0].split("/")[0].split("@")[0]


def _checked(argument: str, known: dict[str, Field], multirun: bool, former: Mapping[str, str], beside: set[str]) -> str:
    if argument.startswith("-"):
        raise UserError(f"{argument}: there is no such option. Keys are given as key=value; options: -m, --cfg job, --help")
    key, _ = split(argument)
    root = _root(argument)
    if root != "hydra":
        check_names([root], known, former)
    kind = known[key].type if key in known else Any
    part = root in known and part_of(known[root].type) is not None
    named = key == root or any(other.startswith(f"{key}.") for other in beside)  # the name of a part, with keys of it
    if part and named and not argument.partition("=")[2].lstrip().startswith("{"):
        argument = f"{key}.{KIND}={argument.partition('=')[2]}"
    override = spelled(argument, kind, multirun, known)
    return f"++{override.lstrip('+')}" if part or root == "env_kwargs" else override
