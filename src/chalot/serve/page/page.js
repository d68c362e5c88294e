// One page, one conversation at a time; the others wait in the list.

import * as api from "./api.js";
import { bytes, button, element, markdown } from "./show.js";
import * as talks from "./talk.js";

const $ = (name) => document.getElementById(name);
const log = $("log");
const text = $("text");
const KEEP_EVERY = 1000; // milliseconds between saves of an answer that is being written
const ASK_EVERY = 5000; // between questions whether the server is there

let talk = talks.Talk.fresh();
let running = null; // {turn, abort, started, pieces} while an answer is written
let server = {};
let digest = null;

// ---- the conversation as it is shown

const STATES = {
  stopped: "stopped by you",
  length: "cut at the longest answer, or at the end of the context",
  cut: "not finished: the page was closed, or the connection lost",
};

function turnElement(turn) {
  const writing = running?.turn === turn;
  const body = element("div", { className: "body", dir: "auto" });
  if (turn.role === "user") body.textContent = turn.content;
  else body.append(markdown(turn.content));
  const made = element(
    "article",
    { className: `turn ${turn.role}${writing ? " busy" : ""}`, id: `turn-${turn.id}`, "aria-busy": String(writing) },
    element("h2", { textContent: turn.role === "user" ? "You" : "Answer" }),
    body,
  );
  if (turn.error) made.append(element("p", { className: "state wrong", textContent: turn.error }));
  else if (STATES[turn.state] && !writing) made.append(element("p", { className: "state", textContent: STATES[turn.state] }));
  made.append(tools(turn, made, writing));
  return made;
}

function tools(turn, made, writing) {
  const bar = element("div", { className: "tools" });
  const others = talk.children(turn.parent);
  const at = others.indexOf(turn);
  if (others.length > 1) {
    const go = (step) => {
      talk.chosen[turn.parent] = others[at + step].id;
      keep();
      show();
    };
    const back = button("‹", () => go(-1), "Version before");
    const on = button("›", () => go(1), "Next version");
    back.disabled = at === 0 || Boolean(running);
    on.disabled = at === others.length - 1 || Boolean(running);
    bar.append(back, `${at + 1} of ${others.length}`, on);
  }
  if (!writing) {
    if (turn.role === "user") bar.append(button("Edit", () => edit(turn, made)));
    else bar.append(button("Try again", () => again(turn)), button("Copy", () => navigator.clipboard.writeText(turn.content)));
    for (const b of bar.querySelectorAll("button")) b.disabled ||= Boolean(running);
    const said = [];
    if (turn.tokens) said.push(`${turn.tokens} tokens`);
    if (turn.speed) said.push(`${turn.speed.toFixed(1)} a second`);
    if (turn.seed !== undefined) said.push(`seed ${turn.seed}`);
    if (said.length) bar.append(element("span", { textContent: said.join(", ") }));
  }
  return bar;
}

function show() {
  const path = talk.path();
  const empty = element("p", { className: "empty", textContent: "Ask something. Nothing leaves this machine's server." });
  log.replaceChildren(...(path.length ? path.map(turnElement) : [empty]));
  log.scrollTop = log.scrollHeight;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("export").disabled = !path.some((t) => t.role === "assistant");
  showList();
  showStatus();
}

function showList() {
  const found = talks.all();
  const rows = found.map((t) => {
    const open = button(t.title || "(empty)", () => openTalk(t.id));
    open.className = "open";
    open.dir = "auto";
    if (t.id === talk.id) open.setAttribute("aria-current", "true");
    const drop = button("✕", () => dropTalk(t), `Delete “${t.title}”`);
    drop.className = "drop";
    return element("li", {}, open, drop);
  });
  $("list").replaceChildren(...rows);
}

