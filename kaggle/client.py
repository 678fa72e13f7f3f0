"""Kaggle's own client, with the answers and the repeated tries that the other modules here need.

Its class `KaggleApi` is called, not the program `kaggle`, which prints sentences where facts are needed and ends with
exit code 0 after some failures. What the class prints is kept back: with VERBOSE=1 it prints credentials.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import layout
import requests

from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import COMPETITION

SITE = "https://www.kaggle.com"
RULES = f"{SITE}/competitions/{COMPETITION}/rules"
SETTINGS = f"{SITE}/settings"
ENDED = ("complete", "error", "cancel_acknowledged")
SECONDS_TO_ANSWER = 120  # the client sets no limit: after a laptop's sleep it would wait forever
LONGEST_WAIT = 60  # seconds between two tries
UNKNOWN = "unknown"  # a status that the client has no word for
LONGEST_QUEUE = 3600  # seconds for which a request is repeated that Kaggle answers with 429, too many requests
HOW_TO_SIGN_IN = (
    f"Make a token at {SETTINGS} (API) and put it into the variable KAGGLE_API_TOKEN or the file "
    "~/.kaggle/access_token; or run: .venv/bin/kaggle auth login"
)
_send = requests.adapters.HTTPAdapter.send


def _send_with_limit(self, request, stream=False, timeout=None, **options):
    return _send(self, request, stream, timeout or SECONDS_TO_ANSWER, **options)


requests.adapters.HTTPAdapter.send = _send_with_limit


class Refused(UserError):
    """Kaggle's answer is an error; `code` is the HTTP status, or 0 where the client does not know the answer."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Kernel:
    """A kernel, at one of its versions or (None) at its last; `name`: that of its folder in the bundle."""

    owner: str
    name: str
    version: int | None = None

    @property
    def slug(self) -> str:
        """Its name on Kaggle."""
        return layout.kernel_slug(self.name)

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{SITE}/code/{self.owner}/{self.slug}"

    def make(self, command: str) -> str:
        """The make command that does something with it."""
        return f"make kaggle-{command} OWNER={self.owner} NOTEBOOK={self.name}"

    def __str__(self) -> str:
        name = f"{self.owner}/{self.slug}"
        return name if self.version is None else f"version {self.version} of {name}"


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
        """Sign in, and make sure that the credentials are the owner's."""
        signed_in = True
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # without credentials the import alone prints a page
                from kaggle.api.kaggle_api_extended import AuthMethod, KaggleApi

                self._api = KaggleApi()
                self.call("signing in", self._api.authenticate)
        except SystemExit:
            signed_in = False
        values = self._api.config_values
        uses_key = not signed_in or values[KaggleApi.CONFIG_NAME_AUTH_METHOD] == str(AuthMethod.LEGACY_API_KEY)
        if uses_key and str(values.get(KaggleApi.CONFIG_NAME_KEY)).startswith("KGAT"):
            raise UserError(
                "the key in kaggle.json (or KAGGLE_KEY) is an API token, which belongs elsewhere. Put it into the "
                "variable KAGGLE_API_TOKEN or the file ~/.kaggle/access_token, and delete kaggle.json."
            )
        if not signed_in:
            places = ("KAGGLE_API_TOKEN", "~/.kaggle/access_token", KaggleApi.config, "~/.kaggle/credentials.json")
            found = [place for place in places if place in os.environ or Path(place).expanduser().is_file()]
            state = f"the credentials in {found[0]} cannot be used" if found else "there are no Kaggle credentials here"
            raise UserError(f"{state}. {HOW_TO_SIGN_IN}")
        user = values[KaggleApi.CONFIG_NAME_USER]
        if user.lower() != owner:
            raise UserError(f"OWNER={owner}, but the Kaggle credentials here are those of {user}. Correct one of them.")

    def call(self, what: str, function: Callable, *arguments, **options):
        """Call the client.

        Waits after 429 as Kaggle asks, repeats a lost connection within `patience`, and renews an OAuth token once.
        """
        waited, wait, renewed = 0.0, 5.0, False
        while True:
            printed = io.StringIO()
            errors = sys.stderr if sys.stderr.isatty() else io.StringIO()  # the client's upload bar
            try:
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                    answer = function(*arguments, **options)
            except KeyError as error:
                raise Refused(f"{what}: Kaggle's answer {error} is unknown to its client.", 0) from error
            except (requests.RequestException, ValueError) as error:
                lost = error if isinstance(error, requests.RequestException) else error.__context__
                response = getattr(lost, "response", None)
                code = 0 if response is None else response.status_code
                if code == 401 and not renewed and self._renew_token():
                    renewed = True
                    continue
                is_lost = isinstance(lost, requests.RequestException) and (code == 0 or code >= 500)
                if not (is_lost and waited < self.patience) and not (code == 429 and waited < LONGEST_QUEUE):
                    raise _refusal(what, error, response) from error
                told = response.headers.get("Retry-After", "") if code == 429 else ""
                seconds = float(told) if told.isdigit() else wait
                waited, wait = waited + seconds, min(LONGEST_WAIT, 2 * wait)
                time.sleep(seconds)
                continue
            if "Upload unsuccessful" in printed.getvalue():
                raise UserError(f"{what}: the upload broke off. Run the same command again to resume it.")
            return answer

    def gpu_hours(self) -> tuple[float, float] | None:
        """GPU hours of this week's quota that are left, and those that running kernels reserve; None if unknown."""
        quota = getattr(self._find("the GPU quota", self._api.quota_view), "gpu_quota", None)
        if quota is None or quota.total_time_allowed is None:
            return None
        times = (quota.total_time_allowed, quota.time_used, quota.time_reserved)
        total, used, reserved = (time.total_seconds() / 3600 if time else 0.0 for time in times)
        return max(0.0, total - used - reserved), reserved

    def data_set_state(self, name: str) -> tuple[str | None, int]:
        """("ready", 3): how far Kaggle is with a data set, and the number of its version; (None, 0): none there."""
        state = self._find(f"data set {name}", self._api.dataset_status, name)
        if state in (None, "deleted"):
            return state, 0
        answer = self.call(f"data set {name}", self._api.dataset_status, name, "json(current_version_number)")
        return state, json.loads(answer)["current_version_number"]

    def upload_data_set(self, folder: Path, name: str, notes: str | None) -> None:
        """Create a data set, or, with `notes`, add a version to it."""
        options = {"quiet": False, "dir_mode": "zip"}
        if notes is None:
            answer = self.call(f"data set {name}", self._api.dataset_create_new, str(folder), **options)
        else:
            answer = self.call(f"data set {name}", self._api.dataset_create_version, str(folder), notes, **options)
        if answer.error:
            raise UserError(f"data set {name}: Kaggle answers {answer.error!r}. Nothing was started.")

    def push_kernel(self, kernel: Kernel) -> Kernel:
        """Push a kernel of the bundle, which starts it; returns it with the number of the version."""
        answer = self.call(f"kernel {kernel}", self._api.kernels_push, str(layout.DIST / "kernels" / kernel.name))
        if answer.error:
            raise UserError(f"kernel {kernel}: Kaggle answers {answer.error!r}. It was not started.")
        pushed = replace(kernel, version=answer.version_number)
        self.left_there = f"{pushed} was started on Kaggle and keeps running there: {kernel.page}"
        missing = [*answer.invalid_dataset_sources, *answer.invalid_kernel_sources, *answer.invalid_competition_sources]
        if missing:
            rules = f" (have you accepted the rules? {RULES})" if COMPETITION in missing else ""
            raise UserError(
                f"{pushed} was started without {', '.join(missing)}, which Kaggle does not give it{rules}. Stop it on "
                f"its page: {kernel.page}"
            )
        print(f"{pushed} was started", flush=True)
        return pushed

    def kernel_status(self, kernel: Kernel) -> tuple[str, str] | None:
        """("running", "") and the like, with the failure; None where there is no such kernel or version."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest as Request

        answer = self._find(*self._request("get_kernel_session_status", Request, kernel))
        return (UNKNOWN, "") if answer == UNKNOWN else answer and (answer.status.name.lower(), answer.failure_message)

    def log_lines(self, kernel: Kernel) -> Iterator[str]:
        """What a kernel's last version printed, from its start; of a running one until it ends.

        A broken connection ends it without an error: the caller asks again.
        """
        with contextlib.suppress(requests.RequestException, ValueError):
            for event in self._api.kernels_logs_stream(f"{kernel.owner}/{kernel.slug}"):
                if event.get("stream_name") != "stderr" or "Error" in str(event.get("data")):
                    yield from str(event.get("data", "")).splitlines()

    def output_files(self, kernel: Kernel) -> dict[str, str]:
        """name -> address of each file in a kernel's output."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest as Request

        files, token = {}, ""
        while True:
            fields = {"page_size": 100, "page_token": token}
            answer = self.call(*self._request("list_kernel_session_output", Request, kernel, **fields))
            files |= {file.file_name: file.url for file in answer.files or []}
            if not (token := answer.next_page_token):
                return files

    def submit(self, kernel: Kernel, message: str) -> int:
        """Submit a version of a kernel to the competition; returns the submission's number."""
        arguments = ("submission.csv", message, COMPETITION, f"{kernel.owner}/{kernel.slug}", kernel.version)
        return self.call("the submission", self._api.competition_submit_code, *arguments, quiet=True).ref

    def find_submission(self, number: int):
        """A submission as the client gives it (status, public_score, error_description), or None."""
        found = self.call("the list of submissions", self._api.competition_submissions, COMPETITION)
        return next((submission for submission in found or [] if submission.ref == number), None)

    def _find(self, what: str, function: Callable, *arguments):
        """As `call`; None where Kaggle does not tell (403, 404), UNKNOWN where its client does not know the answer."""
        try:
            return self.call(what, function, *arguments)
        except Refused as error:
            if error.code in (403, 404):
                return None
            if error.code == 0:
                return UNKNOWN
            raise

    def _request(self, method: str, request_class: type, kernel: Kernel, **fields: object) -> tuple[str, Callable]:
        """A request about one version of a kernel, which the client's own methods cannot name, for `call`."""
        request = request_class()
        request.user_name, request.kernel_slug = kernel.owner, kernel.slug
        if kernel.version is not None:
            request.version_label = f"v{kernel.version}"
        for name, value in fields.items():
            setattr(request, name, value)

        def send():
            with self._api.build_kaggle_client() as client:
                return getattr(client.kernels.kernels_api_client, method)(request)

        return f"kernel {kernel}", send

    def _renew_token(self) -> bool:
        """A new access token of `kaggle auth login`; False where the credentials are others or have ended too."""
        from kaggle.api.kaggle_api_extended import AuthMethod, KaggleCredentials

        values = self._api.config_values
        if values.get(self._api.CONFIG_NAME_AUTH_METHOD) != str(AuthMethod.OAUTH):
            return False
        values.pop(self._api.CONFIG_NAME_TOKEN, None)  # the request for a new one must not carry the old one
        with contextlib.suppress(requests.RequestException), self._api.build_kaggle_client() as client:
            credentials = KaggleCredentials.load(client=client)
            credentials.refresh_access_token()
            values[self._api.CONFIG_NAME_TOKEN] = credentials.get_access_token()
            return True
        return False


