// Traces as the page holds them, and routes extracted from them exactly as results/extract.py does.

const REST = 65535; // head of the sub-edges that are known only as a sum
const KINDS = ["attention", "mixer", "attention_residual", "ffn", "ffn_residual"];
const [ATTENTION, MIXER, ATTENTION_RESIDUAL, FFN, FFN_RESIDUAL] = [0, 1, 2, 3, 4];
const TYPES = { float32: Float32Array, uint32: Uint32Array, uint16: Uint16Array, uint8: Uint8Array };

async function unpack(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// Sums of counts: entry i is where group i begins.
function starts(counts) {
  const result = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) result[i + 1] = result[i] + counts[i];
  return result;
}

async function openTrace(about, text) {
  const arrays = await openArrays(about, text), n = about.tokens.length;
  about.messageOf = new Int32Array(n).fill(-1); // which message of a chat a token belongs to, -1: none, or the template's
  about.chat.forEach(([, first, stop], i) => about.messageOf.fill(i, first, stop));
  if (about.lazy) return addRows({ ...about, n, ...noRows(about.layers * n, about.heads, arrays) }, about, arrays);
  return indexed({ ...about, n, ...arrays });
}

async function openArrays({ blocks }, text) {
  const buffer = await unpack(text), arrays = {};
  for (const [name, [type, at, length]] of Object.entries(blocks)) arrays[name] = new TYPES[type](buffer, at, length);
  return arrays;
}

function indexed(trace) {
  trace.rowPairs = starts(trace.row_pairs);
  trace.pairEdges = starts(trace.pair_heads);
  return trace;
}

// A served trace of which no row is known yet. Numbers of a row are NaN where it was not evaluated.
const SPARSE = ["pair_key", "pair_heads", "head", "value"];
function noRows(rows, heads, { rows: mine, row_pairs, pair_key, pair_heads, head, value, ...numbers }) {
  const trace = { row_pairs: new Uint32Array(rows), pair_key: new Uint32Array(0), pair_heads: new Uint16Array(0), head: new Uint16Array(0), value: new Float32Array(0) };
  for (const name of Object.keys(numbers)) trace[name] = new Float32Array(rows * (name.startsWith("heads_") ? heads : 1)).fill(NaN);
  return indexed(trace);
}

// Put rows that the server evaluated into a trace, in the place of what it had of them.
function addRows(trace, { number, have, floor = trace.floor }, arrays) {
  const old = { ...trace }, fresh = indexed({ ...arrays }), count = trace.row_pairs.length, place = new Int32Array(count).fill(-1);
  Object.assign(trace, { number, have, floor });
  for (const name of Object.keys(arrays)) {
    if (name === "rows" || name === "row_pairs" || SPARSE.includes(name)) continue;
    const each = name.startsWith("heads_") ? trace.heads : 1;
    arrays.rows.forEach((row, i) => trace[name].set(arrays[name].subarray(i * each, (i + 1) * each), row * each));
  }
  arrays.rows.forEach((row, i) => { place[row] = i; });
  const from = (row) => (place[row] < 0 ? [old, row] : [fresh, place[row]]);
  trace.row_pairs = Uint32Array.from({ length: count }, (_, row) => { const [source, at] = from(row); return source.row_pairs[at]; });
  let pairs = 0, edges = 0;
  for (let row = 0; row < count; row++) {
    const [source, at] = from(row);
    pairs += source.row_pairs[at];
    edges += source.pairEdges[source.rowPairs[at + 1]] - source.pairEdges[source.rowPairs[at]];
  }
  Object.assign(trace, { pair_key: new Uint32Array(pairs), pair_heads: new Uint16Array(pairs), head: new Uint16Array(edges), value: new Float32Array(edges) });
  pairs = edges = 0;
  for (let row = 0; row < count; row++) {
    const [source, at] = from(row), p = source.rowPairs[at], q = source.rowPairs[at + 1], e = source.pairEdges[p], f = source.pairEdges[q];
    if (p === q) continue;
    for (const name of ["pair_key", "pair_heads"]) trace[name].set(source[name].subarray(p, q), pairs);
    for (const name of ["head", "value"]) trace[name].set(source[name].subarray(e, f), edges);
    pairs += q - p;
    edges += f - e;
  }
  return indexed(trace);
}

