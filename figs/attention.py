"""Self-attention: the standard one of RoBERTa and ELECTRA, and DeBERTa's with content and position apart."""

import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from figs.draw import BLUE, GREEN, GREY, INK, MUTED, WHITE, Canvas

BUCKETS, POSITIONS = 256, 512  # k and the longest distance in DeBERTa-v3's configurations


def draw_standard() -> Canvas:
    """Scaled dot-product attention with n heads (Vaswani et al. 2017)."""
    canvas = Canvas(8.9, "Multi-head self-attention (RoBERTa, ELECTRA)")
    canvas.panel(4.75, 0.95, 12.1, 7.5, "In each of n heads", copies=2)
    states = canvas.box(1.0, 3.8, 1.1, 1.05, "$X$", "(T, H)", color=WHITE)
    rows = (("Q", 5.4), ("K", 3.8), ("V", 1.9))
    query, key, value = (canvas.box(3.25, y, 2.0, 0.8, f"Linear $W_{name}$", color=BLUE) for name, y in rows)
    canvas.arrow(states.right(), key.left())
    canvas.dot((1.85, key.y))
    for box in (query, value):
        canvas.arrow((1.85, key.y), (1.85, box.y), box.left())
    scores = canvas.box(7.6, 4.6, 1.9, 2.4, "$Q K^\\mathrm{T} / $√$d$")
    softmax = canvas.box(10.75, 4.6, 1.8, 1.05, "softmax", "over keys")
    mask = canvas.box(10.75, 6.55, 1.8, 0.8, "mask", color=WHITE)
    mixed = canvas.box(10.75, 1.9, 1.8, 0.8, "$A V$")
    for box, name, at in ((query, "Q", 0.64), (key, "K", 0.64)):
        canvas.arrow(box.right(), scores.left(box.y - scores.y), label=f"${name}$ (T, d)", at=at)
    canvas.arrow(scores.right(), softmax.left(), label="(T, T)")
    canvas.arrow(mask.bottom(), softmax.top(), label="+")
    canvas.arrow(softmax.bottom(), mixed.top(), label="$A$ (T, T)", side="left")
    canvas.arrow(value.right(), mixed.left(), label="$V$ (T, d)", at=0.255)
    concat = canvas.box(14.25, 1.9, 2.2, 0.8, "concat")
    output = canvas.box(14.25, 3.8, 2.2, 0.8, "Linear $W_O$", color=BLUE)
    result = canvas.box(14.25, 5.4, 2.2, 0.8, "output", color=WHITE)
    canvas.arrow(mixed.right(), concat.left())
    canvas.arrow(concat.top(), output.bottom(), label="(T, H)")
    canvas.arrow(output.top(), result.bottom(), label="(T, H)")
    canvas.key(0.4, (BLUE, "pretrained weights"), (GREY, "no weights"), (WHITE, "data"))
    canvas.write(15.55, 0.4, "H = n d", align="right", color=MUTED)
    return canvas


