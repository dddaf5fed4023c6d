// The page: what the controls do, and what is shown of the session's state.

import { Connection, api } from "./connection.js";
import { Player } from "./player.js";
import { Timeline, clock, hue } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const GIB = 2 ** 30;
const STAGES = ["engine", "generator", "decoder", "text encoder", "first blocks"];
const HISTORY = 100;

let state = null; // the session's, as the server told it last
let prompts = []; // all that took hold: {number, prompt, second}
let line = "connecting"; // connecting, open, lost, gone, refused
let lineText = "";
let limits = { prompt_characters: 2000 };
const sentAt = new Map(); // number of a prompt → when it was sent
const latencies = [];
let past = read("history", []); // prompts that were sent, the newest last
let browsing = null; // place in `past` while the arrow keys go through it

function read(key, otherwise) {
  try { return JSON.parse(localStorage.getItem(`longlive-${key}`)) ?? otherwise; } catch { return otherwise; }
}
function keep(key, value) {
  try { localStorage.setItem(`longlive-${key}`, JSON.stringify(value)); } catch { /* private window */ }
}

const player = new Player($("picture"), (take, frames) => connection.tell({ type: "played", take, frames }), shown);
const timeline = new Timeline($("track"), $("ruler"), (one) => write(one.prompt), (second) => {
  $("when-at").checked = true;
  $("at").value = second;
  $("prompt").focus();
  note(`Will take hold at ${clock(second, 1)}`);
});
const connection = new Connection({
  state: takeState,
  frame: (frame) => player.add(frame),
  lost: () => { line = "lost"; show(); },
  gone: (reason, status) => { line = "gone"; lineText = status === 429 ? reason : `${reason || "The session has ended"}.`; show(); },
});

// The session

async function enter() {
  line = "connecting";
  show();
  const known = location.hash.slice(1) || read("session", "");
  try {
    const info = await api("GET", "info");
    limits = info.limits;
    suggest(info.suggestions);
    $("prompt").maxLength = limits.prompt_characters;
    let session = null;
    if (known) session = await api("GET", `sessions/${encodeURIComponent(known)}`).catch((error) => {
      if (error.status !== 404) throw error;
      return null;
    });
    join(session ?? await api("POST", "sessions", {}));
  } catch (error) {
    if (error.status) {
      line = "refused";
      lineText = error.message;
    } else {
      line = "lost";
      setTimeout(enter, 1500);
    }
    show();
  }
}

function join(session) {
  history.replaceState(null, "", `#${session.id}`);
  keep("session", session.id);
  state = null;
  prompts = [];
  connection.open(session.id);
}

// Another session; Back returns to this one as long as the server keeps it. One without a frame is not worth keeping.
async function another() {
  const empty = line === "open" && state?.frames === 0 && state.viewers === 1 ? state.id : "";
  connection.leave();
  if (empty) await api("DELETE", `sessions/${encodeURIComponent(empty)}`).catch(() => {});
  keep("session", "");
  history.pushState(null, "", location.pathname);
  await enter();
}

function takeState(message) {
  const fresh = state === null || line !== "open" || message.take !== state.take;
  if (fresh) {
    player.begin(message.take, state && message.take !== state.take ? 0 : message.frames);
    if (state && message.take !== state.take) { prompts = []; sentAt.clear(); }
    if (message.status === "waiting" && document.activeElement === document.body && matchMedia("(hover: hover)").matches) $("prompt").focus();
  }
  line = "open";
  state = message.server ? message : { ...message, server: state?.server };
  const first = message.prompts[0]?.number ?? Infinity;
  prompts = [...prompts.filter((one) => one.number < first), ...message.prompts];
  Object.assign(player, { paused: state.paused, fps: state.fps, turn: state.turn_seconds, block: state.block_frames });
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  $("endless").checked = state.endless;
  $("refresh").value = state.refresh;
  $("player").style.setProperty("--aspect", `${state.width} / ${state.height}`);
  $("player").style.setProperty("--ratio", state.width / state.height);
  listPrompts();
  show();
}

// What is on the screen

function situation() {
  if (line === "refused") return ["failed", "No session", lineText, "Try again", enter];
  if (line === "gone") return ["gone", "This session is over", lineText, "Start a new one", another];
  if (line === "lost") return ["lost", "Connection lost", "Trying again; the session waits."];
  if (line === "connecting" || !state) return ["connecting", "Connecting", ""];
  const server = state.server;
  if (server?.status === "failed") return ["failed", "The model could not be loaded", server.message];
  if (server?.status === "loading") return ["loading", "Loading the model", `${server.stage}, ${Math.round(server.loading_seconds)} s`];
  if (state.status === "failed") return ["failed", "This video stopped", state.message, "Restart", restart];
  const waits = player.queue.length === 0;
  if (state.status === "paused") return ["paused", "", ""];
  if (state.status === "ended" && waits) return ["ended", "The end", state.message, "Restart", restart];
  if (state.status === "waiting") return ["waiting", "What should the video show?", "Type a prompt below, or pick a suggestion."];
  if (state.frames === 0) return ["generating", "Making the first block", ""];
  return ["playing", "", ""];
}

