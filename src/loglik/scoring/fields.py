"""Names of an input's fields, and which of them a row's prompt and text are taken from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loglik.errors import InputError, RowError

__all__ = ["DEFAULT_FIELDS", "Fields", "check_columns", "choose_fields"]


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields (columns) of a row; a name other than the default counts as asked for by the user."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    id: str = "id"


DEFAULT_FIELDS = Fields()


def choose_fields(names: Collection[str], fields: Fields) -> tuple[str | None, str]:
    """Which fields hold the prompt (None: there is none) and the text that is scored."""
    if fields.prompt != DEFAULT_FIELDS.prompt and fields.prompt not in names:
        raise RowError(f"has no field {fields.prompt!r} ({_listed(names)}): name the right one with --prompt-field")
    if fields.text != DEFAULT_FIELDS.text:
        if fields.text not in names:
            raise RowError(f"has no field {fields.text!r} ({_listed(names)}): name the right one with --text-field")
        return None, fields.text
    if fields.completion in names:
        return fields.prompt if fields.prompt in names else None, fields.completion
    if fields.completion != DEFAULT_FIELDS.completion:
        raise RowError(
            f"has no field {fields.completion!r} ({_listed(names)}): name the right one with --completion-field"
        )
    if fields.text in names and fields.prompt == DEFAULT_FIELDS.prompt:
        return None, fields.text
    raise RowError(
        f"has neither a field {fields.completion!r} nor a field {fields.text!r} ({_listed(names)}): name the "
        "right ones with --completion-field and --prompt-field, or with --text-field"
    )


def _listed(names: Collection[str]) -> str:
    shown = [repr(name) for name in list(names)[:20]]  # repr escapes what could not be printed
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"its fields are {', '.join(shown)}{more}" if shown else "it has no fields"


def check_columns(names: list[str], fields: Fields, name: str) -> list[str]:
    """The columns that are needed; a table without them is refused once and not row by row."""
    try:
        needed = [column for column in choose_fields(names, fields) if column is not None]
    except RowError as error:
        raise InputError(f"{name} {error.reason}") from None
    needed += [fields.id] if fields.id in names and fields.id not in needed else []
    for column in needed:
        if names.count(column) > 1:
            raise InputError(f"{name} has {names.count(column)} columns called {column!r}: rename all but one")
    return needed
