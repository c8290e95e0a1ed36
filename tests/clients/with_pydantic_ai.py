"""pydantic-ai: a text, a stream, and a typed output by a forced tool."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


async def main(url: str) -> None:
    model = OpenAIChatModel("cria", provider=OpenAIProvider(base_url=url, api_key="none"))
    settings = {"max_tokens": 200, "temperature": 0.0}
    agent = Agent(model, system_prompt=("Answer shortly.", "Be kind."), model_settings=settings)
    answer = await agent.run("What is 3 plus 4?")
    assert answer.output
    async with agent.run_stream("What is 3 plus 4?") as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True)]
    assert "".join(pieces) == answer.output
    typed = Agent(model, output_type=Person, model_settings=settings)
    person = await typed.run("Alice is 30 years old.")
    assert isinstance(person.output, Person)


asyncio.run(main(sys.argv[1]))
print("pydantic-ai: call, stream, typed output")
