"""Claims as commands: a row's claims are measured, stored and judged, and a table of all rows is written.

A claim in configs/reproduce/ROW.yaml is a study: environment, steps, seeds, settings, and a return that each seed must
reach, or a baseline, trained with the same settings, below which the row must not be shown to be; with a `pessimism` that
both share, what their critics promise is measured, too. Or it is a race: contenders, each with its own settings, and
returns to reach in the least wall-clock time. Or it is a return to `reach` in a share of a baseline's environment steps. Or
it is a ledger: arms that add to each other, on several tasks. Or it is about imitation: rows that learn of an expert's
labels, with several budgets of them. Or it is a task to be solved within few `rollouts`, beside a baseline that needs many.
Or it is about guided policy search on an environment with conditions, or compares planners that learn their dynamics. Or it
names a function of `rlamort.measure.claims` that measures something else.
"""

import importlib.resources
import inspect
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlamort.config import Positive, Run, as_call, convert, locate, methods, read_row
from rlamort.errors import UserError, nearest
from rlamort.host.machine import versions
from rlamort.host.publish import published_file
from rlamort.measure.guided import Guided
from rlamort.measure.imitation import Imitation
from rlamort.measure.ledger import Ledger
from rlamort.measure.ledger_figure import draw_ledger
from rlamort.measure.overestimation import Overestimation
from rlamort.measure.planned import Planned
from rlamort.measure.race import Race
from rlamort.measure.rollouts import Rollouts
from rlamort.measure.slices import Slice
from rlamort.measure.sooner import Sooner
from rlamort.measure.study import LOSS, Results, Study, Task
from rlamort.measure.verdict import Verdict
from rlamort.run.track import span
from rlamort.score import Interval, iqm, stratified_bootstrap

TITLE = "# What was measured here"
MOVED = {  # former paths of functions in stored data
    "rlamort.claims.": "rlamort.measure.claims.",
    "rlamort.measure.claims.anytime.pendulum_": "rlamort.measure.claims.anytime.early_",
}
RELATED = {"bc": ("dagger",), "dagger": ("bc",)}  # rows whose runs are in each other's figures
RENAMED = {" critic_norm=": " critic.norm="}  # former keys in stored commands


class Entry(Protocol):
    """A claim of a row."""

    def claim(self) -> str:
        """The claim in one line."""
        ...

    def due(self, results: Results) -> list[Task]:
        """Tasks without a stored result."""
        ...

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        ...

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts from stored results."""
        ...

    def report(self, results: Results) -> list[str]:
        """Further lines of Markdown."""
        ...

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws its panel of the row's figure, if there is one."""
        ...


class Claim(NamedTuple):
    """A claim measured by a function, every time but in a slice: `measure() -> Measured`, by its dotted path."""

    row: str
    measure: str

    def claim(self) -> str:
        """The first sentence of its function's docstring."""
        return (inspect.getdoc(locate(self.measure)) or "").split(".")[0]

    def due(self, results: Results) -> list[Task]:
        return [Task(self.measure, lambda slice: self.run(slice.results), repeats=True)]

    def run(self, results: Path) -> dict[str, Any]:
        """Its results with versions and duration; figures are written beside the data."""
        started = time.perf_counter()
        verdicts, data, figures = locate(self.measure)()
        for name, figure in figures.items():
            with published_file(results / f"{name}.png") as fresh:
                figure.savefig(fresh, dpi=110, bbox_inches="tight")
        return {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
            "verdicts": [verdict.values() for verdict in verdicts],
            "figures": sorted(figures),
            "data": data,
        }

    def waiting(self, results: Results) -> str:
        return "" if self.measure in results else f"{self.measure.rpartition('.')[2]}: not measured yet"

    def judge(self, results: Results) -> list[Verdict]:
        return [Verdict.read(one) for one in results[self.measure]["verdicts"]] if self.measure in results else []

    def report(self, results: Results) -> list[str]:
        return [f"![{name}]({name}.png)" for name in results[self.measure]["figures"]] if self.measure in results else []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        return None  # its figures are its own


