// The instrument: controls, keys, pointer, and the state of what is shown.

const $ = (id) => document.getElementById(id);
const canvas = $("graph"), context = canvas.getContext("2d"), view = new View();
const KEYS = [
  ["← →", "state before, after at the same height"], ["↑ ↓", "state above, below at the same token; from an edge: its ends"], [", .", "edges into the selected state, by importance"],
  ["Enter", "details of the strongest head of an edge"], ["+ −", "threshold up, down"], ["r", "make the selected token the root"], ["n", "renormalise"], ["s", "signed, or proximity"],
  ["c", "compare: nothing, two positions, two prompts"], ["p", "touched tokens only"], ["t", "of a chat: fold what the template adds"], ["/", "show only some heads: L5H3, L20, H3, ffn"], ["f", "fit into the window"], ["[ ]", "zoom"], ["d", "light, dark"], ["Esc", "let go of the selection"],
];
const state = { sets: [], aligned: null, threshold: 0.04, root: 0, second: null, renormalize: true, measure: "proximity", compare: "", prune: false, fold: true, filter: headFilter(""), selection: null, hover: null, first: null, asking: false, walking: false, looking: false, shown: null, note: "" };
let scene = null, drawn = [], colours = LIGHT, frame = 0, moved = false;

const panel = new Panel($("panel"), (selection) => choose(selection));
panel.makeRoot = (node) => rootAt(node);

const setOf = (prompt) => state.sets.find((s) => s.prompt === prompt && s.measure === state.measure) || state.sets.find((s) => s.prompt === prompt);
const lowest = () => Math.max(...shownSets().map((s) => s.floor));
const shownSets = () => (state.compare === "prompt" ? [setOf("A"), setOf("B")] : [setOf("A")]);

// The slider is logarithmic from the lowest threshold (at least 1e-4, and then 0 itself) to one half.
const base = () => Math.max(lowest(), 1e-4);
const toSlider = (threshold) => (threshold <= lowest() ? 0 : (1000 * Math.log(threshold / base())) / Math.log(0.5 / base()));
const fromSlider = (at) => (at <= 0 ? lowest() : Number((base() * (0.5 / base()) ** (at / 1000)).toPrecision(3)));

function rebuild({ refit = false } = {}) {
  if (!state.sets.length) return;
  const a = setOf("A"), began = performance.now();
  state.threshold = Math.min(Math.max(state.threshold, lowest()), 0.999);
  const routes = [extract(a, [state.root], state.threshold, state.renormalize)];
  if (state.compare === "position") routes.push(extract(a, [state.second], state.threshold, state.renormalize));
  if (state.compare === "prompt") routes.push(extract(setOf("B"), [state.second], state.threshold, state.renormalize));
  const unknown = routes.find((route) => route.trace.lazy && (route.untraced >= 0 || route.open) && !route.trace.answered.has(choiceOf(route)));
  if (unknown) { walk(unknown, refit); return; }
  state.shown = Object.fromEntries(["root", "second", "threshold", "renormalize", "measure", "compare"].map((name) => [name, state[name]]));
  const columns = allColumns(a, state.compare === "prompt" ? setOf("B") : state.compare ? a : null, state.aligned);
  const kept = state.selection;
  scene = buildScene(routes, columns, { prune: state.prune, fold: state.fold, filter: state.filter });
  state.hover = null;
  state.selection = reselect(kept);
  state.took = performance.now() - began;
  if (refit) fit();
  showState();
  look();
  panel.show(scene, state.selection);
  draw();
}

// The same selection in a new scene, if it is still there.
function reselect(kept) {
  if (!kept) return null;
  if (kept.type === "node") {
    const node = scene.nodes.get(kept.node.key);
    return node ? { type: "node", node } : null;
  }
  if (kept.type === "head") return kept.side < scene.routes.length ? { ...kept, line: scene.byKey.get(kept.line && kept.line.key) } : null;
  const line = scene.byKey.get(kept.line.key);
  return line ? { type: "edge", line } : null;
}

