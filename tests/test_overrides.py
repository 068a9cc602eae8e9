"""key=value as it is typed: whatever a text may hold arrives as it is, and Hydra's grammar stays what it was."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlamort.config import Run, fields_of
from rlamort.errors import UserError
from rlamort.run.overrides import read, spelled, values

KINDS = {name: field.type for name, field in fields_of(Run).items()}
PIECES = [*"ab1.ü '\"\\$(){}[],=:#~!&@/-\n\t", "${", "${seed}", "${x}", "\\${", "null"]
NASTY = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def composed(argument, multirun=False):
    """What Hydra and OmegaConf make of it, beside the keys of a run."""
    key = argument.partition("=")[0]
    override = OverridesParser.create().parse_override(spelled(argument, KINDS[key], multirun, KINDS))
    config = OmegaConf.create({**dict.fromkeys(KINDS), "seed": 7, key: override.value()})
    return OmegaConf.to_container(config, resolve=True)[key]


@given(NASTY)
@settings(max_examples=400, deadline=None)
def test_any_text_arrives(text):
    """Verbatim where Hydra's grammar refuses it, and where it does not as that grammar reads it; never an error."""
    try:
        parsed = OverridesParser.create().parse_override(f"wandb_notes={text}")
    except Exception:
        expected = text
    else:
        value = parsed.value()
        expected = value if isinstance(value, str | None) else text
    found = composed(f"wandb_notes={text}")
    if expected is None or not ("${seed}" in expected or "\\${" in expected):  # these resolve, or are escaped already
        assert found == expected


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("dir=runs/jürgen", "runs/jürgen"),
        ("dir=runs/a (b)", "runs/a (b)"),
        ("dir=2024", "2024"),
        ("dir=runs/s${seed}", "runs/s7"),
        ("dir=runs/s${seed}-${x}", "runs/s${seed}-${x}"),
        ("dir=null", None),
        ("wandb_notes=a=b", "a=b"),
        ("wandb_notes=it's", "it's"),
        ("wandb_notes=true", "true"),
        ("wandb_notes=${x}", "${x}"),
        ("wandb_notes=${", "${"),
        ("wandb_notes=${nobody:x}", "${nobody:x}"),
        ("wandb_notes=\\${seed}", "${seed}"),
        ("wandb_notes='${x}'", "${x}"),
        ("wandb_notes=a,b", "a,b"),
        ("wandb_notes=[draft] one", "[draft] one"),
        ("wandb_notes=a\\", "a\\"),
        ("wandb_notes=C:\\new", "C:\\new"),
        ("wandb_notes=", ""),
        ('wandb_notes="x, y"', "x, y"),
        ("wandb_notes=first\nsecond", "first\nsecond"),
        ("wandb_tags=[jürgen, it's, a=b]", ["jürgen", "it's", "a=b"]),
        ("wandb_tags=[a,'b c',${x}]", ["a", "b c", "${x}"]),
        ("wandb_tags=[2024, true, v1]", ["2024", "true", "v1"]),
        ("track=[wandb,tensorboard]", ["wandb", "tensorboard"]),
        ("steps=1_000", 1000),
        ("compile=true", True),
        ("env_kwargs={a: 1, b: [2, null]}", {"a": 1, "b": [2, None]}),
        ("learning_rate=1e400", "1e400"),
        ("seed=(", "("),
    ],
)
def test_what_is_typed_is_what_arrives(argument, expected):
    KINDS.setdefault("learning_rate", float)
    assert composed(argument) == expected


def test_several_values_are_runs_with_m_and_an_error_without():
    assert spelled("seed=0,1", KINDS["seed"], True, KINDS) == "seed=0,1"
    assert spelled("dir=a,b", KINDS["dir"], True, KINDS) == "dir=a,b"
    with pytest.raises(UserError, match=r"seed=0,1: several values are a run each, which needs -m$"):
        spelled("seed=0,1", KINDS["seed"], False, KINDS)
    with pytest.raises(UserError, match=r"needs -m; a list is wandb_tags=\[a,b\]$"):
        spelled("wandb_tags=a,b", KINDS["wandb_tags"], False, KINDS)
    with pytest.raises(UserError, match="with -m a comma separates values; in quotes it is text"):
        spelled("wandb_notes=jürgen, again", KINDS["wandb_notes"], True, KINDS)
    with pytest.raises(UserError, match="=5: key=value is needed"):
        spelled("=5", int, False, KINDS)


def test_commands_without_hydra_read_the_same():
    given = [
        "wandb_notes=it's a=b",
        "model=full,semi",
        "hidden=[8,8]",
        "env_kwargs.size=3",
        "env_kwargs.name=jürgen",
        "steps=2e2",
    ]
    assert values(given, KINDS) == {
        "wandb_notes": "it's a=b",
        "model": ["full", "semi"],
        "hidden": [8, 8],
        "env_kwargs": {"size": 3, "name": "jürgen"},
        "steps": 200.0,
    }
    assert read("{a", KINDS["wandb_notes"]) == "{a"
    with pytest.raises(UserError, match=r"a\.b=1: a is given as a value, too"):
        values(["a=1", "a.b=1"], {})
