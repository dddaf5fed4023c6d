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
  const answer = Object.entries(about.responses ?? {}).find(([status]) => status < 300)?.[1].content?.["application/json"]?.schema;
  const told = resolve(answer?.items ?? answer);
  if (told?.properties) box.append(make("p", answer.items ? "Answer, a list of:" : "Answer:"), table(told.properties));
  return box;
}

const content = document.getElementById("content");
content.replaceChildren(make("p", api.info.description));
const groups = {};
for (const [path, methods] of Object.entries(api.paths))
  for (const [method, about] of Object.entries(methods)) (groups[about.tags?.[0] ?? "other"] ??= []).push(operation(path, method, about));
for (const [name, boxes] of Object.entries(groups)) content.append(make("h2", name), ...boxes);
for (const [path, about] of Object.entries(api["x-websocket"] ?? {})) {
  const socket = make("details", "", make("summary", "", make("b", "WS"), make("code", path), make("span", about.description.split(". ")[0])));
  socket.append(make("p", about.description), make("p", about.binary));
  for (const way of ["send", "receive"]) for (const schema of about[way].map(resolve)) {
    const type = schema.properties.type.const;
    socket.append(make("p", way === "send" ? "You send: " : "You receive: ", make("code", `{"type": "${type}"}`), make("span", ` ${schema.description ?? ""}`)), table(schema.properties, schema.required));
  }
  content.append(make("h2", "WebSocket"), socket);
}
