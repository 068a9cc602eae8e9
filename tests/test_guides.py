"""The guides: every block runs as it stands, in order, and what they say of numbers is what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.S | re.M)
PREAMBLE = """\
import shlex
from rlamort.cli import main
def run(command):
    code = main(shlex.split(command)[1:])
    assert code == 0, (code, command)
"""


def script(guide: Path, folder: Path) -> str:
    """A guide as one program; blocks that begin with `# NAME.py` become that file, commands run in the same process."""
    parts = [PREAMBLE]
    for language, block in BLOCK.findall(guide.read_text()):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
        elif language == "python":
            parts.append(block)
        else:
            parts += [f"run({line!r})" for line in block.splitlines()]
    return "\n".join(parts)


@pytest.mark.parametrize("guide", ["problems", "environments"])
def test_a_guide_runs(guide, tmp_path):
    code = script(DOCS / f"{guide}.md", tmp_path)
    assert code.count("run('rlamort ") >= 1
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
