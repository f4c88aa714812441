(() => {
  "use strict";
  const table = document.getElementById("sites");
  if (table) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const controls = document.getElementById("controls");
    const decision = document.getElementById("decision");
    const text = document.getElementById("text");
    const count = document.getElementById("count");
    const collator = new Intl.Collator("en", { numeric: true });

    const filter = () => {
      const wanted = text.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        const fits = !decision.value || row.dataset.decision === decision.value;
        row.hidden = !fits || !row.textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      count.value = `${shown} of ${rows.length} rows`;
    };

    // #filter=dense or #filter=sparse; any other word is looked for in the rows.
    const readAddress = () => {
      const value = new URLSearchParams(location.hash.slice(1)).get("filter") || "";
      const isDecision = value === "dense" || value === "sparse";
      decision.value = isDecision ? value : "";
      text.value = isDecision ? "" : value;
      filter();
    };

    const compare = (column, isNumber) => (a, b) => {
      const [one, two] = [a.cells[column], b.cells[column]];
      return isNumber
        ? Number(one.dataset.value) - Number(two.dataset.value)
        : collator.compare(one.textContent, two.textContent);
    };

    const sort = (header) => {
      const order = header.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sorted = rows.slice().sort(compare(header.cellIndex, header.classList.contains("number")));
      body.append(...(order === "ascending" ? sorted : sorted.reverse()));
    };

    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(header));
      header.append(button);
    }
    decision.addEventListener("change", filter);
    text.addEventListener("input", filter);
    controls.addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("hashchange", readAddress);
    controls.hidden = false;
    readAddress();
  }
  document.documentElement.dataset.script = "ready";
})();
