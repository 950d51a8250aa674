"""What all sections of configs are made of: their base class, and numbers with bounds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Every number has an upper bound beyond which it is a slip of the keyboard: it would fill the memory, overflow where it
# is used, or never come.
Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
Samples = Annotated[int, Field(ge=1, le=1 << 20)]
Size = Annotated[int, Field(ge=1, le=4096)]  # latent frames, height or width
Tokens = Annotated[int, Field(ge=1, le=1 << 30)]
Steps = Annotated[int, Field(ge=1, le=10**8)]
Count = Annotated[int, Field(ge=1, le=10**5)]
StepsOrNever = Annotated[int, Field(ge=0, le=10**8)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # 1 would divide by zero
Weight = Annotated[float, Field(gt=0, le=1e6)]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=64)]


class Section(BaseModel):
    """Base of all sections: it takes no extra keys, converts no types silently, and cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
