// The video so far and what is scheduled, as a strip: prompts as coloured pieces, the player's place, time to come.

const PAST = 60, COMING = 20, LEAST = 30; // seconds on view
const MARK = 56; // pixels that a mark on the ruler needs

export const hue = (number) => (number * 47 + 225) % 360;
export const clock = (seconds, digits = 0) =>
  `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0")}`;

export class Timeline {
  // choose(prompt): a piece was picked. schedule(second): a place in time to come was picked.
  constructor(track, ruler, choose, schedule) {
    Object.assign(this, { track, ruler, choose, schedule, pieces: new Map(), whole: false });
    this.head = track.appendChild(Object.assign(document.createElement("i"), { className: "head" }));
    this.ghost = track.appendChild(Object.assign(document.createElement("i"), { className: "ghost", hidden: true }));
    track.addEventListener("pointermove", (event) => this.hover(event));
    track.addEventListener("pointerleave", () => { this.ghost.hidden = true; });
    track.addEventListener("click", (event) => {
      const second = this.secondAt(event);
      if (event.target === track && second > this.made) this.schedule(Math.round(2 * second) / 2);
    });
  }

  secondAt(event) {
    const box = this.track.getBoundingClientRect();
    return this.from + (event.clientX - box.left) / box.width * (this.to - this.from);
  }

  hover(event) {
    const second = this.secondAt(event);
    this.ghost.hidden = event.target !== this.track || second <= this.made;
    this.ghost.style.left = `${this.percent(second)}%`;
    this.ghost.textContent = clock(Math.round(2 * second) / 2, 1);
  }

  // Whether there is more than the last minute to see.
  get hasMore() { return this.made > PAST; }

  percent(second) { return 100 * (second - this.from) / (this.to - this.from); }

  // prompts: [{number, prompt, second}], scheduled: the same; made, shown: seconds.
  draw({ prompts, scheduled, made, shown }) {
    this.made = made;
    this.from = this.whole ? 0 : Math.max(0, made - PAST);
    this.to = Math.max(made + Math.max(COMING, (made - this.from) / 4), LEAST, ...scheduled.map((one) => one.second + 8));
    const kept = new Set();
    prompts.forEach((one, i) => {
      const end = prompts[i + 1]?.second ?? made;
      if (end < this.from) return;
      const start = Math.max(one.second, this.from);
      kept.add(this.piece(`p${one.number}-${one.second}`, one, start, end - start, "segment"));
    });
    for (const one of scheduled) kept.add(this.piece(`s${one.number}`, one, one.second, null, "pin"));
    for (const [key, node] of this.pieces) if (!kept.has(key)) { node.remove(); this.pieces.delete(key); }
    this.head.style.left = `${this.percent(Math.max(shown, this.from))}%`;
    this.drawRuler();
  }

  piece(key, one, start, length, kind) {
    let node = this.pieces.get(key);
    if (!node) {
      node = document.createElement("button");
      node.type = "button";
      node.className = kind;
      node.append(Object.assign(document.createElement("span"), { textContent: one.prompt }));
      node.title = `${clock(one.second, 1)}  ${one.prompt}`;
      node.style.setProperty("--segment", `oklch(0.5 0.13 ${hue(one.number)})`);
      node.style.setProperty("--segment-text", "#fff");
      node.addEventListener("click", () => this.choose(one));
      this.track.append(node);
      this.pieces.set(key, node);
    }
    node.style.left = `${this.percent(start)}%`;
    if (length !== null) node.style.width = `${Math.max(0.2, 100 * length / (this.to - this.from))}%`;
    return key;
  }

  drawRuler() {
    const span = this.to - this.from;
    const step = [5, 10, 15, 30, 60, 120, 300, 600].find((one) => span / one < Math.min(11, this.track.clientWidth / MARK)) ?? 1800;
    const first = Math.ceil(this.from / step) * step;
    const marks = [];
    for (let second = first; second < this.to; second += step) marks.push(second);
    this.ruler.replaceChildren(...marks.map((second) => {
      const mark = Object.assign(document.createElement("span"), { textContent: clock(second) });
      const place = this.percent(second);
      mark.style.left = `${place}%`;
      if (place < 3 || place > 97) mark.style.transform = `translateX(${place < 3 ? 0 : -100}%)`;
      return mark;
    }));
  }
}
