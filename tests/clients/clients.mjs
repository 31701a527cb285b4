// Calls a server with the client of OpenAI and the AI SDK of Vercel, unmodified; prints what they got as JSON.
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, streamText } from "ai";

const baseURL = `${process.argv[2]}/v1`;
const messages = [{ role: "user", content: "who sat on the mat?" }];
const found = {};

const client = new OpenAI({ baseURL, apiKey: "none" });
found.models = (await client.models.list()).data.map((model) => model.id);
const answer = await client.chat.completions.create({ model: "chat", messages, max_tokens: 12, temperature: 0 });
found.chat = answer.choices[0].message.content;
found.usage = answer.usage.completion_tokens;
found.streamed = "";
const stream = await client.chat.completions.create({ model: "chat", messages, max_tokens: 12, temperature: 0, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  found.streamed += chunk.choices[0]?.delta?.content || "";
  if (chunk.usage) found.streamedUsage = chunk.usage.completion_tokens;
}
found.vector = (await client.embeddings.create({ model: "embed", input: "rain fell" })).data[0].embedding;
try {
  await client.chat.completions.create({ model: "none", messages });
} catch (error) { found.error = [error.status, error.code]; }

const sdk = createOpenAICompatible({ name: "fieldguide", baseURL, includeUsage: true });
const text = await generateText({ model: sdk("chat"), messages, maxOutputTokens: 12, temperature: 0 });
found.sdk = text.text;
found.sdkUsage = text.usage.outputTokens;
const pieces = streamText({ model: sdk("chat"), messages, maxOutputTokens: 12, temperature: 0 });
found.sdkStreamed = "";
for await (const piece of pieces.textStream) found.sdkStreamed += piece;
found.sdkVector = (await embed({ model: sdk.textEmbeddingModel("embed"), value: "rain fell" })).embedding;
console.log(JSON.stringify(found));