function show() {
  const [name, title, text, button, action] = situation();
  document.body.dataset.state = name;
  document.body.toggleAttribute("data-paused", Boolean(state?.paused));
  $("pause").ariaLabel = state?.paused ? "Play" : "Pause";
  const words = { playing: "live", generating: "generating", loading: "loading", waiting: "waiting for a prompt", lost: "reconnecting", gone: "ended", failed: "stopped" };
  $("status-text").textContent = words[name] ?? name;
  $("veil").hidden = !title;
  $("veil-title").textContent = title;
  $("veil-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  $("veil-text").hidden = !text;
  $("spinner").hidden = !["loading", "lost", "connecting", "generating"].includes(name);
  $("progress").hidden = name !== "loading";
  if (name === "loading") $("progress").firstElementChild.style.width = `${100 * (STAGES.indexOf(state.server.stage) + 0.5) / STAGES.length}%`;
  $("veil-button").hidden = !button;
  $("veil-button").textContent = button ?? "";
  $("veil-button").onclick = action ?? null;
  const open = line === "open";
  for (const id of ["pause", "restart", "download", "endless", "refresh"]) $(id).disabled = !open;
  $("download").disabled = !open || !state.recorded;
  $("send").disabled = !open;
  const waiting = state?.next;
  $("caption").hidden = !state?.prompt || Boolean(title);
  const seen = current()?.prompt ?? state?.prompt ?? "";
  $("caption").textContent = waiting ? `next: ${waiting.prompt}` : seen;
  $("picture").ariaLabel = seen ? `The video: ${seen}` : "The video";
}

function current() {
  const second = player.shown / player.fps;
  return prompts.findLast((one) => one.second <= second + 1e-3);
}

function shown(frame) {
  let last = null;
  for (const [number, at] of sentAt) {
    if (frame.number < number || frame.still) continue;
    last = (performance.now() - at) / 1000;
    latencies.push(last);
    sentAt.delete(number);
  }
  if (last !== null) {
    $("latency-chip").textContent = `${last.toFixed(2)} s after you sent it`;
    $("latency-chip").hidden = false;
    clearTimeout(shown.timer);
    shown.timer = setTimeout(() => { $("latency-chip").hidden = true; }, 2500);
    document.body.dataset.latency = last.toFixed(3);
    listPrompts();
    show();
  }
}

function figures() {
  if (!state) return;
  const number = (id, value, digits) => { $(id).textContent = Number.isFinite(value) ? value.toFixed(digits) : "–"; };
  number("f-fps", state.frames && !state.paused ? player.rate() : NaN, 1);
  number("f-speed", state.frames_per_second ? state.frames_per_second / state.fps : NaN, 2);
  number("f-latency", latencies.at(-1), 2);
  const sorted = [...latencies].sort((a, b) => a - b);
  $("f-latency-more").textContent = sorted.length > 1 ? `median ${sorted[sorted.length >> 1].toFixed(2)} s of ${sorted.length}` : "";
  number("f-buffer", state.frames ? player.buffered : NaN, 1);
  number("f-rate", state.frames ? connection.rate() / 1e6 : NaN, 1);
  const server = state.server;
  if (server) {
    $("f-memory-name").textContent = server.gpu_bytes ? "GPU memory" : "Host memory";
    number("f-memory", (server.gpu_bytes || server.host_bytes) / GIB, 2);
  }
  const recorded = `${state.recorded} frames recorded`;
  const viewers = state.viewers > 1 ? `, ${state.viewers} viewers` : "";
  $("f-more").textContent = state.recording || `${state.width}×${state.height}, ${recorded}${viewers}`;
  $("clock").textContent = clock(player.shown / state.fps, 1);
  $("clock").title = `Shown ${clock(player.shown / state.fps, 1)}, made ${clock(state.seconds, 1)}`;
  $("whole").hidden = !timeline.hasMore;
  timeline.draw({ prompts, scheduled: state.scheduled, made: state.seconds, shown: player.shown / state.fps });
  if (document.body.dataset.state !== situation()[0]) show();
}

function listPrompts() {
  if (!state) return;
  const now = current();
  const entries = [
    ...[...state.scheduled].reverse().map((one) => entry(one, clock(one.second, 1), "waits")),
    ...(state.next ? [entry(state.next, "next", "waits")] : []),
    ...[...prompts].reverse().slice(0, 200).map((one) => entry(one, clock(one.second, 1), one === now ? "now" : "")),
  ];
  $("prompts").replaceChildren(...entries);
}

function entry(one, when, kind) {
  const item = Object.assign(document.createElement("li"), { className: kind });
  item.style.setProperty("--segment", `oklch(0.62 0.15 ${hue(one.number)})`);
  const pick = Object.assign(document.createElement("button"), { type: "button", textContent: one.prompt, title: "Write this again" });
  pick.onclick = () => write(one.prompt);
  item.append(Object.assign(document.createElement("i"), { className: "swatch" }),
    Object.assign(document.createElement("time"), { textContent: when }), pick);
  if (kind === "waits") {
    const undo = Object.assign(document.createElement("button"), { type: "button", className: "undo", textContent: "✕", title: "Take it back" });
    undo.ariaLabel = `Take back: ${one.prompt}`;
    undo.onclick = () => connection.ask({ type: "cancel", number: one.number });
    item.append(undo);
  }
  return item;
}

function suggest(list) {
  $("suggestions").replaceChildren(...list.map((prompt) => {
    const button = Object.assign(document.createElement("button"), { type: "button", title: prompt });
    button.append(Object.assign(document.createElement("span"), { textContent: prompt }));
    button.onclick = () => { write(prompt); send(); };
    return button;
  }));
}

function note(text, bad = false, lasts = bad) {
  clearTimeout(note.timer);
  if (text && !lasts) note.timer = setTimeout(() => note(""), 10000);
  $("composer-note").textContent = text;
  $("composer-note").classList.toggle("bad", bad);
}

// What the controls do

function write(prompt) {
  $("prompt").value = prompt;
  $("prompt").focus();
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || line !== "open") return;
  const at = $("when-at").checked ? Number($("at").value) : null;
  const began = performance.now();
  $("prompt").value = "";
  browsing = null;
  past = [...past.filter((one) => one !== prompt), prompt].slice(-HISTORY);
  keep("history", past);
  const answer = await connection.ask({ type: "prompt", prompt, at, refresh: $("refresh").value });
  if (answer.type === "error") {
    note(`Not sent: ${answer.message}`, true);
    if (!$("prompt").value) $("prompt").value = prompt;
    return;
  }
  if (at === null && state.server?.status === "ready") sentAt.set(answer.number, began); // else it is loading that takes long
  note(at === null ? "" : `Takes hold at ${clock(answer.second ?? at, 1)}`);
  $("when-now").checked = true;
}

