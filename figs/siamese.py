"""The network of `prefcls_lib.models.network`: two towers of one encoder, h, the symmetric head, the offset."""

from figs.draw import BLUE, GREY, ORANGE, WHITE, Canvas
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.models.network import HEAD_WIDTH

LOGITS = f"(B, {NUM_CLASSES})"
BOTTOM, TOP = 6.2, 14.95  # of the upper panels


def draw() -> Canvas:
    """Left the towers, right the inside of h, below how h is used twice and where the baseline's offset is added."""
    canvas = Canvas(16.15, "Siamese network with a symmetric head, on top of a baseline")
    _draw_towers(canvas)
    _draw_h(canvas)
    _draw_symmetric_head(canvas)
    canvas.key(0.4, (BLUE, "pretrained weights"), (ORANGE, "new weights"), (GREY, "no weights"), (WHITE, "data"))
    return canvas


def _draw_towers(canvas: Canvas) -> None:
    canvas.panel(0.4, BOTTOM, 7.3, TOP, "One encoder for both sides")
    towers = []
    for x, side, name in ((2.1, "A", "u"), (5.6, "B", "v")):
        text = canvas.box(x, 13.5, 2.9, 1.05, f"side {side}", f"prompt, answer {side}", color=WHITE)
        encoder = canvas.box(x, 11.75, 2.9, 0.9, "encoder", color=BLUE, bold=True)
        pool = canvas.box(x, 10.0, 2.9, 1.05, "mean pooling", "over real tokens")
        norm = canvas.box(x, 8.3, 2.9, 0.65, "LayerNorm", color=ORANGE)
        output = canvas.box(x, 6.8, 0.8, 0.6, f"${name}$", color=WHITE)
        canvas.arrow(text.bottom(), encoder.top(), label="(B, T)")
        canvas.arrow(encoder.bottom(), pool.top(), label="(B, T, H)")
        canvas.arrow(pool.bottom(), norm.top(), label="(B, H)")
        canvas.arrow(norm.bottom(), output.top(), label="(B, H)")
        towers.append((encoder, norm))
    for one, other in zip(*towers, strict=True):
        canvas.arrow(one.right(), other.left(), head=False, dashed=True)


def _draw_h(canvas: Canvas) -> None:
    canvas.panel(7.6, BOTTOM, 15.6, TOP, "Inside h(u, v): c and a")
    u = canvas.box(10.6, 13.5, 0.8, 0.6, "$u$", color=WHITE)
    v = canvas.box(12.6, 13.5, 0.8, 0.6, "$v$", color=WHITE)
    fusion = canvas.box(11.6, 11.75, 3.9, 0.9, "$[u;\\ v;\\ u - v;\\ u * v]$")
    hidden = canvas.box(11.6, 10.0, 3.9, 1.05, "Linear", "GELU, dropout", color=ORANGE)
    correction = canvas.box(9.9, 8.3, 2.3, 1.05, "Linear", "zero at first", color=ORANGE)
    output = canvas.box(13.3, 8.3, 2.3, 1.05, "Linear", "prior at first", color=ORANGE)
    c = canvas.box(9.9, 6.8, 2.9, 0.6, "$c$: correction", color=WHITE)
    a = canvas.box(13.3, 6.8, 2.9, 0.6, "$a$: auxiliary", color=WHITE)
    canvas.arrow(u.bottom(), fusion.top(-1), label="(B, H)")
    canvas.arrow(v.bottom(), fusion.top(1), label="(B, H)")
    canvas.arrow(fusion.bottom(), hidden.top(), label="(B, 4H)")
    canvas.arrow(hidden.bottom(correction.x - hidden.x), correction.top(), label=f"(B, {HEAD_WIDTH})")
    canvas.arrow(hidden.bottom(output.x - hidden.x), output.top(), label=f"(B, {HEAD_WIDTH})")
    canvas.arrow(correction.bottom(), c.top(), label=LOGITS)
    canvas.arrow(output.bottom(), a.top(), label=LOGITS)


def _draw_symmetric_head(canvas: Canvas) -> None:
    canvas.panel(0.4, 0.95, 15.6, 5.9, "Both orders, averaged: an exact swap, whatever the weights")
    upper, lower = 3.05, 1.75
    mean = canvas.box(9.55, (upper + lower) / 2, 1.3, 2.3, "mean")
    plus = canvas.circle(12.0, upper, "+")
    offset = canvas.box(12.0, 4.55, 4.0, 1.0, "offset $(m, {-}m, t)$", "the baseline's log-odds", color=WHITE)
    logits = canvas.box(14.3, upper, 2.1, 1.0, "logits", "A, B, tie", color=WHITE)
    auxiliary = canvas.box(14.05, lower, 2.6, 1.0, "auxiliary logits", "in training only", color=WHITE)
    for y, arguments, note in ((upper, "u, v", "as given"), (lower, "v, u", "A, B swapped")):
        inputs = canvas.box(1.9, y, 2.5, 1.0, f"${arguments}$", note, color=WHITE)
        h = canvas.box(4.25, y, 1.2, 1.0, "$h$", "same", color=ORANGE)
        canvas.arrow(inputs.right(), h.left())
        if y == upper:
            canvas.arrow(h.right(), mean.left(y - mean.y), label="$c, a$", at=0.12)
        else:
            swap = canvas.box(7.05, y, 2.4, 1.0, "$P$", "swaps A and B")
            canvas.arrow(h.right(), swap.left(), label="$c, a$")
            canvas.arrow(swap.right(), mean.left(y - mean.y))
    canvas.arrow(mean.right(upper - mean.y), plus.left(), label="$c$ " + LOGITS)
    canvas.arrow(offset.bottom(), plus.top(), label=LOGITS)
    canvas.arrow(plus.right(), logits.left())
    canvas.arrow(mean.right(lower - mean.y), auxiliary.left(), label="$a$ " + LOGITS)
