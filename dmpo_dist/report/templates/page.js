// Tables sort by their headings and say where they go on to the right; the table of contents follows the reader; a
// printed page shows what is folded on the screen.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[head.cellIndex].dataset.key ?? row.cells[head.cellIndex].textContent;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b)) : a - b);
      body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b)) * (down ? -1 : 1)));
    });
  }
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    part.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const part of document.querySelectorAll("details[data-printed]")) part.open = false;
});

const boxes = [...document.querySelectorAll(".scroll")];
const edges = (box) => {
  box.classList.toggle("wider", box.scrollWidth > box.clientWidth + 1);
  box.classList.toggle("ended", box.scrollLeft + box.clientWidth >= box.scrollWidth - 1);
};
const sizes = new ResizeObserver((entries) => entries.forEach((entry) => edges(entry.target)));
for (const box of boxes) {
  sizes.observe(box);
  box.addEventListener("scroll", () => edges(box), { passive: true });
}

const contents = document.querySelector("nav ul");
const links = new Map([...contents.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
const sections = [...document.querySelectorAll("main > section")];
let shown = null;
const follow = () => {
  const top = innerHeight / 3;
  const now = sections.findLast((section) => section.getBoundingClientRect().top <= top) ?? sections[0];
  if (now === shown || !now) return;
  if (shown) links.get(shown.id)?.removeAttribute("aria-current");
  const link = links.get(now.id);
  link?.setAttribute("aria-current", "true");
  if (link) contents.scrollTo({ left: link.offsetLeft - contents.clientWidth / 3, top: link.offsetTop - 80 });
  shown = now;
};
addEventListener("scroll", follow, { passive: true });
addEventListener("resize", follow);
follow();
