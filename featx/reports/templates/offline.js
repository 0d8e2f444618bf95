{% include "classifier.js" %}
const AT_ONCE = 1, NEAREST = 5, PREVIEW = 400, STRIP = 2 ** 21, MOST = 2 ** 23;
let MODEL;  // what the page says of it, once it is unpacked

// --- the photo's pixels ---

// Colours as the file has them, since featx ignores colour profiles; upright, as the camera says that it was held.
const AS_FEATX = {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "default"};

async function decoded(file) {
  if (!file.size) throw new Error("The file is empty.");
  try {
    return await createImageBitmap(file, AS_FEATX);
  } catch {
    const heic = /\.hei[cf]$/i.test(file.name || "") ? " Of HEIC only some browsers can: save it as JPEG." : "";
    throw new Error(`This browser cannot read the file as a photo.${heic}`);
  }
}

// What of a photo is looked at, in pixels that are as many of its own a side as `by`. The network's resize rounds its longer
// side to whole pixels: a column or row less, where it would otherwise round another way than for the whole photo.
function smaller(photo, by) {
  let width = Math.max(1, Math.floor(photo.width / by)), height = Math.max(1, Math.floor(photo.height / by));
  if (by === 1) return {width, height};
  const longer = (w, h) => MODEL.resizes.map((side) => Math.floor(side * Math.max(w, h) / Math.min(w, h)));
  const wanted = longer(photo.width, photo.height);
  for (let tries = 0; tries < 9; tries++) {
    const more = longer(width, height).map((side, i) => side - wanted[i]).find((gap) => gap !== 0);
    if (!more) break;
    if ((more > 0) === (width > height)) width--;
    else height--;
  }
  return {width, height};
}

// The picture of a card, small: a phone could not hold twenty photos as they are.
async function shrink(bitmap, image) {
  const {blob} = await jpeg(bitmap, Math.min(1, PREVIEW / Math.min(bitmap.width, bitmap.height)), .9);
  if (blob) image.src = URL.createObjectURL(blob);
}

// Red, green and blue of each pixel. A large photo becomes smaller by a whole number, each pixel the mean of a square of
// the photo's: the graph would look at all of them, and a phone's memory is small. The same in every browser, which
// their own scaling is not. It is read in strips, as the canvas of a phone does not hold a large photo.
async function pixels(file, preview = null) {
  const bitmap = await decoded(file);
  try {
    if (preview) await shrink(bitmap, preview);
    if (Math.min(bitmap.width, bitmap.height) < 2) throw new Error("The photo has less than 2 pixels a side.");
    const by = Math.max(1, Math.floor(Math.min(bitmap.width, bitmap.height) / MODEL.least_side),
      Math.ceil(Math.sqrt(bitmap.width * bitmap.height / MOST)));
    const {width, height} = smaller(bitmap, by);
    const left = (bitmap.width - width * by) >> 1, top = (bitmap.height - height * by) >> 1;
    const data = new Uint8Array(3 * width * height), sums = new Uint32Array(3 * width), half = (by * by) >> 1;
    const rows = Math.max(1, Math.floor(STRIP / (width * by * by)));
    const canvas = make("canvas");
    canvas.width = width * by;
    canvas.height = Math.min(rows, height) * by;
    const drawing = canvas.getContext("2d", {willReadFrequently: true, alpha: false});
    for (let row = 0, i = 0, found; row < height; row++) {
      if (row % rows === 0) {
        drawing.fillStyle = "#fff";  // behind what is transparent
        drawing.fillRect(0, 0, canvas.width, canvas.height);
        drawing.drawImage(bitmap, -left, -top - row * by);
        found = drawing.getImageData(0, 0, canvas.width, canvas.height).data;
        i = 0;
      }
      sums.fill(half);
      for (let line = 0; line < by; line++) {
        for (let to = 0; to < sums.length; to += 3) {
          for (let x = 0; x < by; x++, i += 4) {
            sums[to] += found[i];
            sums[to + 1] += found[i + 1];
            sums[to + 2] += found[i + 2];
          }
        }
      }
      for (let from = 0, to = row * sums.length; from < sums.length; from++) data[to + from] = sums[from] / (by * by);
    }
    return {data, width, height};
  } finally {
    bitmap.close();
  }
}

