"""The figures: drawn to the same bytes, readable, and true to the code that they show."""

import math
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

import prefcls_lib
from figs.__main__ import FIGURES, main

FOLDER = Path(__file__).parents[1] / "figs"
NAMES = ("siamese", "transformer", "attention", "disentangled_attention", "replaced_token_detection", "data_flow")
TOUCH = 0.02  # cm


@pytest.fixture(scope="module", params=NAMES)
def canvas(request):
    return FIGURES[request.param]()


def extents(canvas) -> dict:
    return {text: canvas.extent(text) for text in canvas.texts}


def pieces(canvas) -> list[tuple]:
    """All straight pieces of all arrows, with the number of their arrow."""
    return [(number, *piece) for number, points in enumerate(canvas.arrows) for piece in pairwise(points)]


def passes(start, end, left, bottom, right, top) -> bool:
    """Whether a level or upright piece goes through the inside of a rectangle."""
    (x0, x1), (y0, y1) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return x0 < right and x1 > left and y0 < top and y1 > bottom


def shrink(box, by: float) -> tuple:
    """left, bottom, right, top of a box or a text's extent, smaller by `by` on each side."""
    if hasattr(box, "x0"):
        return box.x0 + by, box.y0 + by, box.x1 - by, box.y1 - by
    return box.left()[0] + by, box.bottom()[1] + by, box.right()[0] - by, box.top()[1] - by


def read_labels(svg: Path) -> tuple[str, list[str]]:
    """The size of an SVG and its texts, which matplotlib notes as comments beside their outlines."""
    words = svg.read_text(encoding="utf-8")
    return re.search(r'viewBox="[^"]*"', words)[0], re.findall(r"<!-- (.*?) -->", words)


def test_drawing_twice_gives_the_same_bytes_and_the_committed_figures(tmp_path):
    """Committed figures have the size and the texts of a new drawing (outlines may differ between machines)."""
    main(tmp_path / "one")
    main(tmp_path / "two")
    drawn = sorted(f"{name}.{kind}" for name in NAMES for kind in ("svg", "png"))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == drawn
    for file in drawn:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    for name in NAMES:
        assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        size, labels = read_labels(tmp_path / "one" / f"{name}.svg")
        assert len(labels) > 10
        assert read_labels(FOLDER / f"{name}.svg") == (size, labels), f"{name}: run `make figs`"


def test_texts_are_large_enough_inside_and_apart(canvas):
    found = extents(canvas)
    for text, extent in found.items():
        assert text.get_fontsize() >= 8
        left, bottom, right, top = shrink(extent, 0)
        assert 0.2 < left < right < 15.8, text.get_text()
        assert 0.2 < bottom < top < canvas.height - 0.2, text.get_text()
    for one, other in combinations(found, 2):
        assert not found[one].overlaps(found[other]), (one.get_text(), other.get_text())


def test_texts_of_a_box_lie_in_it_and_no_other_text_touches_it(canvas):
    found = extents(canvas)
    for box in canvas.boxes:
        left, bottom, right, top = shrink(box, 0)
        for text, extent in found.items():
            inside = extent.x0 > left and extent.x1 < right and extent.y0 > bottom and extent.y1 < top
            outside = extent.x1 < left or extent.x0 > right or extent.y1 < bottom or extent.y0 > top
            assert inside if text in box.texts else outside, text.get_text()


def test_boxes_are_apart(canvas):
    for one, other in combinations(canvas.boxes, 2):
        a, b = shrink(one, 0), shrink(other, 0)
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], (one, other)


def test_arrows_pass_no_text_and_no_box(canvas):
    found = extents(canvas)
    for _, start, end in pieces(canvas):
        assert start[0] == end[0] or abs(start[1] - end[1]) < 1e-9, (start, end)
        for text, extent in found.items():
            assert not passes(start, end, *shrink(extent, 0.01)), text.get_text()
        for box in canvas.boxes:
            assert not passes(start, end, *shrink(box, TOUCH)), (start, end, box)


