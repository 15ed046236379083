// The given picture, and what is painted over it.  What is painted becomes the mask: white there, black elsewhere.

const LONGEST = 1024;  // pixels of the canvases' longer side; the file itself is sent as it is

const at = id => document.getElementById(id);
const [picture, mask] = [at("picture"), at("mask")];
const pen = mask.getContext("2d", {willReadFrequently: true});
let file = null, size = null, cursor = null, told = () => {};

/** Calls `changed` whenever picture or mask are others than before. */
export function watch(changed) {
  told = changed;
}

/** The picture's file, {name, blob}, or null. */
export const given = () => file;

/** Shows a file as the picture, with nothing painted.  Throws a sentence where it is none that a browser reads. */
export async function give(blob, name, painted = null) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error(`${name} cannot be shown as a picture. Give a PNG, JPEG or WebP file.`);
  }
  [file, size] = [{blob, name}, [bitmap.width, bitmap.height]];
  const scale = Math.min(1, LONGEST / Math.max(...size));
  for (const canvas of [picture, mask]) {
    [canvas.width, canvas.height] = size.map(side => Math.max(1, Math.round(side * scale)));
    canvas.classList.toggle("smooth", Math.max(...size) > 200);
  }
  picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
  cursor = null;
  if (painted) await repaint(painted);
  at("board").hidden = false;
  at("picked").textContent = `${name}, ${size[0]} x ${size[1]} pixels. Choose another`;
  told();
}

async function repaint(blob) {
  const bitmap = await createImageBitmap(blob);
  pen.drawImage(bitmap, 0, 0, mask.width, mask.height);
  const data = pen.getImageData(0, 0, mask.width, mask.height);
  for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = data.data[i];
  pen.putImageData(data, 0, 0);
  tint();
}

/** Gives what is painted the paint's colour, keeping how much of it there is. */
function tint() {
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = colour();
  pen.fillRect(0, 0, mask.width, mask.height);
  pen.globalCompositeOperation = "source-over";
}

const colour = () => getComputedStyle(document.documentElement).getPropertyValue("--paint").trim();
const alphas = () => pen.getImageData(0, 0, mask.width, mask.height).data;

export function painted() {
  if (file === null) return false;
  const values = alphas();
  for (let i = 3; i < values.length; i += 4) if (values[i] >= 128) return true;
  return false;
}

/** What is painted as a PNG of the picture's size, white on black: {name, blob}, or null where nothing is. */
export async function maskFile() {
  if (!painted()) return null;
  const small = new OffscreenCanvas(mask.width, mask.height), full = new OffscreenCanvas(...size);
  const values = new ImageData(new Uint8ClampedArray(alphas()), mask.width, mask.height);
  for (let i = 0; i < values.data.length; i += 4) {
    values.data.fill(values.data[i + 3] >= 128 ? 255 : 0, i, i + 3);
    values.data[i + 3] = 255;
  }
  small.getContext("2d").putImageData(values, 0, 0);
  const wide = full.getContext("2d");
  wide.imageSmoothingEnabled = false;
  wide.drawImage(small, 0, 0, ...size);
  return {name: "mask.png", blob: await full.convertToBlob({type: "image/png"})};
}

/** Paints a line of the brush's width, or rubs it out.  Places are in pixels of the canvas. */
function stroke([x0, y0], [x1, y1]) {
  pen.globalCompositeOperation = at("rub").checked ? "destination-out" : "source-over";
  pen.strokeStyle = colour();
  pen.lineWidth = Math.max(1, mask.width * at("brush").value / 100);
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1 + 0.01, y1);
  pen.stroke();
  pen.globalCompositeOperation = "source-over";
}

function place(event) {
  const box = mask.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * mask.width, (event.clientY - box.top) / box.height * mask.height];
}

let from = null;
mask.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  mask.setPointerCapture(event.pointerId);
  from = place(event);
  stroke(from, from);
});
mask.addEventListener("pointermove", event => {
  if (from === null) return;
  const to = place(event);
  stroke(from, to);
  from = to;
});
for (const end of ["pointerup", "pointercancel"]) {
  mask.addEventListener(end, () => {
    if (from !== null) told();
    from = null;
  });
}

const MOVES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
mask.addEventListener("keydown", event => {
  const move = MOVES[event.key], step = Math.max(1, mask.width / 16);
  cursor ??= [mask.width / 2, mask.height / 2];
  if (move) {
    cursor = cursor.map((value, axis) => Math.min(Math.max(value + move[axis] * step, 0), axis ? mask.height : mask.width));
    spot();
  } else if (event.key === " ") {
    stroke(cursor, cursor);
    told();
  } else {
    return;
  }
  event.preventDefault();
});
mask.addEventListener("focus", spot);
mask.addEventListener("blur", spot);

/** Shows where the keyboard's brush is. */
function spot() {
  const shown = document.activeElement === mask && cursor !== null;
  at("spot").hidden = !shown;
  if (!shown) return;
  at("spot").style.left = `${100 * cursor[0] / mask.width}%`;
  at("spot").style.top = `${100 * cursor[1] / mask.height}%`;
}

at("clear").addEventListener("click", () => {
  pen.clearRect(0, 0, mask.width, mask.height);
  told();
});
at("invert").addEventListener("click", () => {
  pen.globalCompositeOperation = "source-out";
  pen.fillStyle = colour();
  pen.fillRect(0, 0, mask.width, mask.height);
  pen.globalCompositeOperation = "source-over";
  told();
});

async function take(blob, name) {
  at("error").textContent = "";
  try {
    await give(blob, name || "picture.png");
  } catch (error) {
    at("error").textContent = error.message;
  }
}
at("file").addEventListener("change", event => {
  const [picked] = event.target.files;
  if (picked) take(picked, picked.name);
  event.target.value = "";  // so that the same file can be chosen again
});
const drop = at("given");
drop.addEventListener("dragover", event => {
  event.preventDefault();
  at("drop").classList.add("over");
});
drop.addEventListener("dragleave", () => at("drop").classList.remove("over"));
drop.addEventListener("drop", event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  const [dropped] = event.dataTransfer.files;
  if (dropped) take(dropped, dropped.name);
});
document.addEventListener("paste", event => {
  const pasted = [...event.clipboardData.files].find(each => each.type.startsWith("image/"));
  if (pasted && !at("given").hidden) take(pasted, pasted.name);
});
