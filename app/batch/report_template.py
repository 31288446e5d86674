"""The page of the contact sheet; `hasten.app.batch.report` puts the data into it."""

TEMPLATE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>hasten batch</title>
<style>
  :root {
    color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1d1f; --soft: #63666b; --line: #dcdcd8; --accent: #0b62c4;
    --bad: #b3261e; --bad-page: #fdecea;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --page: #141517; --card: #1e2023; --ink: #ececea; --soft: #a0a4aa; --line: #34373c; --accent: #7db4ff; --bad: #ff9b92;
      --bad-page: #3a1f1d;
    }
  }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
  header { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--line); padding: 12px 20px; }
  h1 { margin: 0; font-size: 17px; font-weight: 650; }
  .facts { color: var(--soft); margin: 2px 0 10px; }
  form { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
  label { display: inline-flex; gap: 6px; align-items: center; color: var(--soft); }
  input, select {
    font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
    padding: 5px 8px;
  }
  input[type=search] { width: min(300px, 100%); }
  input[type=number] { width: 72px; }
  .scored { display: inline-flex; gap: 6px; align-items: center; }
  input:focus-visible, select:focus-visible, button:focus-visible, .card a:focus-visible {
    outline: 2px solid var(--accent); outline-offset: 1px;
  }
  output { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 14px; padding: 18px 20px 40px; }
  .card {
    background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; display: flex;
    flex-direction: column;
  }
  .frame {
    aspect-ratio: 1; display: flex; align-items: center; justify-content: center; background: var(--page);
    border-bottom: 1px solid var(--line);
  }
  .frame a { display: block; width: 100%; height: 100%; }
  .frame img { width: 100%; height: 100%; object-fit: contain; display: block; }
  .frame.small img { image-rendering: pixelated; }
  .frame p {
    margin: 0; padding: 14px; max-height: 100%; overflow: auto; font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere;
  }
  .failed .frame { background: var(--bad-page); }
  .failed .frame p { color: var(--bad); }
  .about { padding: 9px 11px 11px; min-width: 0; }
  .prompt {
    margin: 0 0 4px; overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
    overflow: hidden;
  }
  .line { margin: 0; color: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
  .none { grid-column: 1 / -1; color: var(--soft); text-align: center; padding: 60px 0; }
  #more {
    display: block; margin: 0 auto 40px; font: inherit; color: var(--accent); background: var(--card);
    border: 1px solid var(--line); border-radius: 6px; padding: 7px 16px; cursor: pointer;
  }
  #more[hidden] { display: none; }
  @media (max-width: 520px) {
    header { position: static; padding: 12px; }
    main { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 9px; padding: 12px; }
    output { margin-left: 0; width: 100%; }
    label.text, input[type=search] { width: 100%; }
  }
</style>
</head>
<body>
<header>
  <h1>hasten batch</h1>
  <p class="facts" id="facts"></p>
  <form id="filters" autocomplete="off">
    <label class="text">
      <input type="search" id="text" placeholder="Prompt, id, error" aria-label="Text in prompt, id or error">
    </label>
    <label>Status <select id="status"><option value="">all</option></select></label>
    <span class="scored">
      <label>Score from <input type="number" id="low" step="any"></label>
      <label>to <input type="number" id="high" step="any"></label>
    </span>
    <label>Order <select id="order">
      <option value="list">as listed</option><option value="best">best score first</option>
      <option value="worst">worst score first</option><option value="slow">slowest first</option>
    </select></label>
    <output id="count" for="text status low high"></output>
  </form>
</header>
<main id="sheet"></main>
<button type="button" id="more" hidden>Show more</button>
<noscript>
  <p style="padding:20px">This page lists its pictures with a script; they are in the folder images, and the manifest says what each is.</p>
</noscript>
<script type="application/json" id="data">{{DATA}}</script>
<script>
"use strict";
(() => {
  const { head, rows } = JSON.parse(document.getElementById("data").textContent);
  const at = (name) => document.getElementById(name);
  const make = (tag, kind, text) => {
    const node = document.createElement(tag);
    if (kind) node.className = kind;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => Number.isFinite(value) ? String(Math.round(value * 1e4) / 1e4) : "none";
  const PAGE = 240;
  let shown = PAGE;

  const counts = new Map();
  for (const row of rows) counts.set(row.status, (counts.get(row.status) || 0) + 1);
  for (const [status, count] of counts) at("status").append(new Option(`${status} (${count})`, status));
  const scores = rows.map((row) => row.score).filter((score) => Number.isFinite(score));
  if (!scores.length) {
    for (const label of document.querySelectorAll(".scored")) label.style.display = "none";
    for (const option of [...at("order").options]) if (["best", "worst"].includes(option.value)) option.remove();
  }
  const mean = scores.length ? `, mean score ${number(scores.reduce((sum, score) => sum + score, 0) / scores.length)}` : "";
  const said = [...counts].map(([status, count]) => `${count} ${status}`).join(", ");
  at("facts").textContent = `${head.jobs} jobs: ${said}${mean}. ${head.model}, ${head.dtype} on ${head.device}, batches of ${head.batch}.`;

  const card = (row) => {
    const node = make("article", `card ${row.status}`);
    const frame = make("div", "frame");
    if (row.src) {
      const link = make("a");
      link.href = row.src;
      link.title = row.sha256 ? `sha256 ${row.sha256}` : "";
      const image = make("img");
      image.loading = "lazy"; image.decoding = "async"; image.alt = row.prompt.slice(0, 300); image.src = row.src;
      if (row.width <= 128) frame.classList.add("small");
      link.append(image); frame.append(link);
    } else {
      frame.append(make("p", "", row.status === "failed" ? row.error : "not drawn yet"));
    }
    const about = make("div", "about");
    const prompt = make("p", "prompt", row.prompt.slice(0, 600));
    prompt.title = row.prompt.slice(0, 2000);
    about.append(prompt, make("p", "line", `${row.id} · seed ${row.seed}`));
    const facts = [];
    if (Number.isFinite(row.score)) facts.push(`score ${number(row.score)}`);
    if (Number.isFinite(row.seconds)) facts.push(`${row.seconds.toPrecision(3)} s`);
    if (row.plan_hash) facts.push(`plan ${row.plan_hash.slice(0, 8)}`);
    if (facts.length) about.append(make("p", "line", facts.join(" · ")));
    if (row.settings) about.append(make("p", "line", row.settings.slice(0, 300)));
    node.append(frame, about);
    return node;
  };

  const limit = (name) => at(name).value === "" ? null : Number(at(name).value);
  const orders = {
    list: null,
    best: (a, b) => (Number.isFinite(b.score) ? b.score : -Infinity) - (Number.isFinite(a.score) ? a.score : -Infinity) || 0,
    worst: (a, b) => (Number.isFinite(a.score) ? a.score : Infinity) - (Number.isFinite(b.score) ? b.score : Infinity) || 0,
    slow: (a, b) => (b.seconds || 0) - (a.seconds || 0),
  };
  const show = () => {
    const words = at("text").value.toLowerCase().split(/\s+/).filter(Boolean), status = at("status").value;
    const low = limit("low"), high = limit("high");
    const found = rows.filter((row) => {
      if (status && row.status !== status) return false;
      if ((low !== null || high !== null) && !Number.isFinite(row.score)) return false;
      if (low !== null && row.score < low || high !== null && row.score > high) return false;
      const text = `${row.prompt} ${row.id} ${row.error || ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const order = orders[at("order").value];
    if (order) found.sort(order);
    at("sheet").replaceChildren(...(found.length ? found.slice(0, shown).map(card) : [make("p", "none", "No job is like this.")]));
    at("count").textContent = `${found.length} of ${rows.length}`;
    at("more").hidden = found.length <= shown;
    at("more").textContent = `Show more (${Math.max(0, found.length - shown)} left)`;
  };
  at("filters").addEventListener("input", () => { shown = PAGE; show(); });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("more").addEventListener("click", () => { shown += PAGE; show(); });
  show();
})();
</script>
</body>
</html>
"""
