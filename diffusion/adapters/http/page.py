"""The page at /: how to call the endpoint, and a form that does."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>diffusion</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
form { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; }
label { display: grid; font-size: .85rem; }
input, select, button { font: inherit; padding: .3rem .5rem; }
input { width: 7rem; }
#described { flex-basis: 100%; }
#prompt { width: auto; }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
img { height: 128px; image-rendering: pixelated; margin: .25rem; }
[role=alert] { color: #a00; }
[role=alert], pre { overflow-wrap: anywhere; }
[hidden] { display: none; }
</style>
</head>
<body>
<h1>Draw a picture</h1>
<p id="model">...</p>
<form id="form">
<label id="described" hidden>what the picture shows, in words <input id="prompt" placeholder="a red heart"></label>
<label>class <select id="label"></select></label>
<label>seed <input id="seed" type="number" min="0" max="4294967295" placeholder="random"></label>
<label id="sized" hidden>size <select id="size"></select></label>
<label>pictures <input id="n" type="number" min="1" value="4"></label>
<label>steps <input id="steps" type="number" min="2"></label>
<label>guidance <input id="guidance" type="number" min="0" max="20" step="0.1"></label>
<button>Draw</button>
</form>
<p role="alert" id="error"></p>
<div id="pictures" aria-live="polite"></div>
<p>The same from a terminal:</p>
<pre id="curl"></pre>
<script>
const at = id => document.getElementById(id);
const url = location.origin + "/v1/images/generations";
let autoguided = false;  // guidance then needs neither class nor prompt
const number = id => at(id).value === "" ? undefined : Number(at(id).value);
function body() {
  const label = at("label").value || null, prompt = at("prompt").value || undefined, size = at("size").value || undefined;
  return JSON.stringify({label, prompt, size, n: number("n"), seed: number("seed"), steps: number("steps"),
    guidance: label === null && prompt === undefined && !autoguided ? undefined : number("guidance")});
}
function show() {
  const quoted = body().replaceAll("'", "'\\\\''");
  at("curl").textContent = `curl -s ${url} -H 'Content-Type: application/json' -d '${quoted}'`;
}
at("form").addEventListener("input", show);
at("form").addEventListener("submit", async event => {
  event.preventDefault();
  at("error").textContent = "";
  at("pictures").textContent = "drawing ...";
  try {
    const answer = await fetch(url, {method: "POST", headers: {"Content-Type": "application/json"}, body: body()});
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error.message);
    at("pictures").replaceChildren(...value.data.map(item => {
      const image = new Image();
      image.src = "data:image/png;base64," + item.b64_json;
      const about = [item.receipt.label, item.receipt.prompt].filter(Boolean).join(", ") || "no class";
      image.alt = `${about}, seed ${item.receipt.seed}, picture ${item.receipt.image}`;
      image.title = image.alt;
      return image;
    }));
  } catch (error) {
    at("pictures").textContent = "";
    at("error").textContent = error.message;
  }
});
fetch("/v1/models").then(answer => answer.json()).then(value => {
  const model = value.data[0];
  const sizes = model.sizes.map(size => size.replace("x", " x ")).join(", ");
  at("model").textContent = `${model.id}, version ${model.version}, ${sizes} pixels`;
  at("size").append(new Option("(the squarest)", ""), ...model.sizes.map(size => new Option(size, size)));
  at("sized").hidden = model.sizes.length < 2;
  const classes = model.classes.map(name => new Option(name, name)), none = new Option("(none)", "");
  at("label").append(...model.prompts ? [none, ...classes] : [...classes, none]);
  autoguided = model.defaults.guidance_kind === "autoguidance";
  at("described").hidden = !model.prompts;
  at("n").max = model.limits.max_n;
  at("steps").max = model.limits.max_steps;
  at("steps").placeholder = model.defaults.steps;
  at("guidance").placeholder = model.defaults.guidance;
  show();
});
</script>
</body>
</html>
"""
