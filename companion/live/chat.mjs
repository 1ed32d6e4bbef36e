// The chat of the live page: choose, upload or compose an image, ask, and see what each word depends on.
// `render({ model, el })` has anywidget's signature. model.get("state") and model.get("weights") are what
// companion.live.page returns; the module sets "turns". With `#live-box=QUESTION` in its address a page shows the
// chat and nothing else, and asks.
import { open } from "./engine.mjs";

const LARGEST_FILE = 20e6; // bytes
const LARGEST_IMAGE = 40e6; // pixels
const SHOWN = 336; // pixels of the picture on the page
const LEAST_SCALE = 0.1; // nats; a map of occlusion whose largest change is smaller has this as the end of its scale
const STYLE = `
.llava-live { display: grid; grid-template-columns: minmax(0, ${SHOWN + 2}px) minmax(0, 1fr); gap: 1.2em; font-size: .95em }
.llava-live * { box-sizing: border-box } .llava-live [hidden] { display: none !important }
.llava-live canvas { display: block; width: 100%; max-width: ${SHOWN}px; border-radius: 6px; touch-action: none }
.llava-live .live-row { display: flex; flex-wrap: wrap; gap: .4em; margin: .5em 0; align-items: center }
.llava-live button, .llava-live select, .llava-live input[type=text], .llava-live input[type=number] {
  font: inherit; color: inherit; background: color-mix(in srgb, currentColor 7%, transparent); padding: .3em .65em;
  border: 1px solid color-mix(in srgb, currentColor 45%, transparent); border-radius: 5px; max-width: 100% }
.llava-live option { color: #111; background: #fff }
.llava-live button { cursor: pointer } .llava-live button:disabled { opacity: .55; cursor: default }
.llava-live button[aria-pressed=true] { background: color-mix(in srgb, currentColor 22%, transparent) }
.llava-live .question { flex: 1 1 14em } .llava-live .thumbs button { padding: 2px } .llava-live .thumbs img { display: block }
.llava-live .log { max-height: 26em; overflow-y: auto; overflow-wrap: anywhere; margin: .5em 0 }
.llava-live .log p { margin: .35em 0 } .llava-live .word { padding: 0 .06em; border: 0; border-radius: 3px }
.llava-live small { display: block; min-height: 1.4em } .llava-live .live-error { color: #c62828; font-weight: 600 }
.llava-live .maps { display: grid; grid-template-columns: 1fr 1fr; gap: .5em } .llava-live .maps small { min-height: 0 }
html[data-theme=dark] .llava-live .live-error { color: #ff8a80 }
.llava-live.live-box { padding: .6em } .live-box .live-more { display: none } .live-box canvas { max-width: 200px } .live-box .log { max-height: 12em }
@media (max-width: 700px) { .llava-live { grid-template-columns: minmax(0, 1fr) } }
`;

const pause = () => new Promise((resolve) => setTimeout(resolve));

function make(tag, options = {}, ...children) {
  const { class: name, on = {}, ...rest } = options, node = document.createElement(tag);
  if (name) node.className = name;
  for (const [key, value] of Object.entries(rest)) {
    if (key.startsWith("aria-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children);
  return node;
}

function loadPicture(source) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => resolve(picture);
    picture.onerror = () => reject(new Error("no image"));
    picture.src = source;
  });
}

/** RGB bytes of what a canvas shows. */
function rgbOf(canvas) {
  const { width, height } = canvas, rgba = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let k = 0; k < width * height; k++) for (let c = 0; c < 3; c++) data[k * 3 + c] = rgba[k * 4 + c];
  return { data, width, height };
}

function canvasOf(picture, width, height) {
  const canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // as in Python, a transparent image lies on white
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  return canvas;
}

