"""A run's settings: `fields` says what there is, `rules` what must hold between them, `read` how they are given."""

from fastrot.config.fields import GRAPHING_MODES, Config, Data, Section, Tap
from fastrot.config.read import (
    as_overrides,
    command_of,
    flat,
    from_values,
    is_text,
    known_keys,
    load,
    read_yaml,
    table,
    to_yaml,
)

__all__ = [
    "GRAPHING_MODES",
    "Config",
    "Data",
    "Section",
    "Tap",
    "as_overrides",
    "command_of",
    "flat",
    "from_values",
    "is_text",
    "known_keys",
    "load",
    "read_yaml",
    "table",
    "to_yaml",
]
