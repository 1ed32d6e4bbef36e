// The page of `companion.demo.Chat`: it shows the state that Python sends and sends what a visitor does. No text of a
// model, a file or a visitor is ever parsed as HTML: all of them are set as `textContent`.

const SHOWN = 336; // pixels of the picture
const SILENT = "The kernel does not answer: another cell is running, or it has ended; reload the page if this lasts.";
const STYLE = `
.llava-demo { display: grid; grid-template-columns: minmax(0, ${SHOWN}px) minmax(0, 1fr); gap: 1.4em; max-width: 68em;
  margin: 0 auto; padding: .8em; font: 15px/1.5 system-ui, sans-serif; color: var(--jp-ui-font-color1, inherit) }
.llava-demo * { box-sizing: border-box } .llava-demo [hidden] { display: none !important }
.llava-demo canvas { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px }
.llava-demo .picture.over { outline: 3px dashed #0067a5; outline-offset: 3px; border-radius: 6px }
.llava-demo .row { display: flex; flex-wrap: wrap; gap: .45em; margin: .55em 0; align-items: center }
.llava-demo button, .llava-demo input { font: inherit; color: inherit; padding: .3em .7em; max-width: 100%; border-radius: 5px;
  border: 1px solid color-mix(in srgb, currentColor 40%, transparent); background: color-mix(in srgb, currentColor 6%, transparent) }
.llava-demo button { cursor: pointer } .llava-demo button:disabled { opacity: .5; cursor: default }
.llava-demo button.ask { background: #0067a5; border-color: #0067a5; color: #fff }
.llava-demo input[type=number] { width: 5em } .llava-demo .question { flex: 1 1 14em; min-width: 0 }
.llava-demo .thumbs { flex-wrap: nowrap; overflow-x: auto; padding-bottom: .3em }
.llava-demo .thumbs button { padding: 2px; flex: none } .llava-demo .thumbs img { display: block; width: 48px; height: 48px; object-fit: cover }
.llava-demo .thumbs [aria-pressed=true] { outline: 2px solid #0067a5 }
.llava-demo .whole { position: relative; flex: none } .llava-demo .whole img { display: block; max-width: 72px; max-height: 72px }
.llava-demo .whole i { position: absolute; inset: 0; margin: auto; border: 2px solid #e07b00; height: 100%; aspect-ratio: 1; max-width: 100% }
.llava-demo .whole.tall i { height: auto; width: 100% }
.llava-demo .crop { flex-wrap: nowrap } .llava-demo small { opacity: .85 }
.llava-demo .turn { margin: .9em 0; overflow-wrap: anywhere } .llava-demo .turn p { margin: .15em 0; white-space: pre-wrap }
.llava-demo .turn button { padding: 0 .5em; font-size: .85em } .llava-demo .words span { border-radius: 3px; padding: 0 .1em; cursor: pointer }
.llava-demo .words span:hover, .llava-demo .words span:focus { background: #e07b0055; outline: none }
.llava-demo .error { color: #c62828; font-weight: 600 } .llava-demo .facts { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding-top: .5em }
.llava-demo .facts p { margin: .2em 0; font-size: .88em }
[data-jp-theme-light=false] .llava-demo .error { color: #ff8a80 }
@media (max-width: 700px) { .llava-demo { grid-template-columns: minmax(0, 1fr); gap: .6em; padding: .4em }
  .llava-demo .picture { max-width: 260px } }
`;

function make(tag, options = {}, ...children) {
  const { on = {}, ...rest } = options, node = document.createElement(tag);
  for (const [key, value] of Object.entries(rest)) {
    if (key.startsWith("aria-") || key === "role" || key === "class") node.setAttribute(key, value);
    else node[key] = value;
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children);
  return node;
}

const button = (label, listener, more = {}) => make("button", { type: "button", textContent: label, on: { click: listener }, ...more });

