"""A report's pages: a Markdown template filled in, as one HTML file that loads nothing, and as a PDF."""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
import matplotlib
import mistune
from matplotlib.figure import Figure

from prefcls_lib.runtime.files import printable, reason, write_whole

# text stays text: outlines of small letters are drawn unevenly spaced on a screen
STYLE = {"svg.hashsalt": "prefcls", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"]}
FORMULA_STYLE = STYLE | {"svg.fonttype": "path", "mathtext.fontset": "stix"}
FORMULA_POINTS = 10


def fill_template(path: Path, values: dict) -> str:
    """A Jinja template with its values put in; a name that has none is a jinja2.TemplateError."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["formula"] = embed_formula
    return environment.from_string(path.read_text(encoding="utf-8")).render(values)


def make_page(markdown: str, style: str, script: str = "") -> str:
    """Markdown (with HTML in it) to one HTML document; its title is the first heading.

    Sections, figures and tables are numbered; `[figure NAME]` and `[table NAME]` become links to them.
    """
    for kind in ("figure", "table"):
        for number, name in enumerate(re.findall(rf'<figure id="{kind}-([\w-]+)"', markdown), 1):
            label = f"{kind.capitalize()} {number}"
            markdown = markdown.replace(f"[{kind} {name}]", f'<a href="#{kind}-{name}">{label}</a>')
            caption = re.compile(rf'(<figure id="{kind}-{name}".*?<figcaption>)', re.DOTALL)
            markdown = caption.sub(rf"\1<b>{label}.</b> ", markdown, count=1)
    body = mistune.create_markdown(escape=False, plugins=["table"])(markdown)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    contents, plain = [], ("Appendix", "References")

    def mark(match: re.Match) -> str:
        anchor = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<.*?>", "", match[1]).lower()).strip("-")
        title = match[1] if match[1].startswith(plain) else f"{len(contents) + 1} {match[1]}"
        contents.append(f'<li><a href="#{anchor}">{title}</a></li>')
        return f'<h2 id="{anchor}">{title}</h2>'

    body = re.sub(r"(\d) %", "\\1\u00a0%", re.sub(r"<h2>(.*?)</h2>", mark, body))
    title = re.sub(r"<.*?>", "", re.search(r"<h1>(.*?)</h1>", body)[1])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>\n{style}</style>\n</head>\n<body>\n<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>\n'
        f"<main>\n{body}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def lay_out(document: str):
    """The page set in print (`weasyprint.Document`), in the fonts that come with matplotlib: equal on every machine."""
    import weasyprint
    from weasyprint.text.fonts import FontConfiguration

    fonts, faces = FontConfiguration(), Path(__file__).with_name("fonts.css").read_text(encoding="utf-8")
    sheet = weasyprint.CSS(string=faces, font_config=fonts, base_url=f"{matplotlib.get_data_path()}/fonts/ttf/")
    return weasyprint.HTML(string=document).render(stylesheets=[sheet], font_config=fonts)


def write_pdf(document: str, path: Path) -> str | None:
    """The page as a PDF, the same bytes for the same page; returns why this machine cannot, if it cannot."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # else fontTools writes the time of day into the fonts
    try:
        data = lay_out(document).write_pdf()
    except (ImportError, OSError) as error:  # OSError: the system has no pango
        remedy = "Install Pango (apt install libpango-1.0-0 libpangoft2-1.0-0) and pip install 'prefcls-lib[report]'."
        return f"WeasyPrint does not start ({reason(error)}). {remedy}"
    with write_whole(path) as temporary:
        temporary.write_bytes(data)
    return None


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """A Markdown table; columns other than those of `texts` are set flush right."""
    marks = ["---" if place in texts else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))


def escape_text(text: str) -> str:
    """Foreign text (names of folders, rows of data) for a Markdown table or paragraph."""
    plain = html.escape(" ".join(printable(text).split()))
    marks = r"[\\`*{}\[\]#|~$]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])"  # inside a word _ is no mark
    return re.sub(marks, lambda match: f"&#{ord(match[0])};", plain)


def signed(text: str) -> str:
    """Numbers with a true minus sign."""
    return text.replace("-", "−")


def draw_svg(figure: Figure, style: dict = STYLE, **options: object) -> bytes:
    """A matplotlib figure as SVG, the same bytes every time."""
    target = io.BytesIO()
    with matplotlib.rc_context(style):
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True, **options)
    return target.getvalue()


def embed_figure(drawn: Figure | bytes, name: str, caption: str, kind: str = "plot") -> str:
    """A figure, or an SVG, inside the page, with its caption; `kind` is a class of the style sheet."""
    svg = drawn if isinstance(drawn, bytes) else draw_svg(drawn)
    alt = html.escape(re.sub("<.*?>", "", caption))
    return (
        f'\n<figure id="figure-{name}" class="{kind}"><div class="wide" tabindex="0"><img alt="{alt}" '
        f'src="{_data_uri(svg)}"></div><figcaption>{caption}</figcaption></figure>\n'
    )


def embed_table(name: str, caption: str, table: str, kind: str = "") -> str:
    """A Markdown table with its caption; of the kind "long" it may be broken between two pages."""
    return f'\n<figure id="table-{name}" class="{kind}"><figcaption>{caption}</figcaption>\n\n{table}\n\n</figure>\n'


@cache
def embed_formula(tex: str) -> str:
    """A displayed formula, set by matplotlib, as SVG: no script, no font to load; its source is the alt text."""
    with matplotlib.rc_context(FORMULA_STYLE):
        figure = Figure()
        figure.text(0, 0, f"${tex}$", fontsize=FORMULA_POINTS)
        svg = draw_svg(figure, FORMULA_STYLE, bbox_inches="tight", pad_inches=0.02)
    height = float(re.search(rb'height="([\d.]+)pt"', svg)[1]) / FORMULA_POINTS
    alt = html.escape(tex)
    return f'\n<p class="formula"><img style="height:{height:.2f}em" alt="{alt}" src="{_data_uri(svg)}"></p>\n'


def _data_uri(svg: bytes) -> str:
    svg = re.sub(rb"<!DOCTYPE.*?>", b"", svg, flags=re.DOTALL)
    svg = re.sub(rb"<metadata>.*?</metadata>|<!--.*?-->", b"", svg, flags=re.DOTALL)
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
