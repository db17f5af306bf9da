// The page of Ringway's side port. All values become text nodes: names, texts of checks and output of replicas may be hostile.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const POINTS = 300;
const MOST_ARCS = 240;
// More small charts would slow the page down.
const MOST_CHARTS = 100;
const ROW_POINTS = 60;

// No event for so long: the page may be out of date.
const SILENCE_MS = 6000;

let token = sessionStorage.getItem("ringway-token") || "";
let keeps = token !== "";
const pools = new Map();
let sections = 0;
let process = null;
// Seconds between two points of the charts of the pools.
let step = 1;

// An element with attributes and children. Text children stay text.
function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function s(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Changes the text only if it differs, so that screen readers and selections are left alone.
function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function api(path, options = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  return fetch(path, { ...options, headers, cache: "no-store" });
}

async function problem(answer) {
  try { return (await answer.json()).error.message; } catch { return `status ${answer.status}`; }
}

// ---- words ----

function time(seconds) {
  let left = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]]) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count > 0 || (unit === "s" && parts.length === 0)) parts.push(`${count} ${unit}`);
    else if (parts.length) break;
    if (parts.length === 2) break;
  }
  return parts.join(" ");
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const percent = (part) => `${(part * 100).toFixed(1)} %`;

// Percentages with one digit that add up to 100.0: the largest remainders are rounded up.
function percents(parts) {
  const tenths = parts.map((part) => part * 1000);
  const whole = tenths.map(Math.floor);
  let missing = Math.round(tenths.reduce((a, b) => a + b, 0)) - whole.reduce((a, b) => a + b, 0);
  const order = tenths.map((_, n) => n).sort((a, b) => (tenths[b] % 1) - (tenths[a] % 1));
  for (const n of order) { if (missing-- <= 0) break; whole[n] += 1; }
  return whole.map((number) => `${(number / 10).toFixed(1)} %`);
}

const STATES = { healthy: ["good", "●"], standby: ["good", "○"], starting: ["warn", "◌"], draining: ["warn", "▲"] };
const look = (state) => STATES[state] || ["bad", "✖"];

function why(member) {
  const exit = member.last_exit;
  if (member.drain) {
    const deadline = member.drain.deadline_in_seconds == null ? null : member.drain.deadline_in_seconds - (Date.now() - member.at) / 1000;
    const then = deadline == null ? "" : `, reset in ${time(deadline)}`;
    return `${member.drain.leaves ? "leaves the pool" : "drained"}: ${counted(member.connections.active, "connection")} left${member.connections.active ? then : ""}`;
  }
  if (member.state === "crash_loop" || !member.replica && exit) {
    const last = exit?.output.at(-1);
    return exit ? `${exit.reason}${last ? `: ${last.slice(0, 120)}` : ""}` : "replicas keep exiting";
  }
  if (member.state === "ejected") return "connects keep failing";
  const since = member.health.since_seconds + (Date.now() - member.at) / 1000;
  return member.health.last ? `${member.health.last}, for ${time(since)}` : "no check has ended yet, or the pool has no checks";
}

function differs(one) {
  const of = one.backend ? ` of ${one.backend}` : "";
  if (one.now != null) return `${one.what}${of} is ${one.now}${one.config == null ? "" : `, not ${one.config}`}`;
  if (one.what === "image") return `image is ${one.image}`;
  if (one.what === "drain") return `${one.backend} is drained`;
  return one.backend ? `${one.backend} was ${one.what}` : one.what;
}

// ---- charts ----