// What an importance of one row is multiplied by to get its lower and upper bound.
function factors(trace, row) {
  if (trace.measure === "signed") return [1, 1];
  const low = trace.normaliser_low[row], high = trace.normaliser_high[row];
  if (!(high > low)) return [1, 1];
  const middle = Math.fround(low + Math.fround(Math.fround(high - low) / 2));
  return [high > 0 ? middle / high : 1, low > 0 ? middle / low : Infinity];
}

class Columns {
  constructor(names) {
    this.length = 0;
    this.size = 1024;
    for (const [name, type] of Object.entries(names)) this[name] = new type(this.size);
    this.names = Object.keys(names);
  }
  // Make room for one more row; its place.
  next() {
    if (this.length === this.size) {
      this.size *= 2;
      for (const name of this.names) {
        const larger = new this[name].constructor(this.size);
        larger.set(this[name]);
        this[name] = larger;
      }
    }
    return this.length++;
  }
}

const EDGE = { layer: Uint16Array, kind: Uint8Array, source: Uint32Array, target: Uint32Array, value: Float64Array, raw: Float64Array, first: Uint32Array, count: Uint32Array };
class Edges extends Columns {
  constructor() { super(EDGE); }
  add(layer, kind, source, target, value, raw, first, count) {
    const i = this.next();
    this.layer[i] = layer;
    this.kind[i] = kind;
    this.source[i] = source;
    this.target[i] = target;
    this.value[i] = value;
    this.raw[i] = raw;
    this.first[i] = first;
    this.count[i] = count;
  }
}

const PART = { head: Uint16Array, value: Float64Array, raw: Float64Array };
class Parts extends Columns {
  constructor() { super(PART); }
  add(head, value, raw) {
    const i = this.next();
    this.head[i] = head;
    this.value[i] = value;
    this.raw[i] = raw;
  }
}

// Parts that come from the same position into the node after attention (parallel block: after the block).
function sameTokenParts(trace, layer) {
  const parts = [[ATTENTION_RESIDUAL, trace.attention_residual]];
  if (trace.mixers[layer]) parts.push([MIXER, trace.mixer]);
  if (trace.shapes[layer] === "parallel") parts.push([FFN, trace.ffn]);
  return parts;
}

// The route of `roots`: `edges` with heads summed, `parts` with the heads of each, `open`: decisions that the certified intervals leave open.
function extract(trace, roots, threshold, renormalize) {
  const { n, layers } = trace, edges = new Edges(), parts = new Parts();
  const limit = Math.fround(threshold); // numpy compares float32 arrays in float32
  const route = { trace, roots, threshold, renormalize, edges, parts, open: 0, untraced: -1 };
  let active = new Uint8Array(n);
  for (const root of roots) active[root] = 1;
  const alone = (layer, kind, row, position, value, total) => {
    edges.add(layer, kind, position, position, value / total, value, parts.length, 1);
    parts.add(REST, value / total, value);
  };
  for (let layer = layers - 1; layer >= 0; layer--) {
    const base = layer * n, below = new Uint8Array(n);
    if (trace.shapes[layer] !== "parallel") {
      for (let t = 0; t < n; t++) {
        if (!active[t]) continue;
        const row = base + t, f = trace.ffn[row], r = trace.ffn_residual[row];
        if (Number.isNaN(f)) return Object.assign(route, { untraced: t });
        const keepF = Math.abs(f) > threshold, keepR = Math.abs(r) > threshold;
        const total = renormalize ? (keepF ? Math.abs(f) : 0) + (keepR ? Math.abs(r) : 0) : 1;
        if (keepF) alone(layer, FFN, row, t, f, total);
        if (keepR) alone(layer, FFN_RESIDUAL, row, t, r, total);
        if (!keepF && !keepR) active[t] = 0;
      }
    }
    const same = sameTokenParts(trace, layer);
    for (let t = 0; t < n; t++) {
      if (!active[t]) continue;
      const row = base + t;
      if (Number.isNaN(trace.ffn[row])) return Object.assign(route, { untraced: t });
      attentionRow(route, layer, t, row, same, limit, below, alone);
    }
    active = below;
  }
  return route;
}