function showState() {
  const a = setOf("A"), subEdges = scene.routes.map((r) => r.parts.length), edges = scene.routes.map((r) => r.edges.length);
  $("about").textContent = `${a.model} · ${a.layers} layers × ${a.heads} heads · ${state.compare === "prompt" ? `${a.n} and ${setOf("B").n}` : a.n} tokens · ${a.precision}, ${a.measure}`;
  $("threshold").value = toSlider(state.threshold);
  $("threshold").setAttribute("aria-valuetext", String(state.threshold));
  if (document.activeElement !== $("threshold-number")) $("threshold-number").value = Number(state.threshold.toPrecision(6));
  $("threshold-number").min = lowest();
  $("root").value = state.root;
  $("root").max = a.n - 1;
  $("root-b-tool").hidden = !state.compare;
  $("root-b").value = state.second ?? "";
  $("renormalize").checked = state.renormalize;
  $("prune").checked = state.prune;
  $("fold").checked = state.fold;
  $("fold-tool").hidden = !scene.messages;
  $("measure").value = a.measure;
  for (const option of $("measure").options) option.disabled = !state.sets.some((s) => s.prompt === "A" && s.measure === option.value);
  $("compare").value = state.compare;
  $("compare").options[2].disabled = !setOf("B");
  const each = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
  $("count").textContent = subEdges.map((n, i) => `${scene.compared ? "AB"[i] + ": " : ""}${each(n, "sub-edge")}, ${each(edges[i], "edge")}`).join(" · ");
  notice();
  strip($("prompt"), a, 0);
  $("name-a").hidden = $("strip-b").hidden = state.compare !== "prompt";
  if (state.compare === "prompt") strip($("prompt-b"), setOf("B"), 1);
}

function notice() {
  const untraced = scene.routes.find((r) => r.untraced >= 0), open = scene.routes.reduce((sum, r) => sum + r.open, 0);
  const text = untraced ? `Position ${untraced.untraced} was not traced, and the route reaches it: trace without positions=.`
    : state.filter.wrong ? "Not understood: show takes heads and kinds, such as L5H3, L20, H3, ffn, attention, residual."
    : scene.filter.active && !scene.lines.some((line) => line.shown) ? "No edge of this route passes the filter."
    : open ? `At this threshold ${open} decision${open === 1 ? "" : "s"} of the route lie${open === 1 ? "s" : ""} within the certified intervals: estimates decide here. Certain without a new pass: ${setOf("A").thresholds.join(", ") || "none"}.` : state.note;
  state.note = "";
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// A prompt as buttons, one per token; built once, then only classes change. In a chat each message begins a line, with its role.
function strip(box, trace, side) {
  if (box.trace !== trace) {
    box.trace = trace;
    box.showing = false;
    box.classList.toggle("chat", trace.chat.length > 0);
    box.replaceChildren();
    trace.tokens.forEach((token, i) => {
      const role = roleOf(trace, i), begins = trace.chat.length && (!i || trace.messageOf[i] !== trace.messageOf[i - 1]);
      if (begins && role === "template") gap(box);
      else if (begins) add(box, "b", role, `role role-${roleIndex(role)}`);
      const button = add(box, "button");
      button.type = "button";
      button.tabIndex = -1;
      add(button, "bdi", token);
      button.title = `position ${i}${role && `, ${role}`}`;
      button.dataset.position = i;
      for (let n = 0; n < (role === "template" ? 0 : trace.breaks[i]); n++) add(box, "br");
    });
  }
  const chosen = side ? state.second : state.root;
  const both = state.compare === "position", place = scene.placeOf[side], second = scene.placeOf[1];
  let fold = null;
  for (const child of box.children) {
    if (child.classList.contains("gap")) [fold, child.hidden] = [child, true];
    if (child.dataset.position === undefined) continue;
    const i = +child.dataset.position, role = roleOf(trace, i);
    const isRoot = i === chosen, two = both && i === state.second, reached = scene.touched[place[i]] || (both && scene.touched[second[i]]);
    child.className = `${reached ? "touched" : ""} ${isRoot || two ? "root" : ""} ${two || (side && isRoot) ? "two" : ""} ${role && role !== "template" ? `said role-${roleIndex(role)}` : role}`;
    child.hidden = folded(trace, i, place, second, both);
    if (child.hidden) fold.hidden = false;
  }
  if (box.chosen !== chosen || box.folded !== state.fold || !box.showing) {
    [box.chosen, box.folded, box.showing] = [chosen, state.fold, true];
    const found = box.querySelector(`[data-position="${chosen}"]`);
    if (found) box.scrollTop = found.offsetTop - box.offsetTop - box.clientHeight / 2;
  }
}

// Is a token of a template left out? Not where a route touches it.
const folded = (trace, i, place, second, both) => state.fold && roleOf(trace, i) === "template" && !scene.touched[place[i]] && !(both && scene.touched[second[i]]);

// In the place of tokens that are folded.
function gap(box) {
  const found = add(box, "button", "⋯", "gap");
  found.type = "button";
  found.tabIndex = -1;
  found.title = "tokens of the template that the route does not touch (t)";
  found.setAttribute("aria-label", found.title);
}

function marked() {
  const found = state.hover || state.selection, mark = { node: null, lines: null, near: null, column: -1 };
  if (!found) return mark;
  if (found.type === "node") {
    mark.node = found.node;
    mark.column = found.node.column;
    if (found.node.into.length || found.node.out.length) {
      mark.lines = new Set(found.node.into.length ? found.node.into : found.node.out);
    }
  } else if (found.line) mark.lines = new Set([found.line]);
  if (found.type === "head") mark.lines = new Set(linesOfHead(found));
  if (mark.lines) {
    mark.near = new Set();
    for (const line of mark.lines) for (const key of [line.from * scene.count + line.s, line.to * scene.count + line.t]) mark.near.add(scene.nodes.get(key));
  }
  return mark;
}

function linesOfHead({ layer, head, side }) {
  const route = scene.routes[side];
  return scene.lines.filter((line) => {
    if (line.layer !== layer || line.kind !== ATTENTION || line.edge[side] < 0) return false;
    const { edges, parts } = route, e = line.edge[side];
    for (let p = edges.first[e]; p < edges.first[e] + edges.count[e]; p++) if (parts.head[p] === head) return true;
    return false;
  });
}

function draw() {
  if (frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    if (!scene) return;
    const began = performance.now(), ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawn = paint(new CanvasSurface(context), scene, view, colours, marked(), pulling ? 1500 : MAX_DRAWN);
    state.drew = performance.now() - began;
  });
}

