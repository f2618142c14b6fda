"""A captured step as one HTML page that needs nothing else.

Operations in order, each with the memory that it reads and writes; beside them all
memory, by whether a graph could keep it: what moves between two captures first, then
what stays, then what is the graph's own. Pointing at memory, with the mouse or the
keyboard, shows who reads and who writes it.
"""

from collections.abc import Iterator
from html import escape
from typing import Any

KINDS = {"launch": "torch", "triton": "Triton", "h2d": "to device", "d2h": "to host"}

GROUPS = {
    "moves": "Moves between two captures",
    "pinned": "Pinned memory of the host, stays",
    "given": "Given to the graph, stays",
    "own": "The graph's own",
}


def draw(entry: dict[str, Any], title: str = "One decode step, captured") -> str:
    """The page.

    Args:
        entry: Of one step, as `vllm_ext.prove.steprun.look` returns it.
        title: Of the page.
    """
    graph = entry["graph"]
    moving = {
        argument["memory"]
        for node in graph["nodes"]
        for argument in node["arguments"]
        if argument["moves"]
    }
    body = [
        f"<header><h1>{escape(title)}</h1>{_summary(entry)}</header>",
        f"<main><ol>{''.join(_rows(graph))}</ol>",
        f"<aside>{_DETAIL}{''.join(_memories(graph, moving))}</aside></main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _summary(entry: dict[str, Any]) -> str:
    count = sum(entry["launches"].values())
    kinds = ", ".join(
        f"{number} {KINDS[kind]}" for kind, number in entry["launches"].items()
    )
    steady = [each for each in entry["moving"] if each["when"] == "every step"]
    return (
        f"<p><b>{count}</b> operations ({kinds}). "
        f"<b class=moves>{len(steady)}</b> arguments move every step, "
        f"{len(entry['moving']) - len(steady)} more differ now and then. "
        "Point at memory to see who <span class=reads>reads</span> and who "
        "<span class=writes>writes</span> it; <kbd>↑</kbd> <kbd>↓</kbd> walk through "
        "it, a click keeps it, <kbd>Esc</kbd> lets go.</p>"
    )


def _rows(graph: dict[str, Any]) -> Iterator[str]:
    for number, node in enumerate(graph["nodes"]):
        grid = "×".join(map(str, node["grid"]))
        values = [
            f"{each['name']}={each['text']}"
            for each in node["arguments"]
            if each["memory"] is None
        ]
        chips = "".join(_chips(graph, node))
        yield (
            f"<li data-reads='{_list(node['reads'])}' "
            f"data-writes='{_list(node['writes'])}'>"
            f"<i>{number}</i><div><code>{escape(node['name'])}</code>"
            f"<em class={node['kind']}>{KINDS[node['kind']]}{f' {grid}' * bool(grid)}"
            f"</em><small title='{escape(node['text'])}'>{escape(node['where'])}"
            f"</small></div><div>{chips}<small title='{escape(', '.join(values))}'>"
            f"{escape(', '.join(values))}</small></div></li>"
        )


def _chips(graph: dict[str, Any], node: dict[str, Any]) -> Iterator[str]:
    """The memory that an operation touches: each once, what it writes last."""
    named = {
        argument["memory"]: argument
        for argument in node["arguments"]
        if argument["memory"] is not None
    }
    touched = dict.fromkeys((*named, *node["reads"], *node["writes"]))
    for at in sorted(touched, key=lambda at: at in node["writes"]):
        argument = named.get(at)
        memory = graph["memories"][at]
        uses = [
            verb
            for verb, places in (("reads", node["reads"]), ("writes", node["writes"]))
            if at in places
        ]
        title = f"{memory['label']} {memory['shape']} {memory['dtype']}"
        if argument is not None:
            title = f"{argument['name']}: {title}"
            uses += ["moves"] * argument["moves"]
        yield (
            f"<button tabindex=-1 class='{' '.join(uses)}' data-memory={at} "
            f"title='{escape(title)}'>{escape(memory['name'])}</button>"
        )


def _memories(graph: dict[str, Any], moving: set[int]) -> Iterator[str]:
    groups: dict[str, list[int]] = {group: [] for group in GROUPS}
    for at, memory in enumerate(graph["memories"]):
        kept = "own" if memory["own"] else "pinned" if memory["pinned"] else "given"
        groups["moves" if at in moving else kept].append(at)
    for group, members in groups.items():
        if members:
            yield f"<h2 class={group}>{GROUPS[group]} <b>{len(members)}</b></h2>"
            yield from (_memory(graph, at) for at in members)


def _memory(graph: dict[str, Any], at: int) -> str:
    memory, nodes = graph["memories"][at], graph["nodes"]
    marks = "".join(
        f"<rect class={verb} x={number} y={top} width=1 height=5 />"
        for number, node in enumerate(nodes)
        for verb, top in (("reads", 0), ("writes", 5))
        if at in node[verb]
    )
    writers = [node["name"] for node in nodes if at in node["writes"]]
    host = "the host" if memory["pinned"] else "nothing in the graph"
    text = f"{memory['label']} {memory['shape']} {memory['dtype']}"
    return (
        f"<button class=memory data-memory={at} data-text='{escape(text)}' "
        f"data-writers='{escape(', '.join(dict.fromkeys(writers)) or host)}'>"
        f"<span>{escape(memory['name'])}</span><small>{escape(text)}</small>"
        f"<svg viewBox='0 0 {len(nodes)} 10' preserveAspectRatio=none>{marks}</svg>"
        "</button>"
    )


def _list(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


_DETAIL = "<p id=detail aria-live=polite>No memory chosen.</p>"

_STYLE = """
:root { --ink: #23272e; --soft: #6b7280; --line: #e4e6ea; --paper: #fbfbfa;
  --card: #fff; --reads: #2f6db3; --writes: #2b8a5f; --moves: #c2571a;
  --moves-soft: #fdf0e6; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #d9dce1; --soft: #8f97a3;
  --line: #31353c; --paper: #191b1f; --card: #212429; --reads: #6ba6ea;
  --writes: #5fc294; --moves: #ef9357; --moves-soft: #3a2a1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
header { padding: 28px 32px 8px; max-width: 1100px; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 6px; letter-spacing: -.01em; }
header p { margin: 0; color: var(--soft); }
header b { color: var(--ink); } b.moves, h2.moves { color: var(--moves) !important; }
span.reads { color: var(--reads); } span.writes { color: var(--writes); }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 4px;
  font: inherit; font-size: 12px; background: var(--card); }
main { display: grid; grid-template-columns: minmax(0, 1fr) 340px; gap: 28px;
  padding: 16px 32px 48px; align-items: start; }
ol { list-style: none; margin: 0; padding: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
li { display: grid; grid-template-columns: 34px minmax(180px, 5fr) 6fr; gap: 10px;
  padding: 7px 12px 7px 6px; border-top: 1px solid var(--line);
  border-left: 4px solid transparent; transition: opacity .12s; }
li:first-child { border-top: 0; }
li i { color: var(--soft); font-style: normal; text-align: right;
  font-variant-numeric: tabular-nums; font-size: 12px; padding-top: 2px; }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: 11.5px; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; }
em { font-style: normal; font-size: 11px; color: var(--soft); margin-left: 8px;
  white-space: nowrap; }
em.triton { color: var(--ink); font-weight: 600; }
li > div { min-width: 0; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: left; }
li button { font-size: 12px; margin: 0 5px 4px 0; padding: 0 7px; border-radius: 9px;
  border: 1px solid var(--line); line-height: 18px; }
li button.reads { border-color: color-mix(in srgb, var(--reads) 45%, transparent); }
li button.writes { border-color: var(--writes); color: var(--writes); }
li button.moves { border-color: var(--moves); background: var(--moves-soft);
  color: var(--moves); font-weight: 600; }
aside { position: sticky; top: 12px; max-height: calc(100vh - 24px);
  overflow-y: auto; padding-right: 4px; }
#detail { margin: 0 0 4px; padding: 10px 12px; min-height: 64px; color: var(--soft);
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  position: sticky; top: 0; z-index: 1; font-size: 12.5px; }
#detail b { color: var(--ink); }
h2 { font-size: 12px; font-weight: 600; margin: 14px 0 4px; color: var(--soft); }
h2 b { font-weight: 400; }
.memory { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.3fr);
  gap: 0 8px; width: 100%; padding: 3px 8px; border-radius: 6px; font-size: 12.5px; }
.memory span { overflow: hidden; text-overflow: ellipsis; }
.memory svg { grid-column: 1 / -1; width: 100%; height: 8px;
  border-bottom: 1px solid var(--line); }
rect.reads { fill: var(--reads); } rect.writes { fill: var(--writes); }
.chosen { outline: 2px solid var(--reads); outline-offset: -1px;
  background: color-mix(in srgb, var(--reads) 8%, transparent); }
ol.choosing li { opacity: .32; }
ol.choosing li.reads, ol.choosing li.writes { opacity: 1; }
ol.choosing li.reads { border-left-color: var(--reads); }
ol.choosing li.writes { border-left-color: var(--writes); }
ol.choosing li.reads.writes { border-image: linear-gradient(var(--reads) 50%,
  var(--writes) 50%) 1; border-width: 1px 0 0 4px; border-style: solid; }
@media (max-width: 900px) { main { grid-template-columns: 1fr; }
  aside { position: static; max-height: none; } }
"""

_SCRIPT = """
const list = document.querySelector("ol"), rows = [...list.children];
const memories = [...document.querySelectorAll(".memory")];
const detail = document.getElementById("detail"), nothing = detail.textContent;
let kept = null;
const has = (row, key, at) => row.dataset[key].split(" ").includes(at);
function show(at) {
  list.classList.toggle("choosing", at !== null);
  for (const each of document.querySelectorAll("[data-memory]"))
    each.classList.toggle("chosen", each.dataset.memory === at);
  const found = { reads: [], writes: [] };
  rows.forEach((row, number) => {
    for (const verb of ["reads", "writes"]) {
      const does = at !== null && has(row, verb, at);
      row.classList.toggle(verb, does);
      if (does) found[verb].push(number);
    }
  });
  detail.textContent = nothing;
  if (at === null) return;
  const memory = memories.find(each => each.dataset.memory === at);
  const name = document.createElement("b");
  name.textContent = memory.firstChild.textContent;
  detail.replaceChildren(name, ` ${memory.dataset.text}. Written by ` +
    `${memory.dataset.writers}` + (found.writes.length ?
    ` (${found.writes.join(", ")})` : "") +
    (found.reads.length ? `; read by ${found.reads.join(", ")}.` : "; not read."));
}
function keep(at) { kept = at; show(at); }
const target = event => event.target.closest("[data-memory]");
document.addEventListener("pointerover", event => {
  const over = target(event);
  show(over ? over.dataset.memory : kept);
});
document.addEventListener("focusin", event => {
  const over = target(event);
  if (over) show(over.dataset.memory);
});
document.addEventListener("click", event => {
  const hit = target(event);
  keep(hit && hit.dataset.memory !== kept ? hit.dataset.memory : null);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { keep(null); document.activeElement.blur(); }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const now = memories.findIndex(each => each.classList.contains("chosen"));
  const next = memories[now < 0 ? 0 : (now + step + memories.length) % memories.length];
  next.focus();
  keep(next.dataset.memory);
  const first = list.querySelector("li.writes, li.reads");
  if (first) first.scrollIntoView({ block: "nearest" });
  event.preventDefault();
});
if (location.hash) keep(location.hash.slice(1));
"""
