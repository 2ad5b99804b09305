"""What all plans have in common: frozen, strict about fields, and one way to say that data is no such plan."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from edgesd.errors import DataError


class Frozen(BaseModel):
    """Nothing changes it, nothing unknown is in it, every number is finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def unreadable(error: ValidationError, what: str, verb: str, do: str) -> DataError:
    """The error for data that should be a plan: its first wrong field. verb: of edgesd, which writes such plans."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return DataError(f"the {what} does not parse ({where}: {first['msg'][:200]})", f"what edgesd {verb} writes", do)
