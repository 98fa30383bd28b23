// Painting a scene, on a canvas or as SVG: both surfaces know curves, straight lines, boxes, circles and text.

const LIGHT = {
  page: "#ffffff", band: "#f4f6f8", rule: "#dde1e6", ink: "#1b1f24", muted: "#5f6873", faint: "#8a929d", attention: "#0072b2", ffn: "#d55e00",
  residual: "#9aa3ae", mixer: "#8a6d1f", node: "#3a414b", root: "#009e73", plus: "#0072b2", minus: "#d55e00", first: "#0072b2", second: "#d55e00", both: "#8b95a1",
  roles: ["#8a6d1f", "#5b4bb7", "#a3317f", "#5f6873"], // of a chat: system, user, assistant, others
};
const DARK = {
  page: "#14171b", band: "#1a1e23", rule: "#333941", ink: "#e8eaed", muted: "#a3abb6", faint: "#737d89", attention: "#56b4e9", ffn: "#e69f00",
  residual: "#79838f", mixer: "#d8c15a", node: "#cfd4da", root: "#2fc79c", plus: "#56b4e9", minus: "#f0825b", first: "#56b4e9", second: "#f0825b", both: "#8b95a1",
  roles: ["#d8c15a", "#a99cf5", "#f08bd0", "#a3abb6"],
};
const ROLE_ROOM = 15; // px below the graph, for the roles of a chat
const MONO = 'ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", Consolas, monospace';
const SLANT = (-52 * Math.PI) / 180;

class CanvasSurface {
  constructor(context) { this.c = context; }
  curve(p, colour, width, alpha, dash) {
    const c = this.c;
    c.globalAlpha = alpha;
    c.strokeStyle = colour;
    c.lineWidth = width;
    c.setLineDash(dash || []);
    c.beginPath();
    c.moveTo(p[0], p[1]);
    if (p[0] === p[2] && p[4] === p[6] && p[0] === p[6]) c.lineTo(p[6], p[7]);
    else c.bezierCurveTo(p[2], p[3], p[4], p[5], p[6], p[7]);
    c.stroke();
  }
  box(x, y, w, h, fill, alpha = 1, stroke) {
    this.c.globalAlpha = alpha;
    this.c.fillStyle = fill;
    this.c.fillRect(x, y, w, h);
    if (!stroke) return;
    this.c.setLineDash([]);
    this.c.strokeStyle = stroke;
    this.c.lineWidth = 0.8;
    this.c.strokeRect(x, y, w, h);
  }
  circle(x, y, r, fill, stroke, width, alpha = 1) {
    const c = this.c;
    c.globalAlpha = alpha;
    c.setLineDash([]);
    c.beginPath();
    c.arc(x, y, r, 0, 2 * Math.PI);
    c.fillStyle = fill;
    c.fill();
    if (!stroke) return;
    c.strokeStyle = stroke;
    c.lineWidth = width;
    c.stroke();
  }
  text(x, y, text, colour, { size = 11, align = "left", slanted = false, bold = false } = {}) {
    const c = this.c;
    c.globalAlpha = 1;
    c.font = `${bold ? "700 " : ""}${size}px ${MONO}`;
    c.textAlign = align;
    c.direction = "ltr";
    c.fillStyle = colour;
    if (!slanted) { c.fillText(text, x, y); return; }
    c.save();
    c.translate(x, y);
    c.rotate(SLANT);
    c.fillText(text, 0, 0);
    c.restore();
  }
}

const escaped = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");

