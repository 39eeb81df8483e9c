// Makes what a model says safe to show: Markdown becomes elements, and nothing in it can run or
// have the browser fetch anything.

const markdown = window.markdownit({ html: false, linkify: false, breaks: true });
markdown.disable("image");

// Characters that change the direction in which a line is read, and controls other than newline
// and tab, are shown as their codes.
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
const code = (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`;

/** The text without characters that steer. */
export const visible = (text) => text.replace(STEERING, code);

window.DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

/** Elements for a text in Markdown. */
export function rendered(text) {
  return window.DOMPurify.sanitize(markdown.render(visible(text)), {
    RETURN_DOM_FRAGMENT: true,
    FORBID_TAGS: ["img", "style", "form", "input", "svg", "math", "audio", "video"],
    FORBID_ATTR: ["style", "id", "class", "name"],
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  });
}

/** An element with a class, its children and its properties. */
export function element(name, classes, children = [], properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  if (classes) made.className = classes;
  made.append(...[children].flat());
  return made;
}
