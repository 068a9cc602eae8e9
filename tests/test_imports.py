"""Which way imports point: from what uses to what is used, never in a circle, and files of a size that can be read."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = """
cli
measure
run
agents envs
parts
fits
agent solve train score
losses source env
model radial
update
adjoint
objective dynamics constraints
problem critic
head
domain nets norm
host
config errors
"""  # top to bottom: a room imports from lines below its own, or from its own
HEIGHT = {room: -number for number, line in enumerate(LINES.split("\n")) for room in line.split()}
ALLOWED = {
    "env.imports -> envs": "it registers the problems' names with Gymnasium, and imports none of the problems",
    "__main__ -> cli": "`python -m rlamort` is the command line",
    "__init__ -> *": "the package's own names, of which each is imported when it is first used",
}
LONG: dict[str, str] = {}  # file below rlamort/ -> why it is longer than the rest
LARGEST, MODULES = 400, 16


def files():
    """Every module by its dotted name below `rlamort`, as it is installed."""
    found = {}
    for folder, prefix in (("rlamort", ()), ("agents", ("agents",)), ("envs", ("envs",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])] = path
    return found


FILES = files()


@cache
def imports(module, lazy=True):
    """The modules of ours that one imports; of those that are imported when it is, where not `lazy`."""
    found = set()

    def walk(node):
        if not lazy and (
            isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            return
        if isinstance(node, ast.Import):
            found.update(one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module}: imports here are absolute"
            found.update(f"{node.module}.{one.name}" for one in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(FILES[module].read_text()))
    ours = {name.removeprefix("rlamort").lstrip(".") for name in found if name.split(".")[0] == "rlamort"}
    known = {name if name in FILES else name.rpartition(".")[0] for name in ours}
    return {name for name in known if name in FILES and name != module}


def room(module):
    return module.split(".")[0]


def test_imports_point_down():
    wrong = []
    for module in FILES:
        for other in [] if f"{module} -> *" in ALLOWED else imports(module):
            if f"{module} -> {other}" not in ALLOWED and HEIGHT[room(other)] > HEIGHT[room(module)]:
                wrong.append(f"{module} imports {other}, which stands above it")
    assert not wrong


def test_nothing_is_imported_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module, lazy=False)):
                visit(other, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def test_agents_and_envs_do_not_know_each_other():
    for module in FILES:
        if room(module) in ("agents", "envs"):
            met = {room(other) for other in imports(module)}
            assert met.isdisjoint({"agents", "envs"} - {room(module)}), module


def test_exceptions_are_still_needed():
    needed = {f"{module} -> {other}" for module in FILES for other in imports(module)}
    assert all(exception in needed or exception.endswith("*") for exception in ALLOWED)
    assert len(LONG) <= 2
    assert all(lines(ROOT / "rlamort" / name) > LARGEST for name in LONG)


def lines(path):
    return path.read_text().count("\n")


def test_files_can_be_read_at_a_sitting():
    long = [path for path in FILES.values() if lines(path) > LARGEST]
    assert {path.relative_to(ROOT / "rlamort").as_posix() for path in long} <= set(LONG)


def test_the_top_is_a_table_of_contents():
    top = [path for path in (ROOT / "rlamort").glob("*.py") if not path.stem.startswith("__")]
    assert len(top) <= MODULES


def test_every_package_is_in_the_wheel():
    listed = (ROOT / "setup.cfg").read_text().split("packages =", 1)[1].split("install_requires", 1)[0].split()
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "rlamort").rglob("__init__.py")}
    assert present <= set(listed)
