"""The transformer encoder that all backbones share: embeddings, N equal post-norm layers, hidden states."""

from itertools import pairwise

from figs.draw import BLUE, GREEN, WHITE, Canvas


def draw() -> Canvas:
    """Left the whole encoder, in the middle one layer, right where the backbones differ."""
    canvas = Canvas(13.0, "The transformer encoder of all backbones")
    _draw_encoder(canvas)
    _draw_layer(canvas)
    _draw_positions(canvas)
    canvas.key(0.4, (BLUE, "pretrained weights"), (GREEN, "position embeddings"), (WHITE, "data"))
    return canvas


def _draw_encoder(canvas: Canvas) -> None:
    canvas.panel(0.4, 0.95, 4.4, 11.8, "Encoder")
    ids = canvas.box(2.4, 10.45, 3.5, 0.65, "token ids", color=WHITE)
    sums = canvas.box(2.4, 8.95, 3.5, 0.8, "embeddings", color=BLUE)
    norm = canvas.box(2.4, 7.35, 3.5, 0.65, "LayerNorm", color=BLUE)
    notes = ("$N$ times, each with", "its own weights")
    layers = canvas.box(2.29, 4.55, 3.28, 2.0, "layer", *notes, color=BLUE, bold=True, copies=2)
    hidden = canvas.box(2.4, 1.7, 3.5, 0.65, "hidden states", color=WHITE)
    canvas.arrow(ids.bottom(), sums.top(), label="(B, T)")
    canvas.arrow(sums.bottom(), norm.top(), label="(B, T, H)")
    canvas.arrow(norm.bottom(), layers.top(0.11), label="(B, T, H)")
    canvas.arrow(layers.bottom(0.11), hidden.top(), label="(B, T, H)")


def _draw_layer(canvas: Canvas) -> None:
    canvas.panel(4.7, 0.95, 9.4, 11.8, "One layer (post-norm)")
    x, width = 6.75, 3.5
    before = canvas.box(x, 10.45, 1.2, 0.65, "$X$", color=WHITE)
    attention = canvas.box(x, 8.85, width, 1.05, "multi-head", "self-attention", color=BLUE)
    sum1 = canvas.circle(x, 7.6, "+")
    norm1 = canvas.box(x, 6.65, width, 0.65, "LayerNorm", color=BLUE)
    ffn = canvas.box(x, 5.05, width, 1.05, "feed-forward", "H → 4H → H, GELU", color=BLUE)
    sum2 = canvas.circle(x, 3.8, "+")
    norm2 = canvas.box(x, 2.85, width, 0.65, "LayerNorm", color=BLUE)
    after = canvas.box(x, 1.7, 1.2, 0.65, "$X'$", color=WHITE)
    column = [before, attention, sum1, norm1, ffn, sum2, norm2, after]
    for upper, lower in pairwise(column):
        canvas.arrow(upper.bottom(), lower.top())
    for fork, total in ((9.8, sum1), (6.0, sum2)):
        canvas.dot((x, fork))
        canvas.arrow((x, fork), (x + 2.2, fork), (x + 2.2, total.y), total.right())


def _draw_positions(canvas: Canvas) -> None:
    canvas.panel(9.7, 6.55, 15.6, 11.8, "In RoBERTa, ELECTRA")
    word = canvas.box(10.8, 10.25, 1.7, 1.05, "word", color=BLUE)
    position = canvas.box(12.65, 10.25, 1.7, 1.05, "position", "absolute", color=GREEN)
    segment = canvas.box(14.5, 10.25, 1.7, 1.05, "segment", "constant", color=BLUE)
    total = canvas.circle(position.x, 8.7, "+")
    norm = canvas.box(position.x, 7.3, 3.2, 0.65, "LayerNorm", color=BLUE)
    canvas.arrow(word.bottom(), (word.x, total.y), total.left())
    canvas.arrow(segment.bottom(), (segment.x, total.y), total.right())
    canvas.arrow(position.bottom(), total.top())
    canvas.arrow(total.bottom(), norm.top())
    canvas.panel(9.7, 0.95, 15.6, 6.25, "In DeBERTa-v3")
    word = canvas.box(11.2, 4.5, 2.5, 1.05, "word", color=BLUE)
    relative = canvas.box(14.1, 4.5, 2.5, 1.05, "position", "relative", color=GREEN)
    norm = canvas.box(11.2, 1.9, 2.5, 1.05, "LayerNorm", color=BLUE)
    attention = canvas.box(14.1, 1.9, 2.5, 1.05, "attention", "of every layer", color=BLUE)
    canvas.arrow(word.bottom(), norm.top())
    canvas.arrow(relative.bottom(), attention.top())
