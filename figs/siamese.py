"""The Siamese network as `prefcls_lib.model` builds it: two towers of one encoder, h, and the symmetric head."""

from figs.draw import BLUE, GREY, ORANGE, WHITE, Canvas
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.models.network import HEAD_WIDTH

FEATURES, LOGITS = f"(B, {len(FEATURE_NAMES)})", f"(B, {NUM_CLASSES})"


def draw() -> Canvas:
    """Left the towers, right the inside of h, below how h is used twice."""
    canvas = Canvas(14.05, "Siamese network with a symmetric head")
    _draw_towers(canvas)
    _draw_h(canvas)
    _draw_symmetric_head(canvas)
    canvas.key(0.4, (BLUE, "pretrained weights"), (ORANGE, "new weights"), (GREY, "no weights"), (WHITE, "data"))
    return canvas


def _draw_towers(canvas: Canvas) -> None:
    canvas.panel(0.4, 4.7, 7.3, 12.85, "One encoder for both sides")
    towers = []
    for x, side, name in ((2.1, "A", "u"), (5.6, "B", "v")):
        text = canvas.box(x, 11.4, 2.9, 1.05, f"side {side}", f"prompt, answer {side}", color=WHITE)
        encoder = canvas.box(x, 9.65, 2.9, 0.9, "encoder", color=BLUE, bold=True)
        pool = canvas.box(x, 7.97, 2.9, 1.05, "mean pooling", "over real tokens")
        norm = canvas.box(x, 6.5, 2.9, 0.65, "LayerNorm", color=ORANGE)
        output = canvas.box(x, 5.27, 0.8, 0.6, f"${name}$", color=WHITE)
        canvas.arrow(text.bottom(), encoder.top(), label="(B, T)")
        canvas.arrow(encoder.bottom(), pool.top(), label="(B, T, H)")
        canvas.arrow(pool.bottom(), norm.top(), label="(B, H)")
        canvas.arrow(norm.bottom(), output.top(), label="(B, H)")
        towers.append((encoder, norm))
    for one, other in zip(*towers, strict=True):
        canvas.arrow(one.right(), other.left(), head=False, dashed=True)


def _draw_h(canvas: Canvas) -> None:
    canvas.panel(7.6, 4.7, 15.6, 12.85, "Inside h(u, v, x)")
    u = canvas.box(8.9, 11.4, 0.8, 0.6, "$u$", color=WHITE)
    v = canvas.box(10.9, 11.4, 0.8, 0.6, "$v$", color=WHITE)
    x = canvas.box(13.8, 11.4, 2.96, 1.05, "$x$", "structure features", color=WHITE)
    fusion = canvas.box(9.9, 9.65, 3.8, 0.9, "$[u;\\ v;\\ u - v;\\ u * v;\\ x]$")
    hidden = canvas.box(9.9, 7.97, 3.8, 1.05, "Linear", "GELU, dropout", color=ORANGE)
    output = canvas.box(9.9, 6.5, 1.9, 0.65, "Linear", color=ORANGE)
    wide = canvas.box(13.8, 7.97, 2.96, 1.05, "Linear $W$", "wide path, no bias", color=ORANGE)
    total = canvas.circle(13.8, 6.5, "+")
    logits = canvas.box(13.8, 5.27, 2.96, 0.6, "$h(u, v, x)$", color=WHITE)
    canvas.arrow(u.bottom(), fusion.top(-1), label="(B, H)")
    canvas.arrow(v.bottom(), fusion.top(1), label="(B, H)")
    canvas.arrow(x.bottom(), wide.top(), label=FEATURES, at=0.25)
    canvas.arrow((x.x, fusion.y), fusion.right())
    canvas.dot((x.x, fusion.y))
    canvas.arrow(fusion.bottom(), hidden.top(), label=f"(B, 4H + {len(FEATURE_NAMES)})")
    canvas.arrow(hidden.bottom(), output.top(), label=f"(B, {HEAD_WIDTH})")
    canvas.arrow(output.right(), total.left(), label=LOGITS)
    canvas.arrow(wide.bottom(), total.top(), label=LOGITS)
    canvas.arrow(total.bottom(), logits.top(), label=LOGITS)


def _draw_symmetric_head(canvas: Canvas) -> None:
    canvas.panel(0.4, 0.95, 15.6, 4.4, "Both orders, averaged: an exact swap, whatever the weights")
    mean = canvas.box(11.4, 2.35, 1.4, 2.3, "mean")
    logits = canvas.box(14.25, 2.35, 2.06, 1.0, "logits", "A, B, tie", color=WHITE)
    for y, arguments, note in ((3.0, "u, v, x", "as given"), (1.7, "v, u, Px", "A, B swapped")):
        inputs = canvas.box(1.9, y, 2.5, 1.0, f"${arguments}$", note, color=WHITE)
        h = canvas.box(4.75, y, 1.6, 1.0, "$h$", "same", color=ORANGE)
        canvas.arrow(inputs.right(), h.left())
        if y > 2:
            canvas.arrow(h.right(), mean.left(y - mean.y), label=LOGITS, at=0.125)
        else:
            swap = canvas.box(8.2, y, 2.6, 1.0, "$P$", "swaps A and B")
            canvas.arrow(h.right(), swap.left(), label=LOGITS)
            canvas.arrow(swap.right(), mean.left(y - mean.y), label=LOGITS)
    canvas.arrow(mean.right(), logits.left(), label=LOGITS)
