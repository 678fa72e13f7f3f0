"""Imported first by every Python of a rehearsal: no network but loopback, and no installed prefcls_lib."""

import socket
import sys


def _is_local(host: object) -> bool:
    return host in (None, "", "localhost", socket.gethostname()) or str(host).startswith(("127.", "::1"))


def _guard(name: str) -> None:
    function = getattr(socket.socket, name)

    def guarded(self, address, *more):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise OSError(f"a rehearsal has no network: {address[0]}")
        return function(self, address, *more)

    setattr(socket.socket, name, guarded)


for _name in ("connect", "connect_ex"):
    _guard(_name)
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
