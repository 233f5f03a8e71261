// The conversation: its messages, what is asked for them, and how they are shown.

import { call, events } from "./api.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** Makes an element: `make("p", {className: "note"}, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Text with its ```fenced``` parts as blocks of code. */
function prose(text) {
  return text.split(/^```[^\n]*\n?/m).map((part, index) =>
    index % 2 ? make("pre", {}, make("code", {}, part)) : document.createTextNode(part));
}

/** What one answer's stream has said so far; `add` takes an event's delta. */
export class Answer {
  role = "assistant";
  content = "";
  reasoning = "";
  calls = [];
  note = ""; // how it ended and how fast it was
  error = "";
  running = true;

  add(delta) {
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const piece of delta.tool_calls ?? []) {
      this.calls[piece.index] ??= { id: "", name: "", arguments: "", result: "" };
      const call = this.calls[piece.index];
      call.id = piece.id ?? call.id;
      call.name = piece.function.name ?? call.name;
      call.arguments += piece.function.arguments ?? "";
    }
  }

  get isEmpty() {
    return !this.content && !this.calls.length;
  }
}

/** A message as the API wants it. */
function forApi(message) {
  if (!(message instanceof Answer)) return message;
  const sent = { role: "assistant", content: message.content };
  if (message.calls.length) {
    sent.tool_calls = message.calls.map((each) =>
      ({ id: each.id, type: "function", function: { name: each.name, arguments: each.arguments } }));
  }
  return sent;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

export class Chat {
  /** `askForKey` as in `call`; `onLost(error)` is told when the server has gone. */
  constructor({ askForKey, onLost }) {
    this.askForKey = askForKey;
    this.onLost = onLost;
    this.messages = [];
    this.controller = null;
    this.list = document.getElementById("messages");
    this.prompt = document.getElementById("prompt");
    this.fields = document.getElementById("parameters");
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    document.getElementById("stop").addEventListener("click", () => this.stop());
    this.prompt.addEventListener("keydown", (event) => this.sendsOnEnter(event, () => this.send()));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    this.showAll();
  }

  sendsOnEnter(event, send) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  }

  send() {
    const text = this.prompt.value;
    if (!text.trim() || this.controller) return;
    const parameters = this.parameters();
    if (parameters === null) return;
    this.prompt.value = "";
    this.messages.push({ role: "user", content: text });
    this.answer(parameters);
  }

  stop() {
    this.controller?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.showAll();
    this.prompt.focus();
  }

  /** Answer again from here on: the messages behind `index` go. */
  answerFrom(index) {
    const parameters = this.parameters();
    if (this.controller || parameters === null) return;
    this.messages.length = index;
    this.answer(parameters);
  }

  /** The request's fields; null where one is wrong, which is then shown. */
  parameters() {
    const field = (name) => this.fields.querySelector(`[name=${name}]`);
    const body = {};
    for (const name of NUMBERS) {
      const input = field(name);
      if (!input.checkValidity()) return this.refuse(input);
      if (input.value !== "") body[name] = Number(input.value);
    }
    if (field("model").value) body.model = field("model").value;
    if (field("thinking").value) body.chat_template_kwargs = { enable_thinking: field("thinking").value === "true" };
    const stops = field("stop").value.split("\n").filter((line) => line);
    if (stops.length) body.stop = stops;
    const tools = field("tools");
    tools.setCustomValidity("");
    if (tools.value.trim()) {
      try {
        body.tools = JSON.parse(tools.value);
      } catch (error) {
        tools.setCustomValidity(`This is no JSON: ${error.message}`);
        return this.refuse(tools);
      }
    }
    body.system = field("system").value;
    return body;
  }

  refuse(input) {
    this.fields.open = true;
    input.addEventListener("input", () => input.setCustomValidity(""), { once: true });
    input.reportValidity();
    return null;
  }

  async answer({ system, ...parameters }) {
    const sent = this.messages.filter((each) => !(each instanceof Answer && each.isEmpty)).map(forApi);
    if (system) sent.unshift({ role: "system", content: system });
    const answer = new Answer();
    this.messages.push(answer);
    const controller = this.controller = new AbortController();
    this.showAll();
    const begun = performance.now();
    let first = 0, usage = null, reason = "";
    try {
      const body = { ...parameters, messages: sent, stream: true, stream_options: { include_usage: true } };
      const response = await call("v1/chat/completions", { askForKey: this.askForKey, body, signal: controller.signal });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage ?? usage;
        for (const choice of event.choices) {
          answer.add(choice.delta);
          if (!first && (answer.reasoning || !answer.isEmpty)) first = performance.now();
          reason = choice.finish_reason ?? reason;
        }
        this.showSoon(answer);
      }
      answer.note = this.note(usage, reason, begun, first);
    } catch (error) {
      if (controller.signal.aborted) answer.note = "stopped";
      else {
        answer.error = error.message;
        this.onLost(error);
      }
    }
    answer.running = false;
    if (this.controller === controller) this.controller = null;
    const index = this.messages.indexOf(answer);
    if (index < 0) return; // the conversation was cleared
    this.buttons();
    this.show(index);
    this.list.querySelectorAll("button").forEach((button) => (button.disabled = false));
  }

  note(usage, reason, begun, first) {
    const parts = [reason === "length" ? "cut at the limit of tokens" : ""];
    if (usage) {
      const count = usage.completion_tokens;
      const seconds = (performance.now() - first) / 1000;
      parts.push(`${usage.prompt_tokens} in, ${count} out`);
      if (first) parts.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
      if (first && count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    }
    return parts.filter((each) => each).join(" · ");
  }

  // --- what is seen ----------------------------------------------------------------------------------------------

  buttons() {
    document.getElementById("send").hidden = this.controller !== null;
    document.getElementById("stop").hidden = this.controller === null;
  }

  showAll() {
    this.buttons();
    this.list.replaceChildren(...this.messages.map((message, index) => this.element(message, index)));
    if (!this.messages.length) this.list.append(make("li", { className: "empty" }, "Say something to the model."));
    this.list.scrollTop = this.list.scrollHeight;
  }

  /** Once a frame at most, however fast tokens come. */
  showSoon(answer) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const index = this.messages.indexOf(answer);
      if (index >= 0 && answer.running) this.show(index);
    });
  }

  show(index) {
    const { scrollTop, scrollHeight, clientHeight } = this.list;
    const atEnd = scrollHeight - scrollTop - clientHeight < 40;
    const old = this.list.children[index];
    const open = old.querySelector("details.reasoning")?.open;
    const fresh = this.element(this.messages[index], index);
    if (open) fresh.querySelector("details.reasoning").open = true;
    if (old.contains(document.activeElement) && document.activeElement.matches("summary")) {
      old.replaceWith(fresh);
      fresh.querySelector("summary")?.focus();
    } else old.replaceWith(fresh);
    if (atEnd) this.list.scrollTop = this.list.scrollHeight;
  }

  element(message, index) {
    const item = make("li", { className: message.role });
    item.append(make("h3", {}, { user: "You", assistant: "Model", tool: "Tool result" }[message.role]));
    if (message instanceof Answer) this.fillAnswer(item, message, index);
    else {
      item.append(make("div", { className: "text" }, ...prose(message.content)));
      if (message.role === "user") item.append(this.actions(["Edit", () => this.edit(item, index)]));
    }
    return item;
  }

  fillAnswer(item, answer, index) {
    if (answer.reasoning) {
      const words = answer.running && answer.isEmpty ? "Reasoning…" : "Reasoning";
      item.append(make("details", { className: "reasoning" }, make("summary", {}, words),
        make("div", { className: "text" }, answer.reasoning)));
    }
    item.append(make("div", { className: "text" }, ...prose(answer.content)));
    for (const each of answer.calls.filter((each) => each)) item.append(this.callElement(each, answer));
    if (answer.error) item.append(make("p", { className: "error" }, answer.error));
    if (answer.running) {
      item.append(make("span", { className: "cursor", ariaLabel: "writing" }));
      return;
    }
    if (answer.note) item.append(make("p", { className: "note" }, answer.note));
    const actions = [["Retry", () => this.answerFrom(index)]];
    if (answer.content && navigator.clipboard) actions.push(["Copy", () => navigator.clipboard.writeText(answer.content)]);
    if (answer.calls.length && index === this.messages.length - 1) {
      actions.unshift(["Send results", () => this.sendResults(answer)]);
    }
    item.append(this.actions(...actions));
  }

  callElement(each, answer) {
    const box = make("div", { className: "call" },
      make("p", {}, "calls ", make("code", {}, each.name)), make("pre", {}, make("code", {}, pretty(each.arguments))));
    const isLast = this.messages.at(-1) === answer;
    if (!answer.running && isLast) {
      const input = make("textarea", { rows: 2, value: each.result, spellcheck: false });
      input.addEventListener("input", () => (each.result = input.value));
      box.append(make("label", {}, `Result of ${each.name}`, input));
    }
    return box;
  }

  sendResults(answer) {
    const parameters = this.parameters();
    if (this.controller || parameters === null) return;
    for (const each of answer.calls) {
      this.messages.push({ role: "tool", tool_call_id: each.id, content: each.result });
    }
    this.answer(parameters);
  }

  actions(...pairs) {
    const buttons = pairs.map(([words, work]) => {
      const button = make("button", { type: "button", disabled: this.controller !== null }, words);
      button.addEventListener("click", work);
      return button;
    });
    return make("div", { className: "actions" }, ...buttons);
  }

  edit(item, index) {
    const input = make("textarea", { rows: 3, value: this.messages[index].content, ariaLabel: "Edit the message" });
    const back = () => {
      this.show(index);
      this.list.children[index].querySelector("button").focus();
    };
    const send = () => {
      if (!input.value.trim() || this.controller || this.parameters() === null) return;
      this.messages[index] = { role: "user", content: input.value };
      this.answerFrom(index + 1);
      this.prompt.focus();
    };
    input.addEventListener("keydown", (event) => {
      this.sendsOnEnter(event, send);
      if (event.key === "Escape") back();
    });
    item.replaceChildren(make("h3", {}, "You"), input, this.actions(["Send", send], ["Cancel", back]));
    input.focus();
  }
}
