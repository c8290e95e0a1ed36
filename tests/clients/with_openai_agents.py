"""OpenAI's agents package over both of its ways, chat completions and responses: a run, a stream, a forced tool."""

import asyncio
import sys

import agents
import openai


@agents.function_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    seen.append(city)
    return "It rains."


seen: list[str] = []


async def main(url: str) -> None:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        model = kind(model="cria", openai_client=client)
        settings = agents.ModelSettings(max_tokens=100, temperature=0)
        agent = agents.Agent(name="a", instructions="Answer shortly.", model=model, model_settings=settings)
        answer = await agents.Runner.run(agent, "What is 3 plus 4?")
        assert answer.final_output
        stream = agents.Runner.run_streamed(agent, "What is 3 plus 4?")
        events = [event async for event in stream.stream_events()]
        assert stream.final_output == answer.final_output
        assert any(event.type == "raw_response_event" for event in events)
        forced = agents.ModelSettings(max_tokens=100, temperature=0, tool_choice="weather")
        caller = agents.Agent(
            name="b", model=model, model_settings=forced, tools=[weather], tool_use_behavior="stop_on_first_tool"
        )
        seen.clear()
        result = await agents.Runner.run(caller, "How is the weather in Lima?")
        assert len(seen) == 1
        assert result.final_output == "It rains."


asyncio.run(main(sys.argv[1]))
print("openai-agents: chat completions and responses, each a run, a stream and a tool")