function spark(width, height) {
  const path = s("path");
  const svg = s("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "No rates yet" }, path);
  return { svg, draw(values, label) {
    const most = Math.max(1, ...values);
    const step = width / Math.max(1, values.length - 1);
    const points = values.map((value, n) => `${(n * step).toFixed(1)},${(height - 1 - (value / most) * (height - 2)).toFixed(1)}`);
    path.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    svg.setAttribute("aria-label", label);
  } };
}

function drawRing(svg, members) {
  const key = members.map((one) => `${one.id}:${one.share}:${one.now > 0}`).join();
  if (svg.dataset.key === key) return;
  svg.dataset.key = key;
  svg.replaceChildren();
  let from = 0;
  members.slice(0, MOST_ARCS).forEach((one, n) => {
    const to = from + one.share;
    const at = (part, r) => `${(50 + r * Math.sin(part * 2 * Math.PI)).toFixed(2)} ${(50 - r * Math.cos(part * 2 * Math.PI)).toFixed(2)}`;
    const end = Math.min(to, from + 0.9999);
    const large = end - from > 0.5 ? 1 : 0;
    if (one.share > 0) {
      svg.append(s("path", {
        d: `M${at(from, 46)}A46 46 0 ${large} 1 ${at(end, 46)}L${at(end, 30)}A30 30 0 ${large} 0 ${at(from, 30)}Z`,
        fill: `hsl(${205 + (n * 31) % 70} 55% ${42 + (n * 17) % 26}%)`, class: one.now > 0 ? "on" : "off",
      }, s("title", {}, `${one.id}: ${percent(one.share)} of the ring, ${percent(one.now)} now`)));
    }
    from = to;
  });
  const words = members.slice(0, 10).map((one) => `${one.id} ${percent(one.share)}`).join(", ");
  svg.setAttribute("aria-label", `Shares of the ring: ${words}${members.length > 10 ? ", and others" : ""}`);
}

// ---- pools ----

const HEAD = [["Backend"], ["State"], ["Why"], ["Share", 1], ["Now", 1], ["Active", 1], ["Conn/s", 1], ["Failed", 1], ["Weight", 1], ["Actions"]];

function newPool(name) {
  const id = `pool-${sections++}`;
  const ring = s("svg", { class: "ring", width: 96, height: 96, viewBox: "0 0 100 100", role: "img" });
  const chart = spark(240, 48);
  const parts = {
    meta: h("p", { class: "quiet" }), rate: h("p", { class: "quiet" }), body: h("tbody"), caption: h("caption"), words: h("div"), scale: h("button", { type: "button", hidden: "" }, "Scale…"),
  };
  const head = h("tr", {}, ...HEAD.map(([label, number]) => h("th", { scope: "col", ...(number ? { class: "number" } : {}) }, label)));
  const table = h("table", { class: "backends" }, parts.caption, h("thead", {}, head), parts.body);
  const title = h("h2", { id }, `Pool ${name}`);
  const section = h("section", { "aria-labelledby": id },
    h("div", { class: "head" }, h("div", {}, title, parts.meta, parts.scale), h("div", { class: "charts" }, ring, h("div", {}, chart.svg, parts.rate))),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Backends of pool ${name}` }, table), parts.words);
  $("pools").append(section);
  const pool = { name, section, ring, chart, ...parts, members: new Map(), rows: new Map(), order: [], rates: [], latest: 0 };
  parts.scale.addEventListener("click", () => ask({
    title: `Scale pool ${name}`, label: "Number of replicas", number: [...pool.members.values()].filter((one) => !one.drain?.leaves).length,
    path: () => `/api/pools/${encodeURIComponent(name)}/scale`, body: (number) => ({ replicas: number }),
  }));
  readHistory(pool);
  return pool;
}

// What happened before the page was open, or while it had no connection.
async function readHistory(pool) {
  try {
    const wanted = step;
    const answer = await api(`/api/history?pool=${encodeURIComponent(pool.name)}&step=${wanted}`);
    // The period may have changed meanwhile.
    if (answer.ok && wanted === step) pool.rates = (await answer.json()).connections.slice(-POINTS);
  } catch { /* The chart begins now. */ }
  drawRates(pool);
}

function drawRates(pool) {
  const latest = `now ${pool.latest.toFixed(1)}`;
  const what = step === 1 ? "in the last 5 minutes" : "in the last day, as averages of 5 minutes";
  const isEmpty = step > 1 && pool.rates.length < 2;
  text(pool.rate, `${pool.latest.toFixed(1)} connections per second${isEmpty ? "; the chart begins after 10 minutes" : ""}`);
  pool.chart.draw(pool.rates, isEmpty ? `No averages yet; ${latest}` : `New connections per second ${what}; ${latest}`);
}

function newRow(pool, id) {
  const cells = HEAD.map(([label, number], n) => h(n ? "td" : "th", { "data-label": label, ...(n ? {} : { scope: "row" }), class: number ? "number" : ["id", "", "why"][n] || "" }));
  const base = `/api/pools/${encodeURIComponent(pool.name)}/backends/${encodeURIComponent(id)}`;
  const drain = h("button", { type: "button", class: "drain" });
  const weight = h("button", { type: "button", "aria-label": `Change the weight of ${id}` }, "Weight…");
  const chart = spark(60, 18);
  const rate = h("span");
  const address = h("span", { class: "quiet address" });
  const replica = h("span", { class: "quiet address" });
  const row = { tr: h("tr", {}, ...cells), cells, drain, chart, rate, address, replica, rates: [], state: h("span", { class: "state" }) };
  cells[6].append(chart.svg, rate);
  drain.addEventListener("click", () => {
    const drained = Boolean(pool.members.get(id)?.drain);
    ask({ title: `${drained ? "Undrain" : "Drain"} ${pool.name}/${id}`, path: () => `${base}/${drained ? "undrain" : "drain"}` });
  });
  weight.addEventListener("click", () => ask({
    title: `Weight of ${pool.name}/${id}`, label: "Weight", number: pool.members.get(id)?.weight ?? 1, least: 0,
    path: () => `${base}/weight`, body: (number) => ({ weight: number }),
  }));
  cells[0].append(id, address, replica);
  row.tr.dataset.id = id;
  cells[1].append(row.state);
  cells[9].className = "actions";
  cells[9].append(drain, weight);
  return row;
}

function showRow(pool, id, shares) {
  const member = pool.members.get(id);
  const row = pool.rows.get(id);
  const [kind, sign] = look(member.state);
  row.state.className = `state ${kind}`;
  text(row.state, `${sign} ${member.state}`);
  text(row.address, member.address && member.address !== id ? member.address : "");
  const replica = member.replica ? (member.replica.name || `pid ${member.replica.pid}`) : "";
  text(row.replica, [replica, member.restarts ? counted(member.restarts, "restart") : ""].filter(Boolean).join(", "));
  text(row.cells[2], why(member));
  text(row.cells[3], shares[0]);
  text(row.cells[4], shares[1]);
  text(row.cells[5], `${member.connections.active}`);
  const rate = member.rate == null ? "–" : member.rate.toFixed(member.rate >= 10 ? 0 : 1);
  text(row.rate, rate);
  if (member.rate != null) row.rates = [...row.rates, member.rate].slice(-ROW_POINTS);
  row.chart.svg.toggleAttribute("hidden", pool.order.length > MOST_CHARTS);
  if (pool.order.length <= MOST_CHARTS) row.chart.draw(row.rates, `New connections per second to ${id}; now ${rate}`);
  text(row.cells[7], `${member.connections.failed}`);
  text(row.cells[8], `${member.weight}`);
  text(row.drain, member.drain ? "Undrain" : "Drain");
  row.drain.setAttribute("aria-label", `${member.drain ? "Undrain" : "Drain"} ${id}`);
  row.drain.hidden = Boolean(member.drain?.leaves);
}

function showPool(pool, data, change, seconds) {
  pool.order = change.members[data.name] || pool.order;
  // A backend that did not change got no connection.
  for (const member of pool.members.values()) member.rate = seconds ? 0 : null;
  for (const member of change.changed[data.name]) {
    const before = pool.members.get(member.id);
    const more = before ? member.connections.total - before.connections.total : -1;
    pool.members.set(member.id, { ...member, at: Date.now(), rate: seconds && more >= 0 ? more / seconds : null });
  }
  for (const id of pool.members.keys()) {
    if (!pool.order.includes(id)) { pool.members.delete(id); pool.rows.get(id)?.tr.remove(); pool.rows.delete(id); }
  }
  const members = pool.order.map((id) => pool.members.get(id)).filter(Boolean);
  const share = percents(members.map((one) => one.share));
  const now = percents(members.map((one) => one.now));
  const fresh = document.createDocumentFragment();
  members.forEach((member, n) => {
    if (!pool.rows.has(member.id)) {
      const row = newRow(pool, member.id);
      pool.rows.set(member.id, row);
      fresh.append(row.tr);
    }
    showRow(pool, member.id, [share[n], now[n]]);
  });
  pool.body.append(fresh);
  const healthy = members.filter((one) => one.state === "healthy").length;
  const from = change.listeners.filter((one) => one.pool === data.name || one.routes.some((route) => route.pool === data.name));
  const listeners = from.map((one) => `${one.name} (${one.address})`).join(", ") || "no listener";
  text(pool.meta, `From ${listeners}: ${data.provider.kind}, key ${data.key}, ring ${data.ring.digest}, ${healthy} of ${counted(members.length, "backend")} healthy`);
  text(pool.caption, `Backends of pool ${data.name}`);
  pool.scale.hidden = data.provider.kind === "static";
  drawRing(pool.ring, members);
  if (seconds) {
    pool.latest = members.reduce((sum, one) => sum + (one.rate || 0), 0);
    if (step === 1) pool.rates = [...pool.rates, pool.latest].slice(-POINTS);
    drawRates(pool);
  }
  showWords(pool, members);
}

// The last words of dead replicas.
function showWords(pool, members) {
  const dead = members.filter((one) => !one.replica && one.last_exit);
  const key = JSON.stringify(dead.map((one) => [one.id, one.last_exit.reason, one.last_exit.output]));
  if (pool.words.dataset.key === key) return;
  pool.words.dataset.key = key;
  pool.words.replaceChildren(...dead.map((one) => h("details", {},
    h("summary", {}, `${one.id}: ${one.last_exit.reason}`),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Last output of ${one.id}` }, one.last_exit.output.join("\n") || "(no output)"))));
}

