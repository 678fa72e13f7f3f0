"""Replaced-token detection: how ELECTRA (Clark et al. 2020) and DeBERTa-v3 (He et al. 2021) were pretrained."""

from figs.draw import BLUE, MUTED, PINK, WHITE, Canvas

ORIGINAL = ("people", "prefer", "the", "longer", "answer")
SAMPLED = {0: "people", 3: "shorter"}  # what the generator puts in the masked places: one is right by chance
COLUMNS = (4.15, 6.25, 8.35, 10.45, 12.55)


def draw() -> Canvas:
    """A sentence on its way: original, masked, filled by the generator, judged by the discriminator."""
    canvas = Canvas(13.15, "Replaced-token detection (ELECTRA, DeBERTa-v3)")
    masked = dict.fromkeys(SAMPLED, "[MASK]")
    rows = {
        "original": _draw_tokens(canvas, 11.35, dict(enumerate(ORIGINAL))),
        "masked": _draw_tokens(canvas, 10.1, dict(enumerate(ORIGINAL)) | masked, masked),
        "corrupted": _draw_tokens(canvas, 7.1, dict(enumerate(ORIGINAL)) | SAMPLED, SAMPLED),
    }
    replaced = [token != SAMPLED.get(place, token) for place, token in enumerate(ORIGINAL)]
    verdicts = {place: "replaced" if wrong else "original" for place, wrong in enumerate(replaced)}
    rows["target"] = _draw_tokens(canvas, 4.1, verdicts, {p: v for p, v in verdicts.items() if replaced[p]})
    for name, cells in rows.items():
        canvas.write(13.8, cells[0].y - 0.12, name, bold=True)
    x, width = COLUMNS[2], COLUMNS[4] - COLUMNS[0] + 1.95
    task = "smaller masked language model; loss on masked tokens"
    generator = canvas.box(x, 8.6, width, 1.05, "generator", task, color=BLUE)
    task = "original or replaced? loss on every token, times λ"
    discriminator = canvas.box(x, 5.6, width, 1.05, "discriminator", task, color=BLUE, bold=True)
    for place, x in enumerate(COLUMNS):
        shift = x - generator.x
        canvas.arrow(rows["original"][place].bottom(), rows["masked"][place].top())
        canvas.arrow(rows["masked"][place].bottom(), generator.top(shift))
        if place in SAMPLED:
            canvas.arrow(generator.bottom(shift), rows["corrupted"][place].top(), label="sample")
        canvas.arrow(rows["corrupted"][place].bottom(), discriminator.top(shift))
        canvas.arrow(discriminator.bottom(shift), rows["target"][place].top())
    embeddings = canvas.box(1.55, 7.1, 2.3, 1.05, "embeddings", "shared", color=BLUE)
    canvas.arrow(embeddings.top(), (embeddings.x, generator.y), generator.left())
    canvas.arrow(embeddings.bottom(), (embeddings.x, discriminator.y), discriminator.left())
    _draw_afterwards(canvas)
    canvas.key(0.4, (BLUE, "pretrained weights"), (WHITE, "data"), (PINK, "masked, sampled, replaced"))
    return canvas


def _draw_tokens(canvas: Canvas, y: float, tokens: dict[int, str], marked: dict[int, str] | None = None):
    return [
        canvas.box(x, y, 1.95, 0.62, tokens[place], color=PINK if place in (marked or {}) else WHITE)
        for place, x in enumerate(COLUMNS)
    ]


def _draw_afterwards(canvas: Canvas) -> None:
    canvas.panel(0.4, 0.95, 7.85, 3.35, "Then the generator is dropped")
    discriminator = canvas.box(2.15, 1.75, 3.0, 1.05, "discriminator", color=BLUE, bold=True)
    encoder = canvas.box(6.1, 1.75, 3.0, 1.05, "encoder", "fine-tuned here", color=BLUE, bold=True)
    canvas.arrow(discriminator.right(), encoder.left())
    canvas.panel(8.15, 0.95, 15.6, 3.35, "How embeddings are shared")
    for y, name, formula in (
        (2.2, "ELECTRA", "$E_D = E_G$"),
        (1.7, "DeBERTa-v3", "$E_D = \\mathrm{sg}(E_G) + E_\\Delta$"),
    ):
        canvas.write(8.4, y, name)
        canvas.write(11.0, y, formula)
    canvas.write(11.0, 1.22, "sg: no gradient passes", color=MUTED)
