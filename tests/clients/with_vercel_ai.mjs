// Vercel's AI SDK over @ai-sdk/openai-compatible: text, a stream, a forced tool, an object.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({ name: "pronk", baseURL: process.argv[2], apiKey: "none", includeUsage: true, supportsStructuredOutputs: true });
const common = { model: provider("cria"), temperature: 0, maxOutputTokens: 200, maxRetries: 0 };

const answer = await generateText({ ...common, prompt: "What is 3 plus 4?" });
assert.ok(answer.text);
const stream = streamText({ ...common, prompt: "What is 3 plus 4?" });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, answer.text);
assert.ok((await stream.usage).outputTokens > 0);

const weather = tool({ description: "Tell the weather.", inputSchema: z.object({ city: z.string() }) });
const called = await generateText({ ...common, prompt: "How is the weather in Lima?", tools: { weather }, toolChoice: "required" });
assert.equal(called.toolCalls[0].toolName, "weather");
assert.equal(typeof called.toolCalls[0].input.city, "string");

const { object } = await generateObject({ ...common, prompt: "Alice is 30 years old.", schema: z.object({ name: z.string(), age: z.number().int() }) });
assert.equal(typeof object.age, "number");
console.log("Vercel AI SDK: text, stream, tool, object");
