// Filters of the page of questions. Without this script the page lists all of them.
document.addEventListener("DOMContentLoaded", () => {
  const entries = [...document.querySelectorAll(".questions > article")];
  if (!entries.length) return;
  const moods = { agrees: "right", partly: "right in part", disagrees: "wrong",
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
  const lists = [...document.querySelectorAll(".questions")];
  const asked = lists.reduce((sum, list) => sum + Number(list.dataset.asked), 0);
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    for (const entry of entries) {
      entry.hidden = Object.entries(chosen).some(([key, select]) => select.value && entry.dataset[key] !== select.value)
        || !entry.textContent.toLowerCase().includes(wanted);
    }
    for (const list of lists) {
      list.closest("section").hidden = [...list.children].every((entry) => entry.hidden);
    }
    const shown = entries.filter((entry) => !entry.hidden).length;
    const more = asked > entries.length ? ` on this page; ${asked} were asked` : "";
    count.textContent = `${shown} of ${entries.length}${more}`;
  };
  bar.addEventListener("input", filter);
  bar.addEventListener("submit", (event) => event.preventDefault());
  entries[0].closest("section").before(bar);
  filter();
});
