// A readable page of openapi.json, with nothing fetched from elsewhere.

const make = (name, text = "", ...children) => {
  const node = document.createElement(name);
  node.textContent = text;
  node.append(...children);
  return node;
};

const api = await (await fetch("openapi.json")).json();
const resolve = (schema) => schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema;

function kind(schema) {
  if (!schema) return "";
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(", ");
  if (schema.anyOf) return schema.anyOf.map(kind).filter((one) => one !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  if (schema.type === "object") return "object";
  return resolve(schema).title && schema.$ref ? resolve(schema).title : schema.type ?? "";
}

function table(properties, required = []) {
  const rows = Object.entries(properties).map(([name, about]) => make("tr", "", make("td", "", make("code", name)),
    make("td", kind(about) + (required.includes(name) ? ", needed" : "")),
    make("td", about.description ?? about.anyOf?.find((one) => one.description)?.description ?? "")));
  return make("table", "", make("tbody", "", ...rows));
}

function operation(path, method, about) {
  const box = make("details", "", make("summary", "", make("b", method.toUpperCase()), make("code", path), make("span", about.description?.split(". ")[0] ?? about.summary)));
  box.append(make("p", about.description ?? ""));
  const body = resolve(about.requestBody?.content?.["application/json"]?.schema);
  let example = `curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${location.origin}${path}`;
  if (body) {
    box.append(make("p", body.description ?? ""), table(body.properties, body.required));
    const given = Object.fromEntries((body.required ?? []).map((name) => [name, body.properties[name].type === "array" ? ["a red ball"] : "a red ball"]));
    example += ` -H 'content-type: application/json' -d '${JSON.stringify(given)}'`;
  }
  box.append(make("pre", example));
  return box;
}

const content = document.getElementById("content");
content.replaceChildren(make("p", api.info.description));
const groups = {};
for (const [path, methods] of Object.entries(api.paths))
  for (const [method, about] of Object.entries(methods)) (groups[about.tags?.[0] ?? "other"] ??= []).push(operation(path, method, about));
for (const [name, boxes] of Object.entries(groups)) content.append(make("h2", name), ...boxes);
const socket = make("details", "", make("summary", "", make("b", "WS"), make("code", "/api/sessions/{identity}/live"), make("span", "Frames and state come, messages go")));
socket.append(make("p", "Binary messages are frames: a header of 20 bytes, little-endian, and a JPEG. The header: version (uint8, 1), flags (uint8; 1: the first frame under its prompt, 2: a still, not to be played), take (uint16), frame (uint32), number of its prompt (uint32), Unix time it was made (float64). Text messages are JSON with a type: state, ok or error, the last two with the id of the message that they answer."),
  make("pre", ['{"type": "prompt", "prompt": "a red ball", "at": null, "refresh": "recache", "id": 1}', '{"type": "cancel", "number": 3, "id": 2}', '{"type": "set", "paused": true, "endless": false, "seconds": 20, "id": 3}', '{"type": "restart", "seed": 7, "id": 4}', '{"type": "played", "take": 1, "frames": 48}'].join("\n")),
  make("p", "Send “played” as frames are shown, several times a second: no more is made than a lead ahead of it."));
content.append(make("h2", "WebSocket"), socket);
