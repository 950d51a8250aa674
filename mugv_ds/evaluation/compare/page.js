(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KEY = `mugv-compare:${data.id}`;
const CHOICES = {
  left: "left is better", right: "right is better", both_good: "both good", both_bad: "both bad", skip: "skipped",
};
const SPEEDS = [[1, "1×"], [0.5, "½×"], [0.25, "¼×"]];
const DRIFT_S = 0.08, DRIFT_MS = 700, FRAME_S = 1 / 24, AGAIN_MS = 5000;
const served = location.protocol.startsWith("http");
const el = (id) => document.getElementById(id);
const one = (what, count) => `${count} ${what}${count === 1 ? "" : "s"}`;

// ---- What is kept: in the browser at once, then on the disk if a server is there. ----

let memory = null;  // in place of localStorage where the browser denies it
function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY));
    if (kept && kept.people) return kept;
  } catch { /* denied, or not ours */ }
  return memory || { current: null, people: {} };
}
function keep(store) {
  memory = store;
  try { localStorage.setItem(KEY, JSON.stringify(store)); return true; } catch { return false; }
}
function me(store) { return store.people[store.current]; }
function change(act) {  // another tab may have voted since: read, change and write without a pause
  const store = load();
  const mine = me(store);
  act(mine);
  mine.revision += 1;
  browserKeeps = keep(store);
  send();
}
function newVoter() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
function file(mine) {
  return {
    comparison: data.id, voter: mine.voter, annotator: mine.annotator, revision: mine.revision, votes: mine.votes,
  };
}

let browserKeeps = true, sending = false, moved = false, again = null;
async function send() {
  const mine = me(load());
  if (!served || sending || !mine || mine.onDisk === mine.revision) { tell(); return; }
  sending = true;
  tell();
  clearTimeout(again);
  let waits = false;
  try {
    const answer = await fetch("votes", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(file(mine)),
    });
    moved = answer.status === 403;  // the server was started again, with another token
    if (answer.status === 409) waits = resolve(mine, await answer.json());
    else if (!answer.ok) throw new Error(answer.status);
    else set(mine.annotator, (kept) => { kept.onDisk = mine.revision; });
  } catch {
    waits = true;
    again = setTimeout(send, AGAIN_MS);
  }
  sending = false;
  tell();
  const now = me(load());
  if (!waits && now && now.onDisk !== now.revision) send();
}
function set(name, act) {
  const store = load();
  if (store.people[name]) { act(store.people[name]); keep(store); }
}
// The disk has votes that this browser has not. Returns whether somebody must say what to do.
function resolve(mine, { reason, stored }) {
  if (reason === "stale") { adopt(mine.annotator, stored); return false; }
  el("taken-text").textContent =
    `“${stored.annotator}” has voted here from another browser: ${one("answer", stored.votes.length)}.`;
  el("adopt").onclick = () => { el("taken").close(); adopt(mine.annotator, stored); send(); };
  el("rename").onclick = () => { el("taken").close(); begin(`“${stored.annotator}” is somebody else.`); };
  if (!el("taken").open) el("taken").showModal();
  return true;
}
function adopt(name, stored) {  // none of either's answers is lost; of two to one question, this browser's counts
  set(name, (mine) => {
    const answered = new Set(mine.votes.map((vote) => `${vote.item} ${vote.question}`));
    const others = stored.votes.filter((vote) => !answered.has(`${vote.item} ${vote.question}`));
    mine.votes = [...others, ...mine.votes];
    mine.voter = stored.voter;
    mine.revision = Math.max(mine.revision, stored.revision) + 1;
  });
  say("Went on with the answers on the disk.");
  next();
}
function tell() {
  const mine = me(load());
  const saved = el("saved");
  if (!mine) { saved.textContent = ""; return; }
  const disk = served && mine.onDisk === mine.revision;
  const lost = !disk && !browserKeeps;
  saved.textContent = disk ? "✓ on disk" : lost ? "kept nowhere: export before you close this page"
    : moved ? "in this browser only; open the new address" : served ? (sending ? "saving …" : "in this browser only; trying again") : "in this browser; export at the end";
  saved.classList.toggle("trouble", lost || (served && !disk && !sending));
}

// ---- Which item and question is on. ----

