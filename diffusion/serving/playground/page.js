// The form: what this model offers, what is wanted, and drawing it.

import {asked, curl, drawn, health, models, useKey} from "./asking.js";
import * as board from "./board.js";
import * as made from "./made.js";

const TASKS = {
  draw: {name: "Draw", hint: "New pictures."},
  inpaint: {name: "Fill in", restores: "inpainting", paints: true, hint: "Paint over what is to be drawn anew; the rest stays as it is."},
  upscale: {name: "Upscale", restores: "super-resolution", hint: "A small picture, made large."},
  colorize: {name: "Colorize", restores: "colorization", hint: "Colours for a picture, which is taken as grey."},
  edit: {name: "Edit", paints: true, hint: "The picture, changed towards a class or words; where you paint, if you do."},
  vary: {name: "Vary", hint: "Other pictures like this one: near 0 hardly changed, at 1 anything."},
};
const FIELDS = ["prompt", "label", "from_label", "from_prompt", "factor", "strength", "size", "n", "steps", "guidance", "sampler",
  "guidance_kind", "repeats", "coarse"];

const at = id => document.getElementById(id);
const form = at("form");
let cards = [], card = null, drawing = null, maskOf = null, commands = 0;

const task = () => form.elements.task.value;
const restores = () => TASKS[task()].restores;
const offered = name => TASKS[name].restores ? card.restorations.includes(TASKS[name].restores) : name === "draw" || card.edits;
const trained = () => card.trained_restorations.includes(restores());

const NEEDS = {  // what of the form the model must be able to
  prompts: () => card.prompts,
  classes: () => card.classes.length > 0,
  sizes: () => card.sizes.length > 1,
  guides: () => card.guidance_kinds.length > 1,
  masks: () => card.edit_masks,
  repeats: () => !trained(),
};

/** Shows what the task and the model take, and nothing else. */
function arrange() {
  const has = board.given() !== null;
  for (const part of document.querySelectorAll("[data-for], [data-free]")) {
    const {for: tasks, needs, free} = part.dataset;
    part.hidden = !tasks.split(" ").includes(task()) || (needs && !NEEDS[needs]()) || card.fixed.includes(free);
  }
  for (const id of ["brushes", "painting"]) at(id).hidden ||= !has || !card.edit_masks;
  at("mask").hidden ||= !card.edit_masks;
  const inverts = taken("from_label") || taken("from_prompt");
  at("n").disabled = Boolean(inverts);
  at("n").title = inverts ? "Of a picture that is said to be something there is one result" : "";
  const towards = taken("label") || taken("prompt");
  const autoguided = (taken("guidance_kind") || card.defaults.guidance_kind) === "autoguidance";
  at("guidance").disabled = !towards && !autoguided;
  at("guidance").title = at("guidance").disabled ? "It strengthens a class or words: give one" : "";
  at("guidance").placeholder = restores() ? 1 : card.defaults.guidance;
  at("steps").placeholder = restores() && trained() ? "its own" : card.defaults.steps;
  at("strength-said").textContent = at("strength").value;
  at("hint").textContent = TASKS[task()].hint + (task() === "upscale" ? ` This model draws ${sizes()} pixels.` : "");
  at("go").textContent = TASKS[task()].name;
  command();
}

const sizes = () => card.sizes.map(size => size.replace("x", " x ")).join(", ");

/** What a control says, if it is shown and says anything. */
function taken(id) {
  const control = at(id);
  if (control.closest("[data-for]")?.hidden || control.closest("section, .row[data-for]")?.hidden || control.disabled) return undefined;
  if (control.validity.badInput) throw new Error(`${control.closest("label").innerText.trim()} is not a number.`);
  if (control.value.trim() === "") return undefined;
  return ["number", "range"].includes(control.type) || id === "factor" ? Number(control.value) : control.value;
}

function fields() {
  const said = FIELDS.map(id => [id, taken(id)]);
  if (at("lock").checked) said.push(["seed", taken("seed")]);
  if (cards.length > 1) said.push(["model", card.id]);
  return Object.fromEntries(said.filter(([, value]) => value !== undefined));
}

