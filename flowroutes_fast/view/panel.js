// The panel: what is known about the selected state, edge or head. All text goes in as text.

const STATE_NAMES = ["embedding", "after"];
const KIND_TEXT = ["attention", "mixer without attention weights (sources unknown)", "residual connection around attention", "FFN", "residual connection around the FFN"];
const SHORT = ["attention", "mixer", "residual", "FFN", "residual"];
const PANEL_ROWS = 12;

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return parent.appendChild(element);
}

const tokenText = (trace, position) => `${isolated(trace.tokens[position])}@${position}`;
const number = (value) => (Number.isNaN(value) ? "–" : value.toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 4 : 3));

function stateText(trace, height) {
  if (height % 2) return `residual stream after the attention of layer ${(height - 1) / 2}`;
  return height ? `residual stream after layer ${height / 2 - 1}` : "token embedding";
}

function stateName(height, position) {
  return height % 2 ? `A${(height - 1) / 2}_${position}` : height ? `I${height / 2 - 1}_${position}` : `X0_${position}`;
}

// Bounds of an importance (before renormalisation) of one row; FFN shares of sequential blocks are known exactly. `low`, `high`: before those of
// the row's normaliser; they differ where heads are known only as a sum.
function boundsOf(trace, layer, kind, target, low, high = low) {
  if (trace.precision !== "certified" || kind === FFN_RESIDUAL || (kind === FFN && trace.shapes[layer] !== "parallel")) return [low, high];
  const [below, above] = factors(trace, layer * trace.n + target);
  return [low * below, high * above];
}

// The same for an edge of a route (the sum of its heads), and for one of its parts: a rest is entered as its middle.
function partBounds(route, e, p) {
  const { trace, edges, parts } = route, raw = parts.raw[p], rest = parts.head[p] === REST && edges.kind[e] === ATTENTION;
  return boundsOf(trace, edges.layer[e], edges.kind[e], edges.target[e], rest ? 0 : raw, rest ? 2 * raw : raw);
}

function edgeBounds(route, e) {
  const sum = [0, 0];
  for (let p = route.edges.first[e]; p < route.edges.first[e] + route.edges.count[e]; p++) partBounds(route, e, p).forEach((bound, i) => { sum[i] += bound; });
  return sum;
}

function facts(parent, rows) {
  const list = add(parent, "dl", undefined, "facts");
  for (const [name, value] of rows) {
    add(list, "dt", name);
    add(list, "dd", value);
  }
}

function interval([low, high]) {
  return high - low > 5e-6 ? `between ${low.toFixed(5)} and ${Number.isFinite(high) ? high.toFixed(5) : "1"}` : "exact to rounding";
}

// A table of [label, value, colour, action]; bars are as long as the largest value asks.
function bars(parent, rows, { largest = Math.max(...rows.map((r) => Math.abs(r[1])), 1e-9), more = 0 } = {}) {
  const table = add(parent, "table");
  for (const [label, value, colour, action, title] of rows) {
    const row = add(table, "tr");
    const name = add(row, "td");
    const text = add(name, "bdi", label);
    text.title = title || label;
    const bar = add(add(row, "td", undefined, "wide"), "span", undefined, "bar");
    bar.style.width = `${(100 * Math.min(Math.abs(value) / largest, 1)).toFixed(1)}%`;
    bar.style.background = `var(--${value < 0 ? "minus" : colour})`;
    add(row, "td", number(value), "number");
    if (action) {
      row.className = "link";
      row.tabIndex = 0;
      row.addEventListener("click", action);
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") action(); });
    }
  }
  if (more > 0) add(parent, "p", `and ${more} more`, "muted");
  return table;
}

const colourName = (kind) => ["attention", "mixer", "residual", "ffn", "residual"][kind];

class Panel {
  constructor(element, select) { Object.assign(this, { element, select }); }

  show(scene, selection) {
    this.scene = scene;
    this.element.replaceChildren();
    if (!selection) return this.overview(scene);
    const head = add(this.element, "div", undefined, "head");
    this.title = add(head, "h2");
    const close = add(head, "button", "×");
    close.setAttribute("aria-label", "close the details");
    close.addEventListener("click", () => this.select(null));
    if (selection.type === "node") this.node(scene, selection.node);
    else if (selection.type === "edge") this.edge(scene, selection.line);
    else this.head(scene, selection);
  }

  sides(scene, sidesOf, show) {
    scene.routes.forEach((route, side) => {
      const found = sidesOf(side);
      if (found === undefined || found < 0) return;
      if (scene.compared) add(this.element, "h3", side ? "B" : "A", side ? "side b" : "side");
      show(route, side, found);
    });
  }

