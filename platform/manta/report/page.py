"""The report as one web page, which loads nothing from elsewhere."""

import base64
import html
from collections.abc import Mapping, Sequence

from manta.report.facts import Fact
from manta.report.sections import RESULT, Section

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #666; --line: #ddd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --soft: #a0a0a0; --line: #3a3a3a }
  img { filter: invert(0.9) hue-rotate(180deg) }
}
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto;
       padding: 0 1.2rem; background: var(--paper); color: var(--ink) }
h1 { font-size: 1.9rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p.lead { color: var(--soft); margin: 0 0 1.5rem }
dl { display: grid; grid-template-columns: minmax(11rem, max-content) 1fr; gap: .15rem 1.4rem;
     margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
dd, td.number { font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100%; margin-top: .4rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
         border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500 }
div.wide { overflow-x: auto }
td.text { white-space: pre-wrap; overflow-wrap: anywhere;
          font: 14px/1.5 ui-monospace, monospace }
td.short { white-space: nowrap }
img { max-width: 100%; height: auto; margin: .4rem 0 }
pre { font: 14px/1.5 ui-monospace, monospace; overflow-x: auto; border: 1px solid var(--line);
      padding: .8rem 1rem; border-radius: 6px }
[title] { cursor: help } .note { color: var(--soft); font-size: .92rem }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem } }
"""
SHORT = 24  # characters of a cell that a narrow screen does not break
# Nothing on the page runs, and nothing is fetched: also where it is served from somewhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    pictures: Mapping[str, bytes],
    config: str,
    notes: Sequence[str],
    end: str = "Point at a number to see the file and the key that it comes from.",
) -> str:
    """The page, with the pictures after the section RESULT, and `end` as its last line. Point at a
    fact to see the file and the key that it comes from."""
    parts = [_section(section) for section in sections]
    after = 1 + next((i for i, s in enumerate(sections) if s.title == RESULT), -1)
    parts.insert(after, "".join(map(_picture, pictures, pictures.values())))
    if config:
        parts.append(f"<h2>The config, where it differs from the defaults</h2>\n{_pre(config)}")
    if notes:
        parts.append("<h2>What could not be read</h2>" + "".join(map(_note, notes)))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
{"".join(parts)}
{_note(end)}
</body></html>
"""


def _section(section: Section) -> str:
    lines = [f"<h2>{html.escape(section.title)}</h2>", *map(_said, section.said)]
    if section.facts:
        facts = "".join(
            f"<dt>{html.escape(fact.name)}</dt><dd>{_shown(fact)}</dd>\n" for fact in section.facts
        )
        lines.append(f"<dl>{facts}</dl>")
    if section.rows:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in section.head)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in section.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        lines.append(f'<div class="wide">{table}</div>')
    lines += map(_note, section.notes)
    return "\n".join(lines) + "\n"


def _shown(fact: Fact) -> str:
    return f'<span title="{html.escape(fact.origin, quote=True)}">{html.escape(fact.shown)}</span>'


def _cell(value: Fact | str) -> str:
    if isinstance(value, Fact):
        return f'<td class="number">{_shown(value)}</td>'
    kind = "text" if len(value) > SHORT else "text short"
    return f'<td class="{kind}">{html.escape(value)}</td>'


def _picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">\n'


def _said(said: tuple[str, str | None]) -> str:
    text, command = said
    return f"<p>{html.escape(text)}</p>" + (_pre(command) if command else "")


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