/** The request for what the form says now.  Files that are not given yet have no blob. */
async function wanted() {
  const said = fields();
  if (task() === "draw") return asked("draw", said);
  const files = {image: board.given() ?? {name: "picture.png", blob: null}};
  if (TASKS[task()].paints && card.edit_masks) {
    maskOf ??= board.maskFile();
    const mask = await maskOf;
    if (mask || task() === "inpaint") files.mask = mask ?? {name: "mask.png", blob: null};
  }
  return asked(task(), said, files);
}

async function command() {
  const mine = ++commands;
  let request;
  try {
    request = await wanted();
  } catch {
    return;  // of a number that is half typed
  }
  if (mine !== commands) return;
  at("curl").textContent = curl(request);
  for (const name of ["image", "mask"]) {
    const link = at(`save-${name}`), file = request.files[name];
    URL.revokeObjectURL(link.href);
    link.hidden = !file?.blob;
    if (file?.blob) Object.assign(link, {href: URL.createObjectURL(file.blob), download: file.name});
  }
}

async function draw() {
  if (drawing !== null || card === null) return;
  at("error").textContent = "";
  const mine = new AbortController();
  drawing = mine;
  busy(true);
  let run = null;
  try {
    const request = await wanted(), {image, mask} = request.files;
    if (image && !image.blob) throw new Error("Choose a picture first.");
    if (mask && !mask.blob) throw new Error("Paint over what is to be drawn anew first.");
    const shape = (request.fields.size ?? (image || card.sizes.length > 1 ? "1x1" : card.sizes[0])).replace("x", " / ");
    const state = {task: task(), title: TASKS[task()].name, values: values(), request};
    const places = Math.min(Math.max(Math.trunc(request.fields.n ?? 1), 1), card.limits.max_n);  // what is wrong the server says
    run = made.begin(state, places, shape);
    follow(run, mine);
    for await (const event of drawn(request, mine.signal)) made.receive(run, event);
    made.finish(run);
    run.request = {...request, fields: {...request.fields, seed: run.items[0].receipt.seed}};
    if (!at("lock").checked) at("seed").value = run.items[0].receipt.seed;
  } catch (error) {
    if (run) made.drop(run);
    if (error.name !== "AbortError") tell(error);
  } finally {
    drawing = null;
    busy(false);
  }
}

function tell(error) {
  at(error.status === 401 ? "locked" : "error").textContent = error.message;
  if (error.status === 401) {
    at("unlock").hidden = false;
    at("unlock").scrollIntoView({block: "nearest"});
    at("key").focus();
  } else if (error.param === "model") {  // what is offered has changed
    load(error);
  } else if (error.param && at(error.param)?.closest("form") === form) {
    at(error.param).closest("details")?.setAttribute("open", "");
    at(error.param).focus();
  }
}

function busy(now) {
  at("go").disabled = now;
  at("stop").hidden = !now;
  if (!now) at("load").textContent = "";
}

/** Tells how busy the server is for as long as the run is being drawn. */
async function follow(run, mine) {
  while (drawing === mine) {
    const {drawing: inSlots, waiting} = await health().catch(() => ({}));
    if (drawing !== mine) return;
    const seen = run.items.some(item => item !== null);
    if (inSlots !== undefined) {
      const queue = waiting ? `${waiting} waiting` : "none waiting";
      at("load").textContent = `${seen || !waiting ? "drawing" : "in the queue"}: ${inSlots} in work, ${queue}`;
    }
    await new Promise(done => setTimeout(done, 500));
  }
}

const values = () => Object.fromEntries(FIELDS.map(id => [id, at(id).value]));

/** Works with another of the models there are, if it is one. */
function choose(id) {
  const found = cards.find(each => each.id === id) ?? card;
  if (found === card) return;
  card = found;
  if (!offered(task())) form.elements.task.value = "draw";
  present();
}

/** Brings a run back: its model, its settings, its seed, its picture and what was painted. */
async function restore(run) {
  at("error").textContent = "";  // it was of what the form said before
  choose(run.request.fields.model);
  form.elements.task.value = run.task;
  for (const [id, value] of Object.entries(run.values)) at(id).value = value;
  at("seed").value = run.request.fields.seed;
  at("lock").checked = true;
  const {image, mask} = run.request.files;
  if (image) await board.give(image.blob, image.name, mask?.blob);
  arrange();
}