function resize() {
  const box = canvas.parentElement.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  if (!box.width || !box.height) return;
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  view.width = box.width;
  view.height = box.height;
  if (scene && !moved) fit();
  draw();
}

function fit() {
  moved = false;
  const root = scene.x[scene.placeOf[0][state.root]];
  view.bottom = 30 + (scene.messages ? ROLE_ROOM : 0) + Math.min(Math.max(...scene.shown.map((i) => [...labelOf(scene, i)].length), 4) * 5.6 + 14, 112);
  view.fit(scene, root < 0 ? 0 : root);
  draw();
}

function choose(selection) {
  state.selection = selection;
  state.hover = null;
  look();
  panel.show(scene, selection);
  $("tip").hidden = true;
  const text = selection ? sentence(selection) : "";
  $("live").textContent = text;
  if (selection && selection.type !== "head") reveal(selection);
  draw();
}

// Pan so that a selection made by key or in the panel can be seen.
function reveal(selection) {
  const spots = selection.type === "node" ? [[selection.node.column, selection.node.height]] : [[selection.line.s, selection.line.from], [selection.line.t, selection.line.to]];
  for (const [column, height] of spots) {
    const x = view.x(scene.x[column]), y = view.y(height);
    if (x < view.left + 12) view.x0 -= view.left + 40 - x;
    if (x > view.width - 24) view.x0 += x - view.width + 60;
    if (y < view.top) view.y0 += view.top + 20 - y;
    if (y > view.height - view.bottom) view.y0 -= y - (view.height - view.bottom) + 10;
  }
}

function sentence(selection) {
  const trace = scene.routes[0].trace;
  if (selection.type === "head") return `${headName(selection.layer, selection.head)} at position ${selection.query}`;
  if (selection.type === "node") {
    const { node } = selection;
    return `${labelOf(scene, node.column, 30)} ${stateText(trace, node.height)}, ${node.into.length} edges enter`;
  }
  const { line } = selection, values = line.value.filter((_, side) => line.edge[side] >= 0).map(number).join(" and ");
  return `layer ${line.layer} ${SHORT[line.kind]}${line.s === line.t ? "" : ` from ${labelOf(scene, line.s, 30)}`} to ${labelOf(scene, line.t, 30)}: ${values}`;
}

