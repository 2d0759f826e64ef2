"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const get = (id) => document.getElementById(id);
/// An element with text; traffic's text is never markup.
const make = (name, attributes = {}, ...children) => {
  const svg = ["svg", "path", "rect", "text", "g", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};
/// What may turn text around, or is not seen, is shown as a mark.
const shown = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
const number = (n) => n.toLocaleString("en");
const time = (ns) => ns === 0 ? "–" : ns < 1e6 ? `${Math.round(ns / 1e3)} µs` : ns < 1e9 ? `${(ns / 1e6).toFixed(ns < 1e7 ? 1 : 0)} ms` : `${(ns / 1e9).toFixed(2)} s`;
const size = (n) => n < 1024 ? `${n} B` : n < 1048576 ? `${(n / 1024).toFixed(1)} KiB` : `${(n / 1048576).toFixed(1)} MiB`;
const credential = (r) => r.o === null ? "unknown" : r.o === 1 ? "none" : r.o === 0 ? "asked for" : "mixed";
const exposed = (r) => r.d === "server" && r.x === "internet" && r.o > 0;
const counted = (map) => Object.entries(map).sort((a, b) => b[1] - a[1]).map(([k, n]) => `${shown(k)} ${number(n)}`).join(", ") || "–";
for (const r of rows) r.text = [r.s, r.w.join(" "), r.m, r.r, ...Object.keys(r.k)].join(" ").toLowerCase();

const columns = [
  ["Service", (r) => r.s, (r) => shown(r.s)],
  ["Method", (r) => r.m, (r) => make("span", { class: `method ${/^[A-Z]+$/.test(r.m) ? r.m : ""}` }, shown(r.m))],
  ["Route", (r) => r.r, (r) => shown(r.r).split(/(\{[^}]*\})/).map((s, i) => i % 2 ? make("i", {}, s) : s), "route"],
  ["Requests", (r) => -r.n, (r) => number(r.n), "number"],
  ["Rate/s", (r) => -r.q, (r) => r.q.toFixed(1), "number"],
  ["Errors", (r) => -r.e / Math.max(r.n, 1), (r) => {
    const share = 100 * r.e / Math.max(r.n, 1);
    return make("span", { class: share > 1 ? "bad-text" : "" }, `${share.toFixed(1)} %`);
  }, "number"],
  ["p99", (r) => -r.p[2], (r) => time(r.p[2]), "number"],
  ["Latency", (r) => -r.p[0], spark],
  ["Credential", credential, (r) => {
    const kinds = Object.entries(r.a).sort((a, b) => b[1] - a[1]).map(([k]) => k).slice(0, 3);
    return kinds.map((k) => make("span", { class: `tag ${k === "none" ? (exposed(r) ? "bad" : "warn") : "good"}` }, shown(k)));
  }],
  ["Exposure", (r) => ["internet", "private", "host", "unknown"].indexOf(r.x), (r) => make("span", { class: `tag ${r.x === "internet" ? "warn" : ""}` }, r.x)],
  ["Life", (r) => ["new", "active", "idle", "gone"].indexOf(r.l), (r) => make("span", { class: `tag ${{ new: "good", gone: "bad", idle: "warn" }[r.l] || ""}` }, r.l)],
  ["Last seen", (r) => r.t, (r) => r.t.replace("T", " ").replace("Z", ""), "number"],
];

/// Requests by duration, each bar four times the one before.
function spark(r) {
  const most = Math.max(...r.h, 1);
  const limits = ["16 µs", "64 µs", "256 µs", "1 ms", "4 ms", "16 ms", "67 ms", "0.27 s", "1.1 s", "4.3 s", "17 s", "more"];
  const svg = make("svg", { class: "spark", width: 72, height: 20, role: "img" }, make("title", {}, r.h.map((n, i) => n ? `up to ${limits[i]}: ${number(n)}` : "").filter(Boolean).join("\n")));
  r.h.forEach((n, i) => { const h = n ? Math.max(2, 20 * n / most) : 0; svg.append(make("rect", { x: 6 * i, y: 20 - h, width: 5, height: h, rx: 1 })); });
  return svg;
}

