// The beginning: what is shown, what the buttons do, and what comes from the server.

import * as api from "./api.js";
import { element, visible } from "./text.js";
import { draw, inspect } from "./view.js";

const $ = (id) => document.getElementById(id);
const CHECK_MS = 2000;

// Numbers of the settings: name, label, lowest, highest, step, and what is sent if nothing is set;
// the server's own defaults take its place.
const NUMBERS = [
  ["temperature", "Temperature", 0, 10, 0.05, 1],
  ["top_k", "Top k (0: all)", 0, 100000, 1, 0],
  ["top_p", "Top p", 0.01, 1, 0.01, 1],
  ["min_p", "Min p", 0, 1, 0.01, 0],
  ["repetition_penalty", "Repetition penalty", 0.1, 10, 0.05, 1],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, 0],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, 0],
  ["max_tokens", "Most tokens", 1, 100000, 1, 512],
  ["seed", "Seed (empty: new)", 0, 2 ** 31, 1, null],
];

const state = {
  models: [],
  conversation: null,
  stamp: "",
  writing: null, // an AbortController while an answer comes
  deleted: null,
  editing: null, // the id of the turn that is edited
};

// --- what is shown -----------------------------------------------------------------------------

function show() {
  const { conversation } = state;
  $("title").disabled = !conversation;
  for (const turn of conversation?.turns ?? []) turn.editing = turn.id === state.editing;
  $("title").textContent = visible(conversation?.title || "New conversation");
  document.title = conversation?.title ? `${visible(conversation.title)} - Manta` : "Manta";
  draw($("log"), conversation, $("show-tokens").checked, does, formOfTalk());
  $("send").hidden = Boolean(state.writing);
  $("stop").hidden = !state.writing;
  for (const id of ["export", "rename", "delete"]) $(id).disabled = !conversation;
}

function problem(error) {
  if (error.name === "AbortError") return;
  if (error instanceof api.Away) {
    $("away").hidden = false;
    return;
  }
  const text = element("div", "mark", visible(error.message), { role: "alert" });
  $("log").append(element("article", "turn", [text]));
  $("log").scrollTop = $("log").scrollHeight;
}

/** Runs what a button does; what goes wrong is shown. */
const doing = (work) => async (...all) => {
  try {
    await work(...all);
  } catch (error) {
    problem(error);
  }
};

async function refreshList(current = state.conversation?.id) {
  const wanted = $("search").value;
  const found = await api.list(wanted);
  if ($("search").value !== wanted) return; // a newer search is on its way
  state.stamp = found.stamp;
  $("conversations").replaceChildren(
    ...found.conversations.map(({ id, title }) => {
      const made = element("button", "", visible(title || "New conversation"), { type: "button" });
      if (id === current) made.setAttribute("aria-current", "true");
      made.addEventListener("click", doing(() => open(id)));
      return element("li", "", [made]);
    }),
  );
}

async function open(id) {
  stop();
  state.editing = null;
  await refreshList(id);
  state.conversation = await api.open(id);
  $("system").value = state.conversation.system;
  sessionStorage.setItem("manta-open", id);
  $("sidebar").classList.remove("open");
  show();
  $("log").scrollTop = $("log").scrollHeight;
}

function fresh() {
  stop();
  state.editing = null;
  state.conversation = null;
  sessionStorage.removeItem("manta-open");
  $("sidebar").classList.remove("open");
  $("system").value = "";
  show();
  $("question").focus();
  doing(() => refreshList())();
}

// --- asking ------------------------------------------------------------------------------------

function settings() {
  const found = { overflow: $("overflow").value };
  for (const [name] of NUMBERS) {
    const value = $(`number-${name}`).value;
    if (value !== "") found[name] = Number(value);
  }
  return found;
}

async function send(text, parent) {
  if (!text.trim() || state.writing) return;
  if (!state.conversation) {
    const { id } = await api.create($("system").value);
    state.conversation = await api.open(id);
    sessionStorage.setItem("manta-open", id);
  }
  const { id } = await api.ask(state.conversation.id, parent, text);
  await answer(id);
}