// ---- banners ----

function showBanners(status, members) {
  const lines = [];
  if (!status.ready) lines.push(["warn", "Not ready: Ringway is stopping, or a pool has had no healthy backend yet."]);
  if (status.config_error) lines.push(["warn", `The config file is not applied, and an earlier config runs: ${status.config_error}`]);
  for (const pool of status.pools) {
    // What stands beside a slot is no backend of its own.
    const all = members(pool.name).filter((one) => !one.beside);
    if (pool.panic) lines.push(["bad", `Pool ${pool.name} is in panic: too few backends are healthy, so Ringway tries all of them.`]);
    else if (asleep(pool)) lines.push(["note", `Pool ${pool.name} ${asleep(pool)}.`]);
    else if (!all.length) lines.push(["bad", `Pool ${pool.name} has no backends.`]);
    else if (!all.some((one) => one.state === "healthy")) lines.push(["bad", `Pool ${pool.name} has no healthy backend.`]);
    if (pool.spilled && !pool.panic) lines.push(["warn", `Pool ${pool.name}: too few backends of the lowest tier are healthy, so keys go to tier ${pool.tiers.join(" and ")}.`]);
    const sick = all.filter((one) => ["unhealthy", "ejected"].includes(one.state)).map((one) => one.id);
    if (sick.length && !pool.panic) lines.push(["warn", `Pool ${pool.name}: ${sick.length} of ${counted(all.length, "backend")} fail: ${sick.slice(0, 5).join(", ")}${sick.length > 5 ? " and others" : ""}.`]);
    const said = rollout(pool, members(pool.name));
    if (said) lines.push(["warn", `Pool ${pool.name}, rollout: ${said}.`]);
    const looping = all.filter((one) => one.state === "crash_loop").map((one) => one.id);
    if (looping.length) lines.push(["bad", `Pool ${pool.name}: replicas keep exiting: ${looping.slice(0, 5).join(", ")}${looping.length > 5 ? " and others" : ""}.`]);
    const engine = pool.provider.engine;
    if (engine && !engine.reachable) lines.push(["bad", `Pool ${pool.name}: the Docker engine does not answer. ${engine.error || ""}`]);
    const dns = pool.provider.dns;
    if (dns && dns.error) lines.push(["warn", `Pool ${pool.name}: the look-up of ${dns.question} failed, and the known backends stay. ${dns.error}`]);
    const file = pool.provider.file;
    if (file && file.error) lines.push(["warn", `Pool ${pool.name}: ${file.error}; the backends of the last list stay.`]);
    if (pool.differs.length) lines.push(["warn", `Pool ${pool.name} differs from its config: ${pool.differs.slice(0, 8).map(differs).join("; ")}.`]);
  }
  showLines($("alerts"), "bad", lines.filter(([kind]) => kind === "bad").map(([, line]) => `✖ ${line}`));
  const others = lines.filter(([kind]) => kind !== "bad");
  showLines($("warnings"), "warn", others.map(([kind, line]) => `${kind === "note" ? "◌" : "▲"} ${line}`));
}

