// Draws a conversation.

import { newestLeaf, pairOf, path, siblings } from "./tree.js";
import { element, rendered, visible } from "./text.js";

/**
 * Draws the branch that is shown into `log`. `does` has what the buttons do; `hint` is shown while
 * nothing was said. Turns that did not change keep their elements, so that a long conversation is
 * quick, the focus stays where it is, and a screen reader says only what is new.
 */
export function draw(log, conversation, showTokens, does, hint) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const turns = conversation ? path(conversation) : [];
  const before = new Map([...log.children].map((each) => [each.dataset.key, each]));
  const wanted = turns.map((turn) => {
    const key = String(turn.id);
    const content = contentOf(conversation, turn, showTokens);
    const old = before.get(key);
    if (old && old.content === content) return old;
    const made = drawn(conversation, turn, showTokens, does);
    made.dataset.key = key;
    made.content = content;
    return made;
  });
  if (!wanted.length) wanted.push(welcome(hint));
  const kept = new Set(wanted);
  for (const each of [...log.children]) if (!kept.has(each)) each.remove();
  wanted.forEach((each, at) => {
    if (log.children[at] !== each) log.insertBefore(each, log.children[at] ?? null);
  });
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** A text that is another one if a turn has to be drawn again. */
function contentOf(conversation, turn, showTokens) {
  const pair = turn.role === "assistant" ? pairOf(conversation, turn) : undefined;
  const all = [turn, pair].filter(Boolean).map((each) => [
    each.state, each.editing, isOpen(conversation, each), siblings(conversation, each).length,
    textOf(each),
  ]);
  return JSON.stringify([conversation.id, showTokens, all]);
}

/** Whether a turn is a question without an answer, at the end of what is shown. */
const isOpen = (conversation, turn) => turn.role === "user" && turn.id === conversation.leaf;

/** @type {WeakMap<object, string>} what `textOf` found of turns that are whole */
const texts = new WeakMap();

function textOf(turn) {
  if (texts.has(turn)) return texts.get(turn);
  const found = JSON.stringify([turn.id, turn.text, turn.tokens.length, turn.about]);
  if (turn.state !== "streaming") texts.set(turn, found);
  return found;
}

function welcome(hint) {
  const strong = element("strong", "", "What shall we talk about?");
  return element("div", "welcome", [strong, visible(hint)]);
}

function drawn(conversation, turn, showTokens, does) {
  const pair = turn.role === "assistant" ? pairOf(conversation, turn) : undefined;
  if (!pair) {
    return element("article", `turn ${turn.role}`, parts(conversation, turn, showTokens, does));
  }
  const place = (each) => each.settings.place ?? each.id;
  const both = [turn, pair].sort((a, b) => place(a) - place(b)).map((each) => {
    const more = each === turn
      ? []
      : [button("Continue with this one", () => does.choose(newestLeaf(conversation, each)))];
    const inside = [
      element("h2", "", visible(each.model)), ...parts(conversation, each, showTokens, does),
    ];
    const classes = `assistant ${each === turn ? "chosen" : ""}`;
    return element("section", classes, [...inside, ...more], { ariaLabel: each.model });
  });
  return element("article", "turn side-by-side", both);
}

function parts(conversation, turn, showTokens, does) {
  if (turn.editing) return [editor(turn, does)];
  const found = turn.role === "assistant" ? marks(turn) : [];
  found.push(said(turn, showTokens), about(conversation, turn, does));
  return found;
}

/** What was left out of what the model saw, as marks above its answer. */
function marks(turn) {
  const { dropped = [], why = "", note } = turn.about;
  const fresh = dropped.filter((each) => each.is_new);
  if (!dropped.length) return [];
  const count = dropped.length === 1 ? "Turn 1 is" : `Turns 1 to ${dropped.length} are`;
  const lines = [`${count} left out of what the model saw here: ${why}.`];
  if (fresh.length) {
    const items = fresh.map((each) => element("li", "", visible(`${each.turn}: ${each.question}`)));
    lines.push(element("ul", "", items, { ariaLabel: "left out since the answer before" }));
  }
  if (note) lines.push(element("p", "", visible(note)));
  return [element("div", "mark", lines, { role: "note" })];
}

function said(turn, showTokens) {
  if (turn.role === "user") return element("div", "said", visible(turn.text));
  if (showTokens && turn.tokens.length) return tokens(turn);
  const writing = turn.state === "streaming" ? " writing" : "";
  return element("div", `said${writing}`, [rendered(turn.text)]);
}

