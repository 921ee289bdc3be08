// Put everything in place; again where the legend or the reader's colours change.

drawLegend();
prepareTables();
placeCharts();
prepareSamples();
onChange(redrawCharts);
onChange(() => { if (DATA.samples) drawSamples(); });
DARK.addEventListener("change", () => { drawLegend(); changed(); });
