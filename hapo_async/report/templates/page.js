(() => {
  const tip = document.getElementById("tip");
  const show = (v, unit) => unit === "share" ? (100 * v).toFixed(1) + "%" : Number(v.toPrecision(4)).toLocaleString("en");
  const escape = (t) => { const e = document.createElement("i"); e.textContent = t; return e.innerHTML; };
  const place = (event, text) => {
    tip.innerHTML = text;
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 12) + "px";
    tip.style.top = Math.max(event.clientY - tip.offsetHeight - 12, 8) + "px";
  };
  const hide = () => { tip.style.display = "none"; };
  for (const svg of document.querySelectorAll("svg[data-heat]")) {
    const data = JSON.parse(svg.dataset.heat), [left, right, top, bottom] = data.box;
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - left) / (right - left) * data.columns.length);
      const row = Math.floor(((event.clientY - box.top) * scale - top) / (bottom - top) * data.rows.length);
      const value = (data.cells[row] || [])[column];
      if (value === undefined) return hide();
      place(event, "<b>" + escape(data.rows[row]) + "</b><br>step " + escape(data.columns[column]) + " <b>" +
        (value === null ? "not judged" : show(value, data.unit)) + "</b>");
    });
    svg.addEventListener("mouseleave", hide);
  }
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const data = JSON.parse(svg.dataset.chart), [left, right, x0, x1] = data.box, cursor = svg.querySelector(".cursor");
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const at = x0 + (px - left) / (right - left) * (x1 - x0);
      const near = (xs) => xs.reduce((best, x, i) => Math.abs(x - at) < Math.abs(xs[best] - at) ? i : best, 0);
      const step = data.lines[0].x[near(data.lines[0].x)], cx = left + (step - x0) / ((x1 - x0) || 1) * (right - left);
      cursor.setAttribute("x1", cx); cursor.setAttribute("x2", cx);
      place(event, "<b>step " + Math.round(step) + "</b>" + data.lines.map((line) => "<br><span style='color:var(--c" +
        line.color + ")'>■</span> " + escape(line.label) + " <b>" + show(line.y[near(line.x)], data.unit) + "</b>").join(""));
    });
    svg.addEventListener("mouseleave", hide);
  }
})();