def rows() -> list[str]:
    """The rows that have claims."""
    folder = importlib.resources.files("rlamort.configs") / "reproduce"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def entries(row: str) -> list[Entry]:
    """The claims of a row. Raises UserError if it has none."""
    return [_kind(entry)(row, **entry) for entry in _declared(row)["claims"]]


def _declared(row: str) -> dict[str, Any]:
    """A row's claims, the `hours` that measuring them takes on two cores, and a `note` if there is one."""
    if row not in rows():
        raise UserError(f"reproduce {row}: this row has no claims yet. {nearest(row, rows())}")
    return dict(yaml.safe_load((importlib.resources.files("rlamort.configs") / "reproduce" / f"{row}.yaml").read_text()))


def outline() -> list[str]:
    """Every row with claims, with the claims and the time to measure them."""
    lines = ["`rlamort reproduce ROW` measures these claims; hours are on two cores, and stored results are reused."]
    for row in rows():
        hours = _declared(row)["hours"]
        lines.append(f"\n{row:<10} about {span(3600 * hours)}")
        lines += [f"{'':<10} {entry.claim()}" for entry in entries(row)]
    return lines


def _kind(entry: dict[str, Any]) -> Callable[..., Entry]:
    kinds: dict[str, Callable[..., Entry]] = {
        "measure": Claim, "race": Race, "ledger": Ledger, "imitation": Imitation, "reach": Sooner,
        "pessimism": Overestimation, "rollouts": Rollouts, "guided": Guided, "planned": Planned,
    }  # fmt: skip
    return next((kind for key, kind in kinds.items() if key in entry), Study)


def deadline(minutes: str | None) -> float:
    """That many minutes from now, in time.monotonic(); inf for None. Raises UserError if that is no positive number."""
    return math.inf if minutes is None else time.monotonic() + 60 * float(convert("--minutes", minutes, Positive))


def reproduce(row: str, results: Path, ends: float = math.inf, idle: bool = False) -> list[Verdict]:
    """Measure what is missing of a row, judge all of it, and write the table of all measured rows.

    Each result is stored immediately, in `results`/ROW.json or a file of its own in `results`/ROW; a training is not repeated
    while its command stays the same.

    Args:
        row: with claims.
        results: folder of results.
        ends: begin nothing later, in time.monotonic(). Trainings of studies and ledgers are stopped then, and the next call
            continues them.
        idle: measure a ledger's timed runs, and not the others; nothing else should run on this machine.

    Raises:
        UserError: the row has no claims, or, with `idle`, no ledger; or files would be overwritten that are not its own.
    """
    claims = [one._replace(idle=idle) if isinstance(one, Ledger) else one for one in entries(row)]
    if idle and not any(isinstance(one, Ledger) for one in claims):
        raise UserError(f"reproduce {row} --idle: this row has no timed runs; only those of a ledger are measured apart")
    _refuse_foreign(row, results)
    results.mkdir(parents=True, exist_ok=True)
    for entry in claims:
        _measure(row, entry, Slice(results, ends))
    data = _read(row, results)
    drawn = {key: one for other in (*RELATED.get(row, ()), row) for key, one in _read(other, results).items()}
    draw([panel for entry in claims if (panel := entry.panel(drawn))], results / f"{row}.png")
    for entry in claims:
        if isinstance(entry, Ledger):
            draw_ledger(entry, data, results / f"{row}.png")
    _write(results / "README.md", table(results))
    return [verdict for entry in claims for verdict in entry.judge(data)]


