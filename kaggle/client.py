"""Kaggle's own client, with the answers and the patience that the other modules here need.

Its class `KaggleApi` is called, not the program `kaggle`, which is a thin layer over the methods used here. The program
prints sentences where facts are needed (a status code, Retry-After, the number of a pushed version), ends with exit
code 0 after some failures, and its download writes files in place without comparing their length. Credentials are read
by that class, from where it always looks for them; what it prints is kept back, since with VERBOSE=1 it prints them.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import COMPETITION

SITE = "https://www.kaggle.com"
ENDED = ("complete", "error", "cancel_acknowledged")
SECONDS_TO_ANSWER = 120  # the client sets no limit: after a laptop's sleep it would wait forever
LONGEST_WAIT = 60  # seconds between two tries
TRIES = 30  # of one request that Kaggle answers with 429, too many requests
_send = requests.adapters.HTTPAdapter.send


def _send_with_limit(self, request, stream=False, timeout=None, **options):
    return _send(self, request, stream, timeout or SECONDS_TO_ANSWER, **options)


requests.adapters.HTTPAdapter.send = _send_with_limit


class Refused(UserError):
    """Kaggle's answer is an error; `code` is the HTTP status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Kaggle:
    """What is asked of Kaggle. Signs in at the first request.

    Attributes:
        patience: seconds for which a lost connection is tried again.
        left_there: what runs or lies on Kaggle because of this command; it is named when the command ends early.
    """

    def __init__(self):
        self.patience = 0.0
        self.left_there: str | None = None
        self._api = None

    def sign_in(self, owner: str) -> None:
        """Sign in, and make sure that the credentials are the owner's.

        Raises:
            UserError: there are none, they have expired, or they are somebody else's.
        """
        where = "Make a token at kaggle.com/settings (API) and put it where Kaggle's client looks: kaggle auth login."
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # without credentials the import alone prints a page
                from kaggle.api.kaggle_api_extended import KaggleApi

                self._api = KaggleApi()
                self.call("signing in", self._api.authenticate)
        except SystemExit:
            raise UserError(f"there are no Kaggle credentials here, or they have expired. {where}") from None
        user = self._api.config_values[KaggleApi.CONFIG_NAME_USER]
        if user.lower() != owner:
            raise UserError(f"OWNER={owner}, but the Kaggle credentials here are those of {user}. Correct one of them.")

    def call(self, what: str, function: Callable, *arguments, **options):
        """Call the client. Waits after 429 as Kaggle asks, and repeats a lost connection within `patience`.

        Raises:
            Refused: Kaggle answers with an error.
            UserError: Kaggle cannot be reached, or an upload broke off.
        """
        waited, attempt = 0.0, 0
        while True:
            printed = io.StringIO()
            errors = sys.stderr if sys.stderr.isatty() else io.StringIO()  # the client's upload bar
            try:
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                    answer = function(*arguments, **options)
            except (requests.RequestException, ValueError) as error:
                wait = _seconds_to_wait(what, error, attempt, waited < self.patience)
                waited, attempt = waited + wait, attempt + 1
                time.sleep(wait)
                continue
            if "Upload unsuccessful" in printed.getvalue():
                raise UserError(f"{what}: the upload broke off. Run the same command again to resume it.")
            return answer

    def hours_left(self) -> float | None:
        """GPU hours that this week's quota still has; None where Kaggle does not tell."""
        quota = self.call("the GPU quota", self._api.quota_view).gpu_quota
        if quota is None or quota.total_time_allowed is None:
            return None
        times = (quota.total_time_allowed, quota.time_used, quota.time_reserved)
        total, *used = (time.total_seconds() if time else 0.0 for time in times)
        return max(0.0, total - sum(used)) / 3600

    def data_set_status(self, name: str) -> str | None:
        """ "ready", "failed", or how far Kaggle is with it; None where there is no such data set."""
        try:
            return self.call(f"data set {name}", self._api.dataset_status, name)
        except Refused as error:
            if error.code in (403, 404):
                return None
            raise

    def upload_data_set(self, folder: Path, name: str, notes: str | None) -> None:
        """Create a data set, or, with `notes`, add a version to it."""
        options = {"quiet": False, "dir_mode": "zip"}
        if notes is None:
            answer = self.call(f"data set {name}", self._api.dataset_create_new, str(folder), **options)
        else:
            answer = self.call(f"data set {name}", self._api.dataset_create_version, str(folder), notes, **options)
        if answer.error:
            raise UserError(f"data set {name}: Kaggle answers {answer.error!r}. Nothing was started.")

    def push_kernel(self, folder: Path, kernel: str) -> int:
        """Push a kernel folder, which starts it; returns the number of the version.

        Raises:
            UserError: it is not started, or started without one of its inputs.
        """
        answer = self.call(f"kernel {kernel}", self._api.kernels_push, str(folder))
        if answer.error:
            raise UserError(f"kernel {kernel}: Kaggle answers {answer.error!r}. It was not started.")
        self.left_there = f"{kernel} was started on Kaggle and keeps running there: {page_of(kernel)}"
        missing = [*answer.invalid_dataset_sources, *answer.invalid_kernel_sources, *answer.invalid_competition_sources]
        if missing:
            raise UserError(
                f"kernel {kernel}: version {answer.version_number} was started without {', '.join(missing)}, which "
                f"Kaggle does not give it{_rules_hint(missing)}. Stop it on its page: {page_of(kernel)}"
            )
        return answer.version_number

    def kernel_status(self, kernel: str) -> tuple[str, str] | None:
        """("running", "") and the like of a kernel's last version, with the failure; None where there is none."""
        try:
            answer = self.call(f"kernel {kernel}", self._api.kernels_status, kernel)
        except Refused as error:
            if error.code in (403, 404):
                return None
            raise
        return answer.status.name.lower(), answer.failure_message

    def log_lines(self, kernel: str) -> Iterator[str]:
        """What a kernel's last version printed, from its start; of a running one until it ends.

        A broken connection ends it without an error: the caller asks again.
        """
        with contextlib.suppress(requests.RequestException, ValueError):
            for event in self._api.kernels_logs_stream(kernel):
                if event.get("stream_name") != "stderr" or "Error" in str(event.get("data")):
                    yield from str(event.get("data", "")).splitlines()

    def output_files(self, kernel: str) -> Iterator[tuple[str, str]]:
        """(name, address) of each file in a kernel's output, page by page."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        owner, slug = kernel.split("/")
        request = ApiListKernelSessionOutputRequest()
        request.user_name, request.kernel_slug, request.page_size = owner, slug, 100
        while True:
            with self._api.build_kaggle_client() as client:
                answer = self.call(f"output of {kernel}", client.kernels.kernels_api_client.list_kernel_session_output,
                                   request)  # fmt: skip
            yield from ((file.file_name, file.url) for file in answer.files or [])
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    def submit(self, kernel: str, version: int, message: str) -> int:
        """Submit a version of a kernel to the competition; returns the submission's number."""
        arguments = ("submission.csv", message, COMPETITION, kernel, version)
        return self.call("the submission", self._api.competition_submit_code, *arguments, quiet=True).ref

    def find_submission(self, number: int):
        """A submission as the client gives it (status, public_score, error_description), or None."""
        found = self.call("the list of submissions", self._api.competition_submissions, COMPETITION)
        return next((submission for submission in found or [] if submission.ref == number), None)


