
// Comfort only: read-outs under the pointer, and the current section in the contents. The page is whole without it.
(() => {
  "use strict";
  const show = v => v === null ? "–" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3)
    ? v.toExponential(2) : String(+v.toPrecision(4));

  for (const chart of document.querySelectorAll("[data-hover]")) {
    const data = JSON.parse(chart.dataset.hover);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    chart.append(tip);
    for (const svg of chart.querySelectorAll("svg.drawing")) {
      const [left, top, width, height] = svg.dataset.box.split(" ").map(Number);
      const [x0, x1] = svg.dataset.x.split(" ").map(Number);
      const [y0, y1, log] = svg.dataset.y.split(" ").map(Number);
      const toX = v => left + (v - x0) / (x1 - x0) * width;
      const part = v => log ? Math.log(v / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0);
      const toY = v => top + (1 - part(v)) * height;
      const cloud = svg.querySelector(".cloud") !== null;
      const sign = document.createElementNS(svg.namespaceURI, cloud ? "circle" : "line");
      sign.setAttribute("class", cloud ? "halo" : "hair");
      sign.setAttribute("visibility", "hidden");
      svg.append(sign);
      const hide = () => { tip.hidden = true; sign.setAttribute("visibility", "hidden"); };

      const line = (look, text) => {
        const row = document.createElement("div");
        if (look !== null) row.append(Object.assign(document.createElement("i"), { className: "c" + look }));
        row.append(text);                       // as text: names come from the data
        return row;
      };
      const move = event => {
        const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
        const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
        if (px < left - 8 || px > left + width + 8 || py < top - 8 || py > top + height + 8) return hide();
        let best = null;
        for (const [, , xs, ys] of data.series) xs.forEach((x, i) => {
          if (x === null || ys[i] === null) return;
          const far = cloud ? Math.hypot(toX(x) - px, toY(ys[i]) - py) : Math.abs(toX(x) - px);
          if (best === null || far < best.far) best = { far, x, y: ys[i] };
        });
        if (best === null || (cloud && best.far > 24)) return hide();
        const date = v => new Date(v * 1000).toISOString().slice(0, 16).replace("T", " ").replace(" 00:00", "");
        const rows = [line(null, data.dates ? date(best.x) : (data.x || "x") + " " + show(best.x))];
        if (cloud) rows.push(line(null, (data.y || "y") + " " + show(best.y)));
        else for (const [name, look, xs, ys] of data.series) {
          let near = -1;
          xs.forEach((x, i) => {
            if (x !== null && ys[i] !== null && (near < 0 || Math.abs(x - best.x) < Math.abs(xs[near] - best.x))) near = i;
          });
          if (near >= 0 && Math.abs(toX(xs[near]) - toX(best.x)) < 24) rows.push(line(look, name + " " + show(ys[near])));
        }
        tip.replaceChildren(...rows);
        tip.hidden = false;
        const at = toX(best.x), attributes = cloud
          ? { cx: at, cy: toY(best.y), r: 6 } : { x1: at, x2: at, y1: top, y2: top + height };
        for (const [key, value] of Object.entries(attributes)) sign.setAttribute(key, value);
        sign.setAttribute("visibility", "visible");
        const outer = chart.getBoundingClientRect(), x = box.left - outer.left + at / scale;
        const beside = x + 14 + tip.offsetWidth > outer.width ? x - 14 - tip.offsetWidth : x + 14;
        tip.style.left = Math.max(0, beside) + "px";
        tip.style.top = Math.max(0, box.top - outer.top + (cloud ? toY(best.y) / scale - 20 : top / scale)) + "px";
      };
      svg.addEventListener("pointermove", move);
      svg.addEventListener("pointerdown", move);
      svg.addEventListener("pointerleave", hide);
    }
  }

  // Images are enlarged in a dialog.
  const dialog = document.createElement("dialog");
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  const enlarge = tile => {
    dialog.replaceChildren(...[...tile.children].map(part => {
      const copy = part.cloneNode(true);
      for (const each of [copy, ...copy.querySelectorAll("[role=button]")]) {
        each.removeAttribute("tabindex");
        if (each.getAttribute("role") === "button") each.removeAttribute("role");
      }
      if (copy.title) { copy.textContent = copy.title; copy.removeAttribute("title"); }
      return copy;
    }));
    dialog.showModal();
  };
  for (const tile of document.querySelectorAll(".gallery > li")) {
    const view = tile.firstElementChild;
    if (!view || view.classList.contains("broken")) continue;
    view.setAttribute("role", "button");
    view.setAttribute("tabindex", "0");
    view.addEventListener("click", () => enlarge(tile));
    view.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(tile); }
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map(a => [a.hash.slice(1), a]));
  const sections = [...document.querySelectorAll("main > section")];
  let current = null;
  const mark = () => {
    const end = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 2;
    const here = end ? sections.at(-1) : sections.findLast(s => s.getBoundingClientRect().top < 140) || sections[0];
    const link = here && links.get(here.id);
    if (!link || link === current) return;
    current?.removeAttribute("aria-current");
    link.setAttribute("aria-current", "true");
    current = link;
    const bar = link.closest("ol");
    if (bar.scrollWidth > bar.clientWidth) bar.scrollTo({ left: link.offsetLeft - 40, behavior: "smooth" });
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
})();
