// What is drawn: routes laid out on columns (tokens) and heights (layers), in units of columns and layers.

const MAX_LINES = 12000; // of a scene: the strongest; more are counted, not drawn
const MAX_DRAWN = 4000; // in one picture
const AFTER_ATTENTION = 0.56; // of a layer's height
const GAP = 0.7; // columns, where tokens that the route does not touch are left out

const heightOf = (height) => height / 2 + (height % 2 ? AFTER_ATTENTION - 0.5 : 0);

// Columns of all tokens: {a, b}: positions in the first and the second trace, -1 for none.
function allColumns(a, b, aligned) {
  if (b && b !== a && aligned) return aligned.map(([i, j]) => ({ a: i, b: j }));
  return a.tokens.map((_, i) => ({ a: i, b: b ? i : -1 }));
}

function headFilter(text) {
  const wanted = text.toLowerCase().split(/[\s,;]+/).filter(Boolean).map((word) => {
    const found = /^(?:l(\d+))?(?:h(\d+))?$/.exec(word);
    if (found && word) return (layer, kind, head) => kind === ATTENTION && (found[1] === undefined || layer === +found[1]) && (found[2] === undefined || head === +found[2]);
    if ("ffn".startsWith(word)) return (layer, kind) => kind === FFN;
    if ("attention".startsWith(word)) return (layer, kind) => kind === ATTENTION;
    if ("residual".startsWith(word)) return (layer, kind) => kind === ATTENTION_RESIDUAL || kind === FFN_RESIDUAL;
    if ("mixer".startsWith(word)) return (layer, kind) => kind === MIXER;
    return null;
  });
  return { active: wanted.length > 0, wrong: wanted.includes(null), passes: (...edge) => wanted.some((test) => test && test(...edge)) };
}

// Importance of those heads of an edge that pass the filter; NaN if none does.
function filtered(route, edge, filter) {
  const { edges, parts } = route, layer = edges.layer[edge], kind = edges.kind[edge];
  let sum = NaN;
  for (let i = edges.first[edge], end = i + edges.count[edge]; i < end; i++) {
    if (filter.passes(layer, kind, parts.head[i])) sum = (Number.isNaN(sum) ? 0 : sum) + parts.value[i];
  }
  return sum;
}

// By what edges are chosen to be drawn: importance; with a filter, that of the heads which pass it.
function weightsOf(route, filter) {
  const { edges } = route, weights = edges.value.slice(0, edges.length).map(Math.abs);
  if (filter.active) for (let e = 0; e < edges.length; e++) weights[e] = Math.abs(filtered(route, e, filter)) || 0;
  return weights;
}

// The weight that at most `most` edges exceed; -1 if there are no more than that.
function cutOf(weights, most) {
  const total = weights.reduce((sum, one) => sum + one.length, 0);
  if (total <= most) return -1;
  const all = new Float64Array(total);
  weights.forEach((one, side) => all.set(one, side ? weights[0].length : 0));
  return all.sort()[total - most - 1];
}

// Lines of one or two routes, by (layer, kind, source column, target column): the strongest, and how many there are in the first, the second
// and both.
function linesOf(routes, placeOf, count, filter) {
  const found = new Map(), weights = routes.map((route) => weightsOf(route, filter)), cut = cutOf(weights, MAX_LINES);
  const keyOf = ({ edges }, place, e) => ((edges.layer[e] * 5 + edges.kind[e]) * count + place[edges.source[e]]) * count + place[edges.target[e]];
  routes.forEach((route, side) => {
    const { edges } = route, place = placeOf[side];
    for (let e = 0; e < edges.length; e++) {
      if (!(weights[side][e] > cut)) continue;
      const key = keyOf(route, place, e), layer = edges.layer[e], kind = edges.kind[e];
      if (found.has(key)) continue;
      const [from, to] = endsOf(route.trace, layer, kind, 0, 0);
      found.set(key, { key, layer, kind, s: place[edges.source[e]], t: place[edges.target[e]], from: from / route.trace.n, to: to / route.trace.n, edge: [-1, -1], value: [0, 0], match: [NaN, NaN] });
    }
    if (routes.length > 1) return;
    for (let e = 0; e < edges.length; e++) if (weights[0][e] > cut) fill(found.get(keyOf(route, place, e)), 0, e, edges.value[e]);
  });
  const sizes = [routes[0].edges.length, routes.length > 1 ? routes[1].edges.length : 0, 0];
  if (routes.length > 1) {
    const first = new Set();
    routes.forEach((route, side) => {
      for (let e = 0; e < route.edges.length; e++) {
        const key = keyOf(route, placeOf[side], e), line = found.get(key);
        if (line) fill(line, side, e, route.edges.value[e]);
        if (!side) first.add(key);
        else if (first.has(key)) sizes[2]++;
      }
    });
  }
  return { lines: [...found.values()], sizes };
}