function detail(r) {
  const list = make("dl");
  const say = (name, value) => { if (value && value !== "–") list.append(make("dt", {}, name), make("dd", {}, value)); };
  say("Workload", shown(r.w.filter(Boolean).join(" / ")));
  say("Side", r.d);
  say("Statuses", counted(r.st));
  say("Credentials", counted(r.a));
  say("Without one, of 2xx", r.o === null ? "" : `${(100 * r.o).toFixed(1)} %`);
  say("Callers by address", `${r.c}`);
  say("Callers by name", counted(r.k));
  say("From", counted(r.re));
  say("p50 / p90 / p99", r.p.map(time).join(" / "));
  say("Median sizes", `${size(r.z[0])} in, ${size(r.z[1])} out`);
  say("Media types", counted(r.mt));
  say("Query keys", shown(r.qk.join(", ")));
  say("HTTP", counted(r.v));
  say("TLS", counted(r.tls));
  say("Route from", `${r.src}, confidence ${r.cf} %`);
  say("First seen", r.f);
  if (r.dep) say("Deprecated", `said by ${number(r.dep)} answers`);
  return make("tr", { class: "detail" }, make("td", { colspan: columns.length }, list));
}

const selects = {
  service: ["All services", (r) => r.s], method: ["All methods", (r) => r.m], exposure: ["Any exposure", (r) => r.x],
  auth: ["Any credential", credential], life: ["Any life", (r) => r.l], side: ["Both sides", (r) => r.d],
};
const STEP = 200;
let order = [3, 1], found = [], drawn = 0;

function draw() {
  const words = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = Object.entries(selects).map(([id, [, of]]) => [get(id).value, of]).filter(([value]) => value !== "");
  found = rows.filter((r) => words.every((w) => r.text.includes(w)) && wanted.every(([value, of]) => `=${of(r)}` === value));
  const [, key] = columns[order[0]];
  found.sort((a, b) => { const [x, y] = [key(a), key(b)]; return order[1] * (x < y ? -1 : x > y ? 1 : 0); });
  get("count").textContent = found.length === rows.length ? `${number(rows.length)} endpoints` : `${number(found.length)} of ${number(rows.length)} endpoints`;
  get("rows").replaceChildren();
  drawn = 0;
  more();
  [...get("head").children].forEach((th, i) => th.setAttribute("aria-sort", i === order[0] ? (order[1] > 0 ? "ascending" : "descending") : "none"));
}

/// Adds the next rows: thousands at once would be slow.
function more() {
  const part = document.createDocumentFragment();
  for (const r of found.slice(drawn, drawn + STEP)) {
    const row = make("tr", { class: "row", tabindex: 0 });
    for (const [, , cell, kind] of columns) {
      const content = cell(r);
      row.append(make("td", { class: kind }, ...(Array.isArray(content) ? content : [content])));
    }
    const toggle = () => { if (row.nextSibling?.classList.contains("detail")) row.nextSibling.remove(); else row.after(detail(r)); };
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (e) => { if (e.key === "Enter") toggle(); });
    part.append(row);
  }
  drawn = Math.min(found.length, drawn + STEP);
  get("rows").append(part);
  get("more").hidden = drawn >= found.length;
  get("more").textContent = `${number(found.length - drawn)} more`;
}

function cards() {
  const offered = rows.filter((r) => r.d === "server");
  const requests = rows.reduce((sum, r) => sum + r.n, 0), errors = rows.reduce((sum, r) => sum + r.e, 0);
  const open = offered.filter(exposed).length;
  const card = (value, name, kind = "", filter) => get("cards").append(make(filter ? "button" : "div", {
    class: `card ${kind}`, onclick: filter && (() => { get("filters").reset(); filter(); draw(); get("filters").scrollIntoView(); }),
  }, make("b", {}, value), make("span", {}, name)));
  const pick = (id, value) => { if ([...get(id).options].some((o) => o.value === `=${value}`)) get(id).value = `=${value}`; };
  card(number(rows.length), "endpoints");
  card(number(new Set(rows.map((r) => r.s)).size), "services");
  card(new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(requests), "requests");
  card(`${(100 * errors / Math.max(requests, 1)).toFixed(2)} %`, "errors", errors / Math.max(requests, 1) > .01 ? "bad" : "");
  card(number(open), "answer the internet without a credential", open ? "bad" : "", () => { pick("exposure", "internet"); pick("side", "server"); pick("auth", "none"); });
  card(number(rows.filter((r) => r.l === "new").length), "new", "", () => pick("life", "new"));
  card(number(rows.filter((r) => r.l === "idle" || r.l === "gone").length), "idle or gone", "", () => pick("life", "idle"));
  card(number(rows.filter((r) => r.dep).length), "deprecated and used", rows.some((r) => r.dep) ? "warn" : "");
}

