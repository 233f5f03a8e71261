// The conversation: its messages, what is asked for them, and how they are shown.

import { call, events } from "./api.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** Makes an element: `make("p", {className: "note"}, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const MARKED = /(`[^`\n]+`|\*\*[^\s*][^*\n]*\*\*|^#+ .*$)/m; // Markdown's code, bold text and headings

/** A paragraph as it was written, its marks too, with weight where Markdown has it. */
function paragraph(text) {
  const parts = text.split(MARKED);
  return make("div", {}, ...parts.map((part, index) =>
    index % 2 ? make(part[0] === "`" ? "code" : "strong", {}, part) : part));
}

/** Text as blocks: paragraphs, and its ```fenced``` parts as code. As it grows only the last one changes. */
function prose(text) {
  return text.split(/^```[^\n]*\n?/m).flatMap((part, index) => index % 2
    ? make("pre", {}, make("code", {}, part))
    : part.split(/(?<=\n\n)/).map(paragraph));
}

/** Makes `old` look like `wanted`, and leaves what is equal alone: its focus, its selection, what is unfolded. */
function morph(old, wanted) {
  if (old.isEqualNode(wanted)) return;
  if (old.nodeName !== wanted.nodeName || old.className !== wanted.className) return old.replaceWith(wanted);
  if (old.nodeType === Node.TEXT_NODE) old.data = wanted.data;
  const parts = [...wanted.childNodes];
  while (old.childNodes.length > parts.length) old.lastChild.remove();
  parts.forEach((part, index) => (index < old.childNodes.length ? morph(old.childNodes[index], part) : old.append(part)));
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

  /** The calls that came whole. One that was cut is shown, but the server would refuse it in the next request. */
  get whole() {
    return this.calls.filter((each) => parsed(each.arguments) !== undefined);
  }
}

/** A message as the API wants it. */
function forApi(message) {
  if (!(message instanceof Answer)) return message;
  const sent = { role: "assistant", content: message.content };
  if (message.whole.length) {
    sent.tool_calls = message.whole.map((each) =>
      ({ id: each.id, type: "function", function: { name: each.name, arguments: each.arguments } }));
  }
  return sent;
}

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    return undefined;
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
    this.controller = null; // the next message need not wait for its end
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
    const sent = this.messages.filter((each) => !(each instanceof Answer) || each.content || each.whole.length).map(forApi);
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
      const rate = (count - 1) / ((performance.now() - first) / 1000);
      parts.push(`${usage.prompt_tokens} in, ${count} out`);
      if (first) parts.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
      // A few tokens come at once, whatever the engine's speed.
      if (first && count > 8 && rate < 1e5) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
    }
    return parts.filter((each) => each).join(" · ");
  }

  // --- what is seen ----------------------------------------------------------------------------------------------

  buttons() {
    const buttons = ["send", "stop"].map((id) => document.getElementById(id));
    const [hidden, shown] = this.controller ? buttons : buttons.reverse();
    shown.hidden = false;
    if (document.activeElement === hidden) shown.focus();
    hidden.hidden = true;
    this.list.ariaBusy = String(this.controller !== null); // else each piece of the answer would be read aloud
  }

  showAll() {
    this.buttons();
    if (this.list.contains(document.activeElement)) this.list.focus();
    this.list.replaceChildren(...this.messages.map((message, index) => this.element(message, index)));
    if (!this.messages.length) this.list.append(make("p", { className: "empty" }, "Say something to the model."));
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
    morph(this.list.children[index], this.element(this.messages[index], index));
    if (atEnd) this.list.scrollTop = this.list.scrollHeight;
  }

  element(message, index) {
    const item = make("article", { className: message.role });
    const call = this.messages.flatMap(({ calls }) => calls ?? []).find(({ id }) => id === message.tool_call_id);
    item.append(make("h2", {}, { user: "You", assistant: "Model", tool: `Result of ${call?.name}` }[message.role]));
    if (message instanceof Answer) this.fillAnswer(item, message, index);
    else {
      item.append(make("div", { className: "text" }, ...prose(message.content)));
      if (message.role === "user") item.append(this.actions(["Edit", () => this.edit(index)]));
    }
    return item;
  }

  fillAnswer(item, answer, index) {
    if (answer.reasoning) {
      const words = answer.running && answer.isEmpty ? "Reasoning…" : "Reasoning";
      item.append(make("details", { className: "reasoning" }, make("summary", {}, words),
        make("div", { className: "text" }, ...prose(answer.reasoning))));
    }
    const text = make("div", { className: "text" }, ...prose(answer.content));
    item.append(text);
    for (const each of answer.calls.filter((each) => each)) item.append(this.callElement(each, answer));
    if (answer.error) item.append(make("p", { className: "error" }, answer.error));
    if (answer.running) {
      (answer.calls.length ? item : text.lastChild).append(make("span", { className: "cursor", ariaLabel: "writing" }));
      return;
    }
    const actions = [["Retry", () => this.answerFrom(index)]];
    if (answer.content && navigator.clipboard) actions.push(["Copy", (event) => this.copy(answer.content, event.target)]);
    if (answer.whole.length && index === this.messages.length - 1) {
      actions.unshift(["Send results", () => this.sendResults(answer)]);
    }
    item.append(make("footer", {}, this.actions(...actions), make("p", { className: "note" }, answer.note)));
  }

  async copy(text, button) {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  callElement(each, answer) {
    const isWhole = answer.whole.includes(each);
    const text = isWhole ? JSON.stringify(parsed(each.arguments), null, 2) : each.arguments;
    const box = make("div", { className: "call" },
      make("p", {}, "calls ", make("code", {}, each.name)), make("pre", {}, make("code", {}, text)));
    const isLast = this.messages.at(-1) === answer;
    if (!answer.running && isLast && isWhole) {
      const input = make("textarea", { rows: 2, value: each.result, spellcheck: false });
      input.addEventListener("input", () => (each.result = input.value));
      box.append(make("label", {}, `Result of ${each.name}`, input));
    }
    return box;
  }

  sendResults(answer) {
    const parameters = this.parameters();
    if (this.controller || parameters === null) return;
    for (const each of answer.whole) {
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

  edit(index) {
    const item = this.list.children[index];
    const input = make("textarea", { rows: 3, value: this.messages[index].content, ariaLabel: "Edit the message" });
    const back = () => {
      item.replaceWith(this.element(this.messages[index], index));
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
    item.replaceChildren(make("h2", {}, "You"), input, this.actions(["Send", send], ["Cancel", back]));
    input.focus();
  }
}
