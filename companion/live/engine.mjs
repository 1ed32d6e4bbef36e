// LLaVA in the browser: safetensors, tokenizer, image preprocessing, CLIP tower, projector, Llama decoder.
// Plain JavaScript in fp32 for the miniature's checkpoints; no dependency, no request to a server.

// ---------------------------------------------------------------------------------------------- weights

/** Tensors of a safetensors file by name: `{shape, data}` with data as Float32Array; dtypes F32 and BF16. */
export function readSafetensors(buffer) {
  const headerLength = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, headerLength)));
  const tensors = new Map();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [begin, end] = entry.data_offsets;
    const bytes = buffer.slice(8 + headerLength + begin, 8 + headerLength + end);
    if (entry.dtype === "F32") {
      tensors.set(name, { shape: entry.shape, data: new Float32Array(bytes) });
    } else if (entry.dtype === "BF16") {
      const bits = new Uint32Array(new Uint16Array(bytes)).map((half) => half << 16);
      tensors.set(name, { shape: entry.shape, data: new Float32Array(bits.buffer) });
    } else {
      throw new Error(`tensor ${name} has dtype ${entry.dtype}; this page reads F32 and BF16`);
    }
  }
  return tensors;
}

/** The bytes of base64 text, as pages have them, or of a DataView, as a kernel sends them. */
export function bytesOf(given) {
  if (typeof given !== "string") return given.buffer.slice(given.byteOffset, given.byteOffset + given.byteLength);
  const binary = atob(given);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < binary.length; k++) bytes[k] = binary.charCodeAt(k);
  return bytes.buffer;
}

// ---------------------------------------------------------------------------------------------- tokenizer

const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu; // GPT-2's pattern

/** The printable characters that stand for bytes in a byte-level BPE vocabulary: byte -> character. */
function byteCharacters() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
}

