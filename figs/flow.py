"""The data's way through the library: one box for each package of `prefcls_lib`, and what passes between them."""

from figs.draw import BLUE, GREY, MUTED, WHITE, Canvas
from prefcls_lib.data.schema import NUM_CLASSES

LEFT, MIDDLE, RIGHT = 2.75, 8.0, 13.25
ROWS = (10.85, 9.1, 7.35, 5.45, 3.95)
PROBS = f"probs (N, {NUM_CLASSES})"


def draw() -> Canvas:
    """In the panel the packages of one run, below it those that read finished runs, and those that all others use."""
    canvas = Canvas(13.3, "The data's way through prefcls_lib")
    canvas.panel(0.4, 6.45, 15.6, 12.2, "pipeline: one run, step by step")
    canvas.panel(0.4, 0.95, 15.6, 3.15, "Around them")

    def place(x: float, row: int, name: str, note: str, color=GREY):
        return canvas.box(x, ROWS[row], 3.9, 1.05, name, note, color=color, bold=color != WHITE)

    files = place(LEFT, 0, "train.csv, test.csv", "rows with two answers", WHITE)
    data = place(LEFT, 1, "data", "folds, features, tokens")
    weights = place(LEFT, 2, "backbone", "a pretrained encoder", WHITE)
    baselines = place(MIDDLE, 0, "baselines", "words, lengths, lists")
    models = place(MIDDLE, 1, "models", "encoder and head", BLUE)
    training = place(MIDDLE, 2, "training", "steps, best weights")
    evaluation = place(RIGHT, 2, "evaluation", "log loss, intervals")
    folder = place(RIGHT, 3, "run folder", "submission.csv, model/", WHITE)
    ensemble = place(MIDDLE, 3, "ensemble", "several runs, blended")
    report = place(MIDDLE, 4, "report/", "tables and figures", WHITE)
    submission = place(LEFT, 3, "submission.csv", "of the blend, checked", WHITE)
    page = place(LEFT, 4, "report.html, .pdf", "one page to read", WHITE)
    around = (
        ("cli", "prefcls ..."),
        ("config", "every setting"),
        ("doctor", "checks the machine"),
        ("runtime", "files, devices"),
    )
    for number, (name, note) in enumerate(around):
        canvas.box(2.45 + 3.7 * number, 1.75, 3.3, 1.05, name, note, bold=True)

    canvas.arrow(files.bottom(), data.top())
    canvas.arrow(
        data.right(0.35), (5.1, data.y + 0.35), (5.1, baselines.y), baselines.left(), label="rows (N)", at=0.45
    )
    canvas.arrow(data.right(-0.1), models.left(-0.1), label="(S, T)")
    canvas.arrow(weights.right(), (5.55, weights.y), (5.55, models.y - 0.3), models.left(-0.3))
    canvas.arrow(baselines.bottom(), models.top(), label=f"offset (N, {NUM_CLASSES})")
    canvas.arrow(models.bottom(), training.top(), label=f"logits (B, {NUM_CLASSES})")
    canvas.arrow(training.right(), evaluation.left())
    canvas.arrow(baselines.right(), (evaluation.x, baselines.y), evaluation.top(), label=PROBS)
    canvas.arrow(evaluation.bottom(), folder.top())
    canvas.arrow(folder.left(), ensemble.right())
    canvas.arrow(folder.bottom(), (folder.x, report.y), report.right())
    canvas.arrow(ensemble.left(), submission.right())
    canvas.arrow(report.left(), page.right())
    canvas.key(0.4, (GREY, "package"), (BLUE, "package with pretrained weights"), (WHITE, "files"))
    canvas.write(15.55, 0.4, "N rows, B pairs, S sides, T tokens", align="right", color=MUTED)
    return canvas