/** Draw what the model sees, and a weight per patch over it: the larger, the clearer; `least`: the scale ends there or above. */
function drawSeen(canvas, seen, weights = null, least = 1e-9) {
  const context = canvas.getContext("2d"), small = new ImageData(seen.width, seen.height);
  for (let k = 0; k < seen.width * seen.height; k++) {
    for (let c = 0; c < 3; c++) small.data[k * 4 + c] = seen.data[k * 3 + c];
    small.data[k * 4 + 3] = 255;
  }
  const source = make("canvas", { width: seen.width, height: seen.height });
  source.getContext("2d").putImageData(small, 0, 0);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  if (!weights) return;
  const side = Math.sqrt(weights.length), cell = canvas.width / side, largest = Math.max(...weights, least);
  weights.forEach((weight, k) => {
    context.fillStyle = `rgba(12, 14, 40, ${0.72 * (1 - Math.max(0, weight) / largest)})`;
    const [left, top, right, bottom] = [k % side, Math.floor(k / side), (k % side) + 1, Math.floor(k / side) + 1].map((n) => Math.round(n * cell));
    context.fillRect(left, top, right - left, bottom - top);
  });
}

/** Words of an answer with the tokens that they are made of. */
function wordsOf(steps) {
  const words = [];
  for (const step of steps) {
    if (!words.length || /^\s/.test(step.piece)) words.push({ text: "", steps: [] });
    words.at(-1).text += step.piece;
    words.at(-1).steps.push(step);
  }
  return words.map((word) => ({ ...word, text: word.text.trim() })).filter((word) => word.text);
}

const mean = (rows) => rows[0].map((_, k) => rows.reduce((sum, row) => sum + row[k], 0) / rows.length);

