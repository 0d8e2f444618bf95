// A colour and a shape for each class: the colours of Okabe and Ito, which colour-blind people tell apart, and never alone.

import {draw} from "./dom.js";

const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442"];
const ASIDE = {"-1": "#8a929c", "-2": "#5b6470", "-3": "#b4a7d6", "-4": "#3a4048"};

// Each in a square from -1 to 1, as a path of SVG. Seven colours and six shapes: 42 pairs.
const SHAPES = ["M0 -.9A.9 .9 0 1 1 0 .9A.9 .9 0 1 1 0 -.9", "M-.8 -.8H.8V.8H-.8z", "M0 -1L1 .8H-1z", "M0 -1.1L1.1 0L0 1.1L-1.1 0z",
  "M-.35 -1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35z", "M0 1L1 -.8H-1z"];

export const colourOf = (label) => label >= 0 ? COLOURS[label % COLOURS.length] : ASIDE[label];

/** Black or white, whichever is read better on the colour of a class. */
export const inkOf = (label) => ["#0072b2", "#5b6470", "#3a4048"].includes(colourOf(label)) ? "#fff" : "#111";

/** The shape of a class around (0, 0), two units wide. */
export const shapeOf = (label) => SHAPES[label >= 0 ? label % SHAPES.length : 0];

/** The mark of a class, as a small picture beside its name. */
export const swatch = (label) => draw("svg", {class: "swatch", viewBox: "-1.2 -1.2 2.4 2.4", "aria-hidden": "true"},
  draw("path", {d: shapeOf(label), fill: colourOf(label)}));