// --- the model ---

// A block of the page, gzip in base64. gzip has a checksum: what was damaged is noticed here.
async function unpacked(id) {
  const text = atob(at(id).textContent.trim()), packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  at(id).remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
const floats = (bytes) => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength >> 2);

function cosine(a, b) {
  let product = 0, one = 0, other = 0;
  for (let i = 0; i < a.length; i++) {
    product += a[i] * b[i];
    one += a[i] * a[i];
    other += b[i] * b[i];
  }
  return product / (Math.sqrt(one * other) || 1);
}

async function look(session, file, preview) {
  const {data, width, height} = await pixels(file, preview);
  const out = await session.run({photo: new ort.Tensor("uint8", data, [height, width, 3])});
  const names = MODEL.class_names, shares = Array.from(out.probabilities.data), label = Number(out.label.data[0]);
  const [first, second] = [...shares].sort((a, b) => b - a);
  const unknown = Boolean(out.unknown && out.unknown.data[0]), abstain = Boolean(out.abstain.data[0]);
  return {
    label: names[label],
    score: MODEL.calibrated ? shares[label] : Math.log(first) - Math.log(Math.max(second, 1e-38)),
    score_kind: MODEL.calibrated ? "probability" : "margin",
    probabilities: MODEL.calibrated ? Object.fromEntries(names.map((name, i) => [name, shares[i]])) : {},
    abstain,
    reason: unknown ? "unknown" : abstain ? "unsure" : null,
    familiarity: out.familiarity ? out.familiarity.data[0] : null,
    shares,
    embedding: out.embedding.data,
  };
}

class Refuses extends Error {}

// What was computed when the file was made, beside what is computed now; "" where they agree.
function difference(now, then) {
  const gap = Math.max(0, ...then.probabilities.map((value, i) => Math.abs(value - now.shares[i])));
  const alike = cosine(now.embedding, floats(fromBase64(then.embedding)));
  // What is no number is not close. Labels may differ where two classes are as probable: their probabilities tell.
  if (gap <= MODEL.most_apart && alike >= MODEL.least_cosine) return "";
  return `Then: ${then.label}; now: ${now.label}. Probabilities differ by ${gap.toFixed(3)} (at most ${MODEL.most_apart}), ` +
    `what the network sees has a likeness of ${alike.toFixed(4)} (at least ${MODEL.least_cosine}).`;
}

// A picture that lies on its side, as its EXIF says: white above black once it is upright.
async function turnsPhotos() {
  const {data, width, height} = await pixels(new Blob([fromBase64(MODEL.turned)], {type: "image/jpeg"}));
  return width < height && data[0] > 200 && data[data.length - 1] < 55;
}

async function opened() {
  if (typeof DecompressionStream === "undefined" || typeof WebAssembly === "undefined" || !globalThis.ort) {
    throw new Refuses("This browser cannot run the model. Chrome, Edge and Firefox from 2023 on can, and Safari from 16.4.");
  }
  let session, now;
  try {
    MODEL = JSON.parse(new TextDecoder().decode(await unpacked("model")));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.proxy = false;
    ort.env.wasm.wasmBinary = await unpacked("wasm");  // as bytes, so that nothing is fetched
    ort.env.logLevel = "error";
    session = await ort.InferenceSession.create(await unpacked("graph"), {executionProviders: ["wasm"]});
    now = await look(session, new Blob([fromBase64(MODEL.proof.photo)], {type: "image/png"}));
  } catch (error) {
    console.error(error);
    throw new Refuses("The model in this file cannot be run here: the file is damaged, or the browser has too little " +
      `memory. Copy the file again. (${String(error && error.message || error).slice(0, 200)})`);
  }
  const found = difference(now, MODEL.proof);
  if (found) {
    throw new Refuses("This file does not give the answers that it gave when it was made, so it gives none. Copy it again; " +
      `if that does not help, use another browser. ${found}`);
  }
  if (!await turnsPhotos()) {
    throw new Refuses("This browser does not turn photos upright as the camera held them, so answers would be wrong. " +
      "Use another browser, or a newer one.");
  }
  if (MODEL.examples.length) {
    const vectors = floats(await unpacked("vectors")), [start, end] = MODEL.columns;
    MODEL.examples.forEach((each, i) => { each.vector = vectors.subarray(i * (end - start), (i + 1) * (end - start)); });
  }
  return session;
}

