"""How the report looks, light and dark; its lines are told apart by people who see few colours, too."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f4f6f8; --ink: #1b1f24; --faint: #59636e; --rule: #d8dee4; --accent: #0b6bcb;
  --c0: #0b6bcb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #a16207; --c5: #be185d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --panel: #1d232a; --ink: #e6eaee; --faint: #9aa5b1; --rule: #343c46; --accent: #6cb2ff;
    --c0: #6cb2ff; --c1: #ff9a5c; --c2: #63d18b; --c3: #c99bff; --c4: #e6c04c; --c5: #ff86b8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 0.5rem; }
section { margin-top: 2rem; }
p { margin: 0 0 0.75rem; color: var(--faint); max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; margin: 0; }
.facts dt { color: var(--faint); font-size: 0.85rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.advice { background: var(--panel); border-left: 4px solid var(--accent); padding: 1rem 1.25rem; }
.advice dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.4rem 1rem; margin: 0; }
.advice dt { color: var(--faint); }
.advice dd { margin: 0; }
svg { display: block; width: 100%; height: auto; }
.chart { min-width: 36rem; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot { stroke: none; }
.grid { stroke: var(--rule); stroke-width: 1; }
.mark { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; }
.bar { fill: var(--c0); }
.line.c0 { stroke: var(--c0); } .dot.c0 { fill: var(--c0); }
.line.c1 { stroke: var(--c1); } .dot.c1 { fill: var(--c1); }
.line.c2 { stroke: var(--c2); } .dot.c2 { fill: var(--c2); }
.line.c3 { stroke: var(--c3); } .dot.c3 { fill: var(--c3); }
.line.c4 { stroke: var(--c4); } .dot.c4 { fill: var(--c4); }
.line.c5 { stroke: var(--c5); } .dot.c5 { fill: var(--c5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: 0.4rem; font-size: 0.9rem; }
.key { width: 24px; height: 8px; }
.wide { overflow-x: auto; }
table { margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.3rem 0.6rem; white-space: nowrap; }
tr { border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
footer { margin-top: 2.5rem; color: var(--faint); font-size: 0.85rem; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .advice dl { grid-template-columns: 1fr; gap: 0; }
  .advice dd { margin-bottom: 0.5rem; }
}
@media print { .advice { break-inside: avoid; } section { break-inside: avoid; } }
"""
