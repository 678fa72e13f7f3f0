"""The data's way through the library: the picture of `prefcls_lib/__init__.py`, one box a room."""

from figs.draw import BLUE, GREY, WHITE, Canvas
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.schema import NUM_CLASSES

LEFT, MIDDLE, RIGHT = 2.75, 8.0, 13.45
ROWS = (10.75, 9.0, 7.25, 5.5, 3.75, 2.0)
PROBS = f"(N, {NUM_CLASSES})"


def draw() -> Canvas:
    """Left rows become numbers, in the middle the network, right the ladder and what leaves the library."""
    canvas = Canvas(12.65, "The data's way through prefcls_lib")
    canvas.panel(MIDDLE - 2.15, ROWS[5] - 0.74, MIDDLE + 2.15, ROWS[2] + 1.25, "The network")
    canvas.panel(RIGHT - 2.15, ROWS[2] - 0.74, RIGHT + 2.15, ROWS[1] + 1.25, "The ladder")

    def room(x: float, row: int, name: str, note: str, color=GREY):
        return canvas.box(x, ROWS[row], 3.8, 1.05, name, note, color=color, bold=color != WHITE)

    files = room(LEFT, 0, "train.csv, test.csv", "or the shipped sample", WHITE)
    data = room(LEFT, 1, "loading", "turns, labels, folds")
    tokenization = room(LEFT, 2, "tokenization", "within a token budget")
    features = room(LEFT, 3, "features", "shape of the answers")
    backbones = room(LEFT, 4, "backbones", "a name to weights", BLUE)
    batching = room(MIDDLE, 2, "batching", "length-sorted batches")
    model = room(MIDDLE, 3, "network", "encoder, head", BLUE)
    train = room(MIDDLE, 4, "loop, step", "best weights, history")
    predict = room(MIDDLE, 5, "predict", "each side once")
    rungs = room(RIGHT, 1, "estimators", "plain models")
    baselines = room(RIGHT, 2, "cross_validation", "on the same folds")
    metrics = room(RIGHT, 3, "metrics", "intervals, calibration")
    runs = room(RIGHT, 4, "folder", "writes the run folder")
    submission = room(RIGHT, 5, "submission", "writes submission.csv")

    canvas.arrow(files.bottom(), data.top())
    canvas.arrow(data.bottom(), tokenization.top(), label="rows (N)")
    canvas.arrow(data.left(), (0.5, data.y), (0.5, features.y), features.left())
    canvas.arrow(data.right(), rungs.left(), label="rows (N)")
    canvas.arrow(tokenization.right(), batching.left(), label="ids")
    canvas.arrow(features.right(), model.left(), label=f"(N, {len(FEATURE_NAMES)})")
    canvas.arrow(backbones.right(), (5.3, backbones.y), (5.3, model.y - 0.3), model.left(-0.3))
    canvas.arrow(batching.bottom(), model.top(), label="(S, T)")
    canvas.arrow(model.bottom(), train.top(), label=f"logits (B, {NUM_CLASSES})")
    canvas.arrow(train.bottom(), predict.top(), label="weights")
    canvas.arrow(predict.right(), submission.left())
    canvas.arrow((10.75, predict.y), (10.75, metrics.y), metrics.left(), label=PROBS, at=0.75)
    canvas.arrow(rungs.bottom(), baselines.top())
    canvas.arrow(baselines.bottom(), metrics.top(), label=PROBS)
    canvas.arrow(metrics.bottom(), runs.top())
    canvas.dot((10.75, predict.y))
    canvas.key(0.4, (GREY, "room of the library"), (BLUE, "room with pretrained weights"), (WHITE, "files"))
    return canvas
