"""What the documents show runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import QUICK, rlamort

from rlamort.cli import COMMANDS

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


def test_contributing_method_trains_from_two_files(tmp_path):
    (code,), (row,) = (blocks(CONTRIBUTING, language) for language in ("python", "yaml"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "averaged.py").write_text(code)
    (folder / "averaged.yaml").write_text(row)
    common = [o for o in QUICK if not o.startswith("hidden")]
    done = rlamort(
        "train", "mine/averaged.yaml", "env=Pendulum-v1", "steps=120", "critics=3", "video=false", *common, cwd=tmp_path
    )
    run = done.stdout.splitlines()[-1]
    assert run.startswith("runs/averaged-Pendulum-v1-s0")
    assert "averaged on Pendulum-v1" in rlamort("eval", run, "--method", "mine/averaged.yaml", cwd=tmp_path).stdout
    assert "name its file yourself" in rlamort("eval", run, cwd=tmp_path, code=2).stderr
    assert "critics=5" in rlamort("train", "mine/averaged.yaml", "--help", cwd=tmp_path).stdout
    failed = rlamort("train", "mine/averaged.yaml", "env=Pendulum-v1", "critic=3", cwd=tmp_path, code=2)
    assert "Did you mean critics" in failed.stderr


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