let cursor = null;  // {item, question}: numbers
function answer(mine, item, question) {
  return mine.votes.find((vote) => vote.item === data.items[item].id && vote.question === data.questions[question].id);
}
function chosen(mine) {
  return data.questions.map((question, i) => i).filter((i) => mine.questions.includes(data.questions[i].id));
}
function next() {  // the first that is not answered, from here on, then from the beginning
  const mine = me(load());
  const asked = chosen(mine);
  const answered = new Set(mine.votes.map((vote) => `${vote.item} ${vote.question}`));
  const from = cursor ? cursor.item : 0;
  cursor = null;
  for (let step = 0; step < data.items.length && !cursor; step++) {
    const item = (from + step) % data.items.length;
    const question = asked.find((i) => !answered.has(`${data.items[item].id} ${data.questions[i].id}`));
    if (question !== undefined) cursor = { item, question };
  }
  show();
}
function vote(choice) {
  if (!cursor || !me(load())) return;
  if (choice !== "skip" && !stage.ready()) { say("Wait until both videos can be seen."); return; }
  const said = { item: data.items[cursor.item].id, question: data.questions[cursor.question].id, choice };
  change((mine) => {
    mine.votes = mine.votes.filter((vote) => vote.item !== said.item || vote.question !== said.question);
    mine.votes.push(said);
  });
  say(`${data.questions[cursor.question].label}: ${CHOICES[choice]}.`);
  next();
}
function undo() {
  const mine = me(load());
  const last = mine && mine.votes.at(-1);
  if (!last) { say("Nothing to undo."); return; }
  change((mine) => { mine.votes.pop(); });
  cursor = {
    item: data.items.findIndex((item) => item.id === last.item),
    question: data.questions.findIndex((question) => question.id === last.question),
  };
  say(`Undone: ${CHOICES[last.choice]}.`);
  show();
}
function ask(question) {
  if (!cursor || question >= data.questions.length) return;
  cursor.question = question;
  show();
}

// ---- What is seen. ----

const questionButtons = data.questions.map((question, i) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(Object.assign(document.createElement("kbd"), { textContent: i + 1 }), ` ${question.label}`);
  button.onclick = () => ask(i);
  el("questions").append(button);
  return button;
});
el("questions").hidden = data.questions.length === 1;

function show() {
  const mine = me(load());
  const asked = chosen(mine);
  const ids = new Set(asked.map((i) => data.questions[i].id));
  const total = data.items.length * asked.length;
  const votes = mine.votes.filter((vote) => ids.has(vote.question));
  const skipped = votes.filter((vote) => vote.choice === "skip").length;
  el("progress").max = total;
  el("progress").value = votes.length;
  el("count").textContent = `${votes.length} of ${total}${skipped ? `, ${skipped} skipped` : ""}`;
  el("who").textContent = mine.annotator;
  el("who").setAttribute("aria-label", `${mine.annotator}: change name or questions`);
  el("work").hidden = el("skip").hidden = !cursor;
  el("done").hidden = Boolean(cursor);
  el("undo").disabled = !mine.votes.length;
  questionButtons.forEach((button, i) => {
    button.setAttribute("aria-pressed", String(Boolean(cursor) && cursor.question === i));
    button.disabled = !cursor;
  });
  el("ask").textContent = cursor ? data.questions[cursor.question].ask : "";
  tell();
  if (!cursor) {
    stage.clear();
    el("thanks").textContent = served
      ? "Your answers are on the disk as soon as it says so above. You may close this page."
      : "Press E to export your answers, and send the file to whoever asked you.";
    return;
  }
  const item = data.items[cursor.item];
  el("prompt").textContent = item.prompt;
  el("first").hidden = !item.image;
  if (item.image) el("frame").src = el("frame-large").src = item.image;
  const before = answer(mine, cursor.item, cursor.question);
  for (const button of document.querySelectorAll(".vote")) {
    button.setAttribute("aria-pressed", String(Boolean(before) && before.choice === button.dataset.choice));
  }
  const following = data.items[cursor.item + 1];
  stage.play(item, following);
}
function say(text) { el("said").textContent = text; }