def run_command(command: Callable[[Kaggle], int], come_back: str = "") -> int:
    """Run a command for its exit code; 2 after an error, 130 after Ctrl-C. Names what still runs on Kaggle."""
    kaggle = Kaggle()
    try:
        return command(kaggle)
    except UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    print(f"kaggle: {message}", file=sys.stderr)
    if kaggle.left_there:
        print(f"{kaggle.left_there}\ncome back to it: {come_back}", file=sys.stderr)
    return code


def _refusal(what: str, error: Exception, response: requests.Response | None) -> UserError:
    """What to say of an error after which a request is not tried again."""
    if response is None and isinstance(error, requests.RequestException):
        reason = f"Kaggle cannot be reached ({type(error).__name__})"
        return UserError(f"{what}: {reason}. Check the network, then run the same command again.")
    if response is None:
        return UserError(f"{what}: Kaggle's client refuses: {error}")
    try:
        message = str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason or ""
    advice = {
        401: f"Your credentials have expired, were revoked, or belong elsewhere. {HOW_TO_SIGN_IN}",
        403: f"Causes: the account's phone is not verified, which a new account needs ({SETTINGS}/phone); the "
        f"competition's rules are not accepted ({RULES}); or the token has expired or lacks the right ({SETTINGS}).",
        409: "Something else of yours has that name. Rename or delete it on Kaggle, then run this again.",
    }.get(response.status_code, "Run the same command again later.")
    told = f"{what}: Kaggle answers {response.status_code}, {message.rstrip('.')!r}. {advice}"
    return Refused(told, response.status_code)
