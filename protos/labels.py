"""Labels of a job: names and values of a person's choosing, by which jobs are found again.

Rules: the maps of the schema hold labels and nothing else.
"""

from __future__ import annotations

import re

from google.protobuf.descriptor import FieldDescriptor

LABEL_RULE = "1 to 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends"
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def is_label(text: str) -> bool:
    """Whether it may be the name or the value of a label: safe in a filter, a table and a shell."""
    return _LABEL.fullmatch(text) is not None


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field holds texts by name; every other repeated field is a list."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
