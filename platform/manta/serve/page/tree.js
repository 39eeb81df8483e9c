// A conversation is a tree: each turn has a parent, and a leaf says which branch is shown.

/** The turns from the start to the leaf. */
export function path(conversation) {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]));
  const found = [];
  for (let turn = byId.get(conversation.leaf); turn; turn = byId.get(turn.parent)) {
    found.unshift(turn);
  }
  return found;
}

/** The turns in the place of this one: edited questions, answers that were made again. */
export function siblings(conversation, turn) {
  return conversation.turns.filter((other) => other.parent === turn.parent);
}

/** The newest leaf under a turn, which is shown when its branch is chosen. */
export function newestLeaf(conversation, turn) {
  const below = conversation.turns.filter((other) => other.parent === turn.id);
  return below.length ? newestLeaf(conversation, below[below.length - 1]) : turn.id;
}

/** The other answer of two that were asked for side by side; undefined: there is none. */
export function pairOf(conversation, turn) {
  const pair = turn.settings.pair;
  if (!pair) return undefined;
  return siblings(conversation, turn).find(
    (other) => other.id !== turn.id && other.settings.pair === pair,
  );
}
