"use strict";
const at = id => document.getElementById(id);
const STRONGEST = 3;
const lines = id => at(id).value.split("\n").map(line => line.trim()).filter(Boolean);

function headers() {
  const token = at("token").value || sessionStorage.getItem("token");
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function ask(path, body) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...options, headers: headers() });
  const answer = await response.json();
  if (response.status === 401) at("token-field").hidden = false;
  if (!response.ok) throw new Error(answer.error ? answer.error.message : response.statusText);
  if (at("token").value) sessionStorage.setItem("token", at("token").value);
  return answer;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function options(id, values) {
  at(id).replaceChildren(...values.map(value => Object.assign(make("option"), { value })));
}

const later = (work, wait = 150) => {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(work, wait); };
};

let known = new Map();
async function suggestUsers() {
  const { users } = await ask(`/v1/users?like=${encodeURIComponent(at("user").value)}`);
  known = new Map(users.map(one => [one.user, one]));
  options("users", [...known.keys()]);
  at("user-field").hidden = at("user-field").hidden && users.length === 0;
}

async function takeUser() {
  if (!known.has(at("user").value)) await suggestUsers();
  const user = known.get(at("user").value);
  if (user) at("history").value = user.history.join("\n");
}

async function suggestTitles() {
  options("titles", (await ask(`/v1/titles?like=${encodeURIComponent(at("add").value)}`)).titles);
}

function addTitle() {
  const title = at("add").value.trim();
  if (title) at("history").value = [...lines("history"), title].join("\n");
  at("add").value = "";
}

function bar(value, largest) {
  const whole = make("span", "bar"), part = make("i"), width = largest ? Math.abs(value) / largest * 50 : 0;
  part.style.width = `${width}%`;
  part.style.left = value < 0 ? `${50 - width}%` : "50%";
  part.style.background = `var(--${value < 0 ? "against" : "for"})`;
  whole.append(part);
  return whole;
}

function signed(value) {
  const text = Math.abs(value).toFixed(Math.abs(value) < 0.1 ? 3 : 2);
  return Number(text) === 0 ? "0" : (value < 0 ? "\u2212" : "+") + text;
}

function listed(items, place, largest) {
  const list = make("ul", "items");
  for (const item of items) {
    const value = item.contributions[place], part = make("li");
    part.append(make("span", "", item.title), bar(value, largest), make("span", "value", signed(value)));
    list.append(part);
  }
  return list;
}

function show(results, explained) {
  const columns = explained ? explained.history : [];
  const largest = Math.max(0, ...columns.flatMap(item => item.contributions.map(Math.abs)));
  at("ranking").replaceChildren(...results.map((result, place) => {
    const row = make("li"), line = make("div", "line");
    line.append(make("span", "rank", place + 1), make("span", "name", result.title),
      make("span", "score", result.score.toFixed(2)));
    row.append(line);
    const size = item => Math.abs(item.contributions[place]);
    const strongest = columns.toSorted((one, other) => size(other) - size(one)).slice(0, STRONGEST);
    row.append(listed(columns.filter(item => strongest.includes(item)), place, largest));
    if (columns.length > STRONGEST) {
      const all = make("details");
      all.append(make("summary", "soft", `all ${columns.length} history items`), listed(columns, place, largest));
      row.append(all);
    }
    return row;
  }));
  at("result").hidden = false;
  at("cut").hidden = !explained || !explained.cut_off;
  if (explained) at("cut").textContent = `${explained.cut_off} of the oldest titles did not fit into the prompt.`;
}

async function ranked() {
  const history = lines("history"), documents = lines("documents"), count = Number(at("count").value);
  const common = { history, user: at("user").value };
  if (!documents.length) {
    const exclude = known.get(at("user").value)?.taken ?? [];
    return (await ask("/v1/recommend", { ...common, k: count, exclude })).results;
  }
  const { results } = await ask("/v1/rerank", { ...common, documents, top_n: count });
  return results.map(one => ({ title: one.document.text, score: one.relevance_score }));
}

async function rank(event) {
  event.preventDefault();
  at("go").disabled = true;
  at("message").hidden = true;
  try {
    const results = await ranked(), titles = [...new Set(results.map(result => result.title))];
    show(results, null);
    if (titles.length > 1 && titles.length === results.length) {
      const about = { history: lines("history"), user: at("user").value, documents: titles };
      show(results, await ask("/v1/explain", about));
    }
  } catch (error) {
    at("message").textContent = error.message;
    at("message").hidden = false;
  }
  at("go").disabled = false;
}

async function begin() {
  const state = await ask("/health").catch(error => ({ error }));
  at("token-field").hidden = at("token-field").hidden && Boolean(state.error || state.model);
  if (!state.model) {
    at("about").textContent = state.error ? state.error.message : "Give the server's token.";
    return;
  }
  const titles = state.catalogue ? `, and ${state.catalogue.titles} titles to choose from` : "";
  at("about").textContent = `Served: ${state.model}${titles}.`;
  at("add-field").hidden = !state.catalogue;
  at("documents").required = !state.catalogue || state.lists_candidates;
  if (state.catalogue) await Promise.allSettled([suggestUsers(), suggestTitles()]);
}

at("form").addEventListener("submit", rank);
at("user").addEventListener("input", later(suggestUsers));
at("user").addEventListener("change", takeUser);
at("add").addEventListener("input", later(suggestTitles));
at("add-button").addEventListener("click", addTitle);
at("token").addEventListener("change", begin);
begin();
