// Talks with the server. Each function throws an Error whose message a person can read.

const TOKEN = "manta-token";

/** Takes the token from the page's address, #token=..., and out of it; keeps it for this tab. */
function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(TOKEN);
}

const known = token();

/** The server did not answer at all. */
export class Away extends Error {}

/** @returns {Promise<Response>} what the server answers; throws for an error of any kind */
async function send(method, path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (known) headers.authorization = `Bearer ${known}`;
  let reply;
  try {
    reply = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Away("The server does not answer.");
  }
  if (!reply.ok) {
    const told = await reply.json().catch(() => null);
    if (reply.status === 401) {
      throw new Error("This server needs its token: open the page as http://.../#token=TOKEN.");
    }
    throw new Error(told?.error?.message ?? `The server answers ${reply.status}.`);
  }
  return reply;
}

const json = async (...all) => (await send(...all)).json();

export const models = async () => (await json("GET", "v1/models")).data;
export const defaults = () => json("GET", "api/defaults");
export const stamp = async () => (await json("GET", "api/stamp")).stamp;
export const list = (search) =>
  json("GET", `api/conversations?search=${encodeURIComponent(search)}`);
export const create = (system) => json("POST", "api/conversations", { system });
export const open = (id) => json("GET", `api/conversations/${id}`);
export const change = (id, what) => json("PATCH", `api/conversations/${id}`, what);
export const remove = (id, undo) => json("DELETE", `api/conversations/${id}?undo=${undo}`);
export const ask = (id, parent, text) =>
  json("POST", `api/conversations/${id}/questions`, { parent, text });

/** Yields the events of an answer as they come; `old` is the id of one that goes on. */
export async function* answer(id, parent, model, settings, signal, old) {
  const path = `api/conversations/${id}/answers`;
  const reply = await send("POST", path, { parent, model, settings, go_on: old }, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (problem) {
      if (problem.name === "AbortError") throw problem;
      throw new Away("The server has gone away.");
    }
    if (part.done) throw new Away("The server has gone away.");
    const events = (held + part.value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      yield told;
    }
  }
}

/** Saves what the server exports as a file. */
export async function save(path, name) {
  const reply = await send("GET", path);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await reply.blob());
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
