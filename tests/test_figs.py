"""The figures: drawn to the same bytes, and true to the code that they show."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import read_tree
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

import prefcls_lib
from figs.__main__ import FIGURES, main

FOLDER = Path(__file__).parents[1] / "figs"
NAMES = ("siamese", "transformer", "attention", "disentangled_attention", "replaced_token_detection", "data_flow")


def read_labels(svg: Path) -> tuple[str, list[str]]:
    """The size of an SVG, and its texts."""
    words = svg.read_text(encoding="utf-8")
    return re.search(r'viewBox="[^"]*"', words)[0], re.findall(r">([^<>\n]+)</t(?:ext|span)>", words)


def test_drawing_twice_gives_the_same_bytes_and_the_committed_figures(tmp_path, monkeypatch):
    """Committed figures have the size and the texts of a new drawing (outlines may differ between machines)."""
    main(tmp_path / "one")
    monkeypatch.setattr("figs.__main__.FIGURES", {name: FIGURES[name] for name in NAMES[:2]})
    main(tmp_path / "two")
    one, two = read_tree(tmp_path / "one"), read_tree(tmp_path / "two")
    assert set(one) == {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    assert len(two) == 4 and two == {name: one[name] for name in two}
    for name in NAMES:
        assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        size, labels = read_labels(tmp_path / "one" / f"{name}.svg")
        assert len(labels) > 10
        assert read_labels(FOLDER / f"{name}.svg") == (size, labels), f"{name}: run `make figs`"


def test_the_flow_names_every_package_of_the_library_and_nothing_else():
    library = Path(prefcls_lib.__file__).parent
    packages = {path.parent.name for path in library.glob("*/__init__.py")} | {"cli", "config"}
    canvas = FIGURES["data_flow"]()
    bold = [t.get_text() for box in canvas.boxes for t in box.texts if t.get_weight() == "bold"]
    assert sorted([*bold, "pipeline"]) == sorted(packages)
    assert any(text.get_text().startswith("pipeline:") for text in canvas.texts), "the panel's title names it"


@pytest.mark.parametrize("share", [True, False])
def test_disentangled_attention_is_as_drawn(share):
    """softmax((Qc_i Kc_j + Qc_i Kr_d(i,j) + Kc_j Qr_d(i,j)) / sqrt(3d)); the paper writes d(j,i) in the last term."""
    torch.manual_seed(0)
    tokens, heads, width, buckets = 9, 4, 8, 4
    config = {"hidden_size": heads * width, "num_attention_heads": heads, "position_buckets": buckets}
    config |= {"relative_attention": True, "max_position_embeddings": 16, "pos_att_type": ["p2c", "c2p"]}
    attention = DisentangledSelfAttention(DebertaV2Config(**config, share_att_key=share)).eval()
    x, p = torch.randn(1, tokens, heads * width), torch.randn(2 * buckets, heads * width)
    relative = build_relative_position(x, x, buckets, 16)
    mask = torch.ones(1, 1, tokens, tokens)
    with torch.no_grad():
        _, found = attention(x, mask, output_attentions=True, relative_pos=relative, rel_embeddings=p)
        of_positions = ("query_proj", "key_proj") if share else ("pos_query_proj", "pos_key_proj")
        projections = [("query_proj", x[0]), ("key_proj", x[0]), *((name, p) for name in of_positions)]
        q, k, qr, kr = (getattr(attention, name)(states).view(-1, heads, width) for name, states in projections)
    row = relative[0] + buckets
    for i in range(tokens):
        scores = [(q[i] * k[j]).sum(1) + (q[i] * kr[row[i, j]]).sum(1) + (k[j] * qr[row[i, j]]).sum(1)
                  for j in range(tokens)]  # fmt: skip
        expected = torch.softmax(torch.stack(scores, dim=1) / math.sqrt(3 * width), dim=1)
        torch.testing.assert_close(found[0, :, i], expected)