def draw_disentangled() -> Canvas:
    """DeBERTa's scores (He et al. 2021), as transformers computes them: three terms, none of position to position."""
    canvas = Canvas(11.3, "Disentangled self-attention (DeBERTa)")
    rows = (
        ("P", "Linear $W^r_K$", "$K^r$ (2k, d)", 9.3),
        ("X", "Linear $W_Q$", "$Q^c$ (T, d)", 7.45),
        ("X", "Linear $W_K$", "$K^c$ (T, d)", 5.6),
        ("P", "Linear $W^r_Q$", "$Q^r$ (2k, d)", 3.75),
        ("X", "Linear $W_V$", "$V^c$ (T, d)", 1.9),
    )
    projections = []
    for source, name, _, y in rows:
        color = GREEN if source == "P" else WHITE
        states = canvas.box(0.9, y, 0.9, 0.8, f"${source}$", color=color)
        notes = (f"in v3: ${name[8:].replace('^r', '')}",) if source == "P" else ()
        box = canvas.box(3.0, y, 2.3, 1.05 if notes else 0.8, name, *notes, color=BLUE)
        canvas.arrow(states.right(), box.left())
        projections.append(box)
    terms = (
        ("$Q^c_i \\cdot K^r_{\\delta(i,j)}$", "content to position", 8.375),
        ("$Q^c_i \\cdot K^c_j$", "content to content", 6.525),
        ("$K^c_j \\cdot Q^r_{\\delta(i,j)}$", "position to content", 4.675),
    )
    scores = [canvas.box(8.15, y, 3.2, 1.4, name, note) for name, note, y in terms]
    canvas.write(8.15, 3.5, "(the paper: $\\delta(j,i)$)", align="center", color=MUTED)
    fork = 6.15
    for row, (_, _, label, y) in enumerate(rows[:4]):
        used = [scores[i] for i in (row - 1, row) if 0 <= i < 3]
        for number, box in enumerate(used):
            shift = 0.4 if y > box.y else -0.4
            points = (projections[row].right(), (fork, y), (fork, box.y + shift), box.left(shift))
            canvas.arrow(*points, label="" if number else label)
        if len(used) == 2:
            canvas.dot((fork, y))
    total = canvas.circle(10.35, 6.525, "+")
    softmax = canvas.box(12.4, 6.525, 2.8, 1.1, "mask, softmax", "of sum / √$(3d)$")
    mixed = canvas.box(12.4, 1.9, 1.1, 0.8, "$A V^c$")
    concat = canvas.box(14.6, 1.9, 1.9, 1.05, "concat", "Linear $W_O$", color=BLUE)
    canvas.arrow(scores[0].right(), (total.x, scores[0].y), total.top())
    canvas.arrow(scores[1].right(), total.left())
    canvas.arrow(scores[2].right(), (total.x, scores[2].y), total.bottom())
    canvas.arrow(total.right(), softmax.left())
    canvas.arrow(softmax.bottom(), mixed.top(), label="$A$ (T, T)")
    canvas.arrow(projections[4].right(), mixed.left(), label=rows[4][2], at=0.131)
    canvas.arrow(mixed.right(), concat.left())
    _draw_buckets(canvas)
    canvas.key(0.4, (BLUE, "pretrained weights"), (GREEN, "position embeddings"), (GREY, "no weights"), (WHITE, "data"))
    canvas.write(15.55, 0.4, f"v3: k = {BUCKETS}", align="right", color=MUTED)
    return canvas


def _draw_buckets(canvas: Canvas) -> None:
    """Which row of P a distance reads: one each for near tokens, wider and wider buckets for far ones."""
    canvas.panel(11.0, 7.4, 15.6, 10.2, "Row $\\mathbf{\\delta(i,j)}$ of $\\mathbf{P}$")
    distances = torch.arange(1 - POSITIONS, POSITIONS)
    rows = make_log_bucket_position(distances, BUCKETS, POSITIONS) + BUCKETS
    left, right, bottom, top = 12.3, 15.1, 8.1, 9.4
    x = left + (distances + POSITIONS) / (2 * POSITIONS) * (right - left)
    y = bottom + rows / (2 * BUCKETS) * (top - bottom)
    canvas.axes.plot([left, left, right], [top, bottom, bottom], color=MUTED, lw=0.8)
    canvas.axes.plot(x.numpy(), y.numpy(), color=INK, lw=1.4, zorder=4, solid_capstyle="butt")
    canvas.write(left - 0.1, top - 0.22, f"{int(rows.max())}", align="right", color=MUTED)
    canvas.write(left - 0.1, bottom - 0.02, f"{int(rows.min())}", align="right", color=MUTED)
    canvas.write(left, 7.72, f"−{POSITIONS - 1}", color=MUTED)
    canvas.write((left + right) / 2, 7.72, "$i - j$", align="center", color=MUTED)
    canvas.write(right, 7.72, f"{POSITIONS - 1}", align="right", color=MUTED)
