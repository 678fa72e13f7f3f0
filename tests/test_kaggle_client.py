"""Kaggle's client as it is used here: credentials of every form, refusals, words that it does not know, patience."""

import json

import client
import pytest
from kaggle_stand_in import COMPLETE, KEY, OWNER, TOKEN, quota

from prefcls_lib.runtime.files import UserError

KERNEL = client.Kernel(OWNER, "02-roberta-base", 7)
OAUTH = {"refresh_token": "r", "access_token": "old", "username": OWNER,
         "access_token_expiration": "2999-01-01T00:00:00+00:00"}  # fmt: skip


@pytest.fixture
def kaggle(server, naps) -> client.Kaggle:
    """Signed in."""
    signed_in = client.Kaggle()
    signed_in.sign_in(OWNER)
    return signed_in


@pytest.fixture
def sign_in(server, tmp_path, monkeypatch):
    """sign_in(files, variables) -> the client, signed in with these credentials alone."""
    from kaggle.api.kaggle_api_extended import KaggleApi

    def run(files: dict[str, str], variables: dict[str, str]) -> client.Kaggle:
        for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
            monkeypatch.delenv(name)
        home = tmp_path / "home" / ".kaggle"
        monkeypatch.setattr(KaggleApi, "config", str(home / "kaggle.json"))
        for name, text in files.items():
            (home / name).write_text(text)
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        signed_in = client.Kaggle()
        signed_in.sign_in(OWNER)
        return signed_in

    return run


@pytest.mark.parametrize(
    ("files", "variables"),
    [({}, {"KAGGLE_API_TOKEN": TOKEN}),
     ({"access_token": TOKEN}, {}),
     ({"kaggle.json": json.dumps({"username": OWNER, "key": KEY})}, {}),
     ({"credentials.json": json.dumps(OAUTH)}, {}),
     ({"kaggle.json": json.dumps({"username": OWNER, "key": TOKEN})}, {"KAGGLE_API_TOKEN": TOKEN})],
)  # fmt: skip
def test_each_form_of_credentials_signs_in(sign_in, files, variables):
    """The variable, the file, the older key, `kaggle auth login`."""
    assert sign_in(files, variables).gpu_hours() == (30.0, 0.0)


@pytest.mark.parametrize(
    ("files", "variables", "words"),
    [({}, {}, ["there are no Kaggle credentials here", "access_token", ".venv/bin/kaggle auth login"]),
     ({}, {"KAGGLE_API_TOKEN": "KGAT_old"}, ["credentials in KAGGLE_API_TOKEN cannot be used", "Make a token"]),
     ({"access_token": "nonsense"}, {}, ["credentials in ~/.kaggle/access_token cannot be used"]),
     ({"kaggle.json": "{"}, {}, ["kaggle.json cannot be used"]),
     ({"kaggle.json": json.dumps({"key": TOKEN})}, {}, ["kaggle.json", "is an API token", "KAGGLE_API_TOKEN"]),
     ({"kaggle.json": json.dumps({"username": OWNER, "key": TOKEN})}, {}, ["is an API token", "access_token"]),
     ({"kaggle.json": json.dumps({"username": "somebody", "key": KEY})}, {}, ["those of somebody"])],
)  # fmt: skip
def test_credentials_of_a_wrong_form(sign_in, capfd, files, variables, words):
    """One message each, in place of the client's page of help."""
    with pytest.raises(UserError) as error:
        sign_in(files, variables)
    for word in words:
        assert word in str(error.value)
    assert capfd.readouterr().out == ""


def test_token_that_ends_during_a_wait_is_renewed_once(sign_in, server, tmp_path):
    """`kaggle auth login` gives one for twelve hours; the refresh token brings the next, once."""
    kaggle = sign_in({"credentials.json": json.dumps(OAUTH)}, {})
    refused = (401, {"message": "Unauthenticated"})
    server.script["GenerateAccessToken"] = [{"token": "new", "expiresIn": 3600}]
    server.script["GetKernelSessionStatus"] = [refused, COMPLETE]
    assert kaggle.kernel_status(KERNEL) == ("complete", "")
    assert json.loads((tmp_path / "home" / ".kaggle" / "credentials.json").read_text())["access_token"] == "new"
    server.script["GetKernelSessionStatus"] = [refused]
    with pytest.raises(client.Refused, match="expired"):
        kaggle.kernel_status(KERNEL)
    assert len(server.sent("GenerateAccessToken")) == 2


@pytest.mark.parametrize(("code", "known"), [(403, False), (404, False), (500, True)])
def test_what_kaggle_does_not_tell_is_not_the_end(kaggle, server, code, known):
    """403 and 404: no quota, no kernel; else an error. A new state, a KeyError in the client, is "unknown"."""
    answer = (code, {"message": "x"})
    server.script |= {"GetAcceleratorQuotaStatistics": [answer], "GetKernelSessionStatus": [answer]}
    for ask in (kaggle.gpu_hours, lambda: kaggle.kernel_status(KERNEL)):
        if known:
            with pytest.raises(client.Refused):
                ask()
        else:
            assert ask() is None
    server.script["GetAcceleratorQuotaStatistics"] = [quota(30, used=4.5, reserved=11.5)]
    assert kaggle.gpu_hours() == (14.0, 11.5)
    server.data_sets = {f"{OWNER}/prefcls-lib": 3}
    server.script |= {key: [{"status": "SOMETHING_NEW"}] for key in ("GetDatasetStatus", "GetKernelSessionStatus")}
    assert kaggle.data_set_state(f"{OWNER}/prefcls-lib") == ("unknown", 3)
    assert kaggle.kernel_status(KERNEL) == ("unknown", "")


def test_lost_connection_is_waited_out(kaggle, server, naps):
    """A kernel does not care about our network: with `patience` a request is tried again."""
    server.script["GetKernelSessionStatus"] = [(502, {"message": "bad gateway"}), (502, {"message": "x"}), COMPLETE]
    with pytest.raises(client.Refused):
        kaggle.kernel_status(KERNEL)
    kaggle.patience = 60.0
    assert kaggle.kernel_status(KERNEL) == ("complete", "")
    assert naps == [5]


def test_without_a_network(server, monkeypatch):
    """Without patience it ends at once; a server that does not answer is given up, the client would wait forever."""
    kaggle = client.Kaggle()
    kaggle.sign_in(OWNER)
    monkeypatch.setattr(client, "SECONDS_TO_ANSWER", 0.1)
    server.silent = True
    with pytest.raises(UserError, match=r"cannot be reached \(ReadTimeout\)"):
        kaggle.gpu_hours()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="Kaggle cannot be reached"):
        kaggle.gpu_hours()
