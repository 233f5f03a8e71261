// The page: its parts wired together, and the loop that looks at the server.

import { Lost, backOff, call, saveKey, savedKey } from "./api.js";
import { Chat, make } from "./chat.js";
import { EngineView } from "./engine.js";

const WATCHING = 1, RESTING = 5; // seconds from one look to the next, with the engine shown and without
const PATIENCE = 12_000; // ms for a look

const element = (id) => document.getElementById(id);

// --- the API key ---------------------------------------------------------------------------------------------------

const dialog = element("key-dialog");
let question = null; // what all wait for that need a key
let declined = false; // then only what the user does asks again

function askForKey(refused) {
  element("show-key").hidden = false;
  element("key-wrong").hidden = !refused;
  question ??= Promise.withResolvers();
  if (!dialog.open) dialog.showModal();
  showState("needs a key");
  return question.promise;
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey(element("key").value.trim());
  declined = false;
  question?.resolve(true);
  question = null;
  dialog.close();
  wake();
});
dialog.addEventListener("close", () => {
  element("key").value = "";
  declined ||= question !== null;
  question?.resolve(false);
  question = null;
});
element("key-cancel").addEventListener("click", () => dialog.close());
element("show-key").addEventListener("click", () => dialog.showModal());

// --- the loop ------------------------------------------------------------------------------------------------------

let failures = 0;
let wake = () => {};

const pause = (seconds) => new Promise((resolve) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  wake = () => {
    clearTimeout(timer);
    resolve();
  };
});

function showState(words, kind = "") {
  if (element("state").textContent !== words) element("state").textContent = words; // it is read aloud
  element("state").className = kind;
}

function lost(error) {
  failures += 1;
  showState(declined ? "needs a key" : "lost", "bad");
  const words = `${error.message} Trying again.`;
  if (element("lost-why").textContent !== words) element("lost-why").textContent = words;
  element("lost").hidden = false;
  document.body.classList.add("without-server");
  return backOff(failures);
}

function found() {
  showState("connected", "good");
  element("lost").hidden = true;
  element("lost-why").textContent = "";
  document.body.classList.remove("without-server");
  failures = 0;
}

async function ask(path) {
  const response = await call(path, { askForKey: declined ? null : askForKey, patience: PATIENCE });
  return response.json().catch((error) => {
    throw new Lost("The server does not answer.", { cause: error });
  });
}

async function loadModels() {
  const { data } = await ask("v1/models");
  element("model-name").textContent = element("model-name").title = data[0].id;
  document.title = `${data[0].id} · miniserve`;
  const select = document.querySelector("[name=model]");
  const chosen = select.value;
  select.replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
  if (data.some(({ id }) => id === chosen)) select.value = chosen;
}

async function look() {
  if (!element("model-name").textContent || failures) await loadModels();
  if (element("engine").hidden) {
    await call("health", { patience: PATIENCE });
    return RESTING;
  }
  view.show(await ask(`debug/engine?engine=${element("which-engine").value || "0"}`));
  return WATCHING;
}

async function watch() {
  for (;;) {
    let seconds;
    try {
      seconds = await look();
      found();
    } catch (error) {
      seconds = lost(error);
    }
    await pause(seconds);
    while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

// --- the start -----------------------------------------------------------------------------------------------------

const view = new EngineView();
const chat = new Chat({
  askForKey,
  onLost: (error) => error instanceof Lost && wake(),
});

function showEngine(shown) {
  element("engine").hidden = !shown;
  element("show-engine").ariaExpanded = String(shown);
  document.body.classList.toggle("with-engine", shown);
  wake();
}

element("show-engine").addEventListener("click", () => showEngine(element("engine").hidden));
element("new-chat").addEventListener("click", () => chat.clear());
element("which-engine").addEventListener("change", () => {
  view.forget();
  wake();
});
element("try-now").addEventListener("click", () => {
  declined = false;
  wake();
});
addEventListener("online", () => wake());
element("show-key").hidden = savedKey() === null;
showEngine(matchMedia("(min-width: 1000px)").matches);
element("prompt").focus();
watch();
