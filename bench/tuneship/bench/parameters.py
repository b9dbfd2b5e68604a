"""Numbers that the verbs' command lines accept, checked where they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

Above0 = Number(gt=0)
Positive = Annotated[float, Parameter(validator=Above0)]
NotNegative = Annotated[float, Parameter(validator=Number(gte=0))]
Alpha = Annotated[float, Parameter(validator=Number(gt=0, lt=0.5))]
Rate = Positive | Literal["sweep"]
Count = Annotated[int, Parameter(validator=Above0)]
