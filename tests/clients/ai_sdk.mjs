// Answers each line of stdin, {"root", "provider", "task", …}, with a line: what the AI SDK made of the server's answer.
import { createInterface } from "node:readline";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, Output, stepCountIs, streamObject, streamText, tool } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false; // which would go to stdout
const MODEL = "tiny/fake";
const providers = {
  chat: (baseURL) => createOpenAI({ baseURL, apiKey: "any" }).chat(MODEL),
  responses: (baseURL) => createOpenAI({ baseURL, apiKey: "any" })(MODEL),
  compatible: (baseURL) =>
    createOpenAICompatible({ name: "own", baseURL, includeUsage: true, supportsStructuredOutputs: true })(MODEL),
  plain: (baseURL) => createOpenAICompatible({ name: "own", baseURL })(MODEL),
  anthropic: (baseURL) => createAnthropic({ baseURL, apiKey: "any" })(MODEL),
};

const toolsOf = (definitions) =>
  Object.fromEntries(
    definitions.map(({ function: { name, description, parameters } }) => {
      const inputSchema = jsonSchema(parameters ?? { type: "object", properties: {} });
      return [name, tool({ description, inputSchema, execute: async () => `the result of ${name}` })];
    }),
  );

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

const text = async (result) => ({
  text: await result.text,
  reasoning: (await result.reasoningText) ?? null,
  finish: await result.finishReason,
  calls: (await result.steps).map((step) => step.toolCalls.map((call) => [call.toolName, call.input])),
  tokens: (await result.usage).outputTokens ?? null,
});

const tasks = {
  generate: async (options) => text(await generateText(options)),
  stream: async (options) => {
    const result = streamText({ ...options, onError: () => {} });
    const parts = await all(result.fullStream);
    const failed = parts.find((part) => part.type === "error");
    if (failed) throw failed.error;
    return { ...(await text(result)), pieces: parts.filter((part) => part.type.endsWith("-delta")).length };
  },
  object: async (options) => ({ object: (await generateObject(options)).object }),
  objects: async (options) => {
    const result = streamObject({ ...options, onError: () => {} });
    const parts = await all(result.partialObjectStream);
    return { object: await result.object, pieces: parts.length };
  },
  output: async (options) => ({ object: (await generateText(options)).output }),
  outputs: async (options) => {
    const result = streamText({ ...options, onError: () => {} });
    const parts = await all(result.partialOutputStream);
    return { object: await result.output, pieces: parts.length };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { root, provider, task, tools, schema, steps, ...options } = JSON.parse(line);
  let answer;
  try {
    Object.assign(options, { model: providers[provider](`${root}/v1`), maxRetries: 0 });
    if (tools) Object.assign(options, { tools: toolsOf(tools), stopWhen: stepCountIs(steps ?? 1) });
    if (schema && task.startsWith("object")) options.schema = jsonSchema(schema);
    else if (schema) options.output = Output.object({ schema: jsonSchema(schema) });
    answer = await tasks[task](options);
  } catch (error) {
    const { name, message, statusCode, responseBody, isRetryable } = error;
    answer = { error: { name, message, status: statusCode ?? null, retries: isRetryable ?? null, body: responseBody } };
  }
  console.log(JSON.stringify(answer));
}
