"""A report's pages: a Markdown template filled in, as one HTML file that loads nothing, and as a PDF."""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from prefcls_lib.runtime.files import UserError, write_whole

STYLE = {"svg.hashsalt": "prefcls", "svg.fonttype": "path", "font.family": "DejaVu Sans", "mathtext.fontset": "cm"}
FORMULA_POINTS = 11


def fill_template(path: Path, values: dict) -> str:
    """A Jinja template with its values put in; a name that has none stops it.

    Raises:
        UserError: the template is missing, or what it needs is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise UserError("report: jinja2 is not installed. Run: pip install 'prefcls-lib[report]'") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file. `prefcls report` needs the repository, not only the package.")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["formula"] = embed_formula
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateError as error:
        raise UserError(f"{path}: {str(error).rstrip('.')}. Put the template right.") from error


def make_page(markdown: str, style: str) -> str:
    """Markdown (with HTML in it) to one HTML document; its title is the first heading."""
    import mistune  # comes with jinja2 in the extra `report`

    body = mistune.create_markdown(escape=False, plugins=["table"])(markdown)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    contents = []

    def mark(match: re.Match) -> str:
        anchor = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<.*?>", "", match[1]).lower()).strip("-")
        contents.append(f'<li><a href="#{anchor}">{match[1]}</a></li>')
        return f'<h2 id="{anchor}">{match[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", mark, body)
    body = body.replace("<p>[contents]</p>", f"<nav><ol>{''.join(contents)}</ol></nav>")
    title = re.sub(r"<.*?>", "", re.search(r"<h1>(.*?)</h1>", body)[1])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def write_pdf(document: str, path: Path) -> str | None:
    """The page as a PDF, the same bytes for the same page; or one line on why this machine cannot."""
    try:
        import weasyprint
    except (ImportError, OSError) as error:  # OSError: the system has no pango
        reason = " ".join(str(error).split())[:120]
        return (
            f"{path} is not written: WeasyPrint does not start ({reason}). Install Pango (apt install libpango-1.0-0 "
            "libpangoft2-1.0-0) and pip install 'prefcls-lib[report]'."
        )
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # else fontTools writes the time of day into the fonts
    data = weasyprint.HTML(string=document).write_pdf()
    write_whole(path, lambda temporary: temporary.write_bytes(data))
    return None


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """A Markdown table; columns other than those of `texts` are set flush right, and numbers in them never broken."""

    def hold(cell: str) -> str:
        return cell.replace(" ", "\u00a0") if any(map(str.isdigit, cell)) else cell

    marks = ["---" if place in texts else "---:" for place in range(len(header))]
    lines = [[cell if i in texts else hold(cell) for i, cell in enumerate(line)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))


def escape_text(text: str) -> str:
    """Foreign text (names of folders, rows of data) for a Markdown table or paragraph."""
    return re.sub(r"([\\`*_{}\[\]#|~$])", lambda match: f"&#{ord(match[1])};", html.escape(" ".join(text.split())))


def draw_svg(figure: Figure) -> bytes:
    """A matplotlib figure as SVG, the same bytes every time."""
    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def embed_figure(svg: bytes, caption: str, kind: str = "plot") -> str:
    """An SVG inside the page, with its caption; `kind` is a class of the style sheet."""
    return (
        f'\n<figure class="{kind}"><img alt="{html.escape(re.sub("<.*?>", "", caption))}" '
        f'src="{_data_uri(svg)}"><figcaption>{caption}</figcaption></figure>\n'
    )


def embed_formula(tex: str) -> str:
    """A displayed formula, set by matplotlib, as SVG: no script, no font to load; its source is the alt text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        figure.text(0, 0, f"${tex}$", fontsize=FORMULA_POINTS)
        target = io.BytesIO()
        figure.savefig(target, format="svg", bbox_inches="tight", pad_inches=0.02, transparent=True,
                       metadata={"Date": None})  # fmt: skip
    svg = target.getvalue()
    height = float(re.search(rb'height="([\d.]+)pt"', svg)[1]) / FORMULA_POINTS
    alt = html.escape(tex)
    return f'\n<p class="formula"><img style="height:{height:.2f}em" alt="{alt}" src="{_data_uri(svg)}"></p>\n'


def _data_uri(svg: bytes) -> str:
    svg = re.sub(rb"<!DOCTYPE.*?>", b"", svg, flags=re.DOTALL)
    svg = re.sub(rb"<metadata>.*?</metadata>|<!--.*?-->", b"", svg, flags=re.DOTALL)
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