function tip(found, x, y) {
  const box = $("tip");
  if (!found) { box.hidden = true; return; }
  box.replaceChildren();
  const trace = scene.routes[0].trace;
  if (found.type === "node") {
    const { node } = found, column = scene.columns[node.column];
    add(box, "div", `${isolated(labelOf(scene, node.column, 30))}@${column.a >= 0 ? column.a : column.b}`);
    const role = scene.messages ? scene.messages[node.column].role : "";
    add(box, "div", stateText(trace, node.height) + (role && `, ${role}`), "muted");
    const guess = column.a >= 0 && lensOf(trace, node.height, column.a);
    if (guess) add(box, "div", `lens: ${guess.slice(0, 3).map(([text, p]) => `${isolated(text)} ${p.toFixed(2)}`).join("  ")}`);
  } else {
    const { line } = found, names = [line.s, line.t].map((i) => isolated(labelOf(scene, i, 20)));
    add(box, "div", line.s === line.t ? names[1] : names.join(" → "));
    add(box, "div", `layer ${line.layer}: ${KIND_TEXT[line.kind]}`, "muted");
    scene.routes.forEach((route, side) => {
      const e = line.edge[side];
      if (e < 0) return;
      const heads = [];
      if (line.kind === ATTENTION) for (let p = route.edges.first[e]; p < route.edges.first[e] + route.edges.count[e]; p++) heads.push([route.parts.head[p], route.parts.value[p]]);
      heads.sort((p, q) => Math.abs(q[1]) - Math.abs(p[1]));
      const [low, high] = edgeBounds(route, e);
      add(box, "div", `${scene.compared ? "AB"[side] + ": " : ""}${number(route.edges.value[e])}${high - low > 5e-5 ? `  (importance ${low.toFixed(4)} to ${high.toFixed(4)})` : ""}`);
      if (heads.length) add(box, "div", heads.slice(0, 5).map(([h, v]) => `${headName(line.layer, h)} ${number(v)}`).join("  ") + (heads.length > 5 ? ` +${heads.length - 5}` : ""), "muted");
    });
  }
  box.hidden = false;
  const w = box.offsetWidth, h = box.offsetHeight;
  box.style.left = `${Math.max(4, x + 16 + w > view.width ? x - w - 14 : x + 16)}px`;
  box.style.top = `${Math.max(4, Math.min(y + 14, view.height - h - 4))}px`;
}

function rootAt(node) {
  const { a, b } = scene.columns[node.column];
  if (a >= 0) state.root = a;
  else if (state.compare === "prompt") state.second = b;
  rebuild();
}

// Pointer: drag pans, wheel pans sideways (Ctrl: zooms), a click selects.
let pulling = null;
const spot = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  pulling = { at: spot(event), x0: view.x0, y0: view.y0, far: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = spot(event);
  if (pulling) {
    const dx = x - pulling.at[0], dy = y - pulling.at[1];
    if (!pulling.far && Math.hypot(dx, dy) < 4) return;
    pulling.far = moved = true;
    canvas.classList.add("pulled");
    view.x0 = pulling.x0 - dx;
    view.y0 = pulling.y0 + dy;
    view.clamp(scene);
    tip(null);
    draw();
    return;
  }
  const found = pick(scene, view, drawn, x, y), before = state.hover;
  state.hover = found;
  canvas.classList.toggle("over", Boolean(found));
  tip(found, x, y);
  if ((found && (found.node || found.line)) !== (before && (before.node || before.line))) draw();
});
const release = (event) => {
  const was = pulling;
  pulling = null;
  canvas.classList.remove("pulled");
  if (was && !was.far && event.type === "pointerup") choose(pick(scene, view, drawn, ...spot(event)));
  else draw();
};
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => { if (!pulling) { state.hover = null; tip(null); draw(); } });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  moved = true;
  const [x, y] = spot(event), unit = event.deltaMode === 1 ? 16 : 1;
  if (event.ctrlKey || event.metaKey) view.zoom(Math.exp(-event.deltaY * unit * 0.004), x, y, event.shiftKey);
  else if (scene.width * view.sx > view.width - view.left && !event.shiftKey) view.x0 += (Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.deltaY) * unit;
  else view.y0 -= event.deltaY * unit;
  view.clamp(scene);
  draw();
}, { passive: false });