  node(scene, node) {
    const column = scene.columns[node.column];
    this.title.textContent = labelOf(scene, node.column, 40) + `@${column.a >= 0 ? column.a : column.b}`;
    add(this.element, "p", stateText(scene.routes[0].trace, node.height), "muted");
    this.sides(scene, (side) => (node.sides >> side & 1 ? (side ? column.b : column.a) : -1), (route, side, position) => {
      const { trace } = route, into = node.into.filter((line) => line.edge[side] >= 0);
      const role = roleOf(trace, position);
      facts(this.element, [["state", stateName(node.height, position)], ...(role ? [["message", role === "template" ? "none: the template's" : role]] : [])]);
      this.entering(scene, route, side, node, into, position);
      this.lens(trace, node.height, position);
    });
    const button = add(this.element, "button", "Make this token the root (r)");
    button.addEventListener("click", () => this.makeRoot(node));
  }

  entering(scene, route, side, node, into, position) {
    if (!node.height) return;
    add(this.element, "h3", route.renormalize ? "What enters, above the threshold, as shares" : "What enters, above the threshold");
    if (!into.length) { add(this.element, "p", node.weak ? `${node.weak} edges, all weaker than those that are drawn` : "nothing", "muted"); return; }
    const rows = into.slice(0, PANEL_ROWS).map((line) => {
      const source = route.edges.source[line.edge[side]];
      const label = line.kind === ATTENTION ? (source === position ? "attention to itself" : tokenText(route.trace, source)) : SHORT[line.kind];
      return [label, line.value[side], colourName(line.kind), () => this.select({ type: "edge", line })];
    });
    bars(this.element, rows, { largest: 1, more: Math.max(into.length - PANEL_ROWS, 0) + node.weak });
  }

  lens(trace, height, position, title = "Logit lens: next token if this were the last state") {
    add(this.element, "h3", title);
    const found = lensOf(trace, height, position);
    if (found) bars(this.element, found.map(([text, p]) => [text, p, "root"]), { largest: 1 });
    else add(this.element, "p", this.missing(trace), "muted");
  }

  missing(trace) {
    if (trace.looked) return trace.looked.waiting ? "…" : trace.looked.missing || "There is none here.";
    if (trace.details.missing) return trace.details.missing;
    if (trace.details.partial) return "Left out of this page to keep it small: it holds those of the route that the page was opened with.";
    return "Not in this page: it needs the model (flowroutes view … --model NAME).";
  }

  edge(scene, line) {
    const first = line.edge[0] >= 0 ? 0 : 1, route = scene.routes[first], e = line.edge[first], { trace, edges } = route;
    const names = [edges.source[e], edges.target[e]].map((p) => tokenText(trace, p));
    this.title.textContent = line.kind === ATTENTION && line.s !== line.t ? names.join(" → ") : names[1];
    add(this.element, "p", `layer ${line.layer}: ${KIND_TEXT[line.kind]}`, "muted");
    if (scene.compared) {
      const [a, b] = line.value, only = line.edge[1] < 0 ? "only in A" : line.edge[0] < 0 ? "only in B" : "in both";
      facts(this.element, [["where", only], ["A − B", (a - b >= 0 ? "+" : "") + number(a - b)]]);
    }
    this.sides(scene, (side) => line.edge[side], (one, side, at) => this.edgeOf(scene, one, line, at));
  }

  edgeOf(scene, route, line, e) {
    const { trace, edges, parts } = route, source = edges.source[e], target = edges.target[e];
    const bounds = edgeBounds(route, e), rows = [];
    if (route.renormalize) rows.push(["in the route", `${number(edges.value[e])} of what enters`]);
    rows.push(["importance", number(edges.raw[e])], ["known", interval(bounds)]);
    facts(this.element, rows);
    if (line.kind !== ATTENTION) {
      const before = line.from, after = line.to;
      this.lens(trace, after, target, "Logit lens after");
      if (lensOf(trace, before, source)) this.lens(trace, before, source, "Logit lens before");
      return;
    }
    add(this.element, "h3", edges.count[e] > 1 ? `Its ${edges.count[e]} heads` : "Its head");
    const order = Array.from({ length: edges.count[e] }, (_, i) => edges.first[e] + i).sort((p, q) => Math.abs(parts.value[q]) - Math.abs(parts.value[p]));
    const side = scene.routes.indexOf(route);
    const shown = order.slice(0, 16).map((p) => {
      const head = parts.head[p], role = head === REST || trace.lazy ? "" : trace.roles[trace.role[line.layer * trace.heads + head]];
      const [low, high] = partBounds(route, e, p);
      const action = head === REST ? null : () => this.select({ type: "head", layer: line.layer, head, query: target, side, line });
      return [headName(line.layer, head), parts.value[p], "attention", action, `${low.toFixed(5)} to ${high.toFixed(5)}${role ? ", " + role : ""}`];
    });
    bars(this.element, shown, { more: order.length - 16 });
    if (order.length === 1 && parts.head[order[0]] !== REST) this.headOf(trace, line.layer, parts.head[order[0]], target);
  }