// That a pool sleeps or wakes, in words; nothing for one that is awake.
function asleep(pool) {
  const { wanted, waiting } = pool.provider.scaling || { wanted: 1, waiting: 0 };
  if (waiting) return `wakes up, and ${counted(waiting, "connection")} ${waiting === 1 ? "waits" : "wait"}`;
  return wanted ? null : "sleeps until a connection comes";
}

// How far a rollout is, or why the last one failed; nothing if there is nothing to say.
function rollout(pool, all) {
  const { state, updated, total, held, reason } = pool.provider.rollout || { state: "idle" };
  const [old, replicas, why] = [total - updated, counted(total, "replica"), reason ? `: ${reason}` : ""];
  if (state === "running") {
    const next = all.find((one) => !one.outdated && !["healthy", "standby", "draining"].includes(one.state));
    const waits = held ? ". Ringway waits until the old process has no connections" : next ? `. Ringway waits until ${next.id} is healthy` : "";
    return `${old} of ${replicas} still ${old === 1 ? "has" : "have"} the old settings${waits}`;
  }
  if (state === "rolling_back") return `it did not succeed, and ${old} of ${replicas} go back to the settings before${why}`;
  if (state === "paused") return `it did not succeed and is paused, ${old} of ${replicas} ${old === 1 ? "has" : "have"} the old settings${why}`;
  if (state === "rolled_back") return `it did not succeed, and all replicas have the settings before${why}`;
  return null;
}