// Keys, on the graph and on the page.
function step(key) {
  const found = state.selection, count = scene.count;
  if (!found || found.type === "head") {
    const root = scene.nodes.get(2 * scene.layers * count + scene.placeOf[0][state.root]);
    return choose(found && found.line ? { type: "edge", line: found.line } : { type: "node", node: root });
  }
  if (found.type === "edge") {
    const { line } = found, end = (height, column) => ({ type: "node", node: scene.nodes.get(height * count + column) });
    if (key === "ArrowUp") return choose(end(line.to, line.t));
    if (key === "ArrowDown") return choose(end(line.from, line.s));
    const into = scene.nodes.get(line.to * count + line.t).into, at = into.indexOf(line) + (key === "." || key === "ArrowRight" ? 1 : -1);
    return into[at] && choose({ type: "edge", line: into[at] });
  }
  const { node } = found;
  if (key === "." || key === ",") return node.into.length && choose({ type: "edge", line: key === "." ? node.into[0] : node.into[node.into.length - 1] });
  const vertical = key === "ArrowUp" || key === "ArrowDown", sign = key === "ArrowUp" || key === "ArrowRight" ? 1 : -1;
  let best = null;
  for (const other of scene.nodes.values()) {
    const along = vertical ? other.height - node.height : other.column - node.column;
    if ((vertical ? other.column !== node.column : other.height !== node.height) || along * sign <= 0) continue;
    if (!best || Math.abs(along) < best[0]) best = [Math.abs(along), other];
  }
  return best && choose({ type: "node", node: best[1] });
}

function strongestHead(line) {
  const side = line.edge[0] >= 0 ? 0 : 1, { edges, parts } = scene.routes[side], e = line.edge[side];
  let best = edges.first[e];
  for (let p = best; p < edges.first[e] + edges.count[e]; p++) if (Math.abs(parts.value[p]) > Math.abs(parts.value[best])) best = p;
  if (line.kind === ATTENTION && parts.head[best] !== REST) choose({ type: "head", layer: line.layer, head: parts.head[best], query: edges.target[e], side, line });
}

function slide(by) {
  state.threshold = fromSlider(Math.min(Math.max(toSlider(state.threshold) + by, 0), 1000));
  rebuild();
}

function compareWith(what) {
  state.compare = what === "prompt" && !setOf("B") ? "" : what;
  if (state.compare === "position" && (state.second === null || state.second === state.root || state.second >= setOf("A").n)) state.second = Math.max(state.root - 1, 0);
  if (state.compare === "prompt") state.second = setOf("B").n - 1;
  state.selection = null;
  rebuild({ refit: true });
}

function measureIs(measure) {
  if (!state.sets.some((s) => s.prompt === "A" && s.measure === measure)) return;
  state.measure = measure;
  rebuild();
}

function themeIs(name) {
  document.documentElement.dataset.theme = name;
  colours = name === "dark" ? DARK : LIGHT;
  draw();
}

const ACTIONS = {
  "+": () => slide(20), "=": () => slide(20), "-": () => slide(-20), "−": () => slide(-20),
  r: () => { const s = state.selection; if (!s) $("root").focus(); else if (s.type === "node") rootAt(s.node); else if (s.line) rootAt({ column: s.line.t }); },
  n: () => { state.renormalize = !state.renormalize; rebuild(); },
  s: () => measureIs(setOf("A").measure === "signed" ? "proximity" : "signed"),
  c: () => compareWith({ "": "position", position: setOf("B") ? "prompt" : "", prompt: "" }[state.compare]),
  t: () => { state.fold = !state.fold; rebuild({ refit: true }); },
  p: () => { state.prune = !state.prune; rebuild({ refit: true }); },
  "/": () => $("filter").focus(), f: fit, d: () => themeIs(colours === DARK ? "light" : "dark"), "?": () => $("keys").showModal(),
  "]": () => zoomBy(1.25), "[": () => zoomBy(0.8), Escape: () => choose(null),
};
const zoomBy = (factor) => { moved = true; view.zoom(factor, view.left + (view.width - view.left) / 2, view.height / 2); view.clamp(scene); draw(); };

