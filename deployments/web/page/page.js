// Scores what is dropped or chosen, and shows the pool as `/status` tells of it.

const SHOWN = 24; // results, the last ones first
const AT_ONCE = 4;
const EVERY_MS = 1000;

const byId = (id) => document.getElementById(id);
const counted = new Intl.NumberFormat("en");
const waiting = [];
let underWay = 0;
let done = 0;
let before = null; // the last status, and when it came

function element(name, text, attributes = {}) {
  const one = Object.assign(document.createElement(name), attributes);
  one.textContent = text;
  return one;
}

function headers() {
  const key = byId("key").value.trim();
  return key ? { "x-api-key": key } : {};
}

async function reason(response) {
  const told = await response.json().catch(() => ({}));
  return told.detail ?? `the endpoint answers ${response.status}`;
}

// Scoring

function take(files) {
  waiting.push(...files);
  while (underWay < AT_ONCE && waiting.length) next();
}

async function next() {
  const file = waiting.shift();
  underWay += 1;
  tell();
  const result = show(file);
  try {
    const response = await fetch("predict", {
      method: "POST",
      body: file,
      headers: { "content-type": "application/octet-stream", ...headers() },
    });
    if (response.ok) showScores(result, (await response.json()).predictions);
    else showError(result, await reason(response));
  } catch {
    showError(result, "the endpoint does not answer");
  }
  underWay -= 1;
  done += 1;
  tell();
  if (waiting.length) next();
}

function tell() {
  const left = underWay + waiting.length;
  byId("progress").textContent = left ? `${done} scored, ${left} to go` : `${done} scored`;
}

function show(file) {
  const item = byId("result").content.firstElementChild.cloneNode(true);
  const picture = item.querySelector("img");
  picture.src = URL.createObjectURL(file);
  for (const event of ["load", "error"]) picture.addEventListener(event, () => URL.revokeObjectURL(picture.src));
  item.querySelector("h3").textContent = file.name;
  const list = byId("results");
  list.prepend(item);
  while (list.children.length > SHOWN) list.lastElementChild.remove();
  return item;
}

function showScores(item, predictions) {
  for (const { label, score } of predictions) {
    const line = document.createElement("li");
    const bar = document.createElement("i");
    bar.style.width = `${100 * Math.min(1, Math.max(0, score))}%`;
    line.append(bar, element("span", label), element("span", `${(100 * score).toFixed(1)} %`));
    item.querySelector("ol").append(line);
  }
}

function showError(item, text) {
  item.querySelector("ol").replaceWith(element("p", text, { className: "error" }));
}

const drop = byId("drop");
byId("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const name of ["dragover", "dragleave", "drop"]) {
  // wherever it is dropped: a browser would leave the page for the image
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}

// The pool

async function watch() {
  try {
    const response = await fetch("status", { headers: headers() });
    if (response.ok) showStatus(await response.json());
    else trouble(response.status === 404 ? "" : await reason(response), [401, 403].includes(response.status));
  } catch {
    trouble("the endpoint does not answer");
  }
  setTimeout(watch, document.hidden ? 10 * EVERY_MS : EVERY_MS);
}

function trouble(text, wantsKey = false) {
  if (byId("trouble").textContent !== text) byId("trouble").textContent = text;
  if (wantsKey) byId("access").open = true;
}

function showStatus(status) {
  trouble("");
  // of a folder the last part, since the rest is long and says little
  byId("model").textContent = status.model.startsWith("/") ? status.model.split("/").pop() : status.model;
  byId("model").title = `${status.model} (${status.revision})`;
  byId("replicas").textContent = status.replicas.length;
  byId("per_s").textContent = status.requests.per_s;
  for (const name of ["p50_ms", "p99_ms"]) {
    byId(name).textContent = status.requests[name] === null ? "–" : `${status.requests[name]} ms`;
  }
  const now = { at: performance.now(), replicas: new Map(status.replicas.map((one) => [one.replica, one])) };
  byId("rows").closest("table").hidden = !status.replicas.length;
  byId("rows").replaceChildren(...status.replicas.map((one) => row(one, now)));
  before = now;
  byId("list").replaceChildren(...(status.jobs.length ? status.jobs.map(job) : [element("li", "None runs.")]));
}

function row(one, now) {
  const former = before?.replicas.get(one.replica);
  const seconds = former ? (now.at - before.at) / 1000 : 0;
  const rate = (present, past) => (seconds ? Math.max(0, (present - past) / seconds) : 0);
  const line = document.createElement("tr");
  line.append(element("th", one.replica, { scope: "row" }));
  for (const text of [
    `${Math.min(100, 100 * rate(one.busy_s, former?.busy_s)).toFixed(0)} %`,
    counted.format(one.online.backlog),
    counted.format(one.batch.backlog),
    counted.format(Math.round(rate(one.online.scored, former?.online.scored))),
    counted.format(Math.round(rate(one.batch.scored, former?.batch.scored))),
  ]) {
    line.append(element("td", text));
  }
  return line;
}

function job(one) {
  const item = document.createElement("li");
  const share = one.bytes_total ? one.bytes_done / one.bytes_total : 0;
  const errors = one.errors ? `, ${counted.format(one.errors)} errors` : "";
  const skipped = Object.values(one.skipped ?? {}).reduce((sum, count) => sum + count, 0);
  const left = skipped ? `, ${counted.format(skipped)} skipped` : "";
  const told = { pool: "waits for the pool", score: "scores", done: "done" }[one.phase];
  const bar = element("progress", "", { max: 1, value: share });
  bar.setAttribute("aria-label", `Progress of ${one.output}`);
  const numbers =
    `${told}: ${one.shards_done} of ${one.shards} shards, ${counted.format(one.images)} images` +
    `${errors}${left}, ${counted.format(Math.round(one.images_per_s))}/s`;
  item.append(element("div", one.output), bar, element("div", numbers, { className: "note" }));
  return item;
}

watch();
