"""langchain-openai: a call, a stream, a forced tool, structured output by a schema and by a tool."""

import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


url = sys.argv[1]
model = ChatOpenAI(model="cria", base_url=url, api_key="none", temperature=0, max_completion_tokens=200, seed=1)

answer = model.invoke("What is 3 plus 4?")
assert answer.content, answer
assert answer.usage_metadata["output_tokens"] > 0
pieces = [piece.content for piece in model.stream("What is 3 plus 4?")]
assert "".join(pieces) == answer.content

called = model.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Lima?")
assert [call["name"] for call in called.tool_calls] == ["weather"], called
assert isinstance(called.tool_calls[0]["args"]["city"], str)
streamed = None
for piece in model.bind_tools([weather], tool_choice="required").stream("How is the weather in Lima?"):
    streamed = piece if streamed is None else streamed + piece
assert streamed.tool_calls[0]["args"] == called.tool_calls[0]["args"]

for method in ("json_schema", "function_calling"):
    person = model.with_structured_output(Person, method=method).invoke("Alice is 30 years old.")
    assert isinstance(person, Person), (method, person)
print("langchain-openai: call, stream, tools, structured output")
