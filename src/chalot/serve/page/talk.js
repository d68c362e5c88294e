// A conversation is a tree of turns: editing a question or trying again makes a sibling, nothing is lost.
// Each is kept under a key of its own, so that two tabs with two conversations do not meet.

const PREFIX = "chalot.talk.";
const DEFAULTS = "chalot.settings";
const id = () => crypto.getRandomValues(new Uint32Array(2)).join("-");

export function drawSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

export class Talk {
  constructor(data) {
    Object.assign(this, data);
  }

  static fresh() {
    return new Talk({ id: id(), title: "", changed: Date.now(), settings: defaults(), turns: {}, chosen: {}, file: null });
  }

  children(parent) {
    return Object.values(this.turns).filter((t) => t.parent === parent);
  }

  // The turns that are shown: from the root along what was chosen at each fork.
  path() {
    const out = [];
    for (let at = ""; ; ) {
      const next = this.turns[this.chosen[at]];
      if (!next || out.length > 10000) return out;
      out.push(next);
      at = next.id;
    }
  }

  // The shown turns before one, itself not included.
  before(turn) {
    const path = this.path();
    return path.slice(0, path.indexOf(turn));
  }

  add(parent, role, content) {
    const turn = { id: id(), parent, role, content, made: Date.now(), state: "" };
    this.turns[turn.id] = turn;
    this.chosen[parent] = turn.id;
    if (!this.title && role === "user") this.title = content.trim().slice(0, 80);
    return turn;
  }

  remove(turn) {
    delete this.turns[turn.id];
    if (this.chosen[turn.parent] === turn.id) {
      const left = this.children(turn.parent).at(-1);
      if (left) this.chosen[turn.parent] = left.id;
      else delete this.chosen[turn.parent];
    }
  }

  // What the server gets: the system prompt and the turns up to and with `last`.
  messages(last, more = () => ({})) {
    const system = this.settings.system?.trim() ? [{ role: "system", content: this.settings.system }] : [];
    const turns = [...this.before(last), last].filter((t) => t.content);
    return [...system, ...turns.map((t) => ({ role: t.role, content: t.content, ...more(t) }))];
  }

  // As chalot's own /save writes it; /load and `chalot replay` read it.
  saved(digest) {
    const path = this.path().filter((t) => t.content && t.state !== "failed");
    while (path.length && path.at(-1).role === "user") path.pop();
    const { system: _, ...sampling } = this.settings;
    const options = { ...sampling, seed: path.at(-1)?.seed ?? sampling.seed };
    const known = Object.entries(options).filter(([, v]) => v !== undefined && v !== null);
    const seed = (t) => (t.role === "assistant" && Number.isSafeInteger(t.seed) ? { seed: t.seed } : {});
    const messages = path.length ? this.messages(path.at(-1), seed) : [];
    return { format: 1, version: "page", model: digest ?? "", options: Object.fromEntries(known), messages };
  }
}

export function defaults() {
  return read(DEFAULTS) ?? {};
}

export function keepDefaults(settings) {
  localStorage.setItem(DEFAULTS, JSON.stringify({ ...settings, seed: undefined }));
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // not ours, or damaged: as if it were not there
  }
}

export function all() {
  const out = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    const found = key.startsWith(PREFIX) ? read(key) : null;
    if (found?.turns && found?.chosen) out.push(new Talk(found));
  }
  return out.sort((a, b) => b.changed - a.changed);
}

export function load(name) {
  const found = read(PREFIX + name);
  return found?.turns ? new Talk(found) : null;
}

// Throws QuotaExceededError where the browser has no room left.
export function keep(talk) {
  talk.changed = Date.now();
  localStorage.setItem(PREFIX + talk.id, JSON.stringify(talk));
}

export function drop(talk) {
  localStorage.removeItem(PREFIX + talk.id);
}

export const isTalk = (key) => key?.startsWith(PREFIX) ?? false;
export const nameOf = (key) => key.slice(PREFIX.length);
