// What was made: the pictures of one run, each at large, and the runs before, in this page only.

const MOST = 60;  // runs that are remembered

const at = id => document.getElementById(id);
const runs = [];
let shown = null, open = 0, back = () => {}, use = () => {};

/** restored(run): a click on a run before; used(task, blob, name): a picture is to be worked on. */
export function watch(restored, used) {
  [back, use] = [restored, used];
}

/** A run: what was asked, `pictures` of which are still to come. */
export function begin(asked, count, shape) {
  const run = {...asked, items: new Array(count).fill(null), done: false};
  show(run);
  at("tiles").style.setProperty("--shape", shape);
  if (at("run").getBoundingClientRect().top > innerHeight / 2) at("run").scrollIntoView();  // on a phone they are below the form
  return run;
}

/** An event of the run's answer: a preview or a picture. */
export function receive(run, event) {
  const data = `data:image/png;base64,${event.b64_json}`;
  run.notes = event.notes ?? [];
  run.items[event.image] = {data, receipt: event.receipt ?? null};
  if (run !== shown) return;
  const tile = at("tiles").children[event.image];
  if (!tile) return;
  dress(tile, run, event.image);
  if (event.receipt) told(run);
}

/** The run has all its pictures: it goes into the history. */
export function finish(run) {
  run.done = true;
  runs.unshift(run);
  runs.length = Math.min(runs.length, MOST);
  list();
}

/** The run was stopped or failed: its tiles go, and the run before shows again. */
export function drop(run) {
  if (run === shown) show(runs[0] ?? null);
}

export const current = () => shown;

export function show(run) {
  shown = run;
  at("run").hidden = run === null;
  at("empty").hidden = run !== null;
  at("copied").textContent = "";
  at("tiles").replaceChildren();
  if (run === null) return;
  told(run);
  for (let i = 0; i < run.items.length; i++) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.addEventListener("click", () => enlarge(i));
    at("tiles").append(tile);
    dress(tile, run, i);
  }
  list();
}

function told(run) {
  at("said").textContent = sentence(run);
  at("run-curl").hidden = !run.items.every(item => item?.receipt);  // its seed is known then
  at("notes").textContent = run.notes?.length ? `Taken: ${run.notes.join("; ")}.` : "";
}

function dress(tile, run, i) {
  const item = run.items[i];
  tile.disabled = !item?.receipt;
  tile.classList.toggle("coming", tile.disabled);
  tile.setAttribute("aria-label", item?.receipt ? describe(item.receipt) : `picture ${i + 1} is being drawn`);
  if (!item) return;
  const image = tile.firstElementChild ?? tile.appendChild(new Image());
  image.alt = item.receipt ? describe(item.receipt) : "";
  image.src = item.data;
}

function subject(receipt) {
  const towards = [receipt.label, receipt.prompt].filter(Boolean).join(", ");
  const what = receipt.task ?? (receipt.command === "edit" ? (towards ? "edit" : "variation") : "");
  return [what, towards].filter(Boolean).join(": ") || "no class";
}
const describe = receipt => `${subject(receipt)}, seed ${receipt.seed}, picture ${receipt.image + 1}`;

function sentence(run) {
  const receipt = run.items.find(item => item?.receipt)?.receipt;
  if (!receipt) return `${run.title} …`;
  const strength = receipt.strength == null ? [] : [`strength ${receipt.strength}`];
  const said = [subject(receipt), ...strength, `seed ${receipt.seed}`, `${receipt.steps} steps`, receipt.sampler];
  if (receipt.guidance !== 1) said.push(`guidance ${receipt.guidance}`);
  return said.join(" · ");
}

function list() {
  at("past").hidden = runs.length === 0;
  at("history").replaceChildren(...runs.map(run => {
    const entry = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-current", String(run === shown));
    const strip = document.createElement("span"), said = document.createElement("span");
    strip.className = "strip";
    strip.append(...run.items.slice(0, 2).map(item => Object.assign(new Image(), {src: item.data, alt: ""})));
    said.className = "small";
    said.textContent = `${subject(run.items[0].receipt)} · seed ${run.items[0].receipt.seed}`;
    button.append(strip, said);
    button.addEventListener("click", () => {
      show(run);
      back(run);
    });
    entry.append(button);
    return entry;
  }));
}

const fileName = receipt => `${subject(receipt).replace(/[^\p{L}\p{N}]+/gu, "-")}-${receipt.seed}-${receipt.image}.png`;

function enlarge(i) {
  open = i;
  const {data, receipt} = shown.items[i];
  Object.assign(at("large-image"), {src: data, alt: describe(receipt)});
  at("large-image").classList.toggle("smooth", at("large-image").naturalWidth > 200);
  at("large-said").textContent = `${sentence(shown)} · picture ${i + 1} of ${shown.items.length}`;
  Object.assign(at("save"), {href: data, download: fileName(receipt)});
  if (!at("large").open) at("large").showModal();
}

/** Offers to work on the picture at large with these tasks, [value, name]. */
export function offer(tasks) {
  at("uses").replaceChildren(...tasks.map(([task, name]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      const {data, receipt} = shown.items[open];
      at("large").close();
      use(task, bytes(data), fileName(receipt));
    });
    return button;
  }));
}

/** The PNG itself, receipt and all. */
function bytes(data) {
  const text = atob(data.slice(data.indexOf(",") + 1));
  return new Blob([Uint8Array.from(text, letter => letter.charCodeAt(0))], {type: "image/png"});
}

at("close").addEventListener("click", () => at("large").close());
at("large").addEventListener("click", event => {
  if (event.target === at("large")) at("large").close();
});
at("large").addEventListener("keydown", event => {
  const next = open + ({ArrowLeft: -1, ArrowRight: 1}[event.key] ?? 0);
  if (next !== open && shown.items[next]?.receipt) enlarge(next);
});
