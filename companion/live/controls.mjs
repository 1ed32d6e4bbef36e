// A figure with controls: every combination of values has its own HTML, which companion.live.controls has written.
// `{ controls: [{ label, values, start, slider }], frames: [{ html, text }] }`; frames in the order of the
// values, the last control changing fastest.
const STYLE = `
.companion-controls .choices { display: flex; flex-wrap: wrap; gap: .4em 1.6em; margin: .5em 0 }
.companion-controls label { display: flex; max-width: 100%; flex-wrap: wrap; gap: .5em; align-items: center }
.companion-controls input { width: 11em } .companion-controls label b { min-width: 3em; }
.companion-controls select { font: inherit; color: inherit; background: transparent; max-width: 100% }
.companion-controls option { color: #111; background: #fff }
.companion-controls [data-sets] { cursor: crosshair; touch-action: none }
`;

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export default {
  render({ model, el }) {
    const { controls, frames } = model.get("state"), at = controls.map((control) => control.start);
    const status = make("p", { role: "status" }), view = make("div", {}), shown = [];

    function show() {
      const frame = frames[at.reduce((sum, index, k) => sum * controls[k].values.length + index, 0)];
      shown.forEach((display) => display());
      status.textContent = frame.text;
      view.innerHTML = frame.html;
    }

    const choices = controls.map(({ label, values, slider }, k) => {
      const input = slider
        ? make("input", { type: "range", min: 0, max: values.length - 1 })
        : make("select", {}, ...values.map((text, value) => make("option", { value, textContent: text })));
      const value = make("b", {});
      shown.push(() => {
        input.value = at[k];
        if (!slider) return;
        value.textContent = values[at[k]];
        input.setAttribute("aria-valuetext", values[at[k]]);
      });
      input.addEventListener("input", () => {
        at[k] = Number(input.value);
        show();
      });
      return make("label", {}, label, input, ...(slider ? [value] : []));
    });

    // a picture of rows x columns cells with data-sets="K": pointing at a cell sets control K to the cell's number
    view.addEventListener("pointermove", (event) => {
      const grid = event.target.closest("[data-sets]");
      if (!grid) return;
      const box = grid.getBoundingClientRect(), [rows, columns] = grid.dataset.cells.split(" ").map(Number);
      const cell = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const row = cell((event.clientY - box.top) / box.height, rows);
      const index = row * columns + cell((event.clientX - box.left) / box.width, columns);
      if (at[grid.dataset.sets] === index) return;
      at[grid.dataset.sets] = index;
      show();
    });

    el.classList.add("companion-controls");
    el.replaceChildren(make("style", { textContent: STYLE }), make("div", { className: "choices" }, ...choices), status, view);
    show();
  },
};
