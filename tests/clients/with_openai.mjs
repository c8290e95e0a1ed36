// The official Node client: a call, a stream, tools, a schema, the stream helper, completions, responses, models.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const common = { model: "cria", messages: [{ role: "user", content: "What is 3 plus 4?" }], temperature: 0, max_tokens: 100 };

const answer = await client.chat.completions.create(common);
assert.ok(answer.choices[0].message.content);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...common, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, answer.choices[0].message.content);

const tool = { type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } };
const weather = [{ role: "user", content: "What is the weather in Paris?" }];
const helper = client.chat.completions.stream({ ...common, messages: weather, tools: [tool], tool_choice: "required" });
const called = await helper.finalChatCompletion();
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.equal(typeof JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city, "string");

const schema = { type: "object", properties: { sum: { type: "integer" } }, required: ["sum"], additionalProperties: false };
const formed = await client.chat.completions.parse({ ...common, response_format: { type: "json_schema", json_schema: { name: "sum", strict: true, schema } } });
assert.equal(typeof formed.choices[0].message.parsed.sum, "number");

const scored = await client.completions.create({ model: "cria", prompt: ["Hello", "Bye"], max_tokens: 0, echo: true, logprobs: 1 });
assert.equal(scored.choices.length, 2);
assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);

const response = await client.responses.create({ model: "cria", input: "What is 3 plus 4?", temperature: 0 });
const stream = client.responses.stream({ model: "cria", input: "What is 3 plus 4?", temperature: 0 });
assert.equal((await stream.finalResponse()).output_text, response.output_text);
assert.equal((await client.responses.retrieve(response.id)).id, response.id);

assert.equal((await client.models.retrieve("cria")).id, "cria");
await assert.rejects(client.chat.completions.create({ ...common, model: "other" }), OpenAI.NotFoundError);
console.log("openai (Node): chat, stream, tools, schema, completions, responses, models, errors");