document.addEventListener("keydown", (event) => {
  if (!scene || event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (typing) { if (event.key === "Escape") canvas.focus(); return; }
  const onGraph = event.target === canvas || event.target === document.body;
  if (onGraph && (event.key.startsWith("Arrow") || event.key === "," || event.key === ".")) step(event.key);
  else if (onGraph && event.key === "Enter" && state.selection && state.selection.line) strongestHead(state.selection.line);
  else if (ACTIONS[event.key]) ACTIONS[event.key]();
  else return;
  event.preventDefault();
});

function position(input, trace) {
  const value = Number(input.value);
  return Number.isInteger(value) && value >= 0 && value < trace.n && input.value !== "" ? value : null;
}
$("threshold").addEventListener("input", () => { state.threshold = fromSlider(+$("threshold").value); rebuild(); });
$("threshold-number").addEventListener("input", () => {
  const value = Number($("threshold-number").value);
  if ($("threshold-number").value === "" || !(value >= 0 && value < 1)) return;
  state.threshold = value;
  rebuild();
});
$("threshold-number").addEventListener("change", () => { $("threshold-number").value = Number(state.threshold.toPrecision(6)); });
$("root").addEventListener("change", () => { const p = position($("root"), setOf("A")); if (p !== null) state.root = p; rebuild(); });
$("root-b").addEventListener("change", () => { const p = position($("root-b"), state.compare === "prompt" ? setOf("B") : setOf("A")); if (p !== null) state.second = p; rebuild(); });
$("renormalize").addEventListener("change", () => { state.renormalize = $("renormalize").checked; rebuild(); });
$("prune").addEventListener("change", () => { state.prune = $("prune").checked; rebuild({ refit: true }); });
$("fold").addEventListener("change", () => { state.fold = $("fold").checked; rebuild({ refit: true }); });
$("measure").addEventListener("change", () => measureIs($("measure").value));
$("compare").addEventListener("change", () => compareWith($("compare").value));
$("filter").addEventListener("input", () => { state.filter = headFilter($("filter").value); rebuild(); });
$("fit").addEventListener("click", fit);
$("zoom-in").addEventListener("click", () => zoomBy(1.25));
$("zoom-out").addEventListener("click", () => zoomBy(0.8));
$("theme").addEventListener("click", ACTIONS.d);
$("help").addEventListener("click", ACTIONS["?"]);
$("keys-close").addEventListener("click", () => $("keys").close());
for (const [id, side] of [["prompt", 0], ["prompt-b", 1]]) {
  $(id).addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.classList.contains("gap")) { ACTIONS.t(); return; }
    const chosen = +button.dataset.position;
    if (side || (event.shiftKey && state.compare === "position")) state.second = chosen;
    else if (event.shiftKey) Object.assign(state, { second: chosen, compare: "position", selection: null });
    else state.root = chosen;
    rebuild({ refit: state.prune });
  });
}

// Export: the whole graph, not only what the window shows.
function pictureSvg(palette = colours) {
  const whole = wholeView(scene, view.bottom);
  const surface = new SvgSurface(whole.width, whole.height, palette.page);
  paint(surface, scene, whole, palette, { node: null, lines: null, near: null, column: -1 }, MAX_LINES);
  return surface.toString();
}

