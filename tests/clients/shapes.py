"""What the checks ask models for. Everything is bounded, so that random weights come to an end."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Pet(BaseModel):
    """A pet that somebody has."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["llama", "mule", "dog"]
    legs: Annotated[int, Field(ge=0, le=8)]


class Person(BaseModel):
    """A person who is spoken of."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=16)]
    age: Annotated[int, Field(ge=0, le=120)]
    likes: Annotated[list[Literal["tea", "coffee", "water"]], Field(max_length=3)]
    pet: Pet | None


class Weather(BaseModel):
    """Tell the weather in a city."""

    model_config = ConfigDict(extra="forbid")
    city: Annotated[str, Field(max_length=16)]
    unit: Literal["celsius", "fahrenheit"]
    days: Annotated[int, Field(ge=1, le=7)]


ASK_PERSON = "Mara is 34, likes tea and has a llama with four legs. Who is she?"
ASK_WEATHER = "What will the weather be in Lima, in celsius, for two days?"
MAX_TOKENS = 400  # far above what the shapes need, a byte a token