/** Has the model, or both models, answer a question; or `old`, an answer of it, go on. */
async function answer(question, old) {
  const conversation = state.conversation.id;
  const names = old ? [old.model] : [$("model").value, $("second").value].filter(Boolean);
  const pair = names.length > 1 ? crypto.getRandomValues(new Uint32Array(1))[0] : undefined;
  state.conversation = await api.open(conversation);
  state.conversation.leaf = question;
  const control = (state.writing = new AbortController());
  show();
  try {
    await Promise.all(names.map((name, index) => {
      const asked = pair ? { ...settings(), pair, place: index } : settings();
      return follow(conversation, question, name, asked, control.signal, index === 0, old?.id);
    }));
  } catch (error) {
    problem(error);
  } finally {
    if (state.writing === control) state.writing = null;
    if (state.conversation?.id === conversation) await again(conversation, pair);
  }
}

/** Shows an answer as it comes. */
async function follow(conversation, question, model, asked, signal, isShown, old) {
  let turn = null;
  for await (const event of api.answer(conversation, question, model, asked, signal, old)) {
    if (state.conversation?.id !== conversation) return;
    if (!turn) {
      turn = {
        id: event.turn, parent: question, role: "assistant", text: "", tokens: [], about: {},
        state: "streaming", model, settings: asked, ids: [],
      };
      const others = state.conversation.turns.filter((each) => each.id !== turn.id);
      state.conversation.turns = [...others, turn].sort((a, b) => a.id - b.id);
      if (isShown || state.conversation.leaf === question) state.conversation.leaf = turn.id;
    }
    turn.text += event.text ?? "";
    turn.tokens.push(...(event.tokens ?? []));
    Object.assign(turn.about, event.about);
    if (event.state) turn.state = event.state;
    later();
  }
}

let isDue = false;
/** Draws with the next picture, however many tokens came. */
function later() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    show();
  });
}

/**
 * Takes the open conversation from the server, as it is kept there. The list and its stamp come
 * first: what changes after them changes the stamp, and is seen at the next check. Returns whether
 * it was taken: not if another conversation was opened meanwhile, or an answer has begun.
 */
async function take() {
  const { id, leaf } = state.conversation;
  await refreshList();
  const found = await api.open(id);
  if (state.conversation?.id !== id || state.writing) return false;
  // A branch that was chosen meanwhile stays: the server may not know of it yet.
  if (state.conversation.leaf !== leaf) found.leaf = state.conversation.leaf;
  state.conversation = found;
  return true;
}

/** Shows the conversation as the server keeps it, and the first of a pair of answers. */
async function again(conversation, pair) {
  try {
    const errors = [...$("log").querySelectorAll("[role=alert]")].map((each) => each.parentNode);
    if (!(await take())) return;
    if (pair) {
      const both = state.conversation.turns.filter((turn) => turn.settings.pair === pair);
      const first = both.find((turn) => turn.settings.place === 0) ?? both[0];
      if (first) await api.change(conversation, { leaf: first.id });
      state.conversation.leaf = first?.id ?? state.conversation.leaf;
    }
    show();
    $("log").append(...errors);
  } catch (error) {
    problem(error);
  }
}

function stop() {
  state.writing?.abort();
  state.writing = null;
}

const does = {
  choose: doing(async (leaf) => {
    state.conversation.leaf = leaf;
    show();
    await api.change(state.conversation.id, { leaf });
    await refreshList();
  }),
  edit: (turn) => {
    state.editing = turn?.id ?? null;
    show();
  },
  resend: doing(async (turn, text) => {
    state.editing = null;
    await send(text, turn.parent);
  }),
  answer: doing(async (turn) => {
    if (!state.writing) await answer(turn.id);
  }),
  regenerate: doing(async (turn) => {
    if (!state.writing) await answer(turn.parent);
  }),
  goOn: doing(async (turn) => {
    if (!state.writing) await answer(turn.parent, turn);
  }),
};