/** The answer's tokens, each in the colour of its probability. */
function tokens(turn) {
  const spans = turn.tokens.map(([text, logprob, others]) => {
    const share = logprob === null ? 1 : Math.exp(logprob);
    const step = Math.min(9, Math.floor(share * 10));
    const made = element("span", `p${step}`, visible(text), { tabIndex: 0 });
    made.dataset.alternatives = JSON.stringify([[text, logprob], ...others]);
    return made;
  });
  return element("div", "said tokens", spans);
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

/** Shows the alternatives of a token next to it. */
export function inspect(inspector, token) {
  inspector.hidden = !token;
  if (!token) return;
  const [[text, logprob], ...others] = JSON.parse(token.dataset.alternatives);
  const rows = others.map(([other, its]) =>
    element("tr", "", [
      element("td", "", quoted(other)),
      element("td", "", percent(its) + (other === text ? " (this one)" : "")),
    ]));
  if (!others.some(([other]) => other === text)) {
    rows.push(element("tr", "", [
      element("td", "", quoted(text)), element("td", "", `${percent(logprob)} (this one)`),
    ]));
  }
  inspector.replaceChildren(element("table", "", [element("tbody", "", rows)]));
  const box = token.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - inspector.offsetWidth - 8);
  const below = box.bottom + 6 + inspector.offsetHeight < innerHeight;
  inspector.style.left = `${Math.max(8, left)}px`;
  inspector.style.top = `${below ? box.bottom + 6 : box.top - inspector.offsetHeight - 6}px`;
}

const quoted = (text) => visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

/** The line under a turn: figures, branches, buttons. */
function about(conversation, turn, does) {
  const line = element("div", "about", branches(conversation, turn, does));
  const actions = element("span", "actions");
  if (turn.role === "user") {
    if (isOpen(conversation, turn)) {
      actions.append(button("Answer", () => does.answer(turn), { title: "ask for an answer" }));
    }
    actions.append(button("Edit", () => does.edit(turn)));
    line.append(actions);
    return line;
  }
  const { prefilled, cached, tokens_per_second: speed, context_length: context } = turn.about;
  const facts = pairOf(conversation, turn) ? [] : [turn.model];
  if (turn.state === "interrupted") facts.push("interrupted: the server went away");
  if (turn.state === "stopped") facts.push("stopped");
  if (turn.about.finish_reason === "length") facts.push("cut off at its longest");
  if (prefilled !== undefined) facts.push(`${prefilled} tokens read, ${cached} from the cache`);
  if (speed) facts.push(`${speed.toFixed(1)} tokens/s`);
  if (turn.about.seed !== undefined) facts.push(`seed ${turn.about.seed}`);
  line.append(...facts.map((fact) => element("span", "", visible(String(fact)))));
  if (context) {
    const used = turn.about.prompt_tokens + turn.tokens.length;
    const inside = element("span", "");
    inside.style.width = `${Math.min(100, (100 * used) / context)}%`;
    const bar = element("span", "bar", [inside], { ariaHidden: "true" });
    line.append(element("span", "", [bar, `${used} of ${context}`], { title: "context used" }));
  }
  if (turn.state !== "streaming") {
    const isCut = turn.state !== "complete" || turn.about.finish_reason === "length";
    if (isCut && turn.ids.length) {
      const title = "let the model write on from here";
      actions.append(button("Go on", () => does.goOn(turn), { title }));
    }
    actions.append(button("Again", () => does.regenerate(turn), { title: "a new answer" }));
    actions.append(button("Copy", () => navigator.clipboard.writeText(turn.text)));
    line.append(actions);
  }
  return line;
}

function branches(conversation, turn, does) {
  const all = siblings(conversation, turn);
  const pair = pairOf(conversation, turn);
  if (all.length < (pair ? 3 : 2)) return [];
  const at = all.indexOf(turn);
  const go = (step) => () => does.choose(newestLeaf(conversation, all[at + step]));
  return [
    button("‹", go(-1), { disabled: at === 0, ariaLabel: "the branch before" }),
    element("span", "branch", `${at + 1}/${all.length}`),
    button("›", go(1), { disabled: at === all.length - 1, ariaLabel: "the next branch" }),
  ];
}

function editor(turn, does) {
  const area = element("textarea", "edit", [], { value: turn.text, ariaLabel: "Edit the message" });
  const done = button("Send", () => does.resend(turn, area.value));
  const leave = button("Cancel", () => does.edit(null));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); done.click(); }
    if (event.key === "Escape") { event.stopPropagation(); leave.click(); }
  });
  queueMicrotask(() => area.focus());
  return element("div", "", [area, element("div", "row", [done, leave])]);
}

function button(label, click, properties = {}) {
  const made = element("button", "link", label, { type: "button", ...properties });
  made.addEventListener("click", click);
  return made;
}