/// Callers on the left, services on the right, the busiest of each; a line is as thick as its requests are many.
function map() {
  const MOST = 16, places = { internet: "the internet", private: "private network", host: "this host", unknown: "unknown" };
  const edges = new Map();
  for (const r of rows) {
    if (r.d !== "server") continue;
    const add = (from, n, place) => {
      const key = JSON.stringify([from, r.s]), edge = edges.get(key) || { from, to: r.s, n: 0, open: false, place };
      edge.n += n; edge.open ||= place === "internet" && exposed(r); edges.set(key, edge);
    };
    const named = Object.entries(r.k).reduce((sum, [name, n]) => { add(name, n); return sum + n; }, 0);
    const all = Object.values(r.re).reduce((sum, n) => sum + n, 0);
    // Requests of callers that have a name are drawn once.
    const left = all ? Math.max(0, all - named) / all : 0;
    for (const [place, n] of Object.entries(r.re)) if (left > 0) add(places[place] || place, Math.round(n * left) || 1, place);
  }
  const busiest = (side) => {
    const sums = new Map();
    for (const e of edges.values()) sums.set(e[side], (sums.get(e[side]) || 0) + e.n);
    return [...sums].sort((a, b) => b[1] - a[1]);
  };
  const [from, to] = [busiest("from"), busiest("to")];
  if (!edges.size) { get("map").append("No calls to services of this list were seen."); return; }
  const [left, right] = [from.slice(0, MOST), to.slice(0, MOST)];
  const height = Math.max(left.length, right.length) * 34 + 30, width = 900;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img" }, make("title", {}, "Callers and services"));
  const y = (list, i) => 20 + (i + .5) * (height - 40) / list.length;
  const cut = (text) => { const t = shown(text); return t.length > 28 ? `${t.slice(0, 27)}…` : t; };
  const most = Math.max(...[...edges.values()].map((e) => e.n));
  for (const e of edges.values()) {
    const [a, b] = [left.findIndex(([n]) => n === e.from), right.findIndex(([n]) => n === e.to)];
    if (a < 0 || b < 0) continue;
    const [y1, y2] = [y(left, a), y(right, b)];
    svg.append(make("g", {}, make("path", { d: `M230 ${y1} C 450 ${y1}, 450 ${y2}, 670 ${y2}`, class: e.open ? "open" : undefined,
      "stroke-width": 1 + 9 * Math.log1p(e.n) / Math.log1p(most) }, make("title", {}, `${shown(e.from)} → ${shown(e.to)}: ${number(e.n)} requests${e.open ? ", some without a credential" : ""}`))));
  }
  const nodes = (list, x, anchor) => list.forEach(([name, n], i) => svg.append(make("g", {},
    make("rect", { class: `node ${name === places.internet ? "internet" : ""}`, x, y: y(list, i) - 13, width: 220, height: 26, rx: 6 }),
    make("text", { x: x + 10, y: y(list, i) + 4 }, `${cut(name)}`), make("title", {}, `${shown(name)}: ${number(n)} requests`))));
  nodes(left, 10);
  nodes(right, 670);
  const hidden = from.length - left.length + to.length - right.length;
  if (hidden > 0) svg.append(make("text", { x: 10, y: height - 4, class: "note" }, `${number(hidden)} less busy ones are not drawn`));
  get("map").append(svg);
}

for (const [id, [all, of]] of Object.entries(selects)) {
  const values = [...new Set(rows.map(of))].sort();
  get(id).append(make("option", { value: "" }, all), ...values.map((v) => make("option", { value: `=${v}` }, shown(v))));
  get(id).addEventListener("change", draw);
}
columns.forEach(([name, , , kind], i) => get("head").append(make("th", { class: kind, scope: "col" },
  make("button", { type: "button", onclick: () => { order = [i, order[0] === i ? -order[1] : 1]; draw(); } }, name))));
let wait;
get("search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(draw, 120); });
get("filters").addEventListener("submit", (e) => e.preventDefault());
get("filters").addEventListener("reset", () => setTimeout(draw));
get("more").addEventListener("click", more);
get("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
get("made").textContent = `What was seen up to ${data.made.replace("T", " ").replace("Z", " UTC")}`;
get("foot").textContent = `apiscope ${data.version}. Metadata only: no credential, body, or value is in this page.` +
  (data.overflowed ? ` ${number(data.overflowed)} requests went to endpoints beyond the limit and are not told apart.` : "") +
  (data.left_out ? ` ${number(data.left_out)} endpoints are left out.` : "");
cards();
map();
draw();
