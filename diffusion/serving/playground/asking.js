// What is asked of the endpoint: the request of each task, the same as a command line, and the answer as it comes.

const ROUTES = {
  draw: ["generations"], inpaint: ["restorations", "inpainting"], upscale: ["restorations", "super-resolution"],
  colorize: ["restorations", "colorization"], edit: ["edits"], vary: ["variations"],
};
const PREVIEWS = 3;  // of each picture, the most there are

let key = null;
export const useKey = value => { key = value || null; };
const authorized = () => key === null ? {} : {Authorization: `Bearer ${key}`};

/** An answer that is not pictures; its message is a sentence of the server's. */
export class Refused extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** A request: where to, its fields, and its files, each {name, blob}. */
export function asked(task, fields, files = {}) {
  const [route, named] = ROUTES[task];
  return {path: `v1/images/${route}`, fields: named ? {task: named, ...fields} : fields, files};
}

export const address = path => new URL(path, location.href.split(/[?#]/)[0]).href;

async function get(path) {
  const answer = await reached(fetch(address(path), {headers: authorized()}));
  if (!answer.ok && path !== "healthz") throw await refusal(answer);
  return answer.json();
}
export const models = async () => (await get("v1/models")).data;
export const health = () => get("healthz");

/** Sends the request, and yields events: {type: "partial_image" or "completed", image, b64_json, receipt ...}. */
export async function* drawn(request, signal) {
  const said = {...request.fields, stream: true, partial_images: PREVIEWS};
  let body = JSON.stringify(said), headers = {"Content-Type": "application/json", ...authorized()};
  if (request.files.image) {
    body = form(said, request.files);
    headers = authorized();
  }
  const answer = await reached(fetch(address(request.path), {method: "POST", headers, body, signal}));
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = "";
  while (true) {
    const {value, done} = await reached(reader.read());
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find(line => line.startsWith("data:"));
      if (line === undefined) continue;
      const event = JSON.parse(line.slice(5));
      if (event.error) throw new Refused(answer.status, event.error.message, event.error.param);
      last = event.type.split(".").at(-1);
      yield {...event, type: last};
    }
  }
  if (last !== "completed") throw new Refused(0, "The server ended before the pictures were drawn. Ask again.");
}

function form(fields, files) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
  for (const [name, file] of Object.entries(files)) body.append(name, file.blob, file.name);
  return body;
}

async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
}

async function refusal(answer) {
  const value = await answer.json().catch(() => null);
  const told = value?.error?.message ?? `The server answered ${answer.status}, and did not say why.`;
  return new Refused(answer.status, told, value?.error?.param);
}

/** The command that sends the same request, for bash; its files are read from the folder it is typed in. */
export function curl({path, fields, files}) {
  const one = (fields.n ?? 1) === 1;
  const words = ["curl", "-sS", quoted(address(path))];
  if (key !== null) words.push("-H", '"Authorization: Bearer $KEY"');
  if (one) words.push("-H", "'Accept: image/png'");
  if (files.image) {
    for (const [name, file] of Object.entries(files)) words.push("-F", quoted(`${name}=@${fileWord(file.name)}`));
    // text is sent as it is: -F would read what begins with @ as a file, and what follows a semicolon as a type
    for (const [name, value] of Object.entries(fields)) {
      words.push(typeof value === "string" ? "--form-string" : "-F", quoted(`${name}=${value}`));
    }
  } else {
    words.push("-H", "'Content-Type: application/json'", "-d", quoted(JSON.stringify(fields)));
  }
  return [...words, "-o", one ? "drawn.png" : "drawn.json"].join(" ");
}

const quoted = text => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
const fileWord = name => /[";,\\]/.test(name) ? `"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"` : name;
