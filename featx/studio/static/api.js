// Asking the server. It refuses with a sentence for people; it may also be gone.

export class Refused extends Error {
  constructor(status, reason, message) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

export class Gone extends Error {
  constructor() { super("The connection to featx studio is lost."); }
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Gone();
  }
  if (!answer.ok) {
    let error = {};
    try { error = (await answer.json()).error; } catch { /* no JSON: the status has to do */ }
    throw new Refused(answer.status, error.reason || "", error.message || `The server answered ${answer.status}.`);
  }
  try {
    return await answer.json();
  } catch {
    throw new Gone();  // cut off in the middle
  }
}

export const get = (path) => ask(path, {});

export const post = (path, body = {}) =>
  ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});

/** Send one image as it is. What is no image by its type is sent all the same: the server knows better. */
export const send = (path, file) =>
  ask(path, {method: "POST", headers: {"Content-Type": file.type.startsWith("image/") ? file.type : "image/x-unknown"}, body: file});

export const thumb = (row) => `/thumb/${row}`;
export const photo = (row) => `/photo/${row}`;
