"""Fields: the settings of a run, each declared once, in the signature and docstring of the constructor that takes it.

A method is a row, one YAML file that names its agent, its source and its loop. The keys of a run are those of `Run` and of
the constructors that the row names; their types, ranges, defaults and help are read from there.
"""

from rlamort.config.fields import (
    FIXED,
    FREE,
    Count,
    Decay,
    Field,
    Fixed,
    Fraction,
    Free,
    Mark,
    NonNegative,
    Positive,
    Ratio,
    Seconds,
    Seed,
    Size,
    Whole,
    Widths,
    convert,
    describe,
    element_of,
    fields_of,
    part_of,
    rational,
    takes_text,
)  # fmt: skip
from rlamort.config.parts import KIND, Part
from rlamort.config.rows import (
    Config,
    as_call,
    check_names,
    config_of,
    defaults,
    fields,
    locate,
    marks,
    methods,
    nested,
    opening,
    read_row,
    renamed,
    resolve,
    short_name,
    unsupported,
)  # fmt: skip
from rlamort.config.run import Dtype, Run, Tracked

__all__ = [
    "FIXED", "FREE", "KIND", "Config", "Count", "Decay", "Dtype", "Field", "Fixed", "Fraction", "Free", "Mark", "NonNegative", "Part",
    "Positive", "Ratio", "Run", "Seconds", "Seed", "Size", "Tracked", "Whole", "Widths", "as_call", "check_names", "config_of",
    "convert", "defaults", "describe", "element_of", "fields", "fields_of", "locate", "marks", "methods", "nested", "opening",
    "part_of", "rational", "read_row", "renamed", "resolve", "short_name", "takes_text", "unsupported",
]  # fmt: skip