// Keeps the lines that stay, so that a screen reader reads only the new ones.
function showLines(place, kind, lines) {
  for (const old of [...place.children]) if (!lines.includes(old.textContent)) old.remove();
  const shown = [...place.children].map((old) => old.textContent);
  for (const line of lines) if (!shown.includes(line)) place.append(h("p", { class: `banner ${kind}` }, line));
}

// ---- events ----

function showEvents(events) {
  const list = $("events");
  for (const event of events) {
    const at = new Date(event.at * 1000).toLocaleTimeString();
    const kind = { error: "bad", warn: "warn" }[event.level] || "good";
    const short = (value) => typeof value === "number" ? Number(value.toPrecision(3)) : value;
    const fields = Object.entries(event.fields).map(([key, value]) => `${key}=${short(value)}`).join(" ");
    list.prepend(h("li", {}, h("span", { class: "quiet" }, `${at} `), h("span", { class: `state ${kind}` }, event.level), ` ${event.text} `, h("span", { class: "quiet" }, fields)));
  }
  while (list.children.length > 200) list.lastChild.remove();
}

// ---- one change of the status ----

function show(message) {
  const { status } = message;
  // After an upgrade, another process counts from 0.
  const isSame = process?.pid === status.pid && status.uptime_seconds > process.uptime;
  const seconds = isSame ? status.uptime_seconds - process.uptime : 0;
  process = { pid: status.pid, uptime: status.uptime_seconds };
  const change = { ...status, ...message };
  const connections = change.listeners.reduce((sum, one) => sum + one.connections.active, 0);
  text($("summary"), `Version ${change.version}, up ${time(change.uptime_seconds)}, ${change.ready ? "ready" : "not ready"}, ${counted(connections, "connection")} on ${counted(change.listeners.length, "listener")}${change.config ? `, ${change.config}` : ""}`);
  const names = change.pools.map((pool) => pool.name);
  for (const [name, pool] of pools) if (!names.includes(name)) { pool.section.remove(); pools.delete(name); }
  for (const data of change.pools) {
    if (!pools.has(data.name)) pools.set(data.name, newPool(data.name));
    showPool(pools.get(data.name), data, change, seconds);
  }
  showBanners(change, (name) => [...(pools.get(name)?.members.values() || [])]);
  showEvents(change.events);
  const targets = [...change.listeners.map((one) => `listener ${one.name}`), ...names.map((name) => `pool ${name}`)];
  if ($("target").dataset.key !== targets.join()) {
    $("target").dataset.key = targets.join();
    const chosen = $("target").value;
    $("target").replaceChildren(...targets.map((target) => h("option", {}, target)));
    if (targets.includes(chosen)) $("target").value = chosen;
  }
}