async function restart() {
  const seed = /^\d{1,15}$/.test($("seed").value.trim()) ? Number($("seed").value) : null;
  const answer = await connection.ask({ type: "restart", seed });
  if (answer.type === "error") note(answer.message, true);
}

async function download() {
  const id = encodeURIComponent(state.id);
  note("Preparing the video…", false, true);
  try {
    for (const kind of ["mp4", "json"]) {
      const answer = await fetch(`api/sessions/${id}/video.${kind}`);
      if (!answer.ok) throw new Error((await answer.json()).detail);
      const name = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition"))?.[1] ?? `longlive.${kind}`;
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(await answer.blob()), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    }
    note("");
  } catch (error) {
    note(`No download: ${error.message}`, true);
  }
}

const set = (settings) => connection.ask({ type: "set", ...settings });
const togglePause = () => { if (state) { player.paused = !state.paused; set({ paused: !state.paused }); } };
function fullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("player").requestFullscreen?.();
}

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("pause").onclick = togglePause;
$("picture").onclick = togglePause;
$("restart").onclick = restart;
$("download").onclick = download;
$("fullscreen").onclick = fullscreen;
$("new-session").onclick = another;
$("fullscreen").hidden = !document.fullscreenEnabled;
$("whole").onclick = () => {
  timeline.whole = !timeline.whole;
  $("whole").ariaPressed = timeline.whole;
  figures();
};
$("suggestions").onwheel = (event) => { // a mouse has one wheel
  if (event.deltaX || event.shiftKey) return;
  const before = $("suggestions").scrollLeft;
  $("suggestions").scrollLeft += event.deltaY;
  if ($("suggestions").scrollLeft !== before) event.preventDefault();
};
$("help").onclick = () => $("keys").showModal();
$("endless").onchange = () => set({ endless: $("endless").checked });
$("refresh").onchange = () => set({ refresh: $("refresh").value });
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e6); };
$("at").onfocus = () => {
  $("when-at").checked = true;
  if (!$("at").value || Number($("at").value) <= state?.seconds) $("at").value = Math.ceil((state?.seconds ?? 0) + 5);
};
$("when-at").onchange = () => $("at").focus();
$("seed").onkeydown = (event) => { if (event.key === "Enter") restart(); };

$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  else if (event.key === "Escape") $("prompt").blur();
  else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && past.length && (browsing !== null || !$("prompt").value)) {
    event.preventDefault();
    const step = event.key === "ArrowUp" ? -1 : 1;
    browsing = Math.min(past.length, Math.max(0, (browsing ?? past.length) + step));
    $("prompt").value = past[browsing] ?? "";
    if (browsing === past.length) browsing = null;
  }
};
$("prompt").oninput = () => { browsing = null; note(""); };

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const does = { "/": () => $("prompt").focus(), r: restart, d: () => { if (!$("download").disabled) download(); }, f: fullscreen,
    w: () => { if (!$("whole").hidden) $("whole").click(); }, e: () => $("endless").click(), "?": () => $("keys").showModal() };
  if (event.key === " " && event.target.closest?.("button, a, summary")) return; // the button's own
  const action = event.key === " " ? togglePause : does[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
});
window.addEventListener("online", () => { if (line === "lost" && connection.session) connection.connect(); });
window.addEventListener("hashchange", () => { if (location.hash.slice(1) !== state?.id) enter(); });

setInterval(figures, 250);
enter();