function showStatus() {
  const said = [];
  const figure = (name, value) => value !== undefined && said.push(element("span", {}, `${name} `, element("b", { textContent: value })));
  const last = running?.turn ?? talk.path().filter((t) => t.role === "assistant").at(-1);
  figure("speed", last?.speed ? `${last.speed.toFixed(1)} tokens/s` : undefined);
  figure("context", last?.used && server.context ? `${last.used} of ${server.context} tokens` : server.context && `${server.context} tokens`);
  figure("drafts kept", last?.drafted ? `${Math.round((100 * last.accepted) / last.drafted)} %` : undefined);
  figure("model", server.file_bytes ? bytes(server.file_bytes) : undefined);
  figure("", server.bits_per_weight ? `${server.bits_per_weight.toFixed(2)} bits a weight` : undefined);
  $("status").replaceChildren(...said);
}

function notice(message) {
  $("notice").textContent = message ?? "";
  $("notice").hidden = !message;
}

function keep() {
  try {
    talks.keep(talk);
  } catch (error) {
    notice(`This conversation cannot be kept (${error.name}): delete some in the list, or export it.`);
  }
}

// ---- asking

function ask(question) {
  const last = talk.path().at(-1);
  answer(talk.add(last?.id ?? "", "user", question));
}

function again(turn) {
  answer(talk.turns[turn.parent]);
}

function edit(turn, made) {
  const area = element("textarea", { value: turn.content, dir: "auto", rows: 4, "aria-label": "Edit your message" });
  const back = () => show();
  const send = button("Send", () => {
    if (area.value.trim() && !running) answer(talk.add(turn.parent, "user", area.value));
  });
  made.replaceChildren(element("div", { className: "edit" }, area, send, button("Leave", back)));
  area.onkeydown = (event) => event.key === "Escape" && back();
  area.focus();
}

async function answer(question) {
  if (running) return;
  notice();
  const turn = talk.add(question.id, "assistant", "");
  const { system: _, ...options } = talk.settings;
  turn.seed = options.seed ?? talks.drawSeed();
  turn.state = "cut"; // until it is whole
  running = { turn, talk, abort: new AbortController(), first: 0, pieces: 0, kept: performance.now() };
  const mine = running;
  keep();
  show();
  try {
    const body = { model: server.model ?? "chalot", messages: talk.messages(question), ...options, seed: turn.seed };
    for await (const event of api.chat(body, mine.abort.signal)) take(mine, event);
    if (turn.state === "cut") turn.state = "";
  } catch (error) {
    failed(turn, error);
  } finally {
    running = null;
    if (talk === mine.talk) {
      keep();
      show();
      $("said").textContent = turn.error ?? `Answer ${STATES[turn.state] ?? "complete"}.`;
    } else {
      talks.keep(mine.talk);
      show();
    }
    text.focus();
  }
}

function failed(turn, error) {
  if (error.name === "AbortError") {
    turn.state = "stopped";
    return;
  }
  turn.state = turn.content ? "cut" : "failed";
  turn.error = error.message;
  if (error.status === 401) $("ask-key").showModal();
  if (error.code === "context_length_exceeded") turn.error += " Begin a new chat, or edit an earlier message.";
}

// One event of the stream: words, the end's reason, or the figures behind them.
function take(mine, event) {
  const { turn } = mine;
  const choice = event.choices?.[0];
  const piece = choice?.delta?.content;
  digest = event.system_fingerprint ?? digest;
  if (piece) {
    const now = performance.now();
    mine.first ||= now;
    mine.pieces++;
    turn.content += piece;
    if (now > mine.first) turn.speed = ((mine.pieces - 1) * 1000) / (now - mine.first);
    if (now - mine.kept > KEEP_EVERY) {
      mine.kept = now;
      if (talk === mine.talk) keep();
    }
    draw(mine);
  }
  if (choice?.finish_reason) turn.state = choice.finish_reason === "length" ? "length" : "";
  if (event.usage) {
    turn.tokens = event.usage.completion_tokens;
    turn.used = event.usage.total_tokens;
    const drafts = event.usage.completion_tokens_details ?? {};
    turn.accepted = drafts.accepted_prediction_tokens ?? 0;
    turn.drafted = turn.accepted + (drafts.rejected_prediction_tokens ?? 0);
    const seconds = (performance.now() - mine.first) / 1000;
    if (mine.first && seconds > 0) turn.speed = turn.tokens / seconds;
  }
}

