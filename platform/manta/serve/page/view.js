// Draws a conversation.

import { newestLeaf, pairOf, path, siblings } from "./tree.js";
import { element, rendered, visible } from "./text.js";

/** Draws the branch that is shown into `log`. `does` has what the buttons do. */
export function draw(log, conversation, showTokens, does) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const turns = conversation ? path(conversation) : [];
  log.replaceChildren(
    ...(turns.length ? turns.map((t) => drawn(conversation, t, showTokens, does)) : [welcome()]),
  );
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function welcome() {
  const strong = element("strong", "", "What shall we talk about?");
  return element("div", "welcome", [strong, "Conversations are kept next to the run."]);
}

function drawn(conversation, turn, showTokens, does) {
  const pair = turn.role === "assistant" ? pairOf(conversation, turn) : undefined;
  if (!pair) {
    return element("article", `turn ${turn.role}`, parts(conversation, turn, showTokens, does));
  }
  const both = [turn, pair].sort((a, b) => a.id - b.id).map((each) => {
    const more = each === turn
      ? []
      : [button("Continue with this one", () => does.choose(newestLeaf(conversation, each)))];
    const inside = parts(conversation, each, showTokens, does);
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
  if (turn.role === "user") {
    line.append(button("Edit", () => does.edit(turn)));
    return line;
  }
  const { prefilled, cached, tokens_per_second: speed, context_length: context } = turn.about;
  const facts = [turn.model];
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
    line.append(button("Again", () => does.regenerate(turn)));
    line.append(button("Copy", () => navigator.clipboard.writeText(turn.text)));
  }
  return line;
}

function branches(conversation, turn, does) {
  const all = siblings(conversation, turn);
  if (all.length < 2) return [];
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
