"""`instructor`."""

from typing import Annotated

import instructor
import openai
from instructor.core.exceptions import IncompleteOutputException
from pydantic import BaseModel, Field
from report import Target, expect, run
from shapes import ASK_PERSON, MAX_TOKENS, Person


def client_of(target: Target, mode: instructor.Mode, kind=openai.OpenAI):
    client = kind(base_url=target.base_url, api_key=target.key, max_retries=0)
    return instructor.from_openai(client, mode=mode)


def asked(target) -> dict[str, object]:
    return {
        "model": target.model,
        "messages": [{"role": "user", "content": ASK_PERSON}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "max_retries": 0,
    }


def whole(mode: str):
    def check(target):
        client = client_of(target, instructor.Mode[mode])
        person, answer = client.chat.completions.create_with_completion(
            response_model=Person, **asked(target)
        )
        expect(isinstance(person, Person) and answer.usage.completion_tokens > 0, answer)

    check.__doc__ = f"{mode}: one object"
    return check


def partial(mode: str):
    def check(target):
        client = client_of(target, instructor.Mode[mode])
        *_, last = client.chat.completions.create_partial(response_model=Person, **asked(target))
        Person.model_validate(last.model_dump())

    check.__doc__ = f"{mode}: streamed, partial objects"
    return check


class Friend(BaseModel):
    """A friend, as most would write it: fields may be left out, and more are not forbidden."""

    name: Annotated[str, Field(max_length=16)]
    age: Annotated[int, Field(ge=0, le=120)]
    nickname: Annotated[str, Field(max_length=16)] | None = None


def plain(mode: str):
    def check(target):
        client = client_of(target, instructor.Mode[mode])
        try:
            friend = client.chat.completions.create(response_model=Friend, **asked(target))
        except IncompleteOutputException:
            return  # random weights may go on with fields of their own, and are cut
        expect(isinstance(friend, Friend), friend)

    check.__doc__ = f"{mode}: a plain class, or the answer says that it was cut"
    return check


async def in_async(target):
    """TOOLS: AsyncOpenAI."""
    client = client_of(target, instructor.Mode.TOOLS, openai.AsyncOpenAI)
    person = await client.chat.completions.create(response_model=Person, **asked(target))
    expect(isinstance(person, Person), person)


run(
    [
        whole("TOOLS"),
        partial("TOOLS"),
        plain("TOOLS"),
        in_async,
        whole("JSON_SCHEMA"),
        partial("JSON_SCHEMA"),
        plain("JSON_SCHEMA"),
    ]
)
