"""What the documents show runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_cli import QUICK, rlamort

from rlamort.cli import COMMANDS
from rlamort.config import methods

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING, DESIGN = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/design.md"))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


@pytest.mark.parametrize("block", range(len(blocks(README, "python"))))
def test_readme_python(block, tmp_path):
    code = blocks(README, "python")[block]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_opens_with_the_objective_and_two_commands_on_its_first_screen():
    assert re.findall(r"^## (.*)", README, re.M)[:2] == ["One objective", "Two commands"]
    assert README[: README.index("## Two commands")].count("\n") < 50


def test_laws_that_a_page_names_are_where_it_says():
    page = (ROOT / "docs" / "one-objective.md").read_text()
    named = re.findall(r"`(test_\w+)`.*?\((?:\.\./)(tests/\w+\.py)\)", page, re.S)
    assert len(named) == 4
    for law, file in named:
        assert f"def {law}(" in (ROOT / file).read_text(), law


def test_readme_commands_exist():
    named = set(re.findall(r"^rlamort (\w+)", README, re.M))
    assert named == set(COMMANDS)


def file_in(text, name):
    """The block of a document that begins with `# NAME`."""
    (block,) = re.findall(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```", text, re.S | re.M)
    return block


def test_contributing_method_trains_from_two_files(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("averaged.py", "averaged.yaml"):
        (folder / name).write_text(file_in(CONTRIBUTING, name))
    done = rlamort(
        "train", "mine/averaged.yaml", "env=Pendulum-v1", "steps=120", "critic.members=3", "video=false", *QUICK, cwd=tmp_path
    )
    run = done.stdout.splitlines()[-1]
    assert run.startswith("runs/averaged-Pendulum-v1-s0")
    assert "averaged on Pendulum-v1" in rlamort("eval", run, "--method", "mine/averaged.yaml", cwd=tmp_path).stdout
    assert "name its file yourself" in rlamort("eval", run, cwd=tmp_path, code=2).stderr
    assert "critic.members=5" in rlamort("train", "mine/averaged.yaml", "--help", cwd=tmp_path).stdout
    failed = rlamort("train", "mine/averaged.yaml", "env=Pendulum-v1", "critics=3", cwd=tmp_path, code=2)
    assert "Did you mean critic" in failed.stderr


def test_contributing_shows_iapo_as_it_is():
    comment, row = file_in(CONTRIBUTING, "iapo.yaml").split("\n", 1)
    assert row == (ROOT / "configs" / "method" / f"{comment.removeprefix('# ')}").read_text()


def test_contributing_part_is_trained_by_its_command(tmp_path):
    for name in ("signs.py", "signs.yaml"):
        (tmp_path / name).write_text(file_in(CONTRIBUTING, name))
    (command,) = re.findall(r"^rlamort (train ./signs.yaml .*)$", CONTRIBUTING, re.M)
    run = rlamort(*command.split(), "steps=4", "eval_episodes=4", cwd=tmp_path).stdout.splitlines()[-1]
    update = yaml.safe_load((tmp_path / run / "config.yaml").read_text())["model"]["update"]
    assert update == {"kind": "signs.Signs", "rate": 0.02}


def test_readme_lists_every_method():
    listed = re.search(r"^## Methods\n(.*?)^## ", README, re.S | re.M)[1]
    assert set(re.findall(r"`([\w/]+)`", listed)) >= set(methods())


def test_design_names_every_module_in_its_room():
    (layout,) = (block for block in blocks(DESIGN, "") if "\ncli.py" in f"\n{block}")
    rooms = {entry.split()[0]: entry for entry in re.split(r"\n(?=\S)", layout)}
    for path in [one for folder in ("rlamort", "agents", "envs") for one in (ROOT / folder).rglob("*.py")]:
        place = path.relative_to(ROOT / "rlamort" if path.is_relative_to(ROOT / "rlamort") else ROOT)
        if not path.stem.startswith("__"):
            room = place.name if len(place.parts) == 1 else f"{place.parts[0]}/"
            assert re.search(rf"\b{path.name}", rooms[room]), f"{place} has no line in docs/design.md"


def test_nouns_of_the_design_are_where_it_says():
    named = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\S+\.py(?:, \S+\.py)*) \|", DESIGN, re.M)
    assert len(named) >= 16
    for nouns, places in named:
        text = "".join((ROOT / "rlamort" / place).read_text() for place in places.split(", "))
        for noun in re.findall(r"\w+", nouns):
            assert re.search(rf"^(class|def) {noun}\b|^{noun} = ", text, re.M), f"{noun} is not in {places}"