  head(scene, { layer, head, query, side }) {
    const { trace } = scene.routes[side];
    this.title.textContent = `${headName(layer, head)} at ${tokenText(trace, query)}`;
    this.headOf(trace, layer, head, query);
    const own = [];
    const route = scene.routes[side], { edges, parts } = route;
    for (let e = 0; e < edges.length; e++) {
      if (edges.layer[e] !== layer || edges.kind[e] !== ATTENTION) continue;
      for (let p = edges.first[e]; p < edges.first[e] + edges.count[e]; p++) if (parts.head[p] === head) own.push([e, parts.value[p]]);
    }
    add(this.element, "h3", "In the route");
    if (!own.length) { add(this.element, "p", "not in this route", "muted"); return; }
    own.sort((p, q) => Math.abs(q[1]) - Math.abs(p[1]));
    bars(this.element, own.slice(0, PANEL_ROWS).map(([e, v]) => [`${tokenText(trace, edges.source[e])} → ${tokenText(trace, edges.target[e])}`, v, "attention", () => this.select(this.lineOf(scene, side, e))]), { more: own.length - PANEL_ROWS });
  }

  lineOf(scene, side, edge) {
    const line = scene.lines.find((one) => one.edge[side] === edge);
    return line ? { type: "edge", line } : null;
  }

  headOf(trace, layer, head, query) {
    const cell = layer * trace.heads + head, at = (layer * trace.n + query) * trace.heads + head;
    const role = trace.lazy ? "" : trace.roles[trace.role[cell]], share = trace.lazy ? 0 : trace.role_share[cell];
    facts(this.element, [
      ["head", headName(layer, head)],
      trace.lazy ? ["role here", "not known: it needs all rows, and only those of routes were evaluated"] : ["role here", role ? `${role} (${(100 * share).toFixed(0)} % of its importance)` : "none: no place has more than half"],
      ["all keys", `${number(trace.heads_of[at])} of the state`],
      ...(trace.bounded ? [["known", interval([trace.heads_low[at], trace.heads_high[at]])]] : []),
    ]);
    const row = attentionOf(trace, layer, head, query);
    add(this.element, "h3", `Attention weights at ${tokenText(trace, query)}`);
    if (row) bars(this.element, row.map(([key, w]) => [tokenText(trace, key), w, "attention"]), { largest: 1 });
    else add(this.element, "p", this.missing(trace), "muted");
  }

  overview(scene) {
    const [route] = scene.routes, { trace } = route;
    if (scene.compared) this.differences(scene);
    else {
      const root = route.roots[route.roots.length - 1];
      const guesses = root === trace.n - 1 && trace.prediction.length ? trace.prediction.slice(0, 6) : lensOf(trace, 2 * trace.layers, root);
      add(this.element, "h3", `Next token after ${tokenText(trace, root)}`);
      if (guesses) bars(this.element, guesses.map(([text, p]) => [text, p, "root"]), { largest: 1 });
      else add(this.element, "p", this.missing(trace), "muted");
      this.strongest(scene, route);
    }
    add(this.element, "h3", "Legend");
    legend(this.element, scene);
    this.kept(scene);
  }

  strongest(scene, route) {
    const { edges, parts, trace } = route, found = [];
    let count = 0, least = 0;
    for (let e = 0; e < edges.length; e++) {
      if (edges.kind[e] !== ATTENTION || edges.source[e] === edges.target[e]) continue;
      for (let p = edges.first[e]; p < edges.first[e] + edges.count[e]; p++) {
        if (scene.filter.active && !scene.filter.passes(edges.layer[e], ATTENTION, parts.head[p])) continue;
        count++;
        if (found.length === PANEL_ROWS && Math.abs(parts.value[p]) <= least) continue;
        found.push([e, p]);
        found.sort((a, b) => Math.abs(parts.value[b[1]]) - Math.abs(parts.value[a[1]]));
        found.length = Math.min(found.length, PANEL_ROWS);
        least = Math.abs(parts.value[found[found.length - 1][1]]);
      }
    }
    add(this.element, "h3", "Strongest heads across positions");
    if (!found.length) add(this.element, "p", "none above the threshold", "muted");
    bars(this.element, found.map(([e, p]) => [
      `${headName(edges.layer[e], parts.head[p])} ${clip(trace.tokens[edges.source[e]], 8)}@${edges.source[e]}→${edges.target[e]}`, parts.value[p], scene.signed ? "plus" : "attention",
      () => this.select(this.lineOf(scene, 0, e)), `${tokenText(trace, edges.source[e])} → ${tokenText(trace, edges.target[e])}`,
    ]), { more: count - found.length });
  }

