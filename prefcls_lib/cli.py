"""`prefcls ...` and `python -m prefcls_lib ...`: reads arguments, calls the rooms, prints."""

import argparse
import sys

from prefcls_lib import data
from prefcls_lib.config import RunConfig
from prefcls_lib.files import UserError, read_json
from prefcls_lib.schema import ID


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 when the user must put something right."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except UserError as error:
        print(f"prefcls: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefcls: interrupted. Folds that are done are kept; run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefcls", description="Predict which of two LLM answers people prefer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, validate, predict: from CSV to a checked submission")
    run.add_argument("--train", help='training CSV, "sample", or "competition" (default)')
    run.add_argument("--test", help='test CSV, "sample", or "competition" (default)')
    run.add_argument("--out", help="run folder")
    run.add_argument("--config", metavar="FILE.yaml", help="settings, one a line")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    run.set_defaults(command=_run)

    predict = commands.add_parser("predict", help="predict new rows with a finished run")
    predict.add_argument("--run", required=True, metavar="DIR", help="run folder")
    predict.add_argument("--test", required=True, help='test CSV or "sample"')
    predict.add_argument("--out", required=True, help="submission CSV to write")
    predict.set_defaults(command=_predict)

    check = commands.add_parser("check-submission", help="check a submission against the test rows")
    check.add_argument("file", metavar="FILE")
    check.add_argument("--test", required=True, help='test CSV or "sample"')
    check.set_defaults(command=_check_submission)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    overrides = dict(_key_value(text) for text in arguments.set)
    for name in ("train", "test", "out"):
        if getattr(arguments, name) is not None:
            overrides[name] = getattr(arguments, name)
    config = RunConfig.from_yaml(arguments.config, overrides)
    from prefcls_lib import pipeline, runs  # torch is loaded only where it is needed

    folder = pipeline.run(config)
    result = read_json(folder / "result.json")
    print(runs.result_table(result).to_string(float_format="{:.4f}".format))
    print(runs.verdict(result))
    print(f"submission: {folder / 'submission.csv'}")


def _predict(arguments: argparse.Namespace) -> None:
    from prefcls_lib import pipeline
    from prefcls_lib.runs import RunFolder
    from prefcls_lib.submission import write_submission

    rows = data.read_rows(pipeline.locate_csv(arguments.test, "test"), labelled=False)
    probs, _ = pipeline.predict_run(RunFolder(arguments.run), rows)
    write_submission(arguments.out, list(rows[ID]), probs)
    print(f"submission: {arguments.out} ({len(rows)} rows)")


def _check_submission(arguments: argparse.Namespace) -> None:
    from prefcls_lib.submission import check_submission

    path = data.sample_path("test") if arguments.test == "sample" else arguments.test
    rows = data.read_rows(path, labelled=False)
    check_submission(arguments.file, list(rows[ID]))
    print(f"{arguments.file}: a valid submission for {len(rows)} test rows")


def _key_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {text!r}: expected KEY=VALUE, for example --set max_length=256.")
    return key.strip(), value
