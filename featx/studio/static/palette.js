// A colour and a shape for each class: the colours of Okabe and Ito, which colour-blind people tell apart, and never alone.

import {draw} from "./dom.js";

const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442"];
const ASIDE = {"-1": "#8a929c", "-2": "#5b6470", "-3": "#b4a7d6", "-4": "#3a4048"};

// Each in a square from -1 to 1.
const SHAPES = [
  (path) => path.arc(0, 0, .9, 0, 2 * Math.PI),
  (path) => path.rect(-.8, -.8, 1.6, 1.6),
  (path) => polygon(path, [[0, -1], [1, .8], [-1, .8]]),
  (path) => polygon(path, [[0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]]),
  (path) => polygon(path, [[-.35, -1], [.35, -1], [.35, -.35], [1, -.35], [1, .35], [.35, .35], [.35, 1], [-.35, 1], [-.35, .35],
    [-1, .35], [-1, -.35], [-.35, -.35]]),
  (path) => polygon(path, [[0, 1], [1, -.8], [-1, -.8]]),
];
const POINTS = ["M0 -.9A.9 .9 0 1 1 0 .9A.9 .9 0 1 1 0 -.9", "M-.8 -.8H.8V.8H-.8z", "M0 -1L1 .8H-1z", "M0 -1.1L1.1 0L0 1.1L-1.1 0z",
  "M-.35 -1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35z", "M0 1L1 -.8H-1z"];

function polygon(path, points) {
  points.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
}

export const colourOf = (label) => label >= 0 ? COLOURS[label % COLOURS.length] : ASIDE[label];

/** Black or white, whichever is read better on the colour of a class. */
export const inkOf = (label) => ["#0072b2", "#5b6470", "#3a4048"].includes(colourOf(label)) ? "#fff" : "#111";

/** Trace the shape of a class around (0, 0), two units wide, into a canvas path. Seven colours and six shapes: 42 pairs. */
export function trace(path, label) {
  path.beginPath();
  SHAPES[label >= 0 ? label % SHAPES.length : 0](path);
}

/** The mark of a class, as a small picture beside its name. */
export const swatch = (label) => draw("svg", {class: "swatch", viewBox: "-1.2 -1.2 2.4 2.4", "aria-hidden": "true"},
  draw("path", {d: POINTS[label >= 0 ? label % POINTS.length : 0], fill: colourOf(label)}));