function chat({ model, el }) {
  const state = model.get("state"), conversation = open(state, model.get("weights")), scene = { background: null, things: [] };
  let busy = false, stopping = false, answers = [], source = null, chosen = null; // the word whose maps are shown

  const picture = make("canvas", { width: SHOWN, height: SHOWN, role: "img", "aria-label": "What the model sees" });
  const second = make("canvas", { width: SHOWN, height: SHOWN, role: "img", "aria-label": "Occlusion of the word" });
  const maps = make("div", { class: "maps", hidden: true });
  const occluded = make("small"), crop = make("small"), status = make("small", { role: "status" });
  const error = make("div", { class: "live-error", role: "alert" });
  const log = make("div", { class: "log", "aria-live": "polite" });
  const question = make("input", { type: "text", class: "question", maxLength: 400, "aria-label": "Question", value: state.questions[0],
    on: { keydown: (event) => event.key === "Enter" && ask() } });
  const button = (label, listener, more = {}) => make("button", { type: "button", textContent: label, on: { click: listener }, ...more });
  const askButton = button("Ask", () => ask()), stopButton = button("Stop", () => (stopping = true), { disabled: true });
  const occlusionButton = button("What changes the answer?", () => occlude(), { disabled: true });
  const length = make("input", { type: "number", min: 1, max: 200, value: 96, "aria-label": "Longest answer in tokens" });
  const temperature = make("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0, "aria-label": "Temperature" });

  function guarded(action) {
    return async (...given) => {
      error.textContent = "";
      try {
        await action(...given);
      } catch (problem) {
        error.textContent = problem.message;
      }
    };
  }

  function setBusy(value) {
    busy = value;
    stopping = false;
    askButton.disabled = value;
    stopButton.disabled = !value;
    occlusionButton.disabled = value || !answers.length;
  }

  /** Start a new dialogue about the picture of a canvas. */
  function show(canvas, name) {
    if (busy) stopping = true;
    const seen = conversation.setImage(rgbOf(canvas));
    const short = Math.min(canvas.width, canvas.height);
    source = name;
    drawSeen(picture, seen);
    crop.textContent = canvas.width === canvas.height
      ? `The model sees the whole image, at ${seen.width} × ${seen.height} pixels.`
      : `The model sees the middle ${short} × ${short} of ${canvas.width} × ${canvas.height} pixels, at ${seen.width} × ${seen.height}.`;
    clear();
  }

  function clear() {
    conversation.clear();
    answers = [];
    log.replaceChildren();
    maps.hidden = true;
    occlusionButton.disabled = true;
    if (conversation.seen) drawSeen(picture, conversation.seen);
    status.textContent = "";
    report();
  }

  /** Give the dialogue to a kernel, if there is one. */
  function report() {
    model.set("turns", conversation.turns.map((turn) => ({ ...turn })));
    model.save_changes();
  }

  const openFile = guarded(async (file) => {
    if (!file) return;
    if (file.size > LARGEST_FILE)
      throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(0)} MB; choose an image of at most ${LARGEST_FILE / 1e6} MB.`);
    const url = URL.createObjectURL(file);
    try {
      const read = await loadPicture(url).catch(() => {
        throw new Error(`${file.name} is no image that this browser can read; choose a JPEG, PNG or WebP file.`);
      });
      const { naturalWidth: width, naturalHeight: height } = read;
      if (!(width * height) || width * height > LARGEST_IMAGE || Math.max(width, height) > 200 * Math.min(width, height))
        throw new Error(`${file.name} has ${width} × ${height} pixels; choose a smaller or less narrow image.`);
      show(canvasOf(read, width, height), file.name);
    } finally {
      URL.revokeObjectURL(url);
    }
  });

  // ------------------------------------------------------------------------------------------ dialogue

  const ask = guarded(async () => {
    const text = question.value.replaceAll("<image>", "").trim();
    if (busy || !text) return;
    const words = make("span"), entry = make("p", {}, make("b", { textContent: "LLaVA " }), words);
    log.append(make("p", {}, make("b", { textContent: "You " }), text), entry);
    const answer = { question: text, words: [], before: conversation.turns.length, entry: words };
    const steps = [], begun = performance.now(), turns = conversation.turns;
    let first = 0;
    setBusy(true);
    await pause();
    try {
      const options = { maxNewTokens: Number(length.value) || 96, temperature: Number(temperature.value) || 0 };
      const running = conversation.ask(text, options);
      for (;;) {
        if (conversation.turns !== turns) return; // cleared, or about another image
        const { value, done } = running.next();
        if (done) break;
        first ||= performance.now() - begun;
        steps.push({ ...value, piece: conversation.tokenizer.decode([value.token]) });
        answer.words = wordsOf(steps);
        answer.steps = steps;
        fill(answer);
        log.scrollTop = log.scrollHeight;
        await pause();
        if (stopping && conversation.turns === turns) {
          turns.push({ question: text, answer: value.text });
          break;
        }
      }
      answers.push(answer);
      if (!answer.words.length) words.textContent = "(no answer)";
      const seconds = (performance.now() - begun - first) / 1000;
      status.textContent = `First word after ${Math.round(first)} ms, then ${(Math.max(steps.length - 1, 0) / Math.max(seconds, 1e-3)).toFixed(0)} tokens per second.`;
      report();
    } finally {
      setBusy(false);
    }
  });

  function fill(answer) {
    answer.entry.replaceChildren(...answer.words.flatMap((word) => [" ",
      button(word.text, () => select(answer, word), {
        class: "word",
        title: word.steps[0].candidates.map((c) => `${c.text.trim() || "␣"} ${(100 * c.probability).toFixed(0)} %`).join("\n"),
        on: { click: () => select(answer, word, true), mouseenter: () => select(answer, word), focus: () => select(answer, word) },
      }),
    ]).slice(1)); // white space between the words, for copies and screen readers
  }

  /** Show what the model attends to when it writes a word, and how much greying each patch changes the word. */
  function select(answer, word, clicked = false) {
    if (!conversation.seen || busy) return;
    if (clicked || chosen?.answer !== answer || !chosen.clicked) chosen = { answer, word, clicked };
    if (word.steps[0].attention) drawSeen(picture, conversation.seen, mean(word.steps.map((step) => Array.from(step.attention))));
    crop.textContent = `Attention at "${word.text}", mean over layers and heads. ${word.steps[0].candidates.map((c) => `${c.text.trim() || "␣"} ${(100 * c.probability).toFixed(0)} %`).join(", ")}`;
    maps.hidden = !word.occlusion;
    if (!word.occlusion) return;
    drawSeen(second, conversation.seen, word.occlusion.map((change) => Math.max(0, change)), LEAST_SCALE);
    const most = Math.max(0, ...word.occlusion).toFixed(1);
    occluded.textContent = `What greying each patch takes from "${word.text}", at most ${most} nats`;
  }

  const occlude = guarded(async () => {
    const answer = answers.at(-1);
    if (busy || !answer?.words.length || !conversation.pixels) return;
    setBusy(true);
    try {
      const tokens = answer.steps.map((step) => step.token), rows = [];
      for (const row of conversation.occlusion(answer.before, tokens)) {
        rows.push(row.changes);
        status.textContent = `Greying patch ${row.patch + 1} of ${conversation.model.patches}`;
        await pause();
        if (stopping) return;
      }
      let at = 0;
      for (const word of answer.words) {
        const here = word.steps.map(() => at++);
        word.occlusion = rows.map((changes) => here.reduce((sum, k) => sum + changes[k], 0));
      }
      status.textContent = "Point at a word: attention above, below what greying each patch takes from its log-probability.";
    } finally {
      setBusy(false);
    }
    select(answer, chosen?.answer === answer ? chosen.word : answer.words[0]);
  });

  // ------------------------------------------------------------------------------------------ saving

  function save(name, blob) {
    const url = URL.createObjectURL(blob);
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  function saveJson() {
    const content = { image: source, turns: conversation.turns, checkpoint: state.checkpoint };
    save("dialogue.json", new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  }

  function savePng() {
    const lines = conversation.turns.flatMap(({ question: asked, answer }) => [`You: ${asked}`, `LLaVA: ${answer}`]);
    const wrapped = lines.flatMap((line) => line.match(/.{1,62}(\s|$)|.{1,62}/g) ?? [line]);
    const sheet = make("canvas", { width: 560, height: SHOWN + 40 + 24 * wrapped.length }), context = sheet.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.drawImage(picture, 16, 16);
    context.fillStyle = "#111";
    context.font = "16px sans-serif";
    wrapped.forEach((line, k) => context.fillText(line.trim(), 16, SHOWN + 48 + 24 * k));
    sheet.toBlob((blob) => save("dialogue.png", blob));
  }

  // ------------------------------------------------------------------------------------------ composing

  const stage = make("canvas", { width: 224, height: 224 });
  const compose = make("div", { hidden: true });
  const pictures = new Map();
  const fetched = async (uri) => {
    if (!pictures.has(uri)) pictures.set(uri, await loadPicture(uri));
    return pictures.get(uri);
  };

  const redraw = guarded(async () => {
    const context = stage.getContext("2d"), { backgrounds, sprites } = state.scene;
    const drawn = [await fetched(backgrounds[scene.background])];
    for (const thing of scene.things) drawn.push(await fetched(sprites[thing.category].colors[thing.color]));
    context.drawImage(drawn[0], 0, 0, 224, 224);
    scene.things.forEach((thing, k) => {
      if (sprites[thing.category].zone === "ground") {
        const gradient = context.createRadialGradient(0, 0, 0, 0, 0, 1);
        gradient.addColorStop(0.7, "rgba(24, 24, 40, .33)");
        gradient.addColorStop(1, "rgba(24, 24, 40, 0)");
        context.save();
        context.translate(thing.x + thing.width / 2, thing.y + thing.height);
        context.scale(thing.width / 2, 0.08 * Math.min(thing.width, thing.height));
        context.fillStyle = gradient;
        context.fillRect(-1, -1, 2, 2);
        context.restore();
      }
      context.drawImage(drawn[k + 1], thing.x, thing.y, thing.width, thing.height);
    });
    show(stage, "a composed scene");
  });

  function buildComposer() {
    const { sprites, backgrounds } = state.scene, categories = Object.keys(sprites);
    const options = (names) => names.map((name) => make("option", { value: name, textContent: name }));
    const place = make("select", { "aria-label": "Place" }, ...options(Object.keys(backgrounds)));
    const thing = make("select", { "aria-label": "Thing" }, ...options(categories));
    const color = make("select", { "aria-label": "Color" }, ...options(Object.keys(sprites[categories[0]].colors)));
    const size = make("select", { "aria-label": "Size" }, ...options(["large", "small"]));
    const list = make("div", { class: "live-row" });
    const listed = () => list.replaceChildren(...scene.things.map((item, k) =>
      button(`✕ ${item.color} ${item.category}`, () => {
        scene.things.splice(k, 1);
        listed();
        redraw();
      }, { "aria-label": `Remove the ${item.color} ${item.category}` })));
    place.addEventListener("change", () => {
      scene.background = place.value;
      redraw();
    });
    const add = (category, shade, scale, share) => {
      const height = (scale === "large" ? 0.45 : 0.29) * 224, aspect = sprites[category].aspect;
      const width = Math.min(height * aspect, 0.46 * 224), tall = width / aspect;
      const y = sprites[category].zone === "sky" ? 20 : 210 - tall;
      scene.things.push({ category, color: shade, width, height: tall, x: share * 224 - width / 2, y });
      listed();
    };
    compose.append(
      make("div", { class: "live-row" }, "Place", place),
      make("div", { class: "live-row" }, size, color, thing, button("Add", () => {
        add(thing.value, color.value, size.value, [0.5, 0.25, 0.75][scene.things.length % 3]);
        redraw();
      })),
      list, make("small", { textContent: "Drag the things in the picture, or focus it and move the last one by the arrow keys." }),
    );
    scene.background = Object.keys(backgrounds)[0];
    add(categories[0], Object.keys(sprites[categories[0]].colors)[0], "large", 0.5);
  }

  let dragged = null;
  const pointOf = (event) => {
    const box = picture.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * 224, ((event.clientY - box.top) / box.height) * 224];
  };
  picture.tabIndex = 0;
  picture.addEventListener("pointerdown", (event) => {
    if (compose.hidden) return;
    const [x, y] = pointOf(event);
    const thing = scene.things.findLast((t) => x >= t.x && x <= t.x + t.width && y >= t.y && y <= t.y + t.height);
    dragged = thing && { thing, dx: x - thing.x, dy: y - thing.y };
    if (dragged) picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    if (!dragged) return;
    const [x, y] = pointOf(event);
    Object.assign(dragged.thing, { x: x - dragged.dx, y: y - dragged.dy });
    redraw();
  });
  for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, () => (dragged = null));
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
    if (!move || compose.hidden || !scene.things.length) return;
    event.preventDefault();
    scene.things.at(-1).x += move[0];
    scene.things.at(-1).y += move[1];
    redraw();
  });

  // ------------------------------------------------------------------------------------------ page

  const file = make("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Your image",
    on: { change: () => { openFile(file.files[0]); file.value = ""; } } });
  const thumbs = make("div", { class: "live-row thumbs" }, ...state.gallery.map(({ name, src }) =>
    make("button", { type: "button", title: name, "aria-label": `Image ${name}`, on: { click: guarded(async () => {
      const read = await loadPicture(src);
      show(canvasOf(read, read.naturalWidth, read.naturalHeight), name);
    }) } }, make("img", { src, width: 44, height: 44, alt: "" }))));
  const composeButton = button("Compose a scene", guarded(async () => {
    compose.hidden = !compose.hidden;
    composeButton.setAttribute("aria-pressed", String(!compose.hidden));
    if (compose.hidden) return;
    if (!scene.background) buildComposer();
    await redraw();
  }), { "aria-pressed": "false", hidden: !state.scene });
  maps.append(second, occluded);
  const left = make("div", {}, picture, crop, thumbs,
    make("div", { class: "live-row live-more" }, button("Your image", () => file.click()), file, composeButton), compose);
  const right = make("div", {}, error,
    make("div", { class: "live-row" }, question, askButton, stopButton),
    make("div", { class: "live-row live-more" }, ...state.questions.map((text) => button(text, () => {
      question.value = text;
      ask();
    }))),
    log, status,
    make("div", { class: "live-row live-more" }, occlusionButton, button("Clear", () => {
      clear();
      question.value = ""; // a new image keeps the question, to be asked again
    }), button("Save as JSON", saveJson), button("Save as PNG", savePng)),
    make("div", { class: "live-row live-more" }, make("label", {}, "Temperature ", temperature), make("label", {}, "Tokens ", length)),
    maps, make("small", { textContent: state.checkpoint }));
  el.classList.add("llava-live");
  el.replaceChildren(make("style", { textContent: STYLE }), left, right);
  el.addEventListener("dragover", (event) => event.preventDefault());
  el.addEventListener("drop", (event) => {
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  });
  el.addEventListener("paste", (event) => event.clipboardData.files.length && openFile(event.clipboardData.files[0]));
  const ready = state.gallery.length ? guarded(async () => {
    const read = await loadPicture(state.gallery[0].src);
    show(canvasOf(read, read.naturalWidth, read.naturalHeight), state.gallery[0].name);
  })() : Promise.resolve();

  const asked = new URLSearchParams(location.hash.slice(1)).get("live-box");
  if (asked !== null) {
    el.classList.add("live-box");
    document.body.append(el, make("style", { textContent: "body > :not(.live-box) { display: none !important }" }));
    question.value = asked || question.value;
    ready.then(ask);
  }
  return { conversation, ready };
}

export default { render: chat };
