"""Environments and problems.

Importing this package registers every problem of this folder whose constructor needs no argument with Gymnasium, as
`rlamort/NAME-v0`, for `gymnasium.make` and `gymnasium.make_vec`. Its module is imported when it is made.
"""

import ast
from pathlib import Path

import gymnasium


def _register() -> None:
    for file in sorted(Path(__file__).parent.glob("*.py")):
        # from the source text: importing every problem would import all of their dependencies
        text = file.read_text(encoding="utf-8")
        for kind in ast.parse(text).body if "(Problem" in text else ():
            if isinstance(kind, ast.ClassDef) and "Problem" in map(_named, kind.bases) and _able(kind):
                gymnasium.register(
                    f"rlamort/{kind.name}-v0",
                    entry_point="rlamort.env.one_step:single",
                    vector_entry_point="rlamort.env.one_step:vector",
                    kwargs={"problem": f"rlamort.envs.{file.stem}:{kind.name}"},
                )


def _named(base: ast.expr) -> str:
    """A base class without what it is parametrised by."""
    return ast.unparse(base.value if isinstance(base, ast.Subscript) else base)


def _able(kind: ast.ClassDef) -> bool:
    """Whether its constructor has a default for every argument."""
    for part in kind.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            arguments = part.args
            return (
                len(arguments.posonlyargs + arguments.args) == len(arguments.defaults) + 1 and None not in arguments.kw_defaults
            )
    return True


_register()