const ready = new Promise((done) => setTimeout(done, 50)).then(opened);  // once the page has been drawn

ready.then(() => {
  at("health").className = "good";
  at("health").textContent = "ready";
  at("proof").textContent = "This file gives the same answers as when it was made.";
}).catch((error) => {
  at("health").className = "bad";
  at("health").textContent = "does not answer";
  at("proof").className = "abstains";
  at("proof").textContent = error.message;
  at("drop").disabled = at("camera").disabled = true;
});

async function predict({file, card}) {
  const session = await ready;
  await new Promise((done) => setTimeout(done));  // lets the page be drawn between two photos
  return look(session, file, card.querySelector("img"));
}

// --- showing ---

function taken() {}  // its picture comes when the photo is looked at

const further = () => ({});

function picture(example) {
  const image = make("img");
  image.alt = `An example of ${example.label}`;
  image.src = `data:image/jpeg;base64,${example.picture}`;
  return image;
}

function answered(entry, prediction) {
  tell(entry, prediction);
  if (!MODEL.examples.length) return;
  const seen = prediction.embedding.subarray(...MODEL.columns);
  const scored = MODEL.examples.map((each) => ({...each, score: cosine(seen, each.vector)}));
  scored.sort((a, b) => b.score - a.score);
  entry.card.append(neighbours("Most similar examples", scored.slice(0, NEAREST), picture));
}

function failed(entry, error) {
  if (!entry.card.querySelector("img").src) entry.card.classList.add("bare");
  refuse(entry, error instanceof Refuses ? "Not looked at: see above." : error.message);
}

// --- the camera ---

// Where there is a touch screen, the device's own camera program makes the better photo, and needs no permission.
const touch = matchMedia("(pointer: coarse)").matches;
const camera = navigator.mediaDevices && navigator.mediaDevices.getUserMedia;
let stream = null, shots = 0;

function stop() {
  if (stream) for (const track of stream.getTracks()) track.stop();
  stream = null;
  at("viewer").hidden = true;
  at("camera").hidden = false;
}

function noCamera(why) {
  stop();
  at("nocamera").hidden = false;
  at("nocamera").textContent = `${why} Take the photo with the camera's own program, and choose it here.`;
}

at("camera").addEventListener("click", async () => {
  at("nocamera").hidden = true;
  if (touch) return at("shot").click();
  if (!camera) return noCamera("This browser does not let files use the camera.");
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      video: {facingMode: {ideal: "environment"}, width: {ideal: 1920}, height: {ideal: 1080}},
    });
  } catch (error) {
    const why = {NotFoundError: "There is no camera.", NotAllowedError: "The browser does not allow the camera here."};
    return noCamera(why[error.name] || "The camera cannot be used.");
  }
  at("view").srcObject = stream;
  at("viewer").hidden = false;
  at("camera").hidden = true;
  at("take").focus();
});
at("take").addEventListener("click", () => {
  const canvas = make("canvas"), view = at("view");
  if (!view.videoWidth) return;
  canvas.width = view.videoWidth;
  canvas.height = view.videoHeight;
  canvas.getContext("2d").drawImage(view, 0, 0);
  canvas.toBlob((blob) => take([new File([blob], `camera-${++shots}.png`, {type: "image/png"})]), "image/png");
});
at("stop").addEventListener("click", () => { stop(); at("camera").focus(); });
at("viewer").addEventListener("keydown", (event) => { if (event.key === "Escape") at("stop").click(); });
at("shot").addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
