// The page: its parts wired together, and the loop that looks at the server.

import { Lost, backOff, call, saveKey, savedKey } from "./api.js";
import { Chat, make } from "./chat.js";
import { EngineView } from "./engine.js";

const WATCHING = 1, RESTING = 5; // seconds from one look to the next, with the engine shown and without
const PATIENCE = 12_000; // ms for a look

const element = (id) => document.getElementById(id);

// --- the API key ---------------------------------------------------------------------------------------------------

const dialog = element("key-dialog");
let keyGiven = null; // what all wait for that need one

function askForKey(refused) {
  element("show-key").hidden = false;
  element("key-wrong").hidden = !refused;
  if (!keyGiven) {
    keyGiven = {};
    keyGiven.promise = new Promise((resolve) => (keyGiven.resolve = resolve));
    dialog.showModal();
  }
  element("state").textContent = "needs a key";
  return keyGiven.promise;
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey(element("key").value.trim());
  element("key").value = "";
  dialog.close();
  keyGiven?.resolve();
  keyGiven = null;
  wake();
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

function lost(error) {
  failures += 1;
  const seconds = backOff(failures);
  element("state").textContent = "lost";
  element("state").className = "bad";
  element("lost-why").textContent = `${error.message} Next try in ${seconds} s.`;
  element("lost").hidden = false;
  return seconds;
}

function found() {
  element("state").textContent = "connected";
  element("state").className = "good";
  element("lost").hidden = true;
  failures = 0;
}

async function loadModels() {
  const { data } = await (await call("v1/models", { askForKey })).json();
  element("model-name").textContent = data[0].id;
  const select = document.querySelector("[name=model]");
  const chosen = select.value;
  select.replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
  if (data.some(({ id }) => id === chosen)) select.value = chosen;
}

async function look() {
  if (!element("model-name").textContent || failures) await loadModels();
  const signal = AbortSignal.timeout(PATIENCE);
  if (element("engine").hidden) {
    await call("health", { signal });
    return RESTING;
  }
  view.show(await (await call("debug/engine", { askForKey, signal })).json());
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
element("try-now").addEventListener("click", () => wake());
addEventListener("online", () => wake());
element("show-key").hidden = savedKey() === null;
showEngine(matchMedia("(min-width: 1000px)").matches);
element("prompt").focus();
watch();