// Two videos that start together, stay together and begin again together.
const stage = (() => {
  const films = { left: el("left").lastElementChild, right: el("right").lastElementChild };
  let pairs = new Map(), shown = null, paused = false, speed = 0, ended = 0, dragging = false, corrected = 0;
  function pair(item) {
    if (!pairs.has(item.id)) {
      const make = (url) => {
        const video = document.createElement("video");
        Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: url, disablePictureInPicture: true });
        video.onerror = () => { video.dataset.failed = "yes"; };
        video.onloadeddata = () => { video.dataset.seen = "yes"; };  // readyState falls again with every seek
        return video;
      };
      pairs.set(item.id, [make(item.left), make(item.right)]);
    }
    return pairs.get(item.id);
  }
  const both = () => (shown ? pairs.get(shown) : []);
  const ready = () => Boolean(shown) && both().every((video) => video.dataset.seen);
  function clear() { pairs = new Map(); shown = null; films.left.replaceChildren(); films.right.replaceChildren(); }
  function play(item, following) {
    const kept = new Map();
    for (const wanted of [item, following]) if (wanted) kept.set(wanted.id, pair(wanted));
    pairs = kept;
    if (shown !== item.id) {
      shown = item.id;
      const [left, right] = both();
      films.left.replaceChildren(left);
      films.right.replaceChildren(right);
      paused = false;
      restart();
    }
    fit();
    tick();
  }
  function restart() {
    ended = 0;
    for (const video of both()) { video.currentTime = 0; video.playbackRate = SPEEDS[speed][0]; }
  }
  function tick() {
    const [left, right] = both();
    const failed = both().some((video) => video.dataset.failed);
    el("wait").hidden = ready();
    el("wait").textContent = failed ? "A video cannot be played here. Skip with S." : "Loading the videos …";
    el("pause").firstElementChild.textContent = paused ? "Play" : "Pause";
    if (!ready()) return;
    if (!left.style.width) fit();
    const length = Math.max(left.duration, right.duration) || 1;
    if (!dragging) el("time").value = 1000 * Math.max(left.currentTime, right.currentTime) / length;
    if (paused) return;
    if (left.ended && right.ended) {
      if (!ended) ended = performance.now();
      else if (performance.now() - ended > 300) restart();
      return;
    }
    for (const video of [left, right]) if (video.paused && !video.ended) video.play().catch(() => {});
    const apart = !left.ended && !right.ended && Math.abs(left.currentTime - right.currentTime) > DRIFT_S;
    if (apart && performance.now() - corrected > DRIFT_MS) {  // where decoding is slow, seeks make it slower
      corrected = performance.now();
      right.currentTime = left.currentTime;
    }
  }
  function pause(stop = !paused) {
    paused = stop;
    if (paused) for (const video of both()) video.pause();
    tick();
  }
  function seek(seconds) {
    ended = 0;
    for (const video of both()) video.currentTime = Math.min(Math.max(seconds, 0), video.duration || 0);
  }
  function step(frames) { pause(true); if (ready()) seek(both()[0].currentTime + frames * FRAME_S); }
  function slower() {
    speed = (speed + 1) % SPEEDS.length;
    for (const video of both()) video.playbackRate = SPEEDS[speed][0];
    el("slow").firstElementChild.textContent = `Speed ${SPEEDS[speed][1]}`;
  }
  // Beside each other or one above the other: whichever shows them larger.
  function fit() {
    if (!shown || !both().every((video) => video.videoWidth)) return;
    const box = el("stage"), caption = 24, gap = 10;
    const width = Math.max(...both().map((video) => video.videoWidth));
    const height = Math.max(...both().map((video) => video.videoHeight));
    const beside = Math.min((box.clientWidth - gap) / 2 / width, (box.clientHeight - caption) / height);
    const above = Math.min((box.clientWidth - caption) / width, (box.clientHeight - gap) / 2 / height);
    const rows = above > beside, scale = Math.max(0.05, rows ? above : beside);
    box.classList.toggle("rows", rows);
    const [first, second, back, on] = rows ? ["Upper", "Lower", "↑", "↓"] : ["Left", "Right", "←", "→"];
    el("left").firstElementChild.textContent = first;
    el("right").firstElementChild.textContent = second;
    el("say-left").textContent = `${first} is better`;
    el("say-right").textContent = `${second} is better`;
    el("key-left").textContent = back;
    el("key-right").textContent = on;
    for (const video of both()) {
      video.style.width = `${width * scale}px`;
      video.style.height = `${height * scale}px`;
    }
  }
  el("time").oninput = () => {
    dragging = true;
    pause(true);
    seek(el("time").value / 1000 * Math.max(...both().map((video) => video.duration || 0)));
  };
  el("time").onchange = () => { dragging = false; };
  el("time").onpointerup = () => el("time").blur();  // so that arrows vote again
  addEventListener("resize", fit);
  setInterval(tick, 60);
  return { play, ready, clear, pause, step, slower };
})();