function save(blob, name) {
  const link = document.createElement("a"), url = URL.createObjectURL(blob);
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const picturePng = () => new Promise((resolve, reject) => {
  const whole = wholeView(scene, view.bottom), copy = document.createElement("canvas"), ratio = Math.min(2, 16000 / whole.width, 16000 / whole.height);
  copy.width = Math.round(whole.width * ratio);
  copy.height = Math.round(whole.height * ratio);
  const c = copy.getContext("2d");
  c.scale(ratio, ratio);
  paint(new CanvasSurface(c), scene, whole, colours, { node: null, lines: null, near: null, column: -1 }, MAX_LINES);
  copy.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large for this browser"))), "image/png");
});
const fileName = (ending) => `route-${state.root}-${state.threshold}.${ending}`;
$("save-svg").addEventListener("click", () => save(new Blob([pictureSvg()], { type: "image/svg+xml" }), fileName("svg")));
$("save-png").addEventListener("click", () => picturePng().then((blob) => save(blob, fileName("png")), (error) => { $("notice").textContent = error.message; $("notice").hidden = false; }));
const setting = () => `Threshold ${Number(state.threshold.toPrecision(6))}, ${state.renormalize ? "renormalised" : "not renormalised"}, root ${scene.routes.map((route, side) => (scene.compared ? "AB"[side] + " " : "") + tokenText(route.trace, route.roots[0])).join(", ")}${$("filter").value ? `, showing ${$("filter").value}` : ""}`;
window.addEventListener("beforeprint", () => {
  if (!scene) return;
  $("printed").replaceChildren();
  add($("printed"), "p", setting());
  $("printed").append(document.importNode(new DOMParser().parseFromString(pictureSvg(LIGHT), "image/svg+xml").documentElement, true));
  document.documentElement.dataset.screen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
window.addEventListener("afterprint", () => {
  $("printed").replaceChildren();
  if (document.documentElement.dataset.screen) document.documentElement.dataset.theme = document.documentElement.dataset.screen;
});

// The logit lens and the attention weights belong to the prompt, whatever the measure.
function shareDetails(set, from) {
  if (!from || from === set) return;
  for (const name of ["details", "lens_state", "lens_token", "lens_probability", "attention_row", "attention_key", "attention_weight"]) set[name] = from[name];
}

// Put traces on show: {sets, columns, start} and their blocks.
async function show(about, blocks, keep = false) {
  const began = performance.now(), sets = [];
  for (let i = 0; i < about.sets.length; i++) sets.push(await openTrace(about.sets[i], blocks[i]));
  const { start } = about, first = sets[0];
  for (const set of sets.filter((one) => one.lazy)) {
    const same = sets.find((one) => one.prompt === set.prompt && one.looked);
    Object.assign(set, { answered: new Set(), looked: same ? same.looked : { lens: new Map(), attention: new Map(), missing: "", waiting: false } });
  }
  for (const set of sets) shareDetails(set, sets.find((one) => one.prompt === set.prompt && one.details.keys));
  Object.assign(state, { sets, aligned: about.columns, root: start.root, second: start.second, selection: null, hover: null });
  if (!keep) Object.assign(state, { threshold: start.threshold, renormalize: start.renormalize });
  state.measure = sets.some((s) => s.measure === state.measure) ? state.measure : first.measure;
  state.compare = sets.some((s) => s.prompt === "B") ? "prompt" : start.second !== null ? "position" : "";
  state.prune = first.n > 60;
  document.documentElement.classList.add("live", "shown");
  resize();
  rebuild({ refit: true });
  state.opened = performance.now() - began;
}

// A question to the server: its answer, or an error with one sentence.
async function post(path, question) {
  const { key } = $("ask").dataset;
  const reply = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json", "X-Flowroutes": key }, body: JSON.stringify(question) })
    .catch(() => { throw new Error("the server does not answer; is it still running?"); });
  const found = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(found.error || `the server answered ${reply.status}`);
  return found;
}

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Trace what was typed, alone or beside the first prompt.
async function ask(beside) {
  const typed = { text: $("text").value, chat: $("chat") ? $("chat").checked : false }, first = beside ? state.first : typed;
  if (!typed.text.trim() || state.asking) return;
  state.asking = true;
  askable();
  say("Tracing …");
  try {
    const { threshold, renormalize, measure } = state;
    const found = await post($("ask").dataset.url, { ...first, ...(beside ? { other: typed.text, other_chat: typed.chat } : {}), threshold, renormalize, measure });
    for (const set of found.sets) set.asked = set.prompt === "A" ? first : typed;
    if (!beside) state.first = typed;
    await show(found, found.data, true);
  } catch (error) {
    say(`Not traced: ${error.message}`);
  } finally {
    state.asking = false;
    askable();
  }
}

// What a served trace has been asked for: not the same twice.
const choiceOf = ({ roots, threshold, renormalize }) => JSON.stringify([roots, threshold, renormalize]);

// The route reaches rows that the page has not, or decisions are open: the server walks it from the states it keeps. What is on show stays until
// it answers; of choices made meanwhile the last one counts.
async function walk(route, refit) {
  state.refit ||= refit;
  if (state.walking) return;
  state.walking = true;
  const { trace, roots, threshold, renormalize } = route, { number, have, measure, asked } = trace, sets = state.sets;
  const slow = setTimeout(() => say("Evaluating the rows of this route …"), 300);
  let failed = "";
  try {
    const found = await post("/route", { ...asked, number, have, measure, roots, threshold, renormalize });
    const arrays = await openArrays(found, found.data);
    if (found.again) Object.assign(trace, noRows(trace.layers * trace.n, trace.heads, arrays), { answered: new Set() });
    addRows(trace, found, arrays);
    trace.answered.add(choiceOf(route));
    state.note = found.note;
  } catch (error) {
    failed = error.message;
  }
  clearTimeout(slow);
  state.walking = false;
  if (sets !== state.sets) return; // another prompt is on show
  const whole = state.refit;
  state.refit = false;
  if (failed) Object.assign(state, state.shown);
  rebuild({ refit: whole });
  if (failed) say(`This route is not known: ${failed}`);
}

// What the panel and the picture would show of states and heads of served traces, and the page has not: [states, rows] of one trace.
function unseen(trace, side) {
  const found = state.selection, states = [[2 * trace.layers, scene.routes[side].roots[0]]], rows = [];
  const place = (column) => (side && state.compare === "prompt" ? scene.columns[column].b : scene.columns[column].a);
  if (found && found.type === "node") states.push([found.node.height, place(found.node.column)]);
  if (found && found.type === "edge" && found.line.edge[side] >= 0) {
    const { line } = found;
    if (line.kind === ATTENTION) rows.push([line.layer, place(line.t)]);
    else states.push([line.from, place(line.s)], [line.to, place(line.t)]);
  }
  if (found && found.type === "head" && found.side === side) rows.push([found.layer, found.query]);
  const { lens, attention } = trace.looked, wanted = (known) => ([a, b]) => b >= 0 && !known.has(a * trace.n + b);
  return [states.filter(wanted(lens)), rows.filter(wanted(attention))];
}

async function look() {
  if (state.looking || !scene) return;
  for (const [side, { trace }] of scene.routes.entries()) {
    if (!trace.looked) continue;
    const [states, rows] = unseen(trace, side), { looked, asked } = trace;
    if (!states.length && !rows.length) continue;
    state.looking = looked.waiting = true;
    try {
      const found = await post("/state", { ...asked, threshold: trace.floor, states, rows });
      for (const [height, position] of states) looked.lens.set(height * trace.n + position, null);
      for (const [layer, query] of rows) looked.attention.set(layer * trace.n + query, []);
      for (const [height, position, guesses] of found.lens) looked.lens.set(height * trace.n + position, guesses);
      for (const [layer, query, heads] of found.attention) looked.attention.set(layer * trace.n + query, heads);
      looked.missing = found.missing;
      if (found.note) say(found.note);
      state.looking = looked.waiting = false;
      look(); // the next one, if there is one
    } catch (error) {
      looked.missing = `Not known: ${error.message}`;
      state.looking = looked.waiting = false;
    }
    panel.show(scene, state.selection);
    draw();
    return;
  }
}

function askable() {
  $("run").disabled = state.asking;
  $("run-other").disabled = state.asking || !state.first;
}

function begin() {
  for (const [key, text] of KEYS) {
    add($("key-list"), "dt", key);
    add($("key-list"), "dd", text);
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  themeIs(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => themeIs(dark.matches ? "dark" : "light"));
  new ResizeObserver(resize).observe($("stage"));
  const about = JSON.parse($("about-data").textContent), form = $("ask");
  document.documentElement.classList.add("live");
  if (form) {
    state.first = about.prompt && { text: about.prompt, chat: false };
    askable();
    form.addEventListener("submit", (event) => { event.preventDefault(); ask(event.submitter && event.submitter.id === "run-other"); });
    $("text").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(false); } });
    if (!about.sets.length) $("text").focus();
  }
  if (!about.sets.length) return;
  const blocks = [...document.querySelectorAll("script.block")].map((block) => block.textContent);
  show(about, blocks).catch((error) => {
    $("notice").textContent = `This page's data cannot be read: ${error.message}`;
    $("notice").hidden = false;
  });
}

// For tests and for the curious: what is shown, read from the console.
window.flowroutes = { state, view, get scene() { return scene; }, extract, set: (changes) => { Object.assign(state, changes); rebuild(); }, choose, pictureSvg, picturePng, rebuild };
begin();
