"""Style and script of the page that ``data.page`` writes. They do not use the network."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2127; --soft: #5d6672; --line: #e3e1da; --accent: #3556c9;
  --bar: #6f8ae6; --over: #d1433f; --good: #1d7f4e;
  --shadow: 0 1px 2px rgb(30 30 40 / .06), 0 6px 24px rgb(30 30 40 / .05);
  --answer: #cdeed8; --answer-ink: #0d4527; --stop: #ffdf94; --stop-ink: #5a3b00; --own: #8292ad;
  --edge: rgb(20 30 50 / .13);
  --warn: #fdf0d7; --warn-line: #e8b04b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161b; --card: #1c1f26; --ink: #e5e7eb; --soft: #9aa3b2; --line: #2d323c; --accent: #8fa8ff;
    --bar: #5a74d6; --over: #ff7b72; --good: #5ad18f; --shadow: none;
    --answer: #173f2a; --answer-ink: #b7f0cd; --stop: #57400d; --stop-ink: #ffe1a1; --own: #74819a;
    --edge: rgb(255 255 255 / .15); --warn: #33290f; --warn-line: #b0822b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.1rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 2.8rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0; }
a { color: var(--accent); }
code, .tokens { font-family: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
code { font-size: .87em; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.small { font-size: .87rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; margin: 1rem 0 0; font-size: .92rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow);
  padding: 1.1rem 1.25rem; margin: .9rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 0; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: .8rem 1rem;
  box-shadow: var(--shadow); }
.figure b { display: block; font-size: 1.6rem; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .85rem; }
.findings { background: var(--warn); border-color: var(--warn-line); }
.findings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.findings li { margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: var(--over); font-weight: 600; }
.fine { color: var(--good); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.4rem; }
.charts figure { max-width: 34rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem .6rem; margin: .6rem 0; font-size: .85rem; }
.legend span { padding: .05rem .5rem; border-radius: 5px; border: 1px solid var(--line); }
.tokens { font-size: .84rem; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 34rem;
  overflow-y: auto; padding: .8rem .9rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--paper);
  margin: 0; }
.tokens span { padding: .1em 0; box-shadow: inset 1px 0 0 var(--edge); cursor: default; }
.tokens span:hover, .tokens span.here { outline: 2px solid var(--accent); outline-offset: 0; border-radius: 2px; }
.o { color: var(--own); }
.a { background: var(--answer); color: var(--answer-ink); }
.s { background: var(--stop); color: var(--stop-ink); }
.tokens i { font-style: normal; opacity: .45; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
#tip { position: fixed; z-index: 9; display: none; max-width: min(20rem, 92vw); padding: .6rem .8rem;
  border-radius: 10px;
  background: var(--ink); color: var(--paper); font-size: .85rem; line-height: 1.45; pointer-events: none;
  box-shadow: 0 8px 30px rgb(0 0 0 / .25); }
#tip code { display: block; font-size: .95rem; white-space: pre-wrap; margin-bottom: .2rem; }
#tip dl { display: grid; grid-template-columns: auto 1fr 5.5rem; gap: .15rem .6rem; margin: .3rem 0 0;
  align-items: center; }
#tip dt { opacity: .75; } #tip dd { margin: 0; font-variant-numeric: tabular-nums; text-align: right; }
#tip .meter { height: 5px; border-radius: 3px; background: color-mix(in srgb, currentColor 22%, transparent); }
#tip .meter i { display: block; height: 100%; border-radius: 3px; background: currentColor; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 34rem) {
  main { padding: 1.3rem .8rem 4rem; } h1 { font-size: 1.4rem; } .card { padding: .9rem .85rem; }
  .tokens { max-height: 26rem; font-size: .8rem; }
  #tip { left: .6rem !important; right: .6rem; bottom: .6rem; top: auto !important; max-width: none; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --shadow: none; }
  main { max-width: none; padding: 0; } nav, #tip { display: none !important; }
  .tokens { max-height: none; overflow: visible; font-size: 8pt; } h2 { break-after: avoid; }
  .card, .figure { box-shadow: none; break-inside: auto; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

SCRIPT = """
const tip = document.getElementById('tip');
let here = null;
const shown = value => value === 0 ? '0' : value < 0.001 ? value.toExponential(1) : value.toPrecision(3);
function row(list, name, text, share) {
  const term = document.createElement('dt'), value = document.createElement('dd'),
  meter = document.createElement('div');
  term.textContent = name; value.textContent = text; meter.className = share === null ? '' : 'meter';
  if (share !== null) {
    const part = document.createElement('i');
    part.style.width = 100 * Math.min(1, share) + '%';
    meter.append(part);
  }
  list.append(term, value, meter);
}
function show(token, x, y) {
  if (here) here.classList.remove('here');
  here = token; here.classList.add('here'); tip.replaceChildren();
  const text = document.createElement('code');
  text.textContent = JSON.stringify(token.dataset.t ?? token.textContent); tip.append(text);
  const kind = {a: 'trained', s: 'trained, text of the template', o: 'not trained, text of the template'};
  const names = [...token.classList].map(name => kind[name]).filter(Boolean);
  const note = document.createElement('div');
  note.textContent = 'token ' + token.dataset.i + (token.dataset.p ? '' : ', ' + (names[0] ?? 'not trained'));
  tip.append(note);
  if (token.dataset.p) {
    const [p, phi, weight, share, most] = token.dataset.p.split(' ').map(Number);
    const list = document.createElement('dl');
    row(list, 'p', shown(p), p); row(list, 'phi = p(1 - p)', shown(phi), 4 * phi);
    row(list, 'weight', shown(weight), most > 0 ? weight / most : 0);
    row(list, 'share of gradient', (100 * share).toPrecision(2) + ' %', share);
    tip.append(list);
  }
  tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + 'px';
  tip.style.top = (y + box.height + 26 > innerHeight ? y - box.height - 14 : y + 18) + 'px';
}
function hide() { tip.style.display = 'none'; if (here) here.classList.remove('here'); here = null; }
document.addEventListener('pointermove', event => {
  const token = event.target.closest?.('.tokens span');
  if (token) show(token, event.clientX, event.clientY); else if (event.pointerType === 'mouse') hide();
});
document.addEventListener('click', event => {
  const token = event.target.closest?.('.tokens span');
  if (token) show(token, event.clientX, event.clientY); else hide();
});
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
document.addEventListener('scroll', hide, {passive: true, capture: true});
"""