  differences(scene) {
    const [a, b, both] = scene.sizes;
    add(this.element, "h3", "Edges (heads summed)");
    facts(this.element, [["only in A", String(a - both)], ["only in B", String(b - both)], ["in both", String(both)]]);
    add(this.element, "h3", "Largest differences, A − B (no residual connections)");
    const sorted = scene.lines.filter((line) => line.shown && !residual(line)).sort((p, q) => Math.abs(q.value[0] - q.value[1]) - Math.abs(p.value[0] - p.value[1]));
    bars(this.element, sorted.slice(0, PANEL_ROWS).map((line) => {
      const place = (i) => { const c = scene.columns[i]; return c.a >= 0 ? c.a : c.b; };
      const where = line.s === line.t ? `@${place(line.t)}` : `@${place(line.s)}→${place(line.t)}`;
      return [`L${line.layer} ${SHORT[line.kind]} ${where}`, line.value[0] - line.value[1], "plus", () => this.select({ type: "edge", line }), labelOf(scene, line.s) + " → " + labelOf(scene, line.t)];
    }));
  }

  kept(scene) {
    for (const { trace } of scene.routes) {
      if (trace.floor > trace.traced_floor) {
        add(this.element, "p", `To keep the page small, it holds the ${trace.stored.toLocaleString("en")} strongest of ${trace.sub_edges.toLocaleString("en")} sub-edges; routes start at threshold ${trace.floor}.`, "muted");
        break;
      }
    }
    if (scene.allLines > scene.lines.length) add(this.element, "p", `Drawn are the ${scene.lines.length.toLocaleString("en")} strongest of ${scene.allLines.toLocaleString("en")} edges.`, "muted");
  }
}

const SVG_NAME = "http://www.w3.org/2000/svg";

function sample(parent, d, attributes, square) {
  const svg = document.createElementNS(SVG_NAME, "svg");
  svg.setAttribute("width", "40");
  svg.setAttribute("height", "16");
  const shape = document.createElementNS(SVG_NAME, d ? "path" : "circle");
  const given = d ? { d, fill: "none", "stroke-width": "2.4" } : { cx: "20", cy: "8" };
  for (const [name, value] of Object.entries({ ...given, ...attributes })) {
    if (value.startsWith("var(")) shape.style[name] = value;
    else shape.setAttribute(name, value);
  }
  svg.append(shape);
  if (square) {
    const mark = svg.appendChild(document.createElementNS(SVG_NAME, "rect"));
    for (const [name, value] of Object.entries({ x: "22", y: "4", width: "8", height: "8" })) mark.setAttribute(name, value);
    mark.style.fill = attributes.stroke;
  }
  add(parent, "dt").append(svg);
}

function legend(parent, scene) {
  const list = add(parent, "dl", undefined, "legend"), s = "M3 14C3 4 37 12 37 2", flat = "M3 8H37";
  const entry = (d, attributes, text, square) => { sample(list, d, attributes, square); add(list, "dd", text); };
  if (scene.compared) {
    entry(s, { stroke: "var(--plus)" }, "only in A");
    entry(s, { stroke: "var(--second)", "stroke-dasharray": "6 3" }, "only in B");
    entry(s, { stroke: "var(--both)" }, "in both; tinted towards the stronger");
  } else if (scene.signed) {
    entry(s, { stroke: "var(--plus)" }, "pushes the state where it ends up");
    entry(s, { stroke: "var(--minus)", "stroke-dasharray": "6 3" }, "pushes it away");
  } else {
    entry(s, { stroke: "var(--attention)" }, "attention, heads summed");
    entry("M18 15C28 13 28 3 18 1", { stroke: "var(--ffn)" }, "FFN (square)", true);
    if (scene.lines.some((line) => line.kind === MIXER)) entry(flat, { stroke: "var(--mixer)", "stroke-dasharray": "2 2" }, "mixer without attention weights");
    entry("M20 16V0", { stroke: "var(--residual)" }, "residual connection");
  }
  if (scene.signed || scene.compared) entry("M18 15C28 13 28 3 18 1", { stroke: "var(--muted)" }, "FFN has a square, residual connections are straight", true);
  entry("", { r: "3.2", fill: "var(--page)", stroke: "var(--ink)" }, "residual stream after a layer");
  if (scene.routes[0].trace.shapes.includes("sequential")) entry("", { r: "2.4", fill: "var(--ink)" }, "residual stream after attention");
  if (!scene.compared) entry("", { r: "6", fill: "var(--root)" }, "root of the route");
}
