"""Environments and problems.

Importing this package registers every problem of this folder with Gymnasium, as `rlamort/NAME-v0`: from then on
`gymnasium.make` and `gymnasium.make_vec` know them. Their modules are imported when one is made.
"""

import re
from pathlib import Path

import gymnasium


def _register() -> None:
    for file in sorted(Path(__file__).parent.glob("*.py")):
        # by text: importing every problem, to find out which there are, would bring in all that any of them needs
        for name in re.findall(r"^class (\w+)\(Problem\):", file.read_text(encoding="utf-8"), re.MULTILINE):
            gymnasium.register(
                f"rlamort/{name}-v0",
                entry_point="rlamort.envs.one_step:single",
                vector_entry_point="rlamort.envs.one_step:vector",
                kwargs={"problem": f"rlamort.envs.{file.stem}:{name}"},
            )


_register()