/** A byte-level BPE tokenizer from the content of tokenizer.json. */
export class Tokenizer {
  constructor(file) {
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
    this.added = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.texts = new Map([...this.vocabulary, ...this.added].map(([text, id]) => [id, text]));
    this.characters = byteCharacters();
    this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    const escaped = [...this.added.keys()].map((text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.split = new RegExp(`(${escaped.join("|")})`, "u");
    this.known = new Map();
  }

  /** Token ids of a text, without BOS. */
  encode(text) {
    const ids = [];
    for (const part of text.split(this.split)) {
      if (this.added.has(part)) ids.push(this.added.get(part));
      else for (const piece of part.match(PIECES) ?? []) ids.push(...this.#merged(piece));
    }
    return ids;
  }

  #merged(piece) {
    if (this.known.has(piece)) return this.known.get(piece);
    let parts = Array.from(new TextEncoder().encode(piece), (byte) => this.characters[byte]);
    for (;;) {
      let best = Infinity, at = -1;
      for (let k = 0; k + 1 < parts.length; k++) {
        const rank = this.ranks.get(`${parts[k]} ${parts[k + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, k];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    const ids = parts.map((part) => this.vocabulary.get(part));
    this.known.set(piece, ids);
    return ids;
  }

  /** Text of token ids; incomplete characters become U+FFFD. */
  decode(ids) {
    const bytes = [];
    for (const id of ids) {
      const text = this.texts.get(id) ?? "";
      if (this.added.has(text)) bytes.push(...new TextEncoder().encode(text));
      else for (const character of text) bytes.push(this.bytes.get(character));
    }
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}

// ---------------------------------------------------------------------------------------------- images

/** Filter weights of Pillow's bicubic resize in fixed point: for each output pixel the first input and its weights. */
function bicubicWeights(from, to) {
  const cubic = (x) => {
    const a = -0.5, t = Math.abs(x);
    if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
    return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
  };
  const scale = from / to, stretch = Math.max(scale, 1), support = 2 * stretch;
  return Array.from({ length: to }, (_, k) => {
    const center = (k + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = Array.from({ length: end - first }, (_, n) => cubic((n + first - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => Math.trunc((w / sum) * 2 ** 22 + (w < 0 ? -0.5 : 0.5))) };
  });
}

const byte = (sum) => Math.min(255, Math.max(0, Math.floor((sum + 2 ** 21) / 2 ** 22)));

/** Resize RGB bytes (height x width x 3) as Pillow's `Image.resize` with BICUBIC does, bit for bit. */
export function resize({ data, width, height }, toWidth, toHeight) {
  let pixels = data;
  if (toWidth !== width) {
    const columns = bicubicWeights(width, toWidth);
    const out = new Uint8Array(height * toWidth * 3);
    for (let y = 0; y < height; y++)
      columns.forEach(({ first, weights }, x) => {
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          for (let k = 0; k < weights.length; k++) sum += pixels[(y * width + first + k) * 3 + c] * weights[k];
          out[(y * toWidth + x) * 3 + c] = byte(sum);
        }
      });
    pixels = out;
  }
  if (toHeight !== height) {
    const out = new Uint8Array(toHeight * toWidth * 3);
    bicubicWeights(height, toHeight).forEach(({ first, weights }, y) => {
      for (let x = 0; x < toWidth * 3; x++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += pixels[(first + k) * toWidth * 3 + x] * weights[k];
        out[y * toWidth * 3 + x] = byte(sum);
      }
    });
    pixels = out;
  }
  return { data: pixels, width: toWidth, height: toHeight };
}

/** What the model sees of an RGB image: its short side resized to `size`, then the center of the long side. */
export function visible(image, size) {
  const short = Math.min(image.width, image.height);
  const side = (length) => (length === short ? size : Math.trunc((size * length) / short));
  const { data, width, height } = resize(image, side(image.width), side(image.height));
  const left = Math.trunc((width - size) / 2), top = Math.trunc((height - size) / 2);
  const out = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    const begin = ((top + y) * width + left) * 3;
    out.set(data.subarray(begin, begin + size * 3), y * size * 3);
  }
  return { data: out, width: size, height: size };
}

/** Normalised pixels (3 x size x size) of what `visible` returns. */
export function normalised({ data, width, height }, mean, std) {
  const plane = width * height, out = new Float32Array(3 * plane);
  for (let k = 0; k < plane; k++)
    for (let c = 0; c < 3; c++) out[c * plane + k] = (data[k * 3 + c] / 255 - mean[c]) / std[c];
  return out;
}

// ---------------------------------------------------------------------------------------------- arithmetic

/** x (n x i) times the transposed weight (o x i), plus bias (o); returns (n x o). Four rows share a weight's row. */
function linear(x, n, weight, bias = null) {
  const [o, i] = weight.shape, w = weight.data, out = new Float32Array(n * o);
  for (let j = 0; j < o; j++) {
    const start = j * i, b = bias ? bias.data[j] : 0;
    let r = 0;
    for (; r + 3 < n; r += 4) {
      const r0 = r * i, r1 = r0 + i, r2 = r1 + i, r3 = r2 + i;
      let s0 = b, s1 = b, s2 = b, s3 = b;
      for (let k = 0; k < i; k++) {
        const v = w[start + k];
        s0 += x[r0 + k] * v;
        s1 += x[r1 + k] * v;
        s2 += x[r2 + k] * v;
        s3 += x[r3 + k] * v;
      }
      out[r * o + j] = s0;
      out[(r + 1) * o + j] = s1;
      out[(r + 2) * o + j] = s2;
      out[(r + 3) * o + j] = s3;
    }
    for (; r < n; r++) {
      const r0 = r * i;
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let k = 0; k < i; k += 4) {
        s0 += x[r0 + k] * w[start + k];
        s1 += x[r0 + k + 1] * w[start + k + 1];
        s2 += x[r0 + k + 2] * w[start + k + 2];
        s3 += x[r0 + k + 3] * w[start + k + 3];
      }
      out[r * o + j] = b + s0 + s1 + s2 + s3;
    }
  }
  return out;
}

function add(x, y) {
  for (let k = 0; k < x.length; k++) x[k] += y[k];
  return x;
}

function layerNorm(x, n, weight, bias, eps) {
  const d = weight.data.length, out = new Float32Array(n * d);
  for (let r = 0; r < n; r++) {
    let sum = 0, squares = 0;
    for (let k = 0; k < d; k++) sum += x[r * d + k];
    const mean = sum / d;
    for (let k = 0; k < d; k++) squares += (x[r * d + k] - mean) ** 2;
    const scale = 1 / Math.sqrt(squares / d + eps);
    for (let k = 0; k < d; k++) out[r * d + k] = (x[r * d + k] - mean) * scale * weight.data[k] + bias.data[k];
  }
  return out;
}

function rmsNorm(x, n, weight, eps) {
  const d = weight.data.length, out = new Float32Array(n * d);
  for (let r = 0; r < n; r++) {
    let squares = 0;
    for (let k = 0; k < d; k++) squares += x[r * d + k] ** 2;
    const scale = 1 / Math.sqrt(squares / d + eps);
    for (let k = 0; k < d; k++) out[r * d + k] = x[r * d + k] * scale * weight.data[k];
  }
  return out;
}

function softmax(scores, n) {
  let top = -Infinity, sum = 0;
  for (let k = 0; k < n; k++) top = Math.max(top, scores[k]);
  for (let k = 0; k < n; k++) sum += scores[k] = Math.exp(scores[k] - top);
  for (let k = 0; k < n; k++) scores[k] /= sum;
}

/**
 * Attention of n queries over the keys and values (rows of `width`); query r sees `seen(r)` keys.
 * `watch(r, weights)` receives the weights of each query and head.
 */
function attention(q, n, keys, values, heads, width, seen, watch = null) {
  const d = width / heads, out = new Float32Array(n * width), scores = new Float64Array(seen(n - 1));
  for (let h = 0; h < heads; h++)
    for (let r = 0; r < n; r++) {
      const m = seen(r), at = r * width + h * d;
      for (let t = 0; t < m; t++) {
        let s = 0;
        const key = t * width + h * d;
        for (let k = 0; k < d; k++) s += q[at + k] * keys[key + k];
        scores[t] = s / Math.sqrt(d);
      }
      softmax(scores, m);
      if (watch) watch(r, scores, m);
      for (let t = 0; t < m; t++) {
        const p = scores[t], value = t * width + h * d;
        for (let k = 0; k < d; k++) out[at + k] += p * values[value + k];
      }
    }
  return out;
}

const erf = (x) => {
  // Numerical Recipes' erfc by a Chebyshev fit; fractional error below 1.2e-7
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const poly = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
    -0.82215223, 0.17087277].reduceRight((sum, c) => sum * t + c, 0);
  const tail = t * Math.exp(-x * x + poly);
  return x >= 0 ? 1 - tail : tail - 1;
};

// ---------------------------------------------------------------------------------------------- model

/** The three parts of LLaVA with their weights; `facts` has the shapes (companion.live.page writes both). */
export class Llava {
  constructor(facts, tensors) {
    Object.assign(this, { facts, tensors });
    this.patches = (facts.vision.image_size / facts.vision.patch_size) ** 2;
  }

  #t(name) {
    const tensor = this.tensors.get(name);
    if (!tensor) throw new Error(`the checkpoint has no tensor ${name}`);
    return tensor;
  }

  /** Visual tokens (P x D) of normalised pixels (3 x size x size): tower up to the feature layer, then the projector. */
  encodeImage(pixels) {
    return this.project(this.towerFeatures(pixels));
  }

  towerFeatures(pixels) {
    const { image_size: size, patch_size: patch, hidden, heads, layers, eps } = this.facts.vision;
    const side = size / patch, n = this.patches + 1, flat = new Float32Array(this.patches * 3 * patch * patch);
    for (let p = 0, k = 0; p < this.patches; p++)
      for (let c = 0; c < 3; c++)
        for (let y = 0; y < patch; y++) {
          const begin = c * size * size + (Math.trunc(p / side) * patch + y) * size + (p % side) * patch;
          for (let x = 0; x < patch; x++) flat[k++] = pixels[begin + x];
        }
    const kernel = this.#t("vision.embeddings.patch_embedding.weight");
    const embedded = linear(flat, this.patches, { shape: [hidden, 3 * patch * patch], data: kernel.data });
    let x = new Float32Array(n * hidden);
    x.set(this.#t("vision.embeddings.class_embedding").data);
    x.set(embedded, hidden);
    add(x, this.#t("vision.embeddings.position_embedding.weight").data);
    const norm = (name, v) => layerNorm(v, n, this.#t(`${name}.weight`), this.#t(`${name}.bias`), eps);
    const dense = (name, v) => linear(v, n, this.#t(`${name}.weight`), this.#t(`${name}.bias`));
    x = norm("vision.pre_layrnorm", x);
    const depth = this.facts.feature_layer < 0 ? layers + 1 + this.facts.feature_layer : this.facts.feature_layer;
    for (let layer = 0; layer < depth; layer++) {
      const at = `vision.encoder.layers.${layer}`;
      const y = norm(`${at}.layer_norm1`, x);
      const [q, k, v] = ["q", "k", "v"].map((part) => dense(`${at}.self_attn.${part}_proj`, y));
      add(x, dense(`${at}.self_attn.out_proj`, attention(q, n, k, v, heads, hidden, () => n)));
      const inner = dense(`${at}.mlp.fc1`, norm(`${at}.layer_norm2`, x));
      for (let k2 = 0; k2 < inner.length; k2++) inner[k2] /= 1 + Math.exp(-1.702 * inner[k2]); // quick GELU
      add(x, dense(`${at}.mlp.fc2`, inner));
    }
    return x.slice(hidden); // without the class token
  }

  project(features) {
    const n = this.patches, layer = (name, v) => linear(v, n, this.#t(`${name}.weight`), this.#t(`${name}.bias`));
    if (this.facts.projector === "linear") return layer("projector", features);
    const inner = layer("projector.0", features);
    for (let k = 0; k < inner.length; k++) inner[k] *= 0.5 * (1 + erf(inner[k] / Math.SQRT2));
    return layer("projector.2", inner);
  }

  /** Word embeddings (n x D); image positions, ids below 0, take the visual tokens in order. */
  embed(ids, visual = null) {
    const d = this.facts.text.hidden, table = this.#t("text.embed_tokens.weight").data;
    const out = new Float32Array(ids.length * d);
    let image = 0;
    ids.forEach((id, k) => {
      if (id >= 0) out.set(table.subarray(id * d, id * d + d), k * d);
      else out.set(visual.subarray(image * d, ++image * d), k * d);
    });
    return out;
  }

  /** An empty KV cache. */
  newCache() {
    const { layers, hidden, positions } = this.facts.text;
    return { length: 0, layers: Array.from({ length: layers }, () => ({
      keys: new Float32Array(positions * hidden), values: new Float32Array(positions * hidden) })) };
  }

  /**
   * Feed n tokens; returns logits of the last `keep` of them (keep x V). The cache grows.
   * `watch`, a Float32Array (n x cache length) if given, receives the attention, as a mean over layers and heads.
   */
  feed(x, n, cache, keep = 1, watch = null) {
    const { hidden: d, heads, layers, eps, theta, positions } = this.facts.text, before = cache.length;
    const total = before + n;
    if (total > positions) throw new Error(`the dialogue has ${total} tokens; the model reads ${positions}`);
    const norm = (name, v, rows) => rmsNorm(v, rows, this.#t(`${name}.weight`), eps);
    const see = watch && ((r, weights, m) => {
      for (let t = 0; t < m; t++) watch[r * total + t] += weights[t] / (layers * heads);
    });
    for (let layer = 0; layer < layers; layer++) {
      const at = `text.layers.${layer}`, { keys, values } = cache.layers[layer];
      const y = norm(`${at}.input_layernorm`, x, n);
      const [q, k, v] = ["q", "k", "v"].map((part) => linear(y, n, this.#t(`${at}.self_attn.${part}_proj.weight`)));
      rotate(q, n, before, heads, d, theta);
      rotate(k, n, before, heads, d, theta);
      keys.set(k, before * d);
      values.set(v, before * d);
      const mixed = attention(q, n, keys, values, heads, d, (r) => before + r + 1, see);
      add(x, linear(mixed, n, this.#t(`${at}.self_attn.o_proj.weight`)));
      const z = norm(`${at}.post_attention_layernorm`, x, n);
      const gate = linear(z, n, this.#t(`${at}.mlp.gate_proj.weight`));
      const up = linear(z, n, this.#t(`${at}.mlp.up_proj.weight`));
      for (let k2 = 0; k2 < gate.length; k2++) up[k2] *= gate[k2] / (1 + Math.exp(-gate[k2])); // SiLU
      add(x, linear(up, n, this.#t(`${at}.mlp.down_proj.weight`)));
    }
    cache.length = total;
    const last = norm("text.norm", x.subarray((n - keep) * d), keep);
    return linear(last, keep, this.#t("lm_head.weight"));
  }
}

/** Rotary position embedding of rows (n x width) at positions from `first`, in place. */
function rotate(x, n, first, heads, width, theta) {
  const d = width / heads, half = d / 2;
  for (let k = 0; k < half; k++) {
    const frequency = theta ** (-k / half);
    for (let r = 0; r < n; r++) {
      const angle = (first + r) * frequency, cos = Math.cos(angle), sin = Math.sin(angle);
      for (let h = 0; h < heads; h++) {
        const at = r * width + h * d + k, a = x[at], b = x[at + half];
        x[at] = a * cos - b * sin;
        x[at + half] = b * cos + a * sin;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- dialogue

/** Log-probabilities of a row of logits. */
export function logProbabilities(logits) {
  let top = -Infinity, sum = 0;
  for (const value of logits) top = Math.max(top, value);
  for (const value of logits) sum += Math.exp(value - top);
  return logits.map((value) => value - top - Math.log(sum));
}

function candidates(logits, tokenizer, count = 5) {
  const probabilities = logProbabilities(logits).map(Math.exp);
  const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
  return order.slice(0, count).map((id) => ({ text: tokenizer.decode([id]), probability: probabilities[id] }));
}

function pick(logits, temperature, random) {
  let best = 0;
  if (!(temperature > 0)) {
    for (let k = 1; k < logits.length; k++) if (logits[k] > logits[best]) best = k;
    return best;
  }
  const scaled = logProbabilities(logits.map((value) => value / temperature));
  let left = random();
  for (let k = 0; k < scaled.length; k++) if ((left -= Math.exp(scaled[k])) <= 0) return k;
  return scaled.length - 1;
}

/** A dialogue about one image; the KV cache keeps what two prompts share. */
export class Conversation {
  constructor(model, tokenizer, template, image) {
    Object.assign(this, { model, tokenizer, template, image, turns: [], cached: [], cache: model.newCache() });
  }

  /** Start a new dialogue about an RGB image `{data, width, height}`, or about none; returns what the model sees. */
  setImage(picture) {
    this.clear();
    this.seen = picture && visible(picture, this.image.size);
    this.pixels = this.seen && normalised(this.seen, this.image.mean, this.image.std);
    this.visual = null;
    return this.seen;
  }

  clear() {
    Object.assign(this, { turns: [], cached: [], cache: this.model.newCache() });
  }

  /** Token ids of the dialogue with a new question; image positions are -200. */
  promptIds(question) {
    const { opening, opening_next: next, bridge, closing, eos, image_side: side } = this.template;
    const ids = [this.template.bos_id], block = new Array(this.model.patches).fill(-200);
    [...this.turns, { question, answer: null }].forEach(({ question: asked, answer }, k) => {
      const before = k ? next : opening;
      if (k || !this.pixels) ids.push(...this.tokenizer.encode(before + asked + bridge));
      else if (side === "first")
        ids.push(...this.tokenizer.encode(before), ...block, ...this.tokenizer.encode(`\n${asked}${bridge}`));
      else ids.push(...this.tokenizer.encode(`${before}${asked}\n`), ...block, ...this.tokenizer.encode(bridge));
      if (answer !== null) ids.push(...this.tokenizer.encode(`${bridge ? " " : ""}${answer}${closing}`));
      if (answer !== null && eos) ids.push(this.template.eos_id);
    });
    return ids.filter((id) => id !== undefined && id !== null);
  }

  #visual() {
    if (this.pixels && !this.visual) this.visual = this.model.encodeImage(this.pixels);
    return this.visual;
  }

  /**
   * Answer a question; a generator of `{text, token, attention, candidates}` after each token.
   * `attention` has one weight per patch (null without an image); a complete answer becomes a turn.
   */
  *ask(question, { maxNewTokens = 96, temperature = 0, random = Math.random } = {}) {
    const ids = this.promptIds(question), { model, tokenizer } = this, d = model.facts.text.hidden;
    const room = model.facts.text.positions - ids.length;
    if (room < 1) throw new Error("the dialogue is too long for the model; clear it or ask about a new image");
    let shared = 0;
    while (shared < Math.min(this.cached.length, ids.length - 1) && this.cached[shared] === ids[shared]) shared++;
    this.cache.length = shared;
    this.cached = ids.slice(0, shared);
    let fresh = model.embed(ids, this.#visual()).slice(shared * d), n = ids.length - shared;
    const begin = ids.indexOf(-200), answer = [], ends = new Set(this.template.end_ids);
    let text = "";
    for (let step = 0; step < Math.min(maxNewTokens, room); step++) {
      const watch = new Float32Array(n * (this.cache.length + n));
      const logits = model.feed(fresh, n, this.cache, 1, watch);
      this.cached.push(...(step ? answer.slice(-1) : ids.slice(shared)));
      const last = watch.subarray(watch.length - this.cache.length);
      const attention = begin < 0 ? null : last.slice(begin, begin + model.patches);
      const token = pick(logits, temperature, random);
      const finished = this.#finished(answer, token, ends);
      if (finished !== null) {
        text = finished;
        break;
      }
      answer.push(token);
      text = tokenizer.decode(answer);
      yield { text: text.replace(/\uFFFD+$/, "").trim(), token, attention, candidates: candidates(logits, tokenizer) };
      fresh = model.embed([token]);
      n = 1;
    }
    text = text.replace(/\uFFFD+$/, "").trim();
    this.turns.push({ question, answer: text });
    return text;
  }

  #finished(answer, token, ends) {
    if (ends.has(token)) return this.tokenizer.decode(answer);
    const text = this.tokenizer.decode([...answer, token]);
    const at = this.template.stop ? text.indexOf(this.template.stop) : -1;
    return at < 0 ? null : text.slice(0, at);
  }

  /**
   * Occlusion: the log-probability of the tokens of a turn's answer, with the image and with each patch in grey.
   * A generator of `{patch, changes}`; changes[k] is how much greying the patch lowers token k (nats).
   */
  *occlusion(turn, tokens) {
    const kept = this.turns;
    this.turns = kept.slice(0, turn);
    const ids = [...this.promptIds(kept[turn].question), ...tokens];
    this.turns = kept;
    const score = (pixels) => {
      const embedded = this.model.embed(ids, this.model.encodeImage(pixels)), keep = tokens.length + 1;
      const logits = this.model.feed(embedded, ids.length, this.model.newCache(), keep), v = logits.length / keep;
      return tokens.map((token, k) => logProbabilities(logits.subarray(k * v, (k + 1) * v))[token]);
    };
    const { image_size: size, patch_size: patch } = this.model.facts.vision, side = size / patch;
    const whole = score(this.pixels);
    for (let p = 0; p < this.model.patches; p++) {
      const grey = this.pixels.slice();
      for (let c = 0; c < 3; c++)
        for (let y = 0; y < patch; y++) {
          const begin = c * size * size + (Math.trunc(p / side) * patch + y) * size + (p % side) * patch;
          grey.fill((0.5 - this.image.mean[c]) / this.image.std[c], begin, begin + patch);
        }
      const greyed = score(grey);
      yield { patch: p, changes: whole.map((value, k) => value - greyed[k]) };
    }
  }
}

/** A model, its tokenizer and a conversation from the state and the weights that `companion.live.state` returns. */
export function open(state, weights) {
  const model = new Llava(state.facts, readSafetensors(bytesOf(weights)));
  return new Conversation(model, new Tokenizer(state.tokenizer), state.template, state.image);
}
