// Draws the figures, gives them the page's colours, and links them: what is selected in one is selected in all.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const config = {
  responsive: true,
  displaylogo: false,
  showSendToCloud: false,
  modeBarButtonsToRemove: ["lasso2d", "autoScale2d", "sendChartToCloud"],  // a report leaves the machine by hand only
};
const drawn = {};

function colours() {
  const style = getComputedStyle(document.documentElement);
  return style.getPropertyValue("--text").trim();
}

for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  figure.layout.font.color = colours();
  const isSmall = id.startsWith("slice-");  // too small for buttons: a drag selects
  Plotly.newPlot(place, figure.data, figure.layout, isSmall ? { ...config, displayModeBar: false } : config);
  drawn[id] = place;
}

function recolour() {
  for (const place of Object.values(drawn)) {
    Plotly.relayout(place, { "font.color": colours() });
    const parallel = place.data.findIndex((trace) => trace.type === "parcoords");
    if (parallel >= 0) {
      const text = colours();
      Plotly.restyle(place, { "labelfont.color": text, "tickfont.color": text, "rangefont.color": text }, [parallel]);
    }
  }
}
recolour();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

// --- selection -------------------------------------------------------------------------------------------------------

let isBusy = false;

function select(numbers) {  // a Set of trials, or null for all
  isBusy = true;
  for (const place of Object.values(drawn)) {
    place.data.forEach((trace, index) => {
      if (trace.type === "scatter" && trace.customdata) {
        const points = numbers && trace.customdata.map((n, i) => (numbers.has(n) ? i : -1)).filter((i) => i >= 0);
        Plotly.restyle(place, { selectedpoints: [points] }, [index]);
      } else if (trace.meta !== undefined && typeof trace.meta === "number") {
        Plotly.restyle(place, { visible: !numbers || numbers.has(trace.meta) }, [index]);
      }
    });
  }
  for (const row of document.querySelectorAll("tr[data-trial]")) {
    row.classList.toggle("is-out", Boolean(numbers) && !numbers.has(Number(row.dataset.trial)));
  }
  const bar = document.getElementById("selection");
  bar.style.display = numbers ? "block" : "none";
  if (numbers) bar.firstElementChild.textContent = `${numbers.size} trials selected. `;
  isBusy = false;
}

function inParallel(trace) {  // the trials that every brushed axis lets through, or null if none is brushed
  const brushed = trace.dimensions.filter((axis) => axis.constraintrange);
  if (!brushed.length) return null;
  const passes = (axis, value) => {
    const ranges = Array.isArray(axis.constraintrange[0]) ? axis.constraintrange : [axis.constraintrange];
    return ranges.some(([low, high]) => low <= value && value <= high);
  };
  return new Set(trace.customdata.filter((_, i) => brushed.every((axis) => passes(axis, axis.values[i]))));
}

for (const place of Object.values(drawn)) {
  place.on("plotly_selected", (event) => {
    if (!isBusy && event && event.points.length) select(new Set(event.points.map((point) => point.customdata)));
  });
  place.on("plotly_deselect", () => { if (!isBusy) select(null); });
  place.on("plotly_restyle", () => {
    if (!isBusy && place.data[0].type === "parcoords") select(inParallel(place.data[0]));
  });
}
document.getElementById("clear").addEventListener("click", () => {
  for (const place of Object.values(drawn)) {
    if (place.data[0] && place.data[0].type === "parcoords") {
      const open = {};
      place.data[0].dimensions.forEach((_, i) => { open[`dimensions[${i}].constraintrange`] = null; });
      isBusy = true;
      Plotly.restyle(place, open, [0]);
      isBusy = false;
    } else {
      Plotly.relayout(place, { selections: [] });
    }
  }
  select(null);
});
