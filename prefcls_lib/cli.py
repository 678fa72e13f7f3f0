"""`prefcls ...` and `python -m prefcls_lib ...`: reads arguments, calls the library, prints."""

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.convert import LICENCES, convert_files
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import check_submission, write_submission
from prefcls_lib.evaluation.compare import Comparison
from prefcls_lib.runtime.files import RESUME, UserError, printable, read_json, refuse_overwriting, shown


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 when the user must put something right; `doctor`: 1, not usable."""
    arguments, unknown = _parser().parse_known_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name of a file need not be text; workers write whole lines, in one call
            stream.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _refuse(arguments, unknown + [text for text in getattr(arguments, "set", []) if "=" not in text])
        return arguments.command(arguments) or 0
    except (UserError, OSError, UnicodeError) as error:  # the last two: of a name that no file can have, for example
        message, code = str(error), 2
    except KeyboardInterrupt as error:  # Ctrl-C, or SIGTERM with a message of where training stopped
        message, code = f"{str(error) or 'interrupted'}. {RESUME}", 143 if str(error) else 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"prefcls: {printable(message)}", file=sys.stderr)
    return code


def _interrupt(number: int, _: FrameType | None) -> None:
    """SIGTERM interrupts as Ctrl-C does; a second Ctrl-C does not interrupt what the first has begun."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt("stopped by SIGTERM" if number == signal.SIGTERM else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefcls", description="Predict which of two LLM answers people prefer.")
    parser.set_defaults(command=lambda _: parser.print_help(), prog=parser.prog)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, function: Callable, **options: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, allow_abbrev=False, **options)
        command.set_defaults(command=function, prog=command.prog)
        return command

    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--out", help="run folder")
    settings.add_argument("--config", metavar="FILE.yaml", help="file of settings, one `name: value` a line")
    settings.add_argument("--set", default=[], nargs="+", action="extend", metavar="KEY=VALUE", help="any settings")
    settings.add_argument("--train", help='training CSV, "sample", or "competition" (default)')
    settings.add_argument("--test", help='test CSV, "sample", or "competition" (default)')
    test = argparse.ArgumentParser(add_help=False)
    test.add_argument("--test", required=True, help='test CSV or "sample"')

    add("run", _run, help="train, validate, predict: from CSV to a checked submission", parents=[settings])
    add("ladder", partial(_run, network=False), help="the same with a baseline, without a network", parents=[settings])
    blend = add("blend", _blend, help="fit weights and a calibration of runs on their out-of-sample predictions")
    blend.add_argument("--runs", required=True, nargs="+", action="extend", type=Path, metavar="DIR", help="run folder")
    blend.add_argument("--out", required=True, type=Path, help="blend.json to write")
    predict = add("predict", _predict, help="predict new rows with a finished run or a blend", parents=[test])
    model = predict.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", dest="model", metavar="DIR", help="run folder")
    model.add_argument("--blend", dest="model", metavar="blend.json", help="what `prefcls blend` wrote")
    predict.add_argument("--out", required=True, help="submission CSV to write")
    check = add("check-submission", _check_submission, help="check a submission against the test rows", parents=[test])
    check.add_argument("file", metavar="FILE")
    convert = add("convert", _convert, help="public arena files (33k, 55k, 100k, 140k, WSDM) to a CSV for extra_train",
                  formatter_class=argparse.RawDescriptionHelpFormatter, epilog=LICENCES)  # fmt: skip
    convert.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Parquet or CSV, as published")
    convert.add_argument("--out", required=True, type=Path, help="CSV to write")
    convert.add_argument("--against", metavar="train.csv", help='leave out rows of this training file, or "sample"')
    doctor = add("doctor", _doctor, help="check this machine; exit code 0: usable, 1: not usable", parents=[settings])
    doctor.add_argument("--backbone", metavar="NAME", help="check this backbone, too, and memory and disk for it")

    fit = add("fit", _fit)  # what `run` starts in subprocesses
    fit.add_argument("--started-at", type=float, required=True)  # seconds since 1970, for the time budget
    fit.add_argument("run", type=Path)  # folder; --run would be torchrun's --run-path
    fit.add_argument("models", nargs="+")  # fold0, fold1-seed1, ...
    return parser