function fill(line, side, e, value) {
  line.edge[side] = e;
  line.value[side] = value;
}

// The message of a chat in each column: {key, role, template} (key: of one message), in the first trace that has the column; null where there is no chat.
function messagesOf(routes, columns) {
  if (!routes.some(({ trace }) => trace.chat.length)) return null;
  return columns.map(({ a, b }) => {
    const side = a >= 0 ? 0 : 1, { trace } = routes[Math.min(side, routes.length - 1)], position = side ? b : a;
    const role = roleOf(trace, position);
    return { key: `${role} ${trace.messageOf[position]}`, role, template: role === "template" };
  });
}

// A scene of one route or of two that are compared. `columns`: of all tokens; `prune`: leave out those that no route touches; `fold`: of those,
// what a chat's template adds.
function buildScene(routes, columns, { prune, fold, filter }) {
  const placeOf = routes.map((route, side) => {
    const place = new Int32Array(route.trace.n).fill(-1);
    columns.forEach((column, i) => { const p = side ? column.b : column.a; if (p >= 0) place[p] = i; });
    return place;
  });
  const count = columns.length, { lines, sizes } = linesOf(routes, placeOf, count, filter);
  const touched = new Uint8Array(count), nodes = new Map();
  const node = (height, column, side) => {
    const key = height * count + column;
    let found = nodes.get(key);
    if (!found) nodes.set(key, found = { key, height, column, sides: 0, root: 0, into: [], out: [], weak: 0 });
    found.sides |= 1 << side;
    touched[column] = 1;
    return found;
  };
  routes.forEach(({ edges, trace }, side) => {
    const place = placeOf[side];
    for (let e = 0; e < edges.length; e++) {
      const [from, to] = endsOf(trace, edges.layer[e], edges.kind[e], 0, 0);
      node(from / trace.n, place[edges.source[e]], side);
      node(to / trace.n, place[edges.target[e]], side).weak++;
    }
  });
  for (const line of lines) {
    line.strength = Math.max(Math.abs(line.value[0]), Math.abs(line.value[1]));
    if (filter.active) routes.forEach((route, side) => { if (line.edge[side] >= 0) line.match[side] = filtered(route, line.edge[side], filter); });
    line.shown = !filter.active || line.match.some((v) => !Number.isNaN(v));
    nodes.get(line.from * count + line.s).out.push(line);
    const end = nodes.get(line.to * count + line.t);
    end.into.push(line);
    end.weak -= line.edge.filter((e) => e >= 0).length; // what is left are edges that are not among the lines
  }
  routes.forEach((route, side) => route.roots.forEach((root) => { node(2 * route.trace.layers, placeOf[side][root], side).root |= 1 << side; }));
  for (const one of nodes.values()) one.into.sort((p, q) => q.strength - p.strength);
  lines.sort((p, q) => q.strength - p.strength);
  const x = new Float64Array(count).fill(-1), shown = [], messages = messagesOf(routes, columns);
  let at = 0;
  for (let i = 0; i < count; i++) {
    if ((prune || (fold && messages && messages[i].template)) && !touched[i]) continue;
    if (shown.length && shown[shown.length - 1] !== i - 1) at += GAP;
    x[i] = at++;
    shown.push(i);
  }
  return {
    routes, columns, shown, x, width: Math.max(at - 1, 0), layers: routes[0].trace.layers, count, placeOf, touched, nodes, filter, messages,
    lines, sizes, allLines: sizes[0] + sizes[1] - sizes[2], byKey: new Map(lines.map((line) => [line.key, line])),
    signed: routes[0].trace.measure === "signed", compared: routes.length > 1,
  };
}