// ---- the stream ----

async function follow() {
  const stop = new AbortController();
  const answer = await api("/api/stream", { signal: stop.signal });
  if (answer.status === 401 || answer.status === 403) return needToken(answer);
  if (answer.status === 503) return poll();
  if (!answer.ok) throw new Error(await problem(answer));
  accepted();
  process = null;
  for (const pool of pools.values()) readHistory(pool);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let [buffer, isFirst] = ["", true];
  for (;;) {
    const silence = setTimeout(() => stop.abort(new Error("no news for a while")), SILENCE_MS);
    const { value, done } = await reader.read().finally(() => clearTimeout(silence));
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("");
      if (!data) continue;
      // The first message has all events again.
      if (isFirst) $("events").replaceChildren();
      isFirst = false;
      news("");
      show(JSON.parse(data));
    }
  }
}

// Says that the page is out of date, or that it is not any more.
function news(problem) {
  text($("link"), problem);
  $("main").classList.toggle("stale", problem !== "");
}

async function needToken(answer) {
  const message = await problem(answer);
  sessionStorage.removeItem("ringway-token");
  $("access").hidden = false;
  $("refused").replaceChildren();
  if (token || answer.status === 403) $("refused").append(message);
  text($("summary"), answer.status === 401 ? "This side port needs a token." : "This page is not available.");
  return new Promise((resolve) => { wake = resolve; });
}

function accepted() {
  $("access").hidden = true;
  $("forget").hidden = token === "";
  if (keeps) sessionStorage.setItem("ringway-token", token);
}

// Too many pages follow the stream: ask for the status instead.
async function poll() {
  const answer = await api("/api/status");
  if (!answer.ok) throw new Error(await problem(answer));
  const status = await answer.json();
  const all = (of) => Object.fromEntries(status.pools.map((pool) => [pool.name, of(pool)]));
  show({ status, changed: all((pool) => pool.backends), members: all((pool) => pool.backends.map((one) => one.id)), events: [] });
  text($("link"), "Many pages are open, so this one asks every two seconds, and shows no events.");
  await pause(2000);
}

$("period").addEventListener("change", () => {
  step = Number($("period").value);
  for (const pool of pools.values()) { pool.rates = []; readHistory(pool); }
});

// A new average comes every five minutes.
setInterval(() => { if (step > 1) for (const pool of pools.values()) readHistory(pool); }, 60_000);

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

let wake = () => {};

async function run() {
  let failures = 0;
  for (;;) {
    const began = Date.now();
    try {
      await follow();
      failures = 0;
    } catch (error) {
      failures += 1;
      if (failures > 1) news(`No connection to Ringway (${error.message}). What you see may be out of date. Trying again.`);
    }
    // Never at once: Ringway may be stopping.
    await pause(Date.now() - began > 5000 ? 500 : Math.min(500 * 2 ** failures, 8000));
  }
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  keeps = $("keep").checked;
  $("token").value = "";
  wake();
});

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem("ringway-token");
  location.reload();
});

// ---- commands ----

// The command that the dialog is about, and the body whose forecast it shows.
let question = null;
let forecast = null;

function ask(wanted) {
  question = wanted;
  text($("dialog-title"), wanted.title);
  $("dialog-value").hidden = !wanted.label;
  text($("number-label"), wanted.label || "");
  $("number").min = wanted.least ?? 1;
  $("number").value = wanted.number ?? "";
  $("preview").replaceChildren();
  $("dialog").showModal();
  (wanted.label ? $("number") : $("cancel")).focus();
  preview();
}

const call = (body, dry) => api(question.path() + (dry ? "?dry_run=true" : ""), { method: "POST", body });

// A disabled button would lose the focus.
const allow = (may) => $("confirm").setAttribute("aria-disabled", String(!may));

