"""The page's style and its script: it reads the same without the script, only sorting is gone."""

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 18px}
h2{font-size:20px;margin:44px 0 14px;padding-top:20px;border-top:1px solid var(--rule)}
h3{font-size:16px;margin:32px 0 10px}
p{margin:8px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles div{border:1px solid var(--rule);border-radius:8px;padding:10px 14px}
.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.tiles span,dt{color:var(--quiet);font-size:13px}
section:first-of-type h2{border:0;margin-top:0;padding-top:0}
figure{margin:26px 0;border:1px solid var(--rule);border-radius:8px;padding:10px}
figure svg{display:block;width:100%;min-width:640px;max-width:900px;height:auto;margin:0 auto}
details{margin:8px 0}
summary{cursor:pointer}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--quiet);font-weight:600;vertical-align:bottom}
th.n{white-space:normal}
.n{text-align:right;white-space:nowrap}
.ours td{background:color-mix(in srgb,var(--soft) 30%,transparent)}
.bad{color:var(--peer0);font-weight:600}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--ours);outline-offset:2px}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0}
dd{margin:0;overflow-wrap:anywhere}
@media (min-width:700px){td:first-child{white-space:nowrap}}
@media (max-width:600px){main{padding:18px 14px 40px}h1{font-size:20px}}
@media print{figure{break-inside:avoid}details{margin:8px 0}
summary{cursor:pointer}
.wide{overflow:visible}}
""".strip()

# A click sorts by a column, a second one the other way round; rows without a value in it stay at the end.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const key = row => {
        const cell = row.cells[column];
        if (!cell || cell.colSpan > 1) return null;
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.classList.contains("n") ? null : cell.textContent;
      };
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
      const rows = [...body.rows].map(row => [key(row), row]);
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : up ? order(a, b) : order(b, a));
      body.append(...rows.map(([, row]) => row));
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}
""".strip()