def test_arrows_end_at_boxes_and_do_not_cross(canvas):
    """An arrow goes from a box, or from a fork of another arrow, to a box; only forks touch."""
    lines = pieces(canvas)
    for number, points in enumerate(canvas.arrows):
        at_box = [
            any(passes(p, p, *shrink(box, -TOUCH)) and not passes(p, p, *shrink(box, TOUCH)) for box in canvas.boxes)
            for p in (points[0], points[-1])
        ]
        at_fork = any(
            n != number and passes(points[0], points[0], *(min(a, b) - TOUCH for a, b in zip(s, e, strict=True)),
                                   *(max(a, b) + TOUCH for a, b in zip(s, e, strict=True)))
            for n, s, e in lines
        )  # fmt: skip
        assert at_box[0] or at_fork, points
        assert at_box[1], points
    for (one, a, b), (other, c, d) in combinations(lines, 2):
        if one != other and (a[0] == b[0]) != (c[0] == d[0]):
            upright, level = ((a, b), (c, d)) if a[0] == b[0] else ((c, d), (a, b))
            x, y = upright[0][0], level[0][1]
            (x0, x1), (y0, y1) = sorted(p[0] for p in level), sorted(p[1] for p in upright)
            assert not (x0 + TOUCH < x < x1 - TOUCH and y0 + TOUCH < y < y1 - TOUCH), (a, b, c, d)


def test_the_flow_names_every_package_of_the_library_and_nothing_else():
    library = Path(prefcls_lib.__file__).parent
    packages = {path.parent.name for path in library.glob("*/__init__.py")} | {"cli", "config"}
    canvas = FIGURES["data_flow"]()
    bold = [t.get_text() for box in canvas.boxes for t in box.texts if t.get_weight() == "bold"]
    assert sorted([*bold, "pipeline"]) == sorted(packages)
    assert any(text.get_text().startswith("pipeline:") for text in canvas.texts), "the panel's title names it"


@pytest.mark.parametrize("share", [True, False])
def test_disentangled_attention_is_as_drawn(share):
    """softmax((Qc_i Kc_j + Qc_i Kr_d(i,j) + Kc_j Qr_d(i,j)) / sqrt(3d)), Kr and Qr by W_K and W_Q where shared.

    d(i,j) in both: the paper writes d(j,i) in the last term.
    """
    torch.manual_seed(0)
    tokens, heads, width, buckets = 9, 4, 8, 4
    attention = DisentangledSelfAttention(
        DebertaV2Config(
            hidden_size=heads * width, num_attention_heads=heads, relative_attention=True, position_buckets=buckets,
            max_position_embeddings=16, share_att_key=share, pos_att_type=["p2c", "c2p"],
        )
    ).eval()  # fmt: skip
    x, p = torch.randn(1, tokens, heads * width), torch.randn(2 * buckets, heads * width)
    relative = build_relative_position(x, x, buckets, 16)
    mask = torch.ones(1, 1, tokens, tokens)
    with torch.no_grad():
        _, found = attention(x, mask, output_attentions=True, relative_pos=relative, rel_embeddings=p)
        projections = [
            (attention.query_proj, x[0]), (attention.key_proj, x[0]),
            (attention.query_proj if share else attention.pos_query_proj, p),
            (attention.key_proj if share else attention.pos_key_proj, p),
        ]  # fmt: skip
        q, k, qr, kr = (project(states).view(-1, heads, width) for project, states in projections)
    row = relative[0] + buckets
    for i in range(tokens):
        scores = [(q[i] * k[j]).sum(1) + (q[i] * kr[row[i, j]]).sum(1) + (k[j] * qr[row[i, j]]).sum(1)
                  for j in range(tokens)]  # fmt: skip
        expected = torch.softmax(torch.stack(scores, dim=1) / math.sqrt(3 * width), dim=1)
        torch.testing.assert_close(found[0, :, i], expected)