// What the command would change, and which share of the keys would move.
async function preview() {
  const mine = question;
  const body = mine.body ? JSON.stringify(mine.body(Number($("number").value))) : "";
  forecast = null;
  allow(false);
  let lines;
  let may = false;
  try {
    const answer = await call(body, true);
    may = answer.ok;
    lines = may ? reported(await answer.json()) : [await problem(answer)];
  } catch (error) {
    lines = [`No connection to Ringway: ${error.message}`];
  }
  // The question or the number may be another one by now.
  const current = question?.body ? JSON.stringify(question.body(Number($("number").value))) : "";
  if (mine !== question || body !== current) return;
  if (may) forecast = body;
  allow(may);
  $("preview").replaceChildren(...lines.map((line) => h("p", {}, line)));
}

function reported(report) {
  const lines = [...report.changes];
  for (const moved of report.moved) lines.push(`Pool ${moved.pool}: ${percent(moved.share)} of the keys move to another backend.`);
  return lines.length ? lines : ["Nothing to change."];
}

$("number").addEventListener("input", preview);
$("cancel").addEventListener("click", () => $("dialog").close());
$("dialog").addEventListener("close", () => {
  // The event comes later than the end of the dialog, which may be open again for another question.
  if (!$("dialog").open) [question, forecast] = [null, null];
});
$("dialog-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (forecast == null) return;
  const [mine, body] = [question, forecast];
  forecast = null;
  allow(false);
  let failure = "";
  try {
    const answer = await call(body, false);
    if (!answer.ok) failure = await problem(answer);
  } catch (error) {
    failure = `No connection to Ringway: ${error.message}`;
  }
  text($("outcome"), failure ? `${mine.title}: ${failure}` : `${mine.title}: done.`);
  if (mine !== question) return;
  if (failure) $("preview").replaceChildren(h("p", { class: "state bad" }, failure));
  else $("dialog").close();
});

// ---- explain and sessions ----

// The answer to a call; null: there is none, and the place says so.
async function reach(path, place) {
  try {
    return await api(path);
  } catch (error) {
    place.replaceChildren(h("p", { class: "state bad" }, `No connection to Ringway: ${error.message}`));
    return null;
  }
}

$("explain").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [kind, ...name] = $("target").value.split(" ");
  const query = new URLSearchParams({ [kind === "listener" ? "listener" : "target"]: name.join(" "), from: $("client").value.trim() });
  if ($("sni").value.trim()) query.set("sni", $("sni").value.trim());
  const answer = await reach(`/api/explain?${query}`, $("explanation"));
  if (!answer) return;
  if (!answer.ok) { $("explanation").replaceChildren(h("p", { class: "state bad" }, await problem(answer))); return; }
  const found = await answer.json();
  const lines = [];
  if (found.refused) lines.push(`Refused: ${found.refused}. Ringway resets the connection.`);
  for (const route of found.routes) lines.push(`Route ${route.name}: ${route.matches ? "matches" : "does not match"}. ${route.why}`);
  if (found.pool) {
    lines.push(`Key ${found.pool.key.kind} ${found.pool.key.bytes} in pool ${found.pool.name}`);
    for (const step of found.pool.walk.slice(0, 8)) lines.push(`${step.attempt == null ? "" : `try ${step.attempt}: `}${step.backend} (${step.state}): ${step.why}`);
  } else lines.push("Ringway resets the connection.");
  $("explanation").replaceChildren(h("ol", {}, ...lines.map((line) => h("li", {}, line))));
});

$("load-sessions").addEventListener("click", async () => {
  const answer = await reach("/api/sessions?limit=100", $("sessions"));
  if (!answer) return;
  if (!answer.ok) { $("sessions").replaceChildren(h("p", { class: "state bad" }, await problem(answer))); return; }
  const { sessions, next } = await answer.json();
  const cells = (one) => [one.client, one.listener, one.pool || "–", one.backend || "–", time(one.age_seconds), time(one.idle_seconds), `${one.from_client}`, `${one.to_client}`, one.state];
  const head = ["Client", "Listener", "Pool", "Backend", "Age", "Idle", "Bytes in", "Bytes out", "State"];
  const caption = `${counted(sessions.length, "open connection")}${next ? ", the first ones" : ""}`;
  $("sessions").replaceChildren(h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Open connections" }, h("table", {}, h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...head.map((label) => h("th", { scope: "col" }, label)))),
    h("tbody", {}, ...sessions.map((one) => h("tr", {}, ...cells(one).map((value) => h("td", {}, value))))))));
  text($("load-sessions"), "Show them again");
});

run();
