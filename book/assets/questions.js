// Filters of the page of questions. Without this script the page lists all of them.
document.addEventListener("DOMContentLoaded", () => {
  const entries = [...document.querySelectorAll(".questions > article")];
  if (!entries.length) return;
  const moods = { agrees: "right, or at least the reference", disagrees: "wrong, or below the reference",
    "shown-only": "a score only", "not-resolved": "not scored" };
  const bar = document.createElement("form"), count = document.createElement("output"), chosen = {};
  bar.className = "question-filter";
  const labelled = (text, field) => {
    const label = document.createElement("label");
    label.append(text, field);
    bar.append(label);
  };
  for (const [key, title] of [["bench", "Benchmark"], ["kind", "Kind"], ["verdict", "Verdict"]]) {
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const value of new Set(entries.map((entry) => entry.dataset[key]))) {
      select.append(new Option(key === "verdict" ? moods[value] : value, value));
    }
    chosen[key] = select;
    labelled(title, select);
  }
  const words = document.createElement("input");
  words.type = "search";
  labelled("Words", words);
  bar.append(count);
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    for (const entry of entries) {
      entry.hidden = Object.entries(chosen).some(([key, select]) => select.value && entry.dataset[key] !== select.value)
        || !entry.textContent.toLowerCase().includes(wanted);
    }
    for (const list of document.querySelectorAll(".questions")) {
      list.closest("section").hidden = [...list.children].every((entry) => entry.hidden);
    }
    count.textContent = `${entries.filter((entry) => !entry.hidden).length} of ${entries.length}`;
  };
  bar.addEventListener("input", filter);
  bar.addEventListener("submit", (event) => event.preventDefault());
  entries[0].closest("section").before(bar);
  filter();
});