def _measure(row: str, entry: Entry, slice: Slice) -> None:
    """Run an entry's tasks while there is time. What is due is asked anew after each result, which may decide what follows."""
    skipped: set[str] = set()
    while slice.left > 0:
        stored = _read(row, slice.results)
        due = (one for one in entry.due(stored) if one.key not in skipped)
        task = next((one for one in due if not (one.repeats and slice.continues and one.key in stored)), None)
        if task is None:
            return
        skipped.add(task.key)  # once a call, whatever comes of it
        print(f"running: {task.key}", flush=True)
        found = task.run(slice)
        if found is None:
            print("  not finished in this slice", flush=True)
        elif task.file:
            _write(slice.results / row / task.file, json.dumps({task.key: found}, indent=1) + "\n")
        else:
            _write(slice.results / f"{row}.json", json.dumps({**_read(row, slice.results), task.key: found}, indent=1) + "\n")


def _refuse_foreign(row: str, results: Path) -> None:
    """Raises UserError if a file would be overwritten that this module did not write."""
    about = results / "README.md"
    if about.exists() and not about.read_text(encoding="utf-8").startswith(TITLE):
        raise UserError(f"--results {results}: its README.md was not written by `rlamort reproduce`; choose another folder")
    for data in _files(row, results):
        try:
            ours = all("versions" in one for one in json.loads(data.read_text()).values())
        except (ValueError, AttributeError, TypeError):
            ours = False
        if not ours:
            name = data.relative_to(results)
            raise UserError(f"--results {results}: its {name} was not written by `rlamort reproduce`; choose another folder")


def _files(row: str, results: Path) -> list[Path]:
    """The files that hold a row's results."""
    return [file for file in [results / f"{row}.json", *sorted((results / row).glob("*.json"))] if file.exists()]


def _read(row: str, results: Path) -> Results:
    """Stored results, by the present paths of their functions and keys of their commands."""
    found: dict[str, Any] = {}
    for file in _files(row, results):
        found.update(json.loads(file.read_text()))
    for old, new in MOVED.items():
        found = {new + key.removeprefix(old) if key.startswith(old) else key: one for key, one in found.items()}
    for old, new in RENAMED.items():
        found = {key.replace(old, new): one for key, one in found.items()}
    return dict(found)


def _write(file: Path, text: str) -> None:
    with published_file(file) as fresh:
        fresh.write_text(text)


def draw(panels: Sequence[Callable[[Axes], None]], out: Path) -> None:
    """Draw the panels side by side, if there are any."""
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
        axes.grid(alpha=0.3)
    with published_file(out) as fresh:
        figure.savefig(fresh, dpi=100)


def table(results: Path) -> str:
    """All methods with the outcome of their claims, and all claims with their measurements, as Markdown."""
    lines = [
        TITLE,
        "",
        "Written by `rlamort reproduce`, from the data beside it, with command and versions of every run. The return of a",
        f"training is the mean of {Run().eval_episodes} evaluation episodes at its end, and of other numbers in some rows",
        f"({other_episodes()}). Its interval is the 95 % Student interval over seeds, and an area the mean over the",
        "run's evaluations. A threshold against a baseline is that baseline's own result with the same settings and seeds, on",
        "the same versions. That no return below a baseline's is shown says that the two intervals overlap, which wide ones do",
        "whatever the means are: so the difference of the means stands beside it, with Welch's 95 % interval, and the claim is",
        f"incomplete where that reaches further below 0 than {100 * LOSS:.0f} % of the baseline's mean. A claim is reported,",
        "without a threshold, if its own run computed a bound by which no method of its kind can reach its threshold; if that",
        "bound does not show it, or none is known, the claim is judged by its threshold, and fails. A claim is incomplete if",
        "what is measured does not decide it.",
        "",
        "## Methods",
        "",
        "One row of Table 1 of the tutorial each: which f, over which Y, for which contexts, by which model and loss.",
        "",
        "| method | f | Y | p(x) | model | loss | claims |",
        "|---|---|---|---|---|---|---|",
    ]
    claimed = {method: claims_of(method) for method in methods() if "/" not in method}  # sb3/ are the baselines
    for method, row in claimed.items():
        words = [as_call(read_row(method)[key]) for key in ("f", "Y", "p(x)", "model", "loss")]
        lines.append(f"| {' | '.join([f'`{method}`', *words, summary(row, results) if row else 'none'])} |")
    lines += ["", "Further measurements:", ""]
    lines += [f"- {row}: {summary(row, results)}" for row in rows() if row not in claimed.values()]
    for row in rows():
        lines += ["", *section(row, results)]
    studied = [(one, _read(row, results)) for row in rows() for one in entries(row) if isinstance(one, Study) and one.baseline]
    whole = [(study, data) for study, data in studied if not study.due(data)]
    return "\n".join([*lines, *(["", *overall(whole)] if whole else [])]) + "\n"


