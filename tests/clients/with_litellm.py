"""LiteLLM: a call, a stream, tools, and its own error for a context that is too long."""

import sys

import litellm

url = sys.argv[1]
common = {"model": "openai/cria", "api_base": url, "api_key": "none", "max_tokens": 100, "temperature": 0}
question = [{"role": "user", "content": "What is 3 plus 4?"}]

answer = litellm.completion(messages=question, **common)
assert answer.choices[0].message.content
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
chunks = list(litellm.completion(messages=question, stream=True, stream_options={"include_usage": True}, **common))
assert (
    "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    == answer.choices[0].message.content
)

tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
weather = [{"role": "user", "content": "What is the weather in Paris?"}]
called = litellm.completion(messages=weather, tools=[tool], tool_choice="required", **common)
assert called.choices[0].finish_reason == "tool_calls"
assert called.choices[0].message.tool_calls[0].function.name == "weather"

try:
    litellm.completion(messages=[{"role": "user", "content": "long " * 200_000}], **common)
except litellm.ContextWindowExceededError:
    pass
else:
    raise SystemExit("a prompt that is too long was no ContextWindowExceededError")
print("litellm: call, stream, tools, ContextWindowExceededError")