// ---- Who votes, and what they press. ----

for (const [i, question] of data.questions.entries()) {
  const label = document.createElement("label"), box = document.createElement("input"), text = document.createElement("div");
  Object.assign(box, { type: "checkbox", name: "question", value: question.id, checked: i === 0 });
  text.append(question.label, document.createElement("br"), Object.assign(document.createElement("span"), { textContent: question.ask }));
  label.append(box, text);
  el("choose").append(label);
}
el("choose").hidden = data.questions.length === 1;

function begin(trouble = "") {
  const store = load();
  const mine = me(store);
  el("trouble").textContent = trouble;
  if (mine) {
    el("name").value = mine.annotator;
    for (const box of el("choose").querySelectorAll("input")) box.checked = mine.questions.includes(box.value);
  }
  el("go").textContent = mine ? "Go on" : "Start";
  el("start").showModal();
  el("name").focus();
  el("name").select();
}
el("start-form").onsubmit = (event) => {
  event.preventDefault();
  const name = el("name").value.normalize("NFKC").trim().replace(/\s+/g, " ");
  const questions = [...el("choose").querySelectorAll("input:checked")].map((box) => box.value);
  if (!name || /\p{C}/u.test(name)) { el("trouble").textContent = "Give a name that can be printed."; return; }
  if (!questions.length) { el("trouble").textContent = "Tick at least one question."; return; }
  const store = load();
  const same = Object.keys(store.people).find((other) => other.toLowerCase() === name.toLowerCase()) || name;
  store.people[same] = { voter: newVoter(), annotator: same, revision: 0, votes: [], ...store.people[same], questions };
  store.current = same;
  browserKeeps = keep(store);
  el("start").close();
  cursor = null;
  next();
  send();
};
el("start").oncancel = (event) => { if (!me(load())) event.preventDefault(); };
function exportVotes() {
  const mine = me(load());
  if (!mine) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(file(mine), null, 1)}\n`], { type: "application/json" }));
  link.download = `votes-${mine.annotator.replace(/[^A-Za-z0-9]+/g, "-")}-${mine.voter.slice(0, 8)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say("Exported.");
}
function first() { if (cursor && data.items[cursor.item].image) el("large").showModal(); }

const KEYS = {
  ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowUp: () => vote("left"), ArrowDown: () => vote("right"),
  b: () => vote("both_good"), x: () => vote("both_bad"), s: () => vote("skip"), u: undo, e: exportVotes, f: first,
  v: () => stage.slower(), " ": () => stage.pause(), ",": () => stage.step(-1), ".": () => stage.step(1),
  "?": () => el("keys").showModal(),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const open = document.querySelector("dialog[open]");
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (open) {
    if (open.id === "large" && key === "f") open.close();
    return;
  }
  if (event.target.matches("input") || (event.target.matches("button") && key === " ")) return;
  const act = KEYS[key] || (/^[1-4]$/.test(key) && (() => ask(Number(key) - 1)));
  if (!act) return;
  event.preventDefault();
  if (!event.repeat || key === "," || key === ".") act();
});
const CLICKS = {
  undo, export: exportVotes, help: KEYS["?"], who: () => begin(), first, pause: () => stage.pause(), slow: () => stage.slower(),
};
for (const [id, act] of Object.entries(CLICKS)) el(id).onclick = act;
for (const button of document.querySelectorAll("[data-choice]")) button.onclick = () => vote(button.dataset.choice);
for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => button.closest("dialog").close();
addEventListener("click", (event) => {  // a clicked button keeps no focus, so that Space pauses
  if (event.detail > 0 && event.target.closest("button")) event.target.closest("button").blur();
});
addEventListener("storage", (event) => { if (event.key === KEY && me(load())) next(); });
addEventListener("beforeunload", (event) => { if (!browserKeeps && me(load())) event.preventDefault(); });

if (me(load())) { next(); send(); } else begin();
})();
