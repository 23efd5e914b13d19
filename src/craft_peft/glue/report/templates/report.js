"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies];
  const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("heading"));

  // Missing values stay last, whichever way the rest is sorted.
  const order = (column, sign) => (a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    if (!heads[column].classList.contains("number")) {
      return sign * x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
    }
    const [gone, missing] = [!("value" in x.dataset), !("value" in y.dataset)];
    return gone || missing ? gone - missing : sign * (x.dataset.value - y.dataset.value);
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const first = head.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      for (const body of bodies) {
        body.append(...rowsOf(body).sort(order(column, now === "ascending" ? 1 : -1)));
      }
    });
  });

  const filter = document.querySelector(`input[aria-controls="${table.id}"]`);
  const count = filter.closest(".tools").querySelector(".count");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = rowsOf(bodies[0]);
    for (const row of bodies.flatMap(rowsOf)) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  });
}

const choices = [...document.querySelectorAll(".choice button")];
const choose = (chosen) => {
  for (const button of choices) {
    button.setAttribute("aria-pressed", String(button === chosen));
    document.getElementById(button.dataset.shows).hidden = button !== chosen;
  }
};
choices.forEach((button) => button.addEventListener("click", () => choose(button)));
if (choices.length) choose(choices[0]);
