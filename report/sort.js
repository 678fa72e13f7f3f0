// Every column of a table can be sorted by a click on its header, or by Enter or Space on it.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = text.replace(/,/g, "").replace("−", "-").match(/^[-+]?\d*\.?\d+/);
    return { text, number: number ? Number(number[0]) : NaN };
  };
  Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      const numbers = Array.from(body.rows).some((row) => !isNaN(value(row, column).number));
      const rows = Array.from(body.rows).sort((one, other) => {
        const [a, b] = [value(one, column), value(other, column)];
        const missing = (x) => (numbers ? isNaN(x.number) : !x.text);
        if (missing(a) || missing(b)) return missing(a) - missing(b); // at the end, in either direction
        const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
        return down ? -order : order;
      });
      for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}
