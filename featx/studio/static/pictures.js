// Thumbnails for a grid: many in one answer, as a request for each is what scrolling would wait for. Those in sight come first.

import {thumb} from "./store.js";

const KEPT = 6000, AT_ONCE = 48, TOGETHER = 2, LATE = 60;
const kept = new Map();  // address of a thumbnail -> its picture here, or "" for what cannot be read; the oldest first

export class Pictures {
  /** `came(row)` is called when a picture has come, or is known to be unreadable. */
  constructor(came) {
    this.came = came;
    this.rows = [];
    this.asked = new Set();  // answers that are on their way
  }

  /** The address of a picture that is here; "" where it cannot be read, undefined where it has not come yet. */
  of(row) {
    return kept.get(thumb(row));
  }

  /** Have the pictures of these photos come, in this order, and no others. */
  want(rows) {
    const coming = new Set([...this.asked].flatMap((asked) => [...asked.rows]));
    const missing = rows.filter((row) => this.of(row) === undefined);
    this.rows = missing.filter((row) => !coming.has(row));
    if (this.rows.length && this.asked.size === TOGETHER) {
      const first = new Set(missing.slice(0, AT_ONCE));
      for (const {since, rows: late, control} of this.asked) {
        if (performance.now() - since > LATE && ![...late].some((row) => first.has(row))) control.abort();
      }
    }
    this.#ask();
  }

  #ask() {
    while (this.rows.length && this.asked.size < TOGETHER) {
      const asked = {rows: new Set(this.rows.splice(0, AT_ONCE)), since: performance.now(), control: new AbortController()};
      this.asked.add(asked);
      this.#fetch(asked).catch(async (error) => {
        if (error.name !== "AbortError") await new Promise((done) => setTimeout(done, 1000));  // the rest of the page says what is wrong
        this.rows.push(...asked.rows);
      }).finally(() => {
        this.asked.delete(asked);
        this.#ask();
      });
    }
  }

  async #fetch(asked) {
    const answer = await fetch(`/thumbs?rows=${[...asked.rows].join(",")}`, {signal: asked.control.signal});
    if (!answer.ok) throw new Error(String(answer.status));
    for await (const [row, jpeg] of frames(answer.body.getReader())) this.#keep(row, jpeg, asked);
    for (const row of asked.rows) this.#keep(row, [], asked);  // the server knows no such photo
  }

  #keep(row, jpeg, asked) {
    asked.rows.delete(row);
    kept.set(thumb(row), jpeg.length ? URL.createObjectURL(new Blob([jpeg], {type: "image/jpeg"})) : "");
    if (kept.size > KEPT) {
      const [oldest, picture] = kept.entries().next().value;
      kept.delete(oldest);
      URL.revokeObjectURL(picture);
    }
    this.came(row);
  }
}

/** Rows and JPEGs of an answer, as they come: two numbers of four bytes before each. */
async function* frames(reader) {
  let held = new Uint8Array(0);
  for (let part; !(part = await reader.read()).done;) {
    const bytes = new Uint8Array(held.length + part.value.length), numbers = new DataView(bytes.buffer);
    bytes.set(held);
    bytes.set(part.value, held.length);
    let at = 0;
    for (let end; bytes.length >= at + 8 && bytes.length >= (end = at + 8 + numbers.getUint32(at + 4, true)); at = end) {
      yield [numbers.getUint32(at, true), bytes.subarray(at + 8, end)];
    }
    held = bytes.slice(at);
  }
}