class SvgSurface {
  constructor(width, height, page) {
    this.width = width;
    this.height = height;
    this.parts = [`<rect width="${width}" height="${height}" fill="${page}"/>`];
  }
  curve(p, colour, width, alpha, dash) {
    const [a, b, c, d, e, f, g, h] = p.map((v) => v.toFixed(1));
    const path = p[0] === p[2] && p[4] === p[6] && p[0] === p[6] ? `M${a} ${b}V${h}` : `M${a} ${b}C${c} ${d} ${e} ${f} ${g} ${h}`;
    this.parts.push(`<path d="${path}" fill="none" stroke="${colour}" stroke-width="${width.toFixed(2)}" stroke-opacity="${alpha.toFixed(2)}"${dash ? ` stroke-dasharray="${dash.join(" ")}"` : ""}/>`);
  }
  box(x, y, w, h, fill, alpha = 1, stroke) {
    this.parts.push(`<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${w.toFixed(1)}" height="${h.toFixed(1)}" fill="${fill}" fill-opacity="${alpha}"${stroke ? ` stroke="${stroke}" stroke-width="0.8"` : ""}/>`);
  }
  circle(x, y, r, fill, stroke, width, alpha = 1) {
    this.parts.push(`<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}" fill="${fill}" opacity="${alpha}"${stroke ? ` stroke="${stroke}" stroke-width="${width}"` : ""}/>`);
  }
  text(x, y, text, colour, { size = 11, align = "left", slanted = false, bold = false } = {}) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    const place = slanted ? `transform="translate(${x.toFixed(1)} ${y.toFixed(1)}) rotate(-52)"` : `x="${x.toFixed(1)}" y="${y.toFixed(1)}"`;
    this.parts.push(`<text ${place} font-size="${size}" text-anchor="${anchor}" fill="${colour}"${bold ? ' font-weight="700"' : ""} font-family="${escaped(MONO)}">${escaped(text)}</text>`);
  }
  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" viewBox="0 0 ${this.width} ${this.height}">\n${this.parts.join("\n")}\n</svg>\n`;
  }
}

function mixed(a, b, share) {
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return "#" + [0, 1, 2].map((i) => Math.round(part(a, i) + (part(b, i) - part(a, i)) * share).toString(16).padStart(2, "0")).join("");
}

// Colour and dashes of a line: by kind; by sign; or by which of two routes has it.
function styleOf(scene, line, colours) {
  if (scene.compared) {
    if (line.edge[1] < 0) return [colours.first];
    if (line.edge[0] < 0) return [colours.second, [6, 3]];
    const difference = line.value[0] - line.value[1];
    return [mixed(colours.both, difference > 0 ? colours.first : colours.second, Math.min(Math.abs(difference) / 0.25, 1))];
  }
  if (scene.signed) return [line.value[0] < 0 ? colours.minus : colours.plus, line.value[0] < 0 ? [6, 3] : null];
  if (line.kind === ATTENTION_RESIDUAL || line.kind === FFN_RESIDUAL) return [colours.residual];
  return line.kind === MIXER ? [colours.mixer, [2, 2]] : [line.kind === FFN ? colours.ffn : colours.attention];
}

const residual = (line) => line.kind === ATTENTION_RESIDUAL || line.kind === FFN_RESIDUAL;
const widthOf = (value) => 0.6 + 5 * Math.sqrt(Math.min(Math.abs(value), 1));

function clip(text, length) {
  const characters = [...text];
  return characters.length <= length ? text : characters.slice(0, length - 1).join("") + "…";
}

function labelOf(scene, i, length = 15) {
  const { a, b } = scene.columns[i], texts = scene.routes.map((route, side) => (side ? b : a) >= 0 ? route.trace.tokens[side ? b : a] : "–");
  return texts.length < 2 || texts[0] === texts[1] ? clip(texts[0], length) : `${clip(texts[0], 8)} / ${clip(texts[1], 8)}`;
}

const isolated = (text) => `\u2068${text}\u2069`;

