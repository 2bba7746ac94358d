"""The page on which a served model can be tried."""

from __future__ import annotations

from html import escape
from string import Template

from toolkit.predict.saved import SavedModel

_FIELDS = {
    "texts": '<textarea id="input" rows="6" placeholder="a text; one on each line, for several"></textarea>',
    "rows": '<textarea id="input" rows="6" placeholder=\'{"column": "value"}, one on each line\'></textarea>',
    "files": '<input id="input" type="file" multiple>',
}
_READ = {
    "texts": "lines(input.value)",
    "rows": "lines(input.value).map((line) => JSON.parse(line))",
    "files": "null",
}
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$name</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
textarea { width: 100%; box-sizing: border-box; font: inherit; }
button { font: inherit; padding: .3rem 1.2rem; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #ccc; padding: .3rem .5rem; text-align: left; vertical-align: top; }
.error { color: #b00020; white-space: pre-wrap; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e6e6e6; } .error { color: #ff8a80; } }
</style></head><body>
<h1>$name</h1>
<p>$about</p>
<form id="form"><label for="input">What is it to answer?</label>
$field<br><button>Answer</button></form>
<p id="error" class="error" role="alert"></p>
<table id="answers"></table>
<script>
const input = document.getElementById("input"), table = document.getElementById("answers");
const lines = (text) => text.split("\\n").filter((line) => line.trim());
function show(answers) {
  const names = Object.keys(answers[0]);
  const row = (cells, kind) => {
    const line = table.insertRow();
    for (const cell of cells) {
      const place = document.createElement(kind);
      place.textContent = typeof cell === "object" ? JSON.stringify(cell) : cell;
      line.append(place);
    }
  };
  row(names, "th");
  for (const answer of answers) row(names.map((name) => answer[name]), "td");
}
document.getElementById("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const said = document.getElementById("error");
  said.textContent = "";
  table.replaceChildren();
  try {
    const inputs = $read;
    const request = inputs
      ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ inputs }) }
      : { method: "POST", body: new FormData() };
    if (!inputs) for (const file of input.files) request.body.append("file", file);
    const response = await fetch("predict", request), found = await response.json();
    if (response.ok) show(found.answers);
    else said.textContent = found.error + "\\n" + found.remedy;
  } catch (error) {
    said.textContent = String(error);
  }
});
</script></body></html>
""")


def page(saved: SavedModel) -> str:
    """HTML that needs nothing from elsewhere."""
    folder = saved.folder.parent if saved.folder.name == "model" else saved.folder
    reads = saved.kind.reads
    about = saved.kind.about[0].upper() + saved.kind.about[1:] + "."
    words = {"name": escape(folder.resolve().name), "about": escape(about)}
    return _PAGE.substitute(words, field=_FIELDS[reads], read=_READ[reads])