function attentionRow(route, layer, t, row, same, limit, below, alone) {
  const { trace, threshold, renormalize, edges, parts } = route;
  const { pair_key: keys, pairEdges, head, value } = trace;
  const certified = trace.precision === "certified", [down, up] = certified ? factors(trace, row) : [1, 1];
  const undecided = (low, high) => { if (certified && Math.abs(low) * down <= threshold && Math.abs(high) * up > threshold) route.open++; };
  let total = 1;
  if (renormalize) {
    total = 0;
    for (let p = trace.rowPairs[row]; p < trace.rowPairs[row + 1]; p++) {
      for (let e = pairEdges[p]; e < pairEdges[p + 1]; e++) {
        if (Math.abs(value[e]) > limit && head[e] !== REST) total += Math.abs(value[e]);
        if (down !== up && head[e] !== REST) undecided(value[e], value[e]);
      }
    }
    const constant = Math.abs(trace.attention_bias[row]);
    undecided(constant, constant);
    if (constant > limit) total += constant;
    let others = 0;
    for (const [, values] of same) if (Math.abs(values[row]) > threshold) others += Math.abs(values[row]);
    total += others;
  }
  for (let p = trace.rowPairs[row]; p < trace.rowPairs[row + 1]; p++) {
    const first = parts.length;
    let sum = 0, raw = 0;
    if (renormalize) {
      for (let e = pairEdges[p]; e < pairEdges[p + 1]; e++) {
        if (!(Math.abs(value[e]) > limit) || head[e] === REST) continue;
        parts.add(head[e], value[e] / total, value[e]);
        sum += value[e] / total;
        raw += value[e];
      }
    } else {
      let known = 0, rest = 0;
      for (let e = pairEdges[p]; e < pairEdges[p + 1]; e++) {
        raw += head[e] === REST ? value[e] / 2 : value[e];
        if (head[e] === REST) rest += value[e];
        else known += value[e];
      }
      undecided(known, known + rest);
      if (!(Math.abs(raw) > threshold)) continue;
      for (let e = pairEdges[p]; e < pairEdges[p + 1]; e++) {
        const one = head[e] === REST ? value[e] / 2 : value[e];
        parts.add(head[e], one, one);
        sum += one;
      }
    }
    if (parts.length === first) continue;
    edges.add(layer, ATTENTION, keys[p], t, sum, raw, first, parts.length - first);
    below[keys[p]] = 1;
  }
  for (const [kind, values] of same) {
    undecided(values[row], values[row]);
    if (!(Math.abs(values[row]) > threshold)) continue;
    alone(layer, kind, row, t, values[row], total);
    below[t] = 1;
  }
}

// The role whose message a token belongs to, "template" for what a chat's template adds, "" where there is no chat.
const roleOf = (trace, position) => (!trace.chat.length ? "" : trace.messageOf[position] < 0 ? "template" : trace.chat[trace.messageOf[position]][0]);
const ROLE_NAMES = ["system", "user", "assistant"];
const roleIndex = (role) => (ROLE_NAMES.includes(role) ? ROLE_NAMES.indexOf(role) : 3);

// Where an edge begins and ends: a node is (2 * level, or 2 * layer + 1 after attention) * n + position.
function endsOf(trace, layer, kind, source, target) {
  const parallel = trace.shapes[layer] === "parallel", after = kind === FFN || kind === FFN_RESIDUAL;
  const from = 2 * layer + (after && !parallel ? 1 : 0), to = after || parallel ? 2 * layer + 2 : 2 * layer + 1;
  return [from * trace.n + source, to * trace.n + target];
}

const headName = (layer, head) => (head === REST ? `L${layer} rest` : `L${layer}H${head}`);

// Position of `wanted` in an ascending array, -1 if it is not there.
function find(sorted, wanted) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return sorted[low] === wanted ? low : -1;
}

// The most probable next tokens if a state were the last: [[text, probability]], or null.
function lensOf(trace, height, position) {
  if (trace.looked) return trace.looked.lens.get(height * trace.n + position) || null;
  const at = trace.lens_state ? find(trace.lens_state, height * trace.n + position) : -1;
  if (at < 0) return null;
  const k = trace.details.tokens;
  return Array.from({ length: k }, (_, i) => [trace.details.texts[trace.lens_token[at * k + i]], trace.lens_probability[at * k + i] / 65535]);
}

// The keys with the largest attention weights of a head at a query: [[position, weight]], or null.
function attentionOf(trace, layer, head, query) {
  if (trace.looked) return (head !== REST && (trace.looked.attention.get(layer * trace.n + query) || [])[head]) || null;
  const at = trace.attention_row ? find(trace.attention_row, layer * trace.n + query) : -1;
  if (at < 0 || head === REST) return null;
  const { keys: k, heads } = trace.details, from = (at * heads + head) * k;
  return Array.from({ length: k }, (_, i) => [trace.attention_key[from + i], trace.attention_weight[from + i] / 65535]).filter(([, w]) => w > 0);
}