function paintEdges(surface, scene, view, colours, drawn, lit) {
  const ordered = drawn.slice().reverse().sort((p, q) => (residual(q) ? 1 : 0) - (residual(p) ? 1 : 0));
  const marks = [];
  for (const line of ordered) {
    const [colour, dash] = styleOf(scene, line, colours);
    const on = lit ? lit.has(line) : true, value = scene.filter.active && line.shown ? Math.max(...line.match.filter((v) => !Number.isNaN(v)).map(Math.abs)) : line.strength;
    const strength = Math.sqrt(Math.min(value, 1)), c = curveOf(scene, view, line);
    let alpha = (residual(line) ? 0.3 : 0.45) + 0.5 * strength;
    if (!line.shown) alpha = 0.07;
    else if (!on) alpha *= 0.28;
    const width = widthOf(value) * Math.min(1, Math.max(view.sx / 34, 0.45)) + (lit && on ? 0.5 : 0);
    surface.curve(c, colour, width, lit && on ? Math.max(alpha, 0.85) : alpha, dash);
    if (line.kind === FFN) marks.push([c, colour, Math.min(3.5 + 6.5 * strength, 0.42 * view.sy), alpha, line.shown && on]);
  }
  for (const [c, colour, size, alpha, on] of marks) {
    const [x, y] = onCurve(c, 0.5);
    surface.box(x - size / 2, y - size / 2, size, size, colour, on ? 1 : alpha, on ? colours.page : null);
  }
}

function paintNodes(surface, scene, view, colours, selected, near) {
  const small = Math.min(1, Math.max(view.sy / 20, 0.55));
  for (const node of scene.nodes.values()) {
    const x = view.x(scene.x[node.column]), y = view.y(node.height);
    if (x < view.left - 8 || x > view.width + 8 || y < view.top - 12 || y > view.height - view.bottom + 6) continue;
    const on = selected === node, alpha = near && !near.has(node) && !on ? 0.35 : 1;
    const root = scene.compared ? (node.root === 3 ? colours.root : node.root & 1 ? colours.first : colours.second) : colours.root;
    if (node.root) surface.circle(x, y, 6.5, root, on ? colours.ink : colours.page, 2, alpha);
    else if (node.height % 2) surface.circle(x, y, 2.3 * small, colours.node, on ? colours.ink : colours.page, on ? 2.5 : 0.8, alpha);
    else surface.circle(x, y, 3.1 * small, colours.page, on ? colours.ink : colours.node, on ? 2.6 : 1.2, alpha);
    if (on) surface.circle(x, y, 9, "transparent", colours.ink, 1.6);
  }
}

function paintAxes(surface, scene, view, colours, hovered) {
  const floor = view.height - view.bottom, every = Math.max(1, Math.ceil(13 / view.sx)), level = Math.max(1, Math.ceil(12 / view.sy));
  surface.box(0, floor + 9, view.width, view.bottom - 9, colours.page);
  surface.box(0, 0, view.left, view.height, colours.page);
  surface.curve([view.left, 0, view.left, 0, view.left, floor + 9, view.left, floor + 9], colours.rule, 1, 1);
  for (let layer = 0; layer < scene.layers; layer += level) {
    const y = view.y(2 * layer + 1) + 3;
    if (y > 10 && y < floor) surface.text(view.left - 8, y, `L${layer}`, colours.muted, { align: "right", size: 10.5 });
  }
  if (scene.messages) paintRoles(surface, scene, view, colours, floor);
  const low = floor + (scene.messages ? ROLE_ROOM : 0);
  const wide = Math.max(...scene.shown.map((i) => [...labelOf(scene, i)].length)) * 6.7 < view.sx - 4;
  scene.shown.forEach((i, n) => {
    const x = view.x(scene.x[i]);
    if (x < view.left + 2 || x > view.width + 40) return;
    if (n && scene.shown[n - 1] !== i - 1) surface.text(view.x(scene.x[i] - (1 + GAP) / 2), low + 22, "⋯", colours.faint, { align: "center" });
    if (n % every) return;
    const root = scene.routes.some((route, side) => route.roots.some((r) => scene.placeOf[side][r] === i));
    const colour = root ? colours.root : i === hovered || scene.touched[i] ? colours.ink : colours.faint;
    const { a, b } = scene.columns[i], number = a >= 0 ? a : b;
    if (view.sx >= 17 || !(n % (2 * every))) surface.text(x, low + 22, String(number), a < 0 ? colours.second : colours.faint, { align: "center", size: 9 });
    if (wide) surface.text(x, low + 38, isolated(labelOf(scene, i)), colour, { align: "center", bold: root });
    else surface.text(x + 4, low + 35, isolated(labelOf(scene, i)), colour, { align: "right", slanted: true, bold: root });
  });
}

