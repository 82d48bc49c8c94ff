// Draws figures so that they fit what they are seen on: a phone, paper, a dark screen.
const LIGHT_TO_DARK = {
  "white": "#16191d", "#ffffff": "#16191d", "#000000": "#ffffff",
  "#1f2933": "#e4e7eb", "#9aa5b1": "#7b8794", "#d5dae0": "#52606d",
  "#eceff2": "#2a3138", "#e4e7eb": "#2a3138", "#f3f4f6": "#242a31", "#f4f6f8": "#242a31",
  "#f7f8fa": "#1d2227", "#c6dbef": "#27415a",
  // Scales that grow darker from white grow brighter from black.
  "#08306b": "#d2e7fb",
  "#67001f": "#ffcabf", "#b2182b": "#ff9785", "#d6604d": "#e2604d", "#f4a582": "#8f3a2c",
  "#92c5de": "#29577a", "#2166ac": "#84bff0", "#053061": "#cbe6ff",
  "#0072b2": "#56a8dd",
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = new Map();
let onPaper = false;

function inDark(part) {
  if (typeof part === "string") return LIGHT_TO_DARK[part.toLowerCase()] ?? part;
  if (Array.isArray(part)) return part.map(inDark);
  if (part && Object.getPrototypeOf(part) === Object.prototype)
    return Object.fromEntries(Object.entries(part).map(([name, value]) => [name, inDark(value)]));
  return part;
}

function inLines(title, letters) {
  return (title.match(new RegExp(`.{1,${letters}}(\\s|$)`, "g")) || [title]).join("<br>");
}

function named(traces) {
  return traces.filter(trace => trace.name && trace.showlegend !== false).length;
}

// On a narrow screen a long title takes more lines, and a legend a line for each entry.
function fitWidth({data, layout}, width) {
  layout.margin ??= {};
  let room = 38;
  if (layout.title && layout.title.text) {
    if (width < 480) layout.title.font = {size: 13};
    layout.title.text = inLines(layout.title.text, Math.floor((width - 28) / (width < 480 ? 8 : 9)));
    room += 18 * layout.title.text.split("<br>").length;
  }
  if (width < 480 && layout.legend && layout.legend.y >= 1) room += 19 * named(data);
  layout.margin.t = Math.max(layout.margin.t ?? 80, room);
}

function render(element) {
  const figure = structuredClone(figures.get(element));
  if (element.clientWidth < 720) fitWidth(figure, element.clientWidth);
  const height = figure.layout.height ?? 450;
  const isBelow = figure.layout.legend ? figure.layout.legend.y < 0 : true;
  if (element.clientWidth < 640 && isBelow) {
    figure.layout.height = height + 19 * named(figure.data);
    element.style.height = `${figure.layout.height}px`;
  }
  if (onPaper) figure.layout.width = 680;
  const {data, layout} = dark.matches && !onPaper ? inDark(figure) : figure;
  return Plotly.react(element, data, layout, {responsive: true, displayModeBar: false});
}

function drawFigure(element, figure) {
  figures.set(element, figure);
  render(element);
}

function renderAll() { [...figures.keys()].forEach(render); }

// A table or figure wider than the page says that there is more.
function hint() {
  for (const box of document.querySelectorAll(".wide"))
    box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1);
}

dark.addEventListener("change", renderAll);
addEventListener("beforeprint", () => { onPaper = true; renderAll(); });
addEventListener("afterprint", () => { onPaper = false; renderAll(); });
addEventListener("load", hint);
addEventListener("resize", hint);