def _refuse(arguments: argparse.Namespace, unknown: list[str]) -> None:
    """A UserError where there are arguments that the command does not have: often settings, which need --set."""
    if unknown:
        name, value, *_ = "=".join([*unknown, "VALUE"]).lstrip("-").split("=")
        setting = f"If it is a setting, write --set {name.replace('-', '_')}={value}. " if "set" in arguments else ""
        raise UserError(f"{shown(unknown[0])}: unknown argument. {setting}See `{arguments.prog} --help`.")


def _config(arguments: argparse.Namespace) -> RunConfig:
    given = {name: value for name, value in vars(arguments).items() if hasattr(RunConfig, name) and value is not None}
    return RunConfig.from_yaml(arguments.config, dict(text.split("=", 1) for text in arguments.set) | given)


def _run(arguments: argparse.Namespace, network: bool = True) -> None:
    config = _config(arguments)
    from prefcls_lib.pipeline import results, steps  # torch is loaded only where it is needed

    folder = steps.run(config, network)
    result = read_json(folder / "result.json")
    print(results.result_table(result).to_string(float_format="{:.4f}".format), results.verdict(result), sep="\n")
    print(f"submission: {folder / 'submission.csv'}")


def _fit(arguments: argparse.Namespace) -> None:
    from prefcls_lib.pipeline import folds, job, launch

    launch.end_with_parent()
    names = launch.take_share(arguments.models)
    folds.train_models(job.load_job(arguments.run, arguments.started_at), names)


def _blend(arguments: argparse.Namespace) -> None:
    from prefcls_lib.ensemble import blend

    refuse_overwriting(arguments.out, *arguments.runs)
    result = blend.fit_runs(arguments.runs, arguments.out)
    print(blend.blend_table(result).to_string(float_format="{:.4f}".format))
    c = Comparison.from_dict(result["comparison"])
    print(f"blend {c.against(result['runs'][result['best_run']])}: log loss {c.describe()} on {c.rows} rows")
    print(f"temperature {result['temperature']:.3f}, tie bias {result['tie_bias']:+.3f}: {arguments.out}")


def _predict(arguments: argparse.Namespace) -> None:
    from prefcls_lib.ensemble import predictor

    test = loading.locate_csv(arguments.test, "test")
    refuse_overwriting(arguments.out, test, arguments.model)
    rows = loading.read_rows(test, labelled=False)
    write_submission(arguments.out, list(rows[ID]), predictor.load(arguments.model).predict_rows(rows, "predict"))
    print(f"submission: {arguments.out} ({len(rows)} rows)")


def _check_submission(arguments: argparse.Namespace) -> None:
    rows = loading.read_rows(loading.locate_csv(arguments.test, "test"), labelled=False)
    check_submission(arguments.file, list(rows[ID]))
    print(f"{arguments.file}: a valid submission for {len(rows)} test rows")


def _convert(arguments: argparse.Namespace) -> None:
    against = arguments.against and loading.locate_csv(arguments.against, "train")
    refuse_overwriting(arguments.out, *arguments.files, *filter(None, [against]))
    print(*convert_files(arguments.files, arguments.out, against), f"extra rows: {arguments.out}", sep="\n")


def _doctor(arguments: argparse.Namespace) -> int:
    from prefcls_lib.doctor import checks as doctor

    for_a_run = any(given for name, given in vars(arguments).items() if name not in ("command", "prog"))
    checks = doctor.examine(_config(arguments) if for_a_run else None)
    usable = all(check.state != "bad" for check in checks)
    print(doctor.format_checks(checks), "usable" if usable else "not usable as it is", sep="\n")
    return 0 if usable else 1