// The messages of a chat as bars below their tokens, each with its role.
function paintRoles(surface, scene, view, colours, floor) {
  const half = Math.min(view.sx / 2 - 2, 16), bars = [];
  for (let n = 0, end; n < scene.shown.length; n = end) {
    const first = scene.shown[n], { key, role, template } = scene.messages[first];
    end = n + 1;
    while (end < scene.shown.length && scene.messages[scene.shown[end]].key === key) end++;
    const start = Math.max(view.x(scene.x[first]) - half, view.left), stop = Math.min(view.x(scene.x[scene.shown[end - 1]]) + half, view.width);
    if (!template && stop > start) bars.push([start, stop, role]);
  }
  bars.forEach(([start, stop, role], i) => {
    const colour = colours.roles[roleIndex(role)], room = (i + 1 < bars.length ? bars[i + 1][0] : view.width) - start;
    surface.box(start, floor + 12, stop - start, 2.5, colour);
    surface.text(start, floor + 24, clip(role, Math.max(Math.floor(room / 5.8) - 1, 1)), colour, { size: 9.5, bold: true });
  });
}

function paintGround(surface, scene, view, colours) {
  const floor = view.height - view.bottom, top = view.y(2 * scene.layers);
  for (let layer = 0; layer < scene.layers; layer += 2) {
    const y = view.y(2 * layer + 2);
    if (y < floor) surface.box(view.left, y, view.width - view.left, Math.min(view.sy, floor - y), colours.band);
  }
  if (view.sx < 14) return;
  for (const i of scene.shown) {
    const x = view.x(scene.x[i]);
    if (x > view.left && x < view.width + 2) surface.curve([x, floor, x, floor, x, top, x, top], colours.rule, 1, 1, [1, 5]);
  }
}

// What the roots predict, beside them.
function paintPredictions(surface, scene, view, colours) {
  scene.routes.forEach((route, side) => route.roots.forEach((root) => {
    const guess = predictionOf(route.trace, root), x = view.x(scene.x[scene.placeOf[side][root]]), y = view.y(2 * scene.layers);
    if (!guess || x < view.left) return;
    const text = `${isolated(clip(guess[0], 18))} ${(100 * guess[1]).toFixed(1)} %`, right = x > view.width * 0.55;
    const up = side && scene.compared ? 15 : 30;
    surface.text(x + (right ? 8 : -8), y - (scene.compared ? up : 14), `${scene.compared ? "AB"[side] + " " : ""}next ${text}`, scene.compared ? (side ? colours.second : colours.first) : colours.ink, { align: right ? "right" : "left", size: 12 });
  }));
}

function predictionOf(trace, position) {
  if (position === trace.n - 1 && trace.prediction.length) return trace.prediction[0];
  const lens = lensOf(trace, 2 * trace.layers, position);
  return lens && lens[0];
}

// Everything, from the ground up. `mark`: {node, lines, near, column}: what is selected or under the pointer.
function paint(surface, scene, view, colours, mark, most = MAX_DRAWN) {
  const drawn = visible(scene, view, most);
  surface.box(0, 0, view.width, view.height, colours.page);
  paintGround(surface, scene, view, colours);
  paintEdges(surface, scene, view, colours, drawn, mark.lines);
  paintNodes(surface, scene, view, colours, mark.node, mark.near);
  paintPredictions(surface, scene, view, colours);
  paintAxes(surface, scene, view, colours, mark.column);
  return drawn;
}

// The whole graph, whatever the window shows: for export and print.
function wholeView(scene, bottom) {
  const view = new View();
  view.sx = 42;
  view.sy = 32;
  view.top = scene.compared ? 70 : 60;
  view.bottom = bottom;
  view.width = view.left + scene.width * view.sx + 110;
  view.height = view.top + scene.layers * view.sy + view.bottom;
  view.x0 = -40;
  return view;
}