// --- controls ----------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value;
  if (!text.trim() || state.writing) return;
  $("question").value = "";
  grow();
  doing(send)(text, parentOfNext());
});
/** What the next question comes after: the last answer, as a question has only answers after it. */
function parentOfNext() {
  const last = state.conversation?.turns.find((turn) => turn.id === state.conversation.leaf);
  return (last?.role === "user" ? last.parent : last?.id) ?? undefined;
}
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
$("question").addEventListener("input", grow);
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (state.writing) stop();
    $("sidebar").classList.remove("open");
  }
  if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    fresh();
  }
});
$("new").addEventListener("click", fresh);
$("search").addEventListener("input", doing(() => refreshList()));
$("show-tokens").addEventListener("change", show);
$("open-sidebar").addEventListener("click", () => {
  $("sidebar").classList.add("open");
  $("search").focus();
});
$("close-sidebar").addEventListener("click", () => $("sidebar").classList.remove("open"));
$("open-settings").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("system").addEventListener("change", doing(async () => {
  if (state.conversation) await api.change(state.conversation.id, { system: $("system").value });
}));
$("export-all").addEventListener(
  "click", doing(() => api.save("api/export", "conversations.jsonl")),
);
$("export").addEventListener("click", doing(() => {
  const { id } = state.conversation;
  return api.save(`api/export/${id}`, `conversation-${id}.jsonl`);
}));
const rename = doing(async () => {
  if (!state.conversation) return;
  const title = prompt("A new name for this conversation", state.conversation.title);
  if (!title?.trim()) return;
  await api.change(state.conversation.id, { title });
  await open(state.conversation.id);
});
$("rename").addEventListener("click", rename);
$("title").addEventListener("click", rename);
$("delete").addEventListener("click", doing(async () => {
  const { id, title } = state.conversation;
  if (!confirm(`Delete “${title}”?`)) return;
  await api.remove(id, false);
  state.deleted = id;
  $("undo").hidden = false;
  fresh();
}));
$("undo-delete").addEventListener("click", doing(async () => {
  await api.remove(state.deleted, true);
  $("undo").hidden = true;
  await open(state.deleted);
}));

function dark(is) {
  document.documentElement.classList.toggle("dark", is);
  document.documentElement.classList.toggle("light", !is);
  $("theme").textContent = is ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", is ? "Light colours" : "Dark colours");
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)").matches;
dark((localStorage.getItem("manta-theme") ?? (prefersDark ? "dark" : "light")) === "dark");
$("theme").addEventListener("click", () => {
  const is = !document.documentElement.classList.contains("dark");
  localStorage.setItem("manta-theme", is ? "dark" : "light");
  dark(is);
});

for (const kind of ["mouseover", "focusin"]) {
  $("log").addEventListener(kind, (event) => {
    inspect($("inspector"), event.target.closest?.("[data-alternatives]"));
  });
}
$("log").addEventListener("mouseleave", () => inspect($("inspector"), null));

for (const [name, label, low, high, step, value] of NUMBERS) {
  const input = element("input", "", [], {
    id: `number-${name}`, type: "number", min: low, max: high, step, value: value ?? "",
  });
  $("numbers").append(element("label", "", [label, input]));
}

function formOfTalk() {
  const model = state.models.find((each) => each.id === $("model").value);
  if (!model) return "";
  const { is_fine_tuned: tuned, context_length: context } = model.manta;
  const told = tuned
    ? `${visible(model.id)} was fine-tuned: it gets its chat template. Its context is ${context} tokens.`
    : `${visible(model.id)} only continues texts: it gets a transcript of “User:” and “Assistant:”. `
      + `Its context is ${context} tokens.`;
  $("form-of-talk").textContent = told;
  return told;
}
$("model").addEventListener("change", show);

// --- the server --------------------------------------------------------------------------------

/** Looks whether the server is there, and whether another tab has changed something. */
async function check() {
  try {
    const stamp = await api.stamp();
    const wasAway = !$("away").hidden;
    $("away").hidden = true;
    if ((stamp !== state.stamp || wasAway) && !state.writing) {
      if (!state.conversation || state.editing !== null) await refreshList();
      else if (await take()) show();
    }
  } catch (error) {
    if (error instanceof api.Away) problem(error);
    else if (state.conversation) fresh(); // another tab has deleted it
  }
  setTimeout(check, CHECK_MS);
}

async function begin() {
  const [models, { overflow, ...numbers }] = await Promise.all([api.models(), api.defaults()]);
  state.models = models;
  $("overflow").value = overflow;
  for (const [name, value] of Object.entries(numbers)) $(`number-${name}`).value = value;
  const option = (id) => element("option", "", visible(id), { value: id });
  $("model").replaceChildren(...state.models.map(({ id }) => option(id)));
  const none = element("option", "", "one model", { value: "" });
  $("second").replaceChildren(none, ...state.models.map(({ id }) => option(id)));
  $("second").parentNode.hidden = state.models.length < 2;
  show();
  const id = sessionStorage.getItem("manta-open");
  if (id) await open(Number(id)).catch(() => sessionStorage.removeItem("manta-open"));
  await refreshList();
  $("question").focus();
}

doing(begin)().then(check);