def other_episodes() -> str:
    """The rows whose evaluations have another number of episodes than a run's default, with the numbers."""
    found = []
    for row in rows():
        kinds = entries(row)
        counts = {int(count) for one in kinds for task in one.due({}) for count in re.findall(r"eval_episodes=(\d+)", task.key)}
        counts |= {one.episodes for one in kinds if isinstance(one, Planned) and one.searched}  # after training
        if counts := counts - {Run().eval_episodes}:
            found.append(f"{row} {' or '.join(map(str, sorted(counts)))}")
    return ", ".join(found)


def section(row: str, results: Path) -> list[str]:
    """All claims of a row, with figures and notes."""
    data, claims = _read(row, results), entries(row)
    where = f"{row}.json" if (results / f"{row}.json").exists() else row
    lines = [f"## {row}", "", f"`rlamort reproduce {row}`" + (f", [data]({where})" if data else "")]
    lines += ["", "| claim | threshold | measured | verdict |", "|---|---|---|---|"]
    for entry in claims:
        for verdict in entry.judge(data):
            cells = [verdict.claim, verdict.limit, verdict.measured, verdict.outcome.replace("FAIL", "**FAIL**")]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        if what := entry.waiting(data):
            lines.append(f"| {what} | | | open |")
    if note := _declared(row).get("note"):
        lines += ["", note.strip()]
    if any(entry.panel(data) for entry in claims):
        lines += ["", f"![{row}]({row}.png)"]
    for entry in claims:
        lines += ["", *text] if (text := entry.report(data)) else []
    return lines


def claims_of(method: str) -> str | None:
    """The row with a method's claims: the one of its name, unless its file names another."""
    row = read_row(method).get("claims", method)
    return row if row in rows() else None


def summary(row: str, results: Path) -> str:
    """How many of a row's claims hold, how many are only reported or incomplete, with a link; bold if one fails."""
    data = _read(row, results)
    came = Counter(verdict.outcome for entry in entries(row) for verdict in entry.judge(data))
    count = came["pass"] + came["FAIL"]
    parts = [f"{came['pass']} of {count} hold"] if count else []
    parts += [f"{came[kind]} {kind}" for kind in ("reported", "incomplete") if came[kind]]
    if any(entry.waiting(data) for entry in entries(row)):
        parts.append("not all measured yet" if parts else "not measured yet")
    text = f"[{', '.join(parts)}](#{row})"
    return f"**{text}**" if came["FAIL"] else text


def overall(whole: Sequence[tuple[Study, Results]]) -> list[str]:
    """All studies with a baseline together: interquartile means with stratified bootstrap intervals (Agarwal et al., 2021).

    Returns are scaled from 0, the lowest evaluation of any run of the study, to 1, the baseline's final mean.
    """
    ours, theirs = [], []
    for study, data in whole:
        assert study.baseline is not None
        low = min(study.curves(row, data).min() for row in study.contenders())
        high = study.last(study.baseline, data).mean()
        ours.append((study.last(study.row, data) - low) / (high - low))
        theirs.append((study.last(study.baseline, data) - low) / (high - low))
    return [
        f"Over these {len(whole)} studies with a baseline, returns scaled from 0, the lowest evaluation of any run, to 1, the",
        "baseline's mean: interquartile mean of rlamort "
        f"{_share(stratified_bootstrap(ours, iqm))}, of the baselines {_share(stratified_bootstrap(theirs, iqm))}",
        "(95 % stratified bootstrap intervals over seeds).",
    ]


def _share(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"
