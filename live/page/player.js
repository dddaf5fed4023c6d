// Plays frames that come in bursts, smoothly: each when it is due, no faster than they are made.

const MOST = 240; // frames that may wait
const REPORT_EVERY = 4; // frames

export class Player {
  // report(take, frames): how many frames of a take were shown. changed(frame): another frame is on the screen.
  constructor(canvas, report, changed) {
    Object.assign(this, { canvas, report, changed, paused: false, fps: 16, turn: 0, block: 12 });
    this.context = canvas.getContext("2d", { alpha: false });
    this.take = 0;
    this.shown = 0; // frames of the take that were on the screen
    this.queue = [];
    this.times = [];
    this.due = 0;
    this.reported = -1;
    const tick = (now) => { this.tick(now); requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
  }

  // A take begins, or goes on after a reconnection: what waits is of no use any more.
  begin(take, frames) {
    this.queue.forEach((frame) => frame.picture?.close?.());
    Object.assign(this, { take, queue: [], shown: frames, reported: -1 });
  }

  async add(frame) {
    if (frame.take !== this.take) return;
    if (!frame.still) {
      this.queue.push(frame);
      if (this.queue.length > MOST) this.queue.shift().picture?.close?.();
    }
    try {
      frame.picture = await createImageBitmap(new Blob([frame.jpeg], { type: "image/jpeg" }));
    } catch {
      frame.broken = true;
    }
    frame.jpeg = null;
    if (frame.still && frame.picture && frame.take === this.take && !this.times.length) this.draw(frame);
  }

  // Seconds of video that wait.
  get buffered() { return this.queue.length / this.fps; }

  // Milliseconds between two frames: those of the video, or more where blocks come more slowly than that.
  get period() { return 1000 * Math.max(1 / this.fps, Math.min(1, 1.02 * this.turn / this.block)); }

  // Frames shown a second, of late.
  rate(now = performance.now()) {
    while (this.times.length && now - this.times[0] > 3000) this.times.shift();
    if (this.times.length < 2) return 0;
    return (this.times.length - 1) * 1000 / (Math.max(now - 500, this.times.at(-1)) - this.times[0]);
  }

  tick(now) {
    if (this.paused) { this.due = now; return; }
    while (this.queue[0]?.broken) this.queue.shift();
    const next = this.queue[0];
    if (!next?.picture || now + 4 < this.due) {
      if (!next) this.tell(true);
      return;
    }
    this.queue.shift();
    this.due = now - this.due > 2 * this.period ? now + this.period : this.due + this.period;
    this.draw(next);
    this.times.push(now);
    this.shown = next.index + 1;
    this.tell(this.shown - this.reported >= REPORT_EVERY);
  }

  draw(frame) {
    if (this.canvas.width !== frame.picture.width || this.canvas.height !== frame.picture.height) {
      this.canvas.width = frame.picture.width;
      this.canvas.height = frame.picture.height;
    }
    this.context.drawImage(frame.picture, 0, 0);
    frame.picture.close();
    Object.assign(this.canvas.dataset, { frame: frame.index, number: frame.number, take: frame.take });
    this.changed(frame);
  }

  tell(now) {
    if (!now || this.shown === this.reported) return;
    this.reported = this.shown;
    this.report(this.take, this.shown);
  }
}