function draw(mine) {
  if (mine.drawing) return;
  mine.drawing = true;
  requestAnimationFrame(() => {
    mine.drawing = false;
    if (running !== mine || talk !== mine.talk) return;
    const body = $(`turn-${mine.turn.id}`)?.querySelector(".body");
    if (!body) return;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    body.replaceChildren(markdown(mine.turn.content));
    if (atEnd) log.scrollTop = log.scrollHeight;
    showStatus();
  });
}

// ---- conversations

function openTalk(name) {
  const found = name === talk.id ? talk : running?.talk.id === name ? running.talk : talks.load(name);
  if (!found) return;
  talk = found;
  location.hash = talk.id;
  $("side").classList.remove("shown");
  $("menu").setAttribute("aria-expanded", "false");
  show();
}

function newTalk() {
  talk = talks.Talk.fresh();
  location.hash = "";
  $("side").classList.remove("shown");
  show();
  text.focus();
}

function dropTalk(gone) {
  if (!confirm(`Delete “${gone.title}” from this browser?`)) return;
  if (running?.talk.id === gone.id) running.abort.abort();
  talks.drop(gone);
  if (gone.id === talk.id) newTalk();
  else show();
}

function exportTalk() {
  const content = JSON.stringify(talk.saved(digest ?? server.digest), null, 1) + "\n";
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type: "application/json" })), download: "talk.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- settings

function openSettings() {
  const form = $("settings").querySelector("form");
  for (const field of form.querySelectorAll("[name]")) field.value = talk.settings[field.name] ?? "";
  $("settings").returnValue = "";
  $("settings").showModal();
}

function keepSettings() {
  if ($("settings").returnValue !== "keep") return;
  const settings = {};
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.value !== "") settings[field.name] = field.type === "number" ? Number(field.value) : field.value;
  }
  talk.settings = settings;
  talks.keepDefaults(settings);
  if (talk.path().length) keep();
}

// ---- what people do

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const said = text.value;
  if (!said.trim() || running) return;
  text.value = "";
  grow();
  ask(said);
  location.hash = talk.id;
};
text.onkeydown = (event) => {
  // the Enter that ends a word of an input method is not the one that sends
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}
text.oninput = grow;
$("stop").onclick = () => running?.abort.abort();
$("new").onclick = newTalk;
$("export").onclick = exportTalk;
$("open-settings").onclick = openSettings;
$("settings").onclose = keepSettings;
$("ask-key").onclose = () => {
  api.keepKey($("ask-key").querySelector("input").value);
  $("ask-key").querySelector("input").value = "";
  look();
};
$("menu").onclick = () => {
  const shown = $("side").classList.toggle("shown");
  $("menu").setAttribute("aria-expanded", String(shown));
  if (shown) $("new").focus();
};
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // the address keeps the conversation
  text.focus();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if ($("side").classList.contains("shown")) $("menu").click();
  else running?.abort.abort();
};
window.onstorage = (event) => {
  if (!talks.isTalk(event.key)) return;
  if (talks.nameOf(event.key) === talk.id && running?.talk !== talk && event.newValue) {
    talk = talks.load(talk.id) ?? talk; // another tab went on with it
    show();
  } else showList();
};

async function look() {
  try {
    server = await api.health();
    $("model").textContent = server.model ?? "chalot";
    document.title = server.model ? `${server.model} · chalot` : "chalot";
    if ($("notice").dataset.kind === "lost") notice(), delete $("notice").dataset.kind;
    showStatus();
  } catch (error) {
    if (error.status === 401) return $("ask-key").open || $("ask-key").showModal();
    notice(error.message);
    $("notice").dataset.kind = "lost";
  }
}

const wanted = location.hash.slice(1);
if (wanted) talk = talks.load(wanted) ?? talk;
show();
look();
setInterval(() => document.visibilityState === "visible" && look(), ASK_EVERY);