// Pan and zoom: columns and layers to pixels.
class View {
  constructor() { Object.assign(this, { sx: 40, sy: 24, x0: 0, y0: 0, width: 800, height: 600, left: 46, bottom: 104, top: 34 }); }
  x(column) { return this.left + column * this.sx - this.x0; }
  y(height) { return this.height - this.bottom - heightOf(height) * this.sy + this.y0; }
  fit(scene, focus) {
    this.top = scene.compared ? 54 : 34;
    const wide = this.width - this.left - 58, tall = this.height - this.bottom - this.top;
    this.sy = Math.max(Math.min(tall / scene.layers, 64), 11);
    this.sx = Math.max(Math.min(wide / Math.max(scene.width, 1), Math.max(2.6 * this.sy, 62)), 26);
    const used = scene.width * this.sx;
    this.x0 = used <= wide ? -(29 + (wide - used) / 2) : Math.min(Math.max(focus * this.sx - 0.8 * wide, -29), used - wide - 24);
    this.y0 = -Math.max((tall - this.sy * scene.layers) / 2, 0);
    if (this.sy * scene.layers > tall) this.y0 = this.sy * scene.layers - tall;
  }
  clamp(scene) {
    const wide = this.width - this.left, used = scene.width * this.sx, tall = this.height - this.bottom - this.top, high = this.sy * scene.layers;
    this.x0 = Math.min(Math.max(this.x0, -Math.max(wide - 60, 60)), Math.max(used - 60, -60));
    this.y0 = Math.min(Math.max(this.y0, -Math.max(tall - 40, 40)), Math.max(high - 40, 0));
  }
  zoom(factor, x, y, horizontalOnly) {
    const fx = Math.min(Math.max(this.sx * factor, 6), 240) / this.sx;
    this.x0 = (x - this.left + this.x0) * fx - (x - this.left);
    this.sx *= fx;
    if (horizontalOnly) return;
    const fy = Math.min(Math.max(this.sy * factor, 5), 200) / this.sy, from = this.height - this.bottom;
    this.y0 = (from - y + this.y0) * fy - (from - y);
    this.sy *= fy;
  }
}

// A line's curve in pixels: [x0, y0, x1, y1, x2, y2, x3, y3], control points of a cubic.
function curveOf(scene, view, line) {
  const x0 = view.x(scene.x[line.s]), x1 = view.x(scene.x[line.t]), y0 = view.y(line.from), y1 = view.y(line.to), rise = y0 - y1;
  if (line.s !== line.t) return [x0, y0, x0, y0 - 0.75 * rise, x1, y1 + 0.75 * rise, x1, y1];
  if (line.kind === ATTENTION_RESIDUAL || line.kind === FFN_RESIDUAL) return [x0, y0, x0, y0, x0, y1, x0, y1];
  const bow = x0 + (line.kind === FFN ? 1 : -1) * Math.min(12, 0.3 * view.sx);
  return [x0, y0, bow, y0 - 0.15 * rise, bow, y1 + 0.15 * rise, x1, y1];
}

function onCurve(c, t) {
  const u = 1 - t, a = u * u * u, b = 3 * u * u * t, d = 3 * u * t * t, e = t * t * t;
  return [a * c[0] + b * c[2] + d * c[4] + e * c[6], a * c[1] + b * c[3] + d * c[5] + e * c[7]];
}

// The strongest lines that lie in the window, at most `most`; strongest first.
function visible(scene, view, most) {
  const found = [];
  for (const line of scene.lines) {
    const a = view.x(scene.x[line.s]), b = view.x(scene.x[line.t]);
    if (Math.max(a, b) < view.left - 14 || Math.min(a, b) > view.width + 14) continue;
    if (view.y(line.from) < view.top - 30 || view.y(line.to) > view.height - view.bottom + 4) continue;
    found.push(line);
    if (found.length >= most) break;
  }
  return found;
}

// The node or the line under a point, or null.
function pick(scene, view, drawn, x, y) {
  if (y > view.height - view.bottom + 12 || x < view.left) return null;
  let best = null, distance = 9;
  for (const node of scene.nodes.values()) {
    const d = Math.hypot(view.x(scene.x[node.column]) - x, view.y(node.height) - y);
    if (d < distance) [best, distance] = [{ type: "node", node }, d];
  }
  if (best && distance < 6) return best;
  distance = best ? distance - 3 : 7;
  for (const line of drawn) {
    const c = curveOf(scene, view, line);
    if (Math.max(c[0], c[2], c[6]) < x - 8 || Math.min(c[0], c[2], c[6]) > x + 8 || c[1] < y - 8 || c[7] > y + 8) continue;
    let [px, py] = [c[0], c[1]];
    for (let i = 1; i <= 14; i++) {
      const [qx, qy] = onCurve(c, i / 14), length = (qx - px) ** 2 + (qy - py) ** 2;
      const along = length ? Math.min(Math.max(((x - px) * (qx - px) + (y - py) * (qy - py)) / length, 0), 1) : 0;
      const d = Math.hypot(px + along * (qx - px) - x, py + along * (qy - py) - y) - (line.shown ? 0 : -4);
      if (d < distance) [best, distance] = [{ type: "edge", line }, d];
      [px, py] = [qx, qy];
    }
  }
  return best;
}
