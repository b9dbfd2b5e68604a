"""What every table of a recipe is: typed, frozen, and refused where it names what is not done yet."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """One table of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    # Values that the contract names and this release cannot do yet: {key: refused values}.
    not_yet: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Section:
        for key, refused in self.not_yet.items():
            value = getattr(self, key)
            if value in refused:
                raise ValueError(f"{key} = {value!r} is not yet supported")
        return self