def page_of(kernel: str) -> str:
    """Address of a kernel's page."""
    return f"{SITE}/code/{kernel}"


def run_command(name: str, command: Callable[[Kaggle], int], come_back: str) -> int:
    """Run a command for its exit code; 2 after an error, 130 after Ctrl-C. Names what still runs on Kaggle."""
    kaggle = Kaggle()
    try:
        return command(kaggle)
    except UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    print(f"{name}: {message}", file=sys.stderr)
    if kaggle.left_there:
        print(f"{kaggle.left_there}\ncome back to it: {come_back}", file=sys.stderr)
    return code


def _seconds_to_wait(what: str, error: Exception, attempt: int, patient: bool) -> float:
    """How long to wait before the next try of a request; raises where another would not help."""
    response = getattr(error if isinstance(error, requests.RequestException) else error.__context__, "response", None)
    backoff = min(LONGEST_WAIT, 5 * 2**attempt)
    if response is None:
        if not isinstance(error, requests.RequestException):
            raise UserError(f"{what}: Kaggle's client refuses: {error}") from error
        if patient:
            return backoff
        raise UserError(
            f"{what}: Kaggle cannot be reached ({type(error).__name__}). Check the network, then run the same command "
            "again."
        ) from error
    if response.status_code == 429 and attempt < TRIES:
        told = response.headers.get("Retry-After", "")
        return float(told) if told.isdigit() else backoff
    if response.status_code >= 500 and patient:
        return backoff
    raise Refused(_refusal(what, response), response.status_code) from error


def _refusal(what: str, response: requests.Response) -> str:
    try:
        message = str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason or ""
    text = f"{what}: Kaggle answers {response.status_code}, {message.rstrip('.')!r}."
    if response.status_code == 401:
        return f"{text} Your credentials have expired or were revoked. Make a new token at kaggle.com/settings (API)."
    if response.status_code == 403:
        return f"{text} If you have not accepted the competition's rules: {SITE}/competitions/{COMPETITION}/rules"
    if response.status_code == 409:
        return f"{text} Something else of yours has that name. Rename or delete it on Kaggle, then run this again."
    return f"{text} Run the same command again later."


def _rules_hint(missing: list[str]) -> str:
    return f" (have you accepted the rules? {SITE}/competitions/{COMPETITION}/rules)" if COMPETITION in missing else ""