async function copy(text) {
  at("curl").textContent = text;
  try {
    await navigator.clipboard.writeText(text);
    return "Copied.";
  } catch {  // no permission, or a page that came over plain http from another machine
    at("terminal").open = true;
    getSelection().selectAllChildren(at("curl"));
    return "Selected below the form: press Ctrl-C.";
  }
}

const select = (id, ...options) => at(id).replaceChildren(...options.map(([name, value]) => new Option(name, value)));
const named = names => names.map(name => [name, name]);

function present() {
  const {defaults, limits} = card;
  at("choice").hidden = cards.length < 2;
  select("which", ...cards.map(each => [`${each.id} (version ${each.version})`, each.id]));
  at("which").value = card.id;
  document.title = card.id;
  at("name").textContent = card.id;
  at("model").textContent = `version ${card.version} · ${sizes()} pixels · ${card.parameters.toLocaleString("en")} parameters`;
  const classes = named(card.classes), none = ["(none)", ""];
  select("label", ...card.prompts ? [none, ...classes] : [...classes, none]);
  select("from_label", ["(not said)", ""], ...classes);
  select("factor", ...named(card.factors));
  select("size", ["(the squarest)", ""], ...named(card.sizes));
  select("sampler", [`${defaults.sampler} (its own)`, ""], ...named(card.samplers.filter(name => name !== defaults.sampler)));
  select("guidance_kind", [`${defaults.guidance_kind} (its own)`, ""],
    ...named(card.guidance_kinds.filter(kind => kind !== defaults.guidance_kind)));
  Object.assign(at("n"), {max: limits.max_n, value: Math.min(4, limits.max_n)});
  at("steps").max = limits.max_steps;
  for (const choice of form.elements.task) choice.closest("label").hidden = !offered(choice.value);
  made.offer(Object.keys(TASKS).filter(name => name !== "draw" && offered(name)).map(name => [name, TASKS[name].name]));
  arrange();
  document.querySelector("main").hidden = false;
}

async function load(after = null) {
  const known = card;
  try {
    cards = await models();
    card = cards.find(each => each.id === known?.id) ?? cards[0];
  } catch (error) {
    at("model").textContent = error.status === 401 ? "" : error.message;
    if (error.status === 401) tell(error);
    return;
  }
  at("unlock").hidden = true;
  at("locked").textContent = "";
  at("error").textContent = after?.message ?? "";
  if (known?.id !== card.id || known.version !== card.version) present();
}

form.noValidate = true;  // the server says what is wrong, and in whole sentences
form.addEventListener("submit", event => {
  event.preventDefault();
  draw();
});
form.addEventListener("input", event => {
  if (event.target === at("seed")) at("lock").checked = at("seed").value !== "";
  if (event.target === at("lock") && at("lock").checked && at("seed").value === "") {
    [at("seed").value] = crypto.getRandomValues(new Uint32Array(1));
  }
  if (!["brush", "rub", "file"].includes(event.target.id)) arrange();
});
at("which").addEventListener("change", () => choose(at("which").value));
at("unlock").addEventListener("submit", event => {
  event.preventDefault();
  useKey(at("key").value.trim());
  at("key").value = "";
  load();
});
at("stop").addEventListener("click", () => drawing?.abort());
at("copy").addEventListener("click", async () => { at("copied").textContent = await copy(at("curl").textContent); });
at("run-curl").addEventListener("click", async () => { at("copied").textContent = await copy(curl(made.current().request)); });
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && event.ctrlKey && !at("large").open) form.requestSubmit();
  if (event.key === "Escape" && !at("large").open) drawing?.abort();
});
board.watch(() => {
  maskOf = null;
  if (card) arrange();
});
made.watch(restore, async (name, blob, file) => {
  form.elements.task.value = name;
  await board.give(blob, file);
  at("go").scrollIntoView({block: "nearest"});
});
load();
