"""instructor: an object from a tool call, and one from a JSON schema."""

import sys

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    person = instructor.from_openai(client, mode=mode).chat.completions.create(
        model="cria",
        response_model=Person,
        max_retries=0,
        max_tokens=200,
        temperature=0,
        messages=[{"role": "user", "content": "Alice is 30 years old."}],
    )
    assert isinstance(person, Person), mode
print("instructor: tools, JSON schema")
