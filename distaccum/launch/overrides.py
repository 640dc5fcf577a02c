"""An override as text, quoted for Hydra's grammar and for a shell, each of which has quotes of its own."""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException


def override(key: str, text: str) -> str:
    """Write `key=text` so that Hydra reads exactly this text; without quotes where none are needed."""
    plain = f"{key}={text}"
    return plain if _reads_as(plain, text) else _quoted(key, text)


def _quoted(key: str, text: str) -> str:
    quote = "'" if "'" in text else '"'
    # Hydra takes a backslash as it is, unless it stands before a quote or before another backslash that does.
    inside = re.sub(rf"(\\*)({quote}|$)", lambda found: 2 * found[1] + (f"\\{quote}" if found[2] else ""), text)
    return f"{key}={quote}{inside}{quote}"


def shell_word(text: str) -> str:
    """Quote an override for a shell, in quotes that differ from Hydra's inside where that is possible."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    if "'" not in text:
        return f"'{text}'"
    return shlex.quote(text) if re.search(r'["$`!]|\\[^\']', text) else f'"{text}"'


def to_paste(key: str, text: str) -> str:
    """Write an override for people who copy it into a shell."""
    return shell_word(override(key, text))


def advice(error: BaseException) -> str | None:
    """Say which override could not be read and how its value is written as text; None for any other error."""
    if not isinstance(error, OverrideParseException):
        return None
    key, is_there, value = error.override.partition("=")
    told = f"This override cannot be read: {error.override}"
    quoted = _quoted(key, value)
    if not is_there:
        return f"{told}\nAn override is key=value; where the value has spaces, quote it for the shell: 'key=one two'."
    if not _reads_as(quoted, value):
        return told
    return f"{told}\nIf its value is this very text, write {shell_word(quoted)} (the outer quotes are for the shell)."


def _reads_as(text: str, value: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(text).value() == value)
    except HydraException:
        return False
