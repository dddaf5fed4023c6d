// The server's API and one session's WebSocket, which is opened again whenever it is lost.

const RETRY = [0.3, 0.6, 1, 2, 4]; // seconds between two attempts
const SILENCE = 16; // seconds without a message after which the line is taken for dead; the server speaks every 5

export async function api(method, path, body) {
  const answer = await fetch(`api/${path}`, {
    method, headers: body ? { "content-type": "application/json" } : {}, body: body ? JSON.stringify(body) : undefined,
  });
  const data = answer.status === 204 ? {} : await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(data.detail || `the server answers ${answer.status}`), { status: answer.status });
  return data;
}

export class Connection {
  // on: {state, frame, ok, error, lost, gone}, each a function.
  constructor(on) {
    this.on = on;
    this.asked = new Map(); // id of a message → what to call with its answer
    this.nextId = 1;
    this.bytes = [];
    setInterval(() => this.watchSilence(), 5000);
  }

  open(session) {
    this.session = session;
    this.attempts = 0;
    this.connect();
  }

  connect() {
    clearTimeout(this.timer);
    this.socket?.close();
    const base = new URL(`api/sessions/${encodeURIComponent(this.session)}/live`, location.href);
    base.protocol = base.protocol.replace("http", "ws");
    const socket = new WebSocket(base.href.split("#")[0]);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    this.heard = performance.now();
    socket.onmessage = (event) => {
      if (this.socket !== socket) return;
      this.heard = performance.now();
      if (typeof event.data === "string") this.take(JSON.parse(event.data));
      else this.takeFrame(event.data);
    };
    socket.onclose = (event) => {
      if (this.socket !== socket) return;
      this.drop();
      if (event.code >= 4000) this.on.gone(event.reason, event.code - 4000);
      else this.retry();
    };
  }

  // Leaves the session; nothing is opened again.
  leave() {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.drop();
    socket?.close();
  }

  drop() {
    this.socket = null;
    for (const give of this.asked.values()) give({ type: "error", message: "the connection was lost" });
    this.asked.clear();
  }

  retry() {
    this.on.lost(this.attempts);
    const wait = RETRY[Math.min(this.attempts++, RETRY.length - 1)];
    this.timer = setTimeout(() => this.connect(), 1000 * wait);
  }

  watchSilence() {
    const socket = this.socket;
    if (!socket || performance.now() - this.heard < 1000 * SILENCE) return;
    this.drop();
    socket.close();
    this.retry();
  }

  take(message) {
    if (message.type === "state") {
      this.attempts = 0;
      this.on.state(message);
    } else if (this.asked.has(message.id)) {
      this.asked.get(message.id)(message);
      this.asked.delete(message.id);
    }
  }

  takeFrame(data) {
    const view = new DataView(data);
    if (view.getUint8(0) !== 1) return;
    this.bytes.push([performance.now(), data.byteLength]);
    this.on.frame({
      still: Boolean(view.getUint8(1) & 2), take: view.getUint16(2, true), index: view.getUint32(4, true),
      number: view.getUint32(8, true), made: view.getFloat64(12, true), jpeg: new Uint8Array(data, 20),
    });
  }

  // Sends a message; resolves to the server's answer.
  ask(message) {
    if (this.socket?.readyState !== 1) return Promise.resolve({ type: "error", message: "not connected" });
    const id = this.nextId++;
    this.socket.send(JSON.stringify({ ...message, id }));
    return new Promise((resolve) => this.asked.set(id, resolve));
  }

  tell(message) {
    if (this.socket?.readyState === 1) this.socket.send(JSON.stringify(message));
  }

  // Bits a second over the last five seconds.
  rate() {
    const now = performance.now();
    while (this.bytes.length && now - this.bytes[0][0] > 5000) this.bytes.shift();
    return this.bytes.reduce((sum, [, size]) => sum + size, 0) * 8 / 5;
  }
}