function render({ model, el }) {
  const get = (name) => model.get(name);
  const send = (message, buffers) => {
    error.textContent = ""; // an equal value of Python's `error` is no change
    model.send(message, undefined, buffers);
  };
  const picture = make("canvas", { width: 2 * SHOWN, height: 2 * SHOWN, role: "img" }), frame = make("div", { class: "picture" }, picture);
  const seen = new Image(), whole = make("img", { alt: "" }), square = make("i"), crop = make("small");
  const wholeBox = make("div", { class: "whole" }, whole, square), thumbs = make("div", { class: "row thumbs" });
  const error = make("p", { class: "error", role: "alert" }), status = make("small", { role: "status" });
  const log = make("div", { "aria-live": "polite" }), facts = make("div", { class: "facts" });
  const question = make("input", { type: "text", class: "question", maxLength: 2000, value: get("question"), "aria-label": "Question",
    on: { keydown: (event) => event.key === "Enter" && !event.isComposing && ask() } });
  const askButton = button("Ask", () => ask(), { class: "ask" }), stopButton = button("Stop", () => send({ do: "stop" }));
  const clearButton = button("Clear", () => { question.value = ""; send({ do: "clear" }); }), saveButton = button("Save as JSON", save);
  const tokens = make("input", { type: "number", min: 1, max: 2048, value: 96, "aria-label": "Longest answer in tokens" });
  const temperature = make("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0, "aria-label": "Temperature" });
  const suggestions = make("div", { class: "row" });
  let chosen = 0, waiting = 0;

  function ask(text = question.value) {
    if (get("busy")) return;
    question.value = text;
    clearTimeout(waiting);
    waiting = setTimeout(() => (error.textContent = SILENT), 10000);
    send({ do: "ask", text, tokens: Number(tokens.value) || 96, temperature: Number(temperature.value) || 0 });
  }

  async function open(file) {
    if (!file) return;
    if (file.size > get("largest_file")) {
      const [size, most] = [file.size, get("largest_file")].map((bytes) => (bytes / 1e6).toFixed(0));
      error.textContent = `${file.name} has ${size} MB; choose an image of at most ${most} MB`;
      return;
    }
    chosen = null;
    send({ do: "image", name: file.name }, [await file.arrayBuffer()]);
  }

  function save() {
    const content = { image: get("image").name, turns: get("turns"), checkpoint: get("about") };
    const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    make("a", { href: url, download: "dialogue.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  /** Draw what the model sees; with weights of the patches, the larger the clearer. */
  function draw(weights = null) {
    const context = picture.getContext("2d");
    context.clearRect(0, 0, picture.width, picture.height);
    if (seen.naturalWidth) context.drawImage(seen, 0, 0, picture.width, picture.height);
    if (!weights) return;
    const side = Math.round(Math.sqrt(weights.length)), edge = (k) => Math.round((k * picture.width) / side);
    const largest = Math.max(...weights, 1e-9);
    weights.forEach((weight, k) => {
      const x = k % side, y = Math.floor(k / side);
      context.fillStyle = `rgba(12, 14, 40, ${0.75 * (1 - weight / largest)})`;
      context.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
    });
  }
  seen.addEventListener("load", () => draw());

  function showImage() {
    const { name = "", src = "", whole: small = "", crop: text = "", mode } = get("image");
    if (src) seen.src = src;
    else draw();
    picture.setAttribute("aria-label", src ? `What the model sees of ${name}` : "No image yet");
    whole.onload = () => wholeBox.classList.toggle("tall", whole.naturalHeight > whole.naturalWidth);
    if (small) whole.src = small;
    wholeBox.hidden = !small;
    square.hidden = mode !== "crop";
    crop.textContent = src ? `${name}: ${text}` : "No image yet: choose, upload, drop or paste one.";
    [...thumbs.children].forEach((node, k) => node.setAttribute("aria-pressed", String(k === chosen)));
  }

  function word({ text, weights }) {
    const show = () => {
      draw(weights);
      crop.textContent = `Attention when the model writes "${text}", mean over layers and heads.`;
    };
    return make("span", { textContent: text, tabIndex: 0, on: { mouseenter: show, focus: show, click: show } });
  }

  function showTurns() {
    const turns = get("turns"), attention = get("attention"), busy = get("busy");
    log.replaceChildren(...turns.map(({ question: asked, answer, note }, k) => {
      const content = make("p", { class: "words" }, make("b", { textContent: "LLaVA  " }));
      if (attention.turn === k) for (const each of attention.words) content.append(word(each), " ");
      else content.append(answer || (busy && k === turns.length - 1 ? "…" : "(no answer)"));
      if (note) content.append(make("small", { textContent: `  (${note})` }));
      const look = button("Attention per word", () => send({ do: "attend", turn: k }), { disabled: busy });
      const hidden = !answer || attention.turn === k || (busy && k === turns.length - 1);
      return make("div", { class: "turn" }, make("p", {}, make("b", { textContent: "You  " }), asked), content, ...(hidden ? [] : [look]));
    }));
    if (attention.turn === undefined) showImage();
    else status.textContent = "Point at a word of the answer: the image shows what the model attends to.";
  }

  function showBusy() {
    const busy = get("busy");
    clearTimeout(waiting);
    el.setAttribute("aria-busy", String(busy));
    askButton.disabled = busy;
    stopButton.disabled = !busy;
    clearButton.disabled = saveButton.disabled = busy || !get("turns").length;
    for (const node of suggestions.children) node.disabled = busy;
    showTurns();
  }

  const file = make("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Your image",
    on: { change: () => { open(file.files[0]); file.value = ""; } } });
  thumbs.append(...get("gallery").map(({ name, src }, k) => make("button",
    { type: "button", title: name, "aria-label": `Image ${name}`, on: { click: () => { chosen = k; send({ do: "pick", number: k }); } } },
    make("img", { src, alt: "" }))));
  suggestions.append(...get("suggestions").map((text) => button(text, () => ask(text))));
  facts.append(...get("about").map((text) => make("p", { textContent: text })));
  const left = make("div", {}, frame, make("div", { class: "row crop" }, wholeBox, crop), thumbs,
    make("div", { class: "row" }, button("Upload an image", () => file.click()), file, make("small", { textContent: "or drop or paste one" })));
  const right = make("div", {}, make("div", { class: "row" }, question, askButton, stopButton), suggestions, error, log, status,
    make("div", { class: "row" }, make("label", {}, "Temperature ", temperature), make("label", {}, "Tokens ", tokens), clearButton, saveButton),
    facts);
  el.classList.add("llava-demo");
  el.replaceChildren(make("style", { textContent: STYLE }), left, right);

  const showError = () => (error.textContent = get("error")), showStatus = () => (status.textContent = get("status"));
  const shown = { image: showImage, turns: showTurns, attention: showTurns, busy: showBusy, error: showError, status: showStatus };
  for (const [name, show] of Object.entries(shown)) model.on(`change:${name}`, show);
  showImage();
  showBusy();
  showError();

  const over = (event) => { event.preventDefault(); frame.classList.toggle("over", event.type === "dragover"); };
  const drop = (event) => { over(event); open(event.dataTransfer.files[0]); };
  const paste = (event) => { if (event.clipboardData?.files.length) open(event.clipboardData.files[0]); };
  el.addEventListener("dragover", over);
  el.addEventListener("dragleave", over);
  el.addEventListener("drop", drop);
  document.addEventListener("paste", paste); // a picture has no focus, so the paste arrives at the page
  return () => {
    for (const [name, show] of Object.entries(shown)) model.off(`change:${name}`, show);
    document.removeEventListener("paste", paste);
    clearTimeout(waiting);
  };
}

export default { render };
